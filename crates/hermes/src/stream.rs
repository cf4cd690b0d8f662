//! A layer read once, in order, wherever its image lies, and what is learnt from it on the way.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use artifacts::{ImageLayer, IndexOrigin, IndexStore, Origin, StoreIndexError, StoredIndex};
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use index::{BuildError, LayerIndex, LayerIndexer};
use oci::LayerCompression;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use ztoc::{IndexError, IndexerOptions, SpanOptions};

use crate::failure::{Exit, Failure};

/// A way for the pieces of a layer from [`send`] to whoever takes them; few enough of them are on
/// it to bound the memory they take.
pub(crate) fn pieces() -> (Sender<Bytes>, Receiver<Bytes>) {
    channel(PIECES_IN_FLIGHT)
}

/// Reads a range of a layer's blob; a transfer that breaks off is taken up where it broke. `progress`
/// is told the bytes as they come.
///
/// When the receiver is gone it ends early and without an error: whoever dropped it knows why.
pub(crate) async fn send(
    origin: &Origin,
    layer: &ImageLayer,
    range: Range<u64>,
    sender: Sender<Bytes>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let (mut at, mut failures) = (range.start, 0);
    while at < range.end {
        let result: Result<(), registry::FetchError> = async {
            let mut stream = origin.stream(&layer.digest, at..range.end).await?;
            while let Some(piece) = stream.next().await? {
                at += piece.len() as u64;
                progress(piece.len() as u64);
                if sender.send(piece).await.is_err() {
                    at = range.end;
                    return Ok(());
                }
                failures = 0;
            }
            Ok(())
        }
        .await;
        match result {
            Ok(()) if at < range.end => failures += 1,
            Ok(()) => {}
            Err(err) if err.is_transient() && failures < MOST_FAILURES => {
                failures += 1;
                tracing::warn!(layer = %layer.digest, at, error = %err, "transfer broke off");
                let pause = Duration::from_millis(200 << failures.min(5));
                tokio::time::sleep(err.retry_after().unwrap_or(pause)).await;
            }
            Err(err) => {
                let context =
                    format!("fetching layer {} (at byte {at} of {})", layer.digest, layer.size);
                return Err(err).context(context);
            }
        }
        if failures >= MOST_FAILURES {
            bail!(
                "layer {} broke off {failures} times at byte {at} of {}",
                layer.digest,
                layer.size
            );
        }
    }
    Ok(())
}

/// As [`send`] of a whole layer, over several connections at once where its server gives ranges: one alone
/// is as fast as its window and its round trips let it be, and stores of objects limit it besides. What
/// comes ahead of its turn waits in memory.
async fn send_in_parts(
    origin: &Origin,
    layer: &ImageLayer,
    sender: Sender<Bytes>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let (told, mut handed_on) = (AtomicU64::new(0), 0);
    let tell = |bytes| {
        told.fetch_add(bytes, Ordering::Relaxed);
        progress(bytes);
    };
    let places = Semaphore::new(PARTS_AHEAD);
    let fetch = async |part| {
        let place = places.acquire().await.context("waiting for a place in memory")?;
        anyhow::Ok((part_of(origin, layer, part, &tell).await?, place))
    };
    let mut parts = futures_util::stream::iter(parts(layer.size).map(fetch)).buffered(PARTS_AHEAD);
    let (mut waiting, mut are_more) = (VecDeque::new(), true);
    // Whether it gives them, the first part shows. Without them each would cost all that is before it.
    while origin.gives_ranges() {
        // The other parts come on while a piece of this one waits to be taken.
        tokio::select! {
            biased;
            taken = sender.reserve(), if !waiting.is_empty() => {
                let Ok(taken) = taken else { return Ok(()) };
                if let Some((piece, _place)) = waiting.pop_front() {
                    handed_on += Bytes::len(&piece) as u64;
                    taken.send(piece);
                }
            }
            part = parts.try_next(), if are_more => match part? {
                // The last piece gives the place up.
                Some((pieces, place)) => {
                    let place = Arc::new(place);
                    waiting.extend(pieces.into_iter().map(|piece| (piece, Arc::clone(&place))));
                }
                None => are_more = false,
            },
            else => break,
        }
    }
    drop((parts, waiting));
    // What was told of parts that nobody gets counts for the same bytes now.
    let told = AtomicU64::new(told.into_inner() - handed_on);
    let tell = |bytes| {
        let known = told.load(Ordering::Relaxed).min(bytes);
        told.fetch_sub(known, Ordering::Relaxed);
        progress(bytes - known);
    };
    send(origin, layer, handed_on..layer.size, sender, &tell).await
}

async fn part_of(
    origin: &Origin,
    layer: &ImageLayer,
    part: Range<u64>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Bytes>> {
    let (sender, mut arriving) = pieces();
    let collect = async {
        let mut pieces = Vec::new();
        while let Some(piece) = arriving.recv().await {
            pieces.push(piece);
        }
        pieces
    };
    let (sent, pieces) = tokio::join!(send(origin, layer, part, sender, progress), collect);
    sent.map(|()| pieces)
}

/// What a blob of this size is cut into.
fn parts(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size.div_ceil(PART)).map(move |n| n * PART..size.min((n + 1) * PART))
}

/// How a layer is indexed for everybody: with short spans, so that a read waits for few bytes, and from the
/// same pass as SOCI has it.
pub(crate) fn build_options(layer: &ImageLayer, soci: SpanOptions) -> IndexerOptions {
    let short = short_span(layer, MOST_SHORT_SPANS);
    let SpanOptions { span_size, sparse_windows } = soci;
    let options = whole_layer_options(layer);
    if layer.compression != LayerCompression::Gzip || span_size <= short {
        return IndexerOptions { span_size, sparse_windows, ..options };
    }
    IndexerOptions { span_size: short, sparse_windows: true, also: Some(soci), ..options }
}

/// How a layer is indexed that this machine receives whole: only what is given up of it is ever read by its
/// spans again.
pub(crate) fn received_options(layer: &ImageLayer) -> IndexerOptions {
    let options = whole_layer_options(layer);
    if layer.compression != LayerCompression::Gzip {
        return options;
    }
    let span_size = short_span(layer, MOST_RECEIVED_SPANS);
    IndexerOptions { span_size, sparse_windows: true, ..options }
}

fn whole_layer_options(layer: &ImageLayer) -> IndexerOptions {
    // A small layer is done before a thread is there.
    let digests_aside = layer.size > SHORT_SPAN;
    IndexerOptions { digests_aside, ..IndexerOptions::default() }
}

/// A window of 32 KiB is in memory for each span until the index is written.
fn short_span(layer: &ImageLayer, most: u64) -> u64 {
    (layer.size / most).clamp(SHORT_SPAN, SHORT_SPAN * 4)
}

/// Stores what a pass over `layer` found, under the layer's digest.
pub(crate) fn save(
    built: LayerIndex,
    layer: &ImageLayer,
    indexes: &IndexStore,
) -> Result<StoredIndex, StoreIndexError> {
    // The table of contents is read back from the document: two of them would be in memory.
    let LayerIndex { ztoc_bytes: bytes, also, is_streamed, .. } = built;
    let digest = &layer.digest;
    match also {
        _ if is_streamed => indexes.save_streamed(digest, &bytes, IndexOrigin::Built),
        Some(soci) => indexes.save_both(digest, layer.size, &bytes, soci),
        None => indexes.save_built(digest, layer.size, &bytes),
    }
}

/// Takes all pieces that come, to the last, and checks what they were.
fn take_all(
    mut indexer: LayerIndexer,
    layer: &ImageLayer,
    mut pieces: Receiver<Bytes>,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<LayerIndex> {
    while let Some(piece) = pieces.blocking_recv() {
        let mut taken = Ok(());
        let pushed = indexer.push(&piece, &mut |bytes| {
            if taken.is_ok() {
                taken = sink(bytes);
            }
        });
        pushed.map_err(|err| unreadable(layer, err))?;
        taken.with_context(|| format!("taking in layer {}", layer.digest))?;
    }
    indexer.finish().map_err(|err| unreadable(layer, err))
}

/// Bytes that are no layer are corrupt; a full disk or a layer beyond our limits is not.
fn unreadable(layer: &ImageLayer, err: BuildError) -> anyhow::Error {
    let corrupt = match &err {
        BuildError::Zstd(_) => true,
        BuildError::Index(index) => matches!(
            index,
            IndexError::Inflate { .. } | IndexError::Truncated { .. } | IndexError::Tar(_)
        ),
        BuildError::Read(_) => false,
    };
    let what = format!("layer {} cannot be read", layer.digest);
    let err = anyhow::Error::from(err);
    if corrupt {
        let message = format!("{what}: {}", crate::failure::in_full(&err));
        return Failure { exit: Exit::Corrupt, message }.into();
    }
    err.context(what)
}

/// Reads a whole layer and indexes it; `sink` gets what it unpacks to, on a thread that may block.
/// The layer is what its digest and its DiffID promise, or this fails with [`Exit::Corrupt`].
pub(crate) async fn index_layer(
    origin: &Origin,
    layer: &ImageLayer,
    options: IndexerOptions,
    mut sink: impl FnMut(&[u8]) -> Result<()> + Send + 'static,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<LayerIndex> {
    let (sender, pieces) = pieces();
    let wanted = layer.clone();
    let build = tokio::task::spawn_blocking(move || {
        let indexer = LayerIndexer::new(wanted.compression, options)?;
        take_all(indexer, &wanted, pieces, &mut sink)
    });
    let sent = send_in_parts(origin, layer, sender, progress).await;
    let built = build.await.context("indexing a layer")?;
    // What the sender met comes first: the builder then only saw a layer that was cut short.
    sent?;
    let built = built?;
    check(layer, &built)?;
    Ok(built)
}

fn check(layer: &ImageLayer, built: &LayerIndex) -> Result<()> {
    let wrong = |message: String| Err(Failure { exit: Exit::Corrupt, message }.into());
    if built.layer_digest != layer.digest {
        return wrong(format!(
            "layer {} came with the content of {}",
            layer.digest, built.layer_digest
        ));
    }
    if built.diff_id != layer.diff_id {
        let (found, expected) = (built.diff_id, layer.diff_id);
        return wrong(format!(
            "layer {} unpacks to {found}, the image's configuration promises {expected}",
            layer.digest
        ));
    }
    Ok(())
}

/// After how many bytes of the tar a span of our own begins, at least.
const SHORT_SPAN: u64 = 1 << 20;

/// Layers that would have more of them, were each as long in the blob as in the tar, have longer ones.
const MOST_SHORT_SPANS: u64 = 4096;

/// The same where a node's daemon pays for it with its memory.
const MOST_RECEIVED_SPANS: u64 = 512;

const PIECES_IN_FLIGHT: usize = 16;

/// Bytes of a request, where there are several. Long enough that what it takes to ask is little beside it.
const PART: u64 = 4 << 20;

/// How many parts of a layer are under way or waiting for their turn.
const PARTS_AHEAD: usize = 4;

const MOST_FAILURES: u32 = 10;

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use artifacts::ImageName;
    use testkit::registry::{Fault, Options, Registry, RequestLog, Scope, Times};

    use super::*;
    use crate::protocol::Access;

    /// What came of a layer, of how many bytes the progress was told, and what the registry was asked. The
    /// first piece is taken when the progress was told of `first` bytes.
    async fn received(
        (size, first): (u64, u64),
        spoil: impl FnOnce(&Registry),
        told: impl Fn(&Registry, u64) + Sync,
    ) -> (Vec<u8>, u64, Vec<RequestLog>) {
        let registry = Registry::start(Options::default()).unwrap();
        let digest = registry.put_blob(content(size));
        spoil(&registry);
        let name = format!("{}/some/image:1", registry.reference_prefix());
        let access =
            Access { hosts_dir: "/dev/null/none".into(), docker_config: None, kubelet: false };
        let client = crate::registries::client(&access);
        let origin = Origin::open(&name.parse::<ImageName>().unwrap(), &client).unwrap();
        let layer = ImageLayer {
            digest,
            size,
            media_type: String::new(),
            compression: LayerCompression::None,
            diff_id: digest,
        };
        let (sender, mut arriving) = pieces();
        let (total, mut is_told) = tokio::sync::watch::channel(0);
        let tell = |bytes| {
            total.send_modify(|total| *total += bytes);
            let so_far = *total.borrow();
            told(&registry, so_far);
        };
        let take = async {
            is_told.wait_for(|total| *total >= first).await.unwrap();
            let mut taken = Vec::new();
            while let Some(piece) = arriving.recv().await {
                taken.extend_from_slice(&piece);
            }
            taken
        };
        let both = async { tokio::join!(send_in_parts(&origin, &layer, sender, &tell), take) };
        let (sent, taken) = tokio::time::timeout(PATIENCE, both).await.expect("it goes on");
        sent.unwrap();
        let total = *total.borrow();
        (taken, total, registry.requests())
    }

    fn content(size: u64) -> &'static [u8] {
        static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let word = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            (0..6 * PART / 8).flat_map(word).collect()
        });
        &CONTENT[..usize::try_from(size).unwrap()]
    }

    #[tokio::test]
    async fn a_layer_comes_in_parts_whatever_breaks_off() {
        let often = |fault| {
            move |registry: &Registry| {
                let times = Times::Pattern(vec![false, true]);
                registry.faults().inject(Scope::Blobs, times, fault);
            }
        };
        let check = async |size: u64, spoil: &dyn Fn(&Registry), n_asked: Range<usize>| {
            let (taken, told, asked) = received((size, 0), spoil, |_, _| {}).await;
            assert!(taken == content(size), "{size} bytes are not right");
            assert_eq!(told, size);
            let asked: Vec<_> = asked.iter().filter(|request| request.is_blob()).collect();
            assert!(n_asked.contains(&asked.len()), "{} of {n_asked:?} requests", asked.len());
        };
        let whole = |_: &Registry| {};
        check(1, &whole, 1..2).await;
        check(PART, &whole, 1..2).await;
        check(PART + 1, &whole, 2..3).await;
        check(6 * PART - 1, &whole, 6..7).await;
        check(6 * PART, &often(Fault::Truncate { after: 1 << 20 }), 8..30).await;
        check(6 * PART, &often(Fault::ResetBody { after: 3 << 20 }), 8..30).await;
        // Those that were under way when it was seen, and the rest in one piece.
        let ignore = |registry: &Registry| registry.faults().ignore_ranges(true);
        check(6 * PART, &ignore, 2..PARTS_AHEAD + 3).await;
    }

    #[tokio::test]
    async fn parts_are_under_way_at_once() {
        let stall = |registry: &Registry| {
            let stall = Fault::Stall { after: 0 };
            registry.faults().inject(Scope::Blobs, Times::Next(1), stall);
        };
        // One after the other, nothing would come before the one that is stalled.
        let release = |registry: &Registry, told: u64| {
            if told == (PARTS_AHEAD as u64 - 1) * PART {
                registry.faults().release_stalled();
            }
        };
        let (taken, ..) = received((6 * PART, 0), stall, release).await;
        assert!(taken == content(6 * PART));
    }

    #[tokio::test]
    async fn parts_come_on_while_nobody_takes_the_first() {
        let stall = |registry: &Registry| {
            let stall = Fault::Stall { after: 1 << 20 };
            let second = Times::Pattern(vec![false, true, false, false, false, false, false]);
            registry.faults().inject(Scope::Blobs, second, stall);
        };
        let others = (PARTS_AHEAD as u64 - 1) * PART;
        let release = |registry: &Registry, told: u64| {
            if told == others + (1 << 20) {
                registry.faults().release_stalled();
            }
        };
        let all = PARTS_AHEAD as u64 * PART;
        let (taken, ..) = received((6 * PART, all), stall, release).await;
        assert!(taken == content(6 * PART));
    }

    const PATIENCE: Duration = Duration::from_mins(1);
}

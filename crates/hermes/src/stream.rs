//! A layer read once, in order, wherever its image lies, and what is learnt from it on the way.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use artifacts::{ImageLayer, IndexOrigin, IndexStore, Origin, StoreIndexError, StoredIndex};
use bytes::Bytes;
use index::{BuildError, BuildOptions, LayerIndex, LayerIndexer};
use oci::LayerCompression;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use ztoc::{IndexError, SpanOptions};

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

/// How a layer is indexed: for this machine with short spans, so that a read waits for few bytes, and
/// from the same pass as SOCI has it, for everybody.
pub(crate) fn build_options(layer: &ImageLayer, soci: SpanOptions) -> BuildOptions {
    // A window of 32 KiB is in memory for each span until the index is written.
    let short = (layer.size / MOST_SHORT_SPANS).clamp(SHORT_SPAN, SHORT_SPAN * 4);
    let SpanOptions { span_size, sparse_windows } = soci;
    if layer.compression != LayerCompression::Gzip || span_size <= short {
        return BuildOptions { span_size, sparse_windows, ..BuildOptions::default() };
    }
    BuildOptions {
        span_size: short,
        sparse_windows: true,
        also: Some(soci),
        ..BuildOptions::default()
    }
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
        None => indexes.save(digest, layer.size, &bytes, IndexOrigin::Built),
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
    options: BuildOptions,
    mut sink: impl FnMut(&[u8]) -> Result<()> + Send + 'static,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<LayerIndex> {
    let (sender, pieces) = pieces();
    let wanted = layer.clone();
    let build = tokio::task::spawn_blocking(move || {
        let indexer = LayerIndexer::new(wanted.compression, options)?;
        take_all(indexer, &wanted, pieces, &mut sink)
    });
    let sent = send(origin, layer, 0..layer.size, sender, progress).await;
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
const MOST_SHORT_SPANS: u64 = 512;

const PIECES_IN_FLIGHT: usize = 16;
const MOST_FAILURES: u32 = 10;

//! A layer read once, in order, wherever its image lies, and what is learnt from it on the way.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use artifacts::{ImageLayer, IndexOrigin, IndexStore, Origin, StoreIndexError, StoredIndex};
use bytes::Bytes;
use index::{BuildError, BuildOptions, LayerIndex, LayerIndexer};
use oci::LayerCompression;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use ztoc::{Compression, IndexError, Indexer, IndexerOptions};

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

/// What one pass over a layer told.
#[derive(Debug)]
pub(crate) struct Indexed {
    pub(crate) layer: LayerIndex,
    /// Of a layer that can only be read from its beginning, a zTOC of its uncompressed tar.
    pub(crate) streamed: Option<Vec<u8>>,
}

impl Indexed {
    /// Stores the index under the layer's digest.
    pub(crate) fn save(
        &self,
        layer: &ImageLayer,
        indexes: &IndexStore,
    ) -> Result<StoredIndex, StoreIndexError> {
        match (&self.streamed, &self.layer.ztoc) {
            (Some(streamed), _) => indexes.save_streamed(&layer.digest, streamed),
            (None, Some((_, ztoc))) => {
                indexes.save(&layer.digest, layer.size, ztoc, IndexOrigin::Built)
            }
            (None, None) => Err(StoreIndexError::Unusable {
                layer: layer.digest,
                why: "the pass over the layer made none".to_owned(),
            }),
        }
    }
}

/// A layer being indexed, whatever its compression.
#[derive(Debug)]
pub(crate) struct Indexing {
    indexer: LayerIndexer,
    /// Of a layer whose compression has no checkpoints, the index of its uncompressed tar.
    plain: Option<Indexer>,
}

impl Indexing {
    pub(crate) fn new(compression: LayerCompression, options: BuildOptions) -> Result<Self> {
        let plain = match compression {
            LayerCompression::Gzip | LayerCompression::None => None,
            LayerCompression::Zstd => Some(Indexer::new(IndexerOptions {
                compression: Compression::Uncompressed,
                span_size: options.span_size,
                ..IndexerOptions::default()
            })?),
        };
        Ok(Self { indexer: LayerIndexer::new(compression, options)?, plain })
    }

    /// Takes the next bytes of the layer; `sink` gets what they unpack to.
    pub(crate) fn push(
        &mut self,
        piece: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Self { indexer, plain } = self;
        let mut failed: Option<anyhow::Error> = None;
        indexer.push(piece, &mut |bytes| {
            if failed.is_some() {
                return;
            }
            let indexed = plain.as_mut().map_or(Ok(()), |plain| plain.push(bytes, &mut |_| {}));
            failed = indexed.map_err(anyhow::Error::from).and_then(|()| sink(bytes)).err();
        })?;
        failed.map_or(Ok(()), Err)
    }

    /// Takes all pieces that come, to the last, and checks what they were.
    pub(crate) fn take_all(
        mut self,
        layer: &ImageLayer,
        mut pieces: Receiver<Bytes>,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Indexed> {
        let unreadable = |err: anyhow::Error| unreadable(layer, err);
        while let Some(piece) = pieces.blocking_recv() {
            self.push(&piece, sink).map_err(unreadable)?;
        }
        let built = self.indexer.finish().map_err(|err| unreadable(err.into()))?;
        let plain =
            self.plain.map(Indexer::finish).transpose().map_err(|err| unreadable(err.into()))?;
        Ok(Indexed { layer: built, streamed: plain.map(|plain| plain.ztoc_bytes) })
    }
}

/// Bytes that are no layer are corrupt; a full disk or a layer beyond our limits is not.
fn unreadable(layer: &ImageLayer, err: anyhow::Error) -> anyhow::Error {
    let corrupt = match err.downcast_ref::<BuildError>() {
        Some(BuildError::Zstd { .. }) => true,
        Some(BuildError::Index(index)) => matches!(
            index,
            IndexError::Inflate { .. } | IndexError::Truncated { .. } | IndexError::Tar(_)
        ),
        Some(BuildError::Read(_)) | None => false,
    };
    let what = format!("layer {} cannot be read", layer.digest);
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
) -> Result<Indexed> {
    let (sender, pieces) = pieces();
    let wanted = layer.clone();
    let build = tokio::task::spawn_blocking(move || {
        Indexing::new(wanted.compression, options)?.take_all(&wanted, pieces, &mut sink)
    });
    let sent = send(origin, layer, 0..layer.size, sender, progress).await;
    let built = build.await.context("indexing a layer")?;
    // What the sender met comes first: the builder then only saw a layer that was cut short.
    sent?;
    let built = built?;
    check(layer, &built.layer)?;
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

const PIECES_IN_FLIGHT: usize = 64;
const MOST_FAILURES: u32 = 10;

//! A layer without an index: read once from its beginning, kept, and indexed on the way.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use artifacts::{ImageLayer, IndexStore, Origin, StoredIndex};
use index::{BuildOptions, LayerIndex};
use parking_lot::Mutex;
use ztoc::SpanId;

use super::images::shape_of;
use crate::stream;

/// Streams `layer` into the cache and stores its index. `progress` is told the compressed bytes as
/// they come.
pub(super) async fn ingest(
    origin: &Origin,
    layer: &ImageLayer,
    indexes: &IndexStore,
    store: &cache::Store,
    incoming: &Path,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<StoredIndex> {
    let path = incoming.join(layer.digest.hex());
    let file = Incoming::create(&path)?;
    let out = Arc::new(Mutex::new(BufWriter::with_capacity(1 << 20, file.file.try_clone()?)));
    let writer = Arc::clone(&out);
    let write = move |bytes: &[u8]| {
        writer.lock().write_all(bytes).context("writing the layer to the cache")
    };
    let built =
        stream::index_layer(origin, layer, BuildOptions::default(), write, progress).await?;
    out.lock().flush().context("writing the layer to the cache")?;
    tracing::debug!(layer = %layer.digest, bytes = layer.size, "layer streamed");
    let stored = stream::save(&built, layer, indexes)?;
    keep(layer, &stored, store, &file.file, &built)?;
    Ok(stored)
}

/// Gives the layer's bytes to the cache, which keeps a checksum of each span.
fn keep(
    layer: &ImageLayer,
    stored: &StoredIndex,
    store: &cache::Store,
    file: &File,
    built: &LayerIndex,
) -> Result<()> {
    let cached = store.layer(&layer.digest, shape_of(stored), None)?;
    if cached.is_sealed() {
        return Ok(());
    }
    let spans = &stored.ztoc.spans;
    let mut buffer = Vec::new();
    for span in 0..spans.len() {
        let range = spans.uncompressed_range(SpanId(span));
        let (mut at, mut checksum) = (range.start, 0);
        while at < range.end {
            let len = usize::try_from((range.end - at).min(1 << 20)).unwrap_or_default();
            buffer.resize(len, 0);
            file.read_exact_at(&mut buffer, at).context("reading the layer back")?;
            cached.write_at(at, &buffer)?;
            checksum = crc32c::crc32c_append(checksum, &buffer);
            at += len as u64;
        }
        cached.mark_present(span, checksum)?;
    }
    cached.seal(built.diff_id, built.uncompressed_total)?;
    Ok(())
}

/// A file that is gone when nobody needs it any more.
struct Incoming {
    path: PathBuf,
    file: File,
}

impl Incoming {
    fn create(path: &Path) -> Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).ok();
    }
}

//! What an image's own command needs before its first instruction, found where the image lies.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use artifacts::{Image, IndexStore, Origin, StartRanges, StoredIndex, have_windows};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tree::FileData;
use ztoc::SpanId;

use super::span_bytes::{FileWriter, from_spans};
use super::tree_of;
use crate::program_files::{Asked, Command, Layers, ProgramFiles};

/// Finds it by the indexes in `store`; nothing if a layer has none there. Of the layers only the spans are
/// fetched that tell what a program needs in turn.
pub(crate) async fn start_ranges(
    origin: &Origin,
    image: &Image,
    store: &IndexStore,
) -> Result<StartRanges> {
    let mut indexes = Vec::new();
    for layer in &image.layers {
        let Some(index) = store.load(&layer.digest)? else { return Ok(StartRanges::new()) };
        have_windows(origin, &index).await?;
        indexes.push(Arc::new(index));
    }
    let (origin, image, runtime) = (origin.clone(), image.clone(), Handle::current());
    let find = move || -> Result<StartRanges> {
        let tree = tree_of(indexes.iter().map(AsRef::as_ref));
        let command = Command::of(&image.config);
        let (spans, wanted) = (Mutex::default(), Mutex::default());
        let layers = RemoteLayers { origin, image, indexes, runtime, spans, wanted };
        let asked = Asked::default();
        ProgramFiles { tree: tree.get()?, layers: &layers, command: &command, asked: &asked }
            .find();
        Ok(layers.wanted.into_inner())
    };
    let mut found: StartRanges = tokio::task::spawn_blocking(find).await.context("finding")??;
    found.values_mut().for_each(|ranges| *ranges = joined(std::mem::take(ranges)));
    Ok(found)
}

/// The layers of an image where it lies.
struct RemoteLayers {
    origin: Origin,
    image: Image,
    indexes: Vec<Arc<StoredIndex>>,
    runtime: Handle,
    /// What was fetched last, by its layer and its number.
    spans: Mutex<HashMap<(u32, SpanId), Bytes>>,
    wanted: Mutex<StartRanges>,
}

impl RemoteLayers {
    /// The uncompressed bytes of a span.
    fn span(&self, layer: u32, span: SpanId) -> Result<Bytes> {
        if let Some(known) = self.spans.lock().get(&(layer, span)) {
            return Ok(known.clone());
        }
        let place = layer as usize;
        let index = Arc::clone(self.indexes.get(place).context("no such layer")?);
        let of_image = self.image.layers.get(place).context("no such layer")?;
        let range = index.ztoc.spans.uncompressed_range(span);
        let (offset, size) = (range.start, range.end - range.start);
        let file = FileWriter::new(Vec::new(), &FileData { layer, offset, size, sparse: None });
        let bytes = self.runtime.block_on(from_spans(&self.origin, of_image, index, file))?;
        let bytes = Bytes::from(bytes);
        let mut spans = self.spans.lock();
        if spans.len() >= SPANS_KEPT {
            spans.clear();
        }
        spans.insert((layer, span), bytes.clone());
        Ok(bytes)
    }
}

impl Layers for RemoteLayers {
    fn want(&self, layer: u32, range: Range<u64>) {
        if let Some(layer) = self.image.layers.get(layer as usize) {
            self.wanted.lock().entry(layer.digest).or_default().push(range);
        }
    }

    fn read_exact_at(&self, layer: u32, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let index = self.indexes.get(layer as usize).ok_or(io::ErrorKind::NotFound)?;
        if index.streamed {
            // What follows could be known only by reading the layer to there.
            return Err(io::ErrorKind::Unsupported.into());
        }
        let spans = &index.ztoc.spans;
        let end = at + buffer.len() as u64;
        for span in spans.spans_covering(at..end) {
            let held = spans.uncompressed_range(span);
            let bytes = self.span(layer, span).map_err(io::Error::other)?;
            let part = held.start.max(at)..held.end.min(end);
            let within = |from: u64| {
                let places = part.start.checked_sub(from).zip(part.end.checked_sub(from));
                let (start, end) = places?;
                Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
            };
            let source = within(held.start).and_then(|range| bytes.get(range));
            let target = within(at).and_then(|range| buffer.get_mut(range));
            let (source, target) = source.zip(target).ok_or(io::ErrorKind::UnexpectedEof)?;
            target.copy_from_slice(source);
        }
        Ok(())
    }
}

/// The same bytes in as few ranges as there can be, in their order.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, before| {
        let touches = next.start <= before.end;
        if touches {
            before.end = before.end.max(next.end);
        }
        touches
    });
    ranges
}

/// A span has a few MiB.
const SPANS_KEPT: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one() {
        assert_eq!(joined(vec![8..9, 0..4, 4..6, 1..2]), [0..6, 8..9]);
        assert_eq!(joined(vec![]), []);
    }
}

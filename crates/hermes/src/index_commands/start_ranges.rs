//! What an image's own command needs to start, found where the image lies.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use artifacts::{Image, IndexStore, Origin, StartRanges, StoredIndex, have_windows};
use bytes::Bytes;
use oci::span_index::MOST_RANGES;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tree::FileData;
use ztoc::SpanId;

use super::span_bytes::{FileWriter, from_spans};
use super::tree_of;
use crate::program_files::{Asked, Command, Layers, ProgramFiles, Reach};

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
            .find(Reach::Imports);
        Ok(layers.wanted.into_inner())
    };
    let mut found: StartRanges = tokio::task::spawn_blocking(find).await.context("finding")??;
    found.values_mut().for_each(|ranges| *ranges = in_few(ranges));
    Ok(found)
}

/// The layers of an image where it lies.
struct RemoteLayers {
    origin: Origin,
    image: Image,
    indexes: Vec<Arc<StoredIndex>>,
    runtime: Handle,
    /// What was fetched last, by its layer and its number.
    spans: Mutex<HashMap<(u32, SpanId), FetchedSpan>>,
    wanted: Mutex<StartRanges>,
}

/// A span; locked while it is fetched.
type FetchedSpan = Arc<Mutex<Option<Bytes>>>;

impl RemoteLayers {
    /// The uncompressed bytes of a span.
    fn span(&self, layer: u32, span: SpanId) -> Result<Bytes> {
        let place = {
            let mut spans = self.spans.lock();
            if spans.len() >= SPANS_KEPT {
                spans.clear();
            }
            Arc::clone(spans.entry((layer, span)).or_default())
        };
        let mut place = place.lock();
        if let Some(known) = &*place {
            return Ok(known.clone());
        }
        Ok(place.insert(self.fetch(layer, span)?).clone())
    }

    fn fetch(&self, layer: u32, span: SpanId) -> Result<Bytes> {
        let place = layer as usize;
        let index = Arc::clone(self.indexes.get(place).context("no such layer")?);
        let of_image = self.image.layers.get(place).context("no such layer")?;
        let range = index.ztoc.spans.uncompressed_range(span);
        let (offset, size) = (range.start, range.end - range.start);
        let file = FileWriter::new(Vec::new(), &FileData { layer, offset, size, sparse: None });
        Ok(self.runtime.block_on(from_spans(&self.origin, of_image, index, file))?.into())
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

/// The same bytes in no more ranges than an index holds, each where the first of its bytes was. What lies
/// between two that are close is among them.
fn in_few(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut gap = FIRST_GAP;
    loop {
        let joined = joined(ranges, gap);
        if joined.len() <= MOST_RANGES {
            return joined;
        }
        gap = gap.saturating_mul(2);
    }
}

/// Ranges that are not farther apart than `gap` bytes as one, each where the first of its parts was.
fn joined(ranges: &[Range<u64>], gap: u64) -> Vec<Range<u64>> {
    let mut placed: Vec<(usize, Range<u64>)> = ranges.iter().cloned().enumerate().collect();
    placed.sort_unstable_by_key(|(_, range)| range.start);
    placed.dedup_by(|(place, next), (first, before)| {
        let touches = next.start <= before.end.saturating_add(gap);
        if touches {
            before.end = before.end.max(next.end);
            *first = (*first).min(*place);
        }
        touches
    });
    placed.sort_unstable_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, range)| range).collect()
}

/// A span has up to a few MiB.
const SPANS_KEPT: usize = 64;

/// What lies between two files that follow each other: a header, and what fills a block.
const FIRST_GAP: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_where_the_first_was() {
        let check = |ranges: &[Range<u64>], gap, expected: &[Range<u64>]| {
            assert_eq!(joined(ranges, gap), expected, "{ranges:?} {gap}");
        };
        check(&[8..9, 0..4, 4..6, 1..2], 0, &[8..9, 0..6]);
        check(&[4..6, 8..9, 0..4], 0, &[0..6, 8..9]);
        check(&[8..9, 0..6, 12..13], 2, &[0..9, 12..13]);
        check(&[8..9, 0..6], 1, &[8..9, 0..6]);
        check(&[], 9, &[]);
    }

    #[test]
    fn there_are_no_more_than_an_index_holds() {
        let far: Vec<Range<u64>> =
            (0..5000).map(|place| place * 100_000..place * 100_000 + 10).collect();
        let few = in_few(&far);
        assert!(few.len() <= MOST_RANGES, "{}", few.len());
        let covered = |range: &Range<u64>| {
            few.iter().any(|part| part.start <= range.start && range.end <= part.end)
        };
        assert!(far.iter().all(covered));
    }
}

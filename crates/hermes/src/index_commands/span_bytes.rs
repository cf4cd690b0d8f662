//! The bytes of a file out of the spans that hold it.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use artifacts::{ImageLayer, Origin, StoredIndex};
use bytes::Bytes;
use oci::Digest;
use tokio::sync::mpsc::Receiver;
use tree::FileData;
use ztoc::{SpanDecoder, SpanId, SpanTable};

use super::corrupt;
use crate::stream::{pieces, send};

/// A file being written from what the layer holds of it; the holes of a sparse file become zeros.
#[derive(Debug)]
pub(super) struct FileWriter<W> {
    out: W,
    /// Where in the uncompressed layer the data lies.
    stored: Range<u64>,
    /// Pieces that are still to come: offset in the file and length.
    pieces: std::vec::IntoIter<(u64, u64)>,
    /// The rest of the piece that is being written.
    rest: u64,
    /// Offset in the file.
    at: u64,
    size: u64,
}

impl<W: Write> FileWriter<W> {
    pub(super) fn new(out: W, data: &FileData) -> Self {
        let stored = data.offset..data.offset.saturating_add(data.stored_bytes());
        let pieces = match &data.sparse {
            Some(map) => map.pieces.clone(),
            None => vec![(0, data.size)],
        };
        Self { out, stored, pieces: pieces.into_iter(), rest: 0, at: 0, size: data.size }
    }

    /// What of the uncompressed layer is still wanted.
    pub(super) fn wanted(&self) -> Range<u64> {
        self.stored.clone()
    }

    /// Takes bytes of the uncompressed layer, which begin at `at`, in order; what is not of the file
    /// is left out.
    pub(super) fn push(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let end = at.saturating_add(bytes.len() as u64).min(self.stored.end);
        if at > self.stored.start || end <= self.stored.start {
            return Ok(());
        }
        let within = |offset: u64| usize::try_from(offset.saturating_sub(at)).unwrap_or(usize::MAX);
        let mut bytes = bytes.get(within(self.stored.start)..within(end)).unwrap_or_default();
        self.stored.start = end;
        while !bytes.is_empty() {
            if self.rest == 0 {
                let Some((offset, len)) = self.pieces.next() else { return Ok(()) };
                self.zeros_until(offset)?;
                self.rest = len;
                continue;
            }
            let len = usize::try_from(self.rest).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(len);
            self.out.write_all(now)?;
            self.rest -= len as u64;
            self.at += len as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Writes what follows the last piece.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.zeros_until(self.size)?;
        self.out.flush()
    }

    fn zeros_until(&mut self, offset: u64) -> io::Result<()> {
        let zeros = [0; 16 << 10];
        while self.at < offset {
            let len = usize::try_from(offset - self.at).unwrap_or(usize::MAX).min(zeros.len());
            self.out.write_all(&zeros[..len])?;
            self.at += len as u64;
        }
        Ok(())
    }
}

/// Fetches the spans that hold a file, and writes it.
pub(super) async fn from_spans<W: Write + Send + 'static>(
    origin: &Origin,
    layer: &ImageLayer,
    index: Arc<StoredIndex>,
    mut file: FileWriter<W>,
) -> Result<W> {
    let range = compressed_range(&index.ztoc.spans, file.wanted());
    let (sender, pieces) = pieces();
    let digest = layer.digest;
    let write = tokio::task::spawn_blocking(move || {
        write_file(&index, &digest, pieces, &mut file)?;
        file.finish()?;
        Ok(file.out)
    });
    let sent = send(origin, layer, range, sender, &|_| {}).await;
    let written = write.await.context("writing the file")?;
    sent.and(written)
}

/// The one range of the blob that holds all spans of a range of the tar; empty if there are none.
fn compressed_range(spans: &SpanTable, wanted: Range<u64>) -> Range<u64> {
    let mut covering = spans.spans_covering(wanted);
    let Some(first) = covering.next() else { return 0..0 };
    let last = covering.next_back().unwrap_or(first);
    spans.compressed_range(first).start..spans.compressed_range(last).end
}

/// Writes a file from the compressed bytes of its spans, which come in `pieces` from the start of
/// [`compressed_range`] on. Each span is checked before any byte of it is written.
fn write_file<W: Write>(
    index: &StoredIndex,
    layer: &Digest,
    mut pieces: Receiver<Bytes>,
    file: &mut FileWriter<W>,
) -> Result<()> {
    let spans = &index.ztoc.spans;
    let mut position = compressed_range(spans, file.wanted()).start;
    let mut received: Vec<u8> = Vec::new();
    for span in spans.spans_covering(file.wanted()) {
        let range = spans.compressed_range(span);
        // Neighbours may share a byte, which stays.
        let used = usize::try_from(range.start - position).unwrap_or(usize::MAX);
        received.drain(..used.min(received.len()));
        position = range.start;
        let len =
            usize::try_from(range.end - range.start).context("a span is larger than memory")?;
        while received.len() < len {
            let piece = pieces.blocking_recv();
            received.extend_from_slice(&piece.context("the transfer ended early")?);
        }
        write_span(index, layer, span, &received[..len], file)?;
    }
    if !file.wanted().is_empty() {
        return Err(corrupt(format!(
            "the index of layer {layer} promises a file behind the layer's end"
        )));
    }
    Ok(())
}

fn write_span<W: Write>(
    index: &StoredIndex,
    layer: &Digest,
    span: SpanId,
    compressed: &[u8],
    file: &mut FileWriter<W>,
) -> Result<()> {
    let spans = &index.ztoc.spans;
    let (found, expected) = (Digest::of(compressed), spans.digest(span));
    if found != *expected {
        let number = span.0;
        return Err(corrupt(format!(
            "span {number} of layer {layer} came with digest {found}, its index says {expected}"
        )));
    }
    let mut window = Vec::new();
    index::read_window(spans, span, index.window_file(), &mut window)
        .with_context(|| format!("the window of span {} of layer {layer}", span.0))?;
    let damaged = |err: ztoc::DecodeSpanError| corrupt(format!("layer {layer}: {err}"));
    let mut decoder = SpanDecoder::new(spans, span, compressed, &window).map_err(damaged)?;
    let mut at = spans.uncompressed_range(span).start;
    let mut out = vec![0; 128 << 10];
    while !file.wanted().is_empty() {
        let made = decoder.read(&mut out).map_err(damaged)?;
        if made == 0 {
            break;
        }
        file.push(at, &out[..made])?;
        at += made as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ztoc::SparseMap;

    use super::*;

    #[track_caller]
    fn check(data: &FileData, cuts: &[usize], expected: &[u8]) {
        let layer: Vec<u8> = (0..64).collect();
        for cut in cuts {
            let mut written = Vec::new();
            let mut file = FileWriter::new(&mut written, data);
            for (number, piece) in layer.chunks(*cut).enumerate() {
                file.push((number * cut) as u64, piece).unwrap();
            }
            assert!(file.wanted().is_empty());
            file.finish().unwrap();
            assert_eq!(written, expected, "cut into {cut}");
        }
    }

    #[test]
    fn a_file_is_cut_out_of_its_layer_however_that_comes() {
        let data = FileData { layer: 0, offset: 10, size: 5, sparse: None };
        check(&data, &[1, 2, 3, 7, 10, 11, 64], &[10, 11, 12, 13, 14]);
        let empty = FileData { size: 0, ..data };
        check(&empty, &[1, 64], &[]);
    }

    #[test]
    fn holes_become_zeros() {
        let map = SparseMap { pieces: vec![(2, 3), (5, 0), (6, 1)], logical_size: 9 };
        let data = FileData { layer: 0, offset: 20, size: 9, sparse: Some(map) };
        check(&data, &[1, 2, 22, 64], &[0, 0, 20, 21, 22, 0, 23, 0, 0]);
        let map = SparseMap { pieces: vec![], logical_size: 20_000 };
        let data = FileData { layer: 0, offset: 20, size: 20_000, sparse: Some(map) };
        check(&data, &[64], &[0; 20_000]);
    }
}

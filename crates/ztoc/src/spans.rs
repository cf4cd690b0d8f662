//! Spans: the pieces of a layer that can be fetched and inflated by themselves.

mod zinfo;

use std::ops::Range;

use oci::Digest;

pub(crate) use zinfo::{
    BadZinfo, RECORD_LEN, Surroundings, apart_record, gzip_header, gzip_record, plain_zinfo,
};

/// How much output before a span is needed to inflate it: 32 KiB.
pub const WINDOW_SIZE: usize = sys::inflate::WINDOW_SIZE;

/// The number of a span within its layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(pub u32);

/// How the layer is compressed, as far as zTOCs know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// One or many gzip members.
    Gzip,
    /// A plain tar.
    Uncompressed,
}

/// Where decoding can start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// The first byte in the layer that belongs to the span as a whole.
    pub compressed: u64,
    /// The first byte of the tar that the span makes.
    pub uncompressed: u64,
    /// How many high bits of the byte before `compressed` belong to the span too, 0 to 7.
    pub bits: u8,
}

/// Where the 32 KiB of output lie that a span is inflated with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window<'t> {
    /// In the zTOC: [`WINDOW_SIZE`] bytes from this position on.
    Inside(u64),
    /// In a blob of windows, compressed.
    Apart(&'t WindowFrame),
}

impl Window<'_> {
    /// Where in the zTOC it is, if there.
    #[must_use]
    pub fn position(&self) -> Option<u64> {
        let Self::Inside(position) = self else { return None };
        Some(*position)
    }
}

/// A compressed window in a blob of windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowFrame {
    /// Its bytes in the blob; not empty, and at most [`WindowFrame::MOST_BYTES`].
    pub range: Range<u64>,
    /// The sha256 of these bytes.
    pub digest: Digest,
}

impl WindowFrame {
    /// The size of the largest frame in bytes: no compressor makes much more of what it cannot compress.
    pub const MOST_BYTES: u64 = 2 * 32 * 1024;
}

/// The spans of a layer: where they lie, what they make, their digests.
///
/// Guarantees, whatever the bytes were that it was parsed from: spans follow one another without a
/// gap and none is empty but those that hold nothing but padding behind the archive's end, they lie
/// within the compressed size, and none makes more than deflate can from its bytes (1032 to 1), so that
/// lengths may be trusted for allocation once the compressed size is.
///
/// The 32 KiB windows (one for each span) are not in memory: the table knows where they are, all in the
/// zTOC or all apart from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanTable {
    compression: Compression,
    span_size: u64,
    compressed_size: u64,
    uncompressed_size: u64,
    /// Empty only for a layer of no bytes at all; otherwise the first is at 0 of the tar.
    checkpoints: Vec<Checkpoint>,
    digests: Vec<Digest>,
    /// Where in the zTOC the span data ("zinfo") lies.
    zinfo: Range<u64>,
    /// How many checkpoints precede the first that is recorded: 1 in zinfo version 1, else 0.
    unrecorded: u32,
    /// Where the windows lie if not in the zTOC: for each span, nothing where there is none.
    apart: Option<Vec<Option<WindowFrame>>>,
}

impl SpanTable {
    /// How many spans there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        // Checked when the table was made.
        u32::try_from(self.checkpoints.len()).unwrap_or(u32::MAX)
    }

    /// Whether there is none: so it is for a layer of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.checkpoints.is_empty()
    }

    /// The size that spans were asked to have, in bytes of the tar; real ones of gzip are larger.
    #[must_use]
    pub fn span_size(&self) -> u64 {
        self.span_size
    }

    /// How the layer is compressed.
    #[must_use]
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The size of the layer's blob in bytes.
    #[must_use]
    pub fn compressed_size(&self) -> u64 {
        self.compressed_size
    }

    /// The size of the layer's tar in bytes, without the padding after its end.
    #[must_use]
    pub fn uncompressed_size(&self) -> u64 {
        self.uncompressed_size
    }

    /// All spans in order.
    pub fn ids(
        &self,
    ) -> impl DoubleEndedIterator<Item = SpanId> + ExactSizeIterator + Clone + use<> {
        (0..self.len()).map(SpanId)
    }

    /// Where decoding of a span starts.
    ///
    /// # Panics
    /// If there is no such span.
    #[must_use]
    pub fn checkpoint(&self, span: SpanId) -> Checkpoint {
        *self.get(span).expect("a span of this table")
    }

    /// The bytes of the layer that are needed to decode a span, and that its digest covers.
    /// Neighbours share a byte if deflate's bits do.
    ///
    /// # Panics
    /// If there is no such span.
    #[must_use]
    pub fn compressed_range(&self, span: SpanId) -> Range<u64> {
        let end = self.next(span).map_or(self.compressed_size, |next| next.compressed);
        compressed_start(&self.checkpoint(span))..end
    }

    /// The bytes of the tar, up to the archive's end, that a span makes. What it makes after these is
    /// padding; one behind the archive's end makes nothing else.
    ///
    /// # Panics
    /// If there is no such span.
    #[must_use]
    pub fn uncompressed_range(&self, span: SpanId) -> Range<u64> {
        let made = self.made_range(span);
        made.start.min(self.uncompressed_size)..made.end.min(self.uncompressed_size)
    }

    /// What a span makes, padding included, as far as the table knows: not how much follows the last
    /// span.
    pub(crate) fn made_range(&self, span: SpanId) -> Range<u64> {
        let start = self.checkpoint(span).uncompressed;
        let end = match self.next(span) {
            Some(next) => next.uncompressed,
            None => self.uncompressed_size.max(start),
        };
        start..end
    }

    /// The sha256 of the bytes in [`SpanTable::compressed_range`].
    ///
    /// # Panics
    /// If there is no such span.
    #[must_use]
    pub fn digest(&self, span: SpanId) -> &Digest {
        self.digests.get(index(span)).expect("a span of this table")
    }

    /// The span that makes the byte of the tar at `offset`; `None` behind the end.
    #[must_use]
    pub fn span_at(&self, offset: u64) -> Option<SpanId> {
        let after = self.checkpoints.partition_point(|point| point.uncompressed <= offset);
        let span = SpanId(u32::try_from(after.checked_sub(1)?).ok()?);
        self.uncompressed_range(span).contains(&offset).then_some(span)
    }

    /// The spans that make a range of the tar, in order; what of the range lies behind the end is
    /// left out.
    pub fn spans_covering(
        &self,
        range: Range<u64>,
    ) -> impl DoubleEndedIterator<Item = SpanId> + ExactSizeIterator + Clone + use<> {
        let last = range.end.min(self.uncompressed_size).checked_sub(1);
        let spans = match last {
            Some(last) if range.start <= last => {
                let first = self.span_at(range.start).map_or(0, |span| span.0);
                first..self.span_at(last).map_or(first, |span| span.0.saturating_add(1))
            }
            _ => 0..0,
        };
        spans.map(SpanId)
    }

    /// The bytes of the layer before the first span: the gzip header. No digest covers them, and
    /// nothing needs them.
    #[must_use]
    pub fn header_range(&self) -> Range<u64> {
        0..self.checkpoints.first().map_or(0, compressed_start)
    }

    /// Where the 32 KiB of output before a span lie; `None` if it is decoded without: plain layers, and the
    /// first span. A position and [`WINDOW_SIZE`] bytes from there are within the zTOC.
    #[must_use]
    pub fn window(&self, span: SpanId) -> Option<Window<'_>> {
        let point = self.get(span)?;
        if self.compression != Compression::Gzip || point.uncompressed == 0 {
            return None;
        }
        if let Some(frames) = &self.apart {
            return frames.get(index(span))?.as_ref().map(Window::Apart);
        }
        let record = span.0.checked_sub(self.unrecorded)?;
        zinfo::window_offset(record).checked_add(self.zinfo.start).map(Window::Inside)
    }

    /// The size of the blob that holds the windows, in bytes; `None` if the zTOC itself holds them.
    #[must_use]
    pub fn windows_apart(&self) -> Option<u64> {
        let frames = self.apart.as_ref()?;
        Some(frames.iter().flatten().next_back().map_or(0, |last| last.range.end))
    }

    /// Where in the zTOC the span data lies.
    pub(crate) fn zinfo_range(&self) -> Range<u64> {
        self.zinfo.clone()
    }

    /// The same table for a zTOC in which the span data lies elsewhere.
    pub(crate) fn moved_to(mut self, zinfo: Range<u64>) -> Self {
        self.zinfo = zinfo;
        self
    }

    pub(crate) fn digests(&self) -> &[Digest] {
        &self.digests
    }

    fn get(&self, span: SpanId) -> Option<&Checkpoint> {
        self.checkpoints.get(index(span))
    }

    fn next(&self, span: SpanId) -> Option<&Checkpoint> {
        self.checkpoints.get(index(span).checked_add(1)?)
    }
}

/// What a [`SpanTable`] is made of, before it is checked.
#[derive(Debug)]
pub(crate) struct SpanParts {
    pub(crate) compression: Compression,
    pub(crate) span_size: u64,
    pub(crate) compressed_size: u64,
    pub(crate) uncompressed_size: u64,
    pub(crate) checkpoints: Vec<Checkpoint>,
    pub(crate) digests: Vec<Digest>,
    pub(crate) zinfo: Range<u64>,
    pub(crate) unrecorded: u32,
    pub(crate) apart: Option<Vec<Option<WindowFrame>>>,
}

impl TryFrom<SpanParts> for SpanTable {
    type Error = BadZinfo;

    fn try_from(parts: SpanParts) -> Result<Self, BadZinfo> {
        check(&parts)?;
        let SpanParts {
            compression,
            span_size,
            compressed_size,
            uncompressed_size,
            checkpoints,
            digests,
            zinfo,
            unrecorded,
            apart,
        } = parts;
        Ok(Self {
            compression,
            span_size,
            compressed_size,
            uncompressed_size,
            checkpoints,
            digests,
            zinfo,
            unrecorded,
            apart,
        })
    }
}

/// The most that deflate makes of a byte: a match of 258 bytes can take as little as two bits.
const MAX_EXPANSION: u64 = 1032;

/// A gzip header may hold a name and a comment of any length; a real one has none or a short one.
const MAX_HEADER: u64 = 1 << 20;

/// Holds everything to the guarantees of [`SpanTable`].
fn check(parts: &SpanParts) -> Result<(), BadZinfo> {
    let count = parts.checkpoints.len();
    if count != parts.digests.len() || u32::try_from(count).is_err() {
        return Err(BadZinfo("the numbers of checkpoints and digests differ"));
    }
    let Some(first) = parts.checkpoints.first() else {
        // A plain layer of no bytes has no spans; gzip of no bytes has a header and one span.
        let empty = parts.compression == Compression::Uncompressed && parts.compressed_size == 0;
        return if empty { Ok(()) } else { Err(BadZinfo("there are no spans")) };
    };
    if parts.compression == Compression::Uncompressed
        && parts.uncompressed_size > parts.compressed_size
    {
        return Err(BadZinfo("a plain layer is smaller than its tar"));
    }
    if first.uncompressed != 0 || first.compressed > MAX_HEADER {
        return Err(BadZinfo("the first span does not begin where the tar does"));
    }
    if parts
        .checkpoints
        .iter()
        .any(|point| point.bits > 7 || (point.bits > 0 && point.compressed == 0))
    {
        return Err(BadZinfo("impossible bit count in a checkpoint"));
    }
    let ends = parts.checkpoints.iter().skip(1).map(|next| (next.compressed, next.uncompressed));
    for (point, (compressed_end, uncompressed_end)) in parts.checkpoints.iter().zip(ends) {
        check_span(point, compressed_end, uncompressed_end)?;
    }
    let last = parts.checkpoints.last().unwrap_or(first);
    // The last span may hold nothing but padding behind the archive's end.
    let start = last.uncompressed;
    let end = parts.uncompressed_size.max(start.saturating_add(1));
    check_span(last, parts.compressed_size, end)
}

fn check_span(
    point: &Checkpoint,
    compressed_end: u64,
    uncompressed_end: u64,
) -> Result<(), BadZinfo> {
    let compressed = compressed_end
        .checked_sub(compressed_start(point))
        .filter(|&len| len > 0)
        .ok_or(BadZinfo("the spans' compressed offsets do not ascend within the layer"))?;
    let uncompressed = uncompressed_end
        .checked_sub(point.uncompressed)
        .filter(|&len| len > 0)
        .ok_or(BadZinfo("the spans' uncompressed offsets do not ascend"))?;
    // One more match may have begun in the bits before.
    let most = compressed.saturating_add(1).saturating_mul(MAX_EXPANSION);
    if uncompressed > most {
        return Err(BadZinfo("a span claims to make more than deflate can from its bytes"));
    }
    Ok(())
}

fn compressed_start(point: &Checkpoint) -> u64 {
    point.compressed.saturating_sub(u64::from(point.bits != 0))
}

fn index(span: SpanId) -> usize {
    usize::try_from(span.0).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three spans: 10..50, 49..90, 90..100 of the layer make 0..100, 100..250, 250..300 of the tar.
    fn parts() -> SpanParts {
        let point = |compressed, uncompressed, bits| Checkpoint { compressed, uncompressed, bits };
        SpanParts {
            compression: Compression::Gzip,
            span_size: 90,
            compressed_size: 100,
            uncompressed_size: 300,
            checkpoints: vec![point(10, 0, 0), point(50, 100, 3), point(90, 250, 0)],
            digests: vec![Digest::of(b""); 3],
            zinfo: 1000..99_367,
            unrecorded: 0,
            apart: None,
        }
    }

    fn table() -> SpanTable {
        parts().try_into().unwrap()
    }

    #[test]
    fn ranges_follow_the_format() {
        let table = table();
        let compressed: Vec<_> = table.ids().map(|span| table.compressed_range(span)).collect();
        assert_eq!(compressed, [10..50, 49..90, 90..100]);
        let uncompressed: Vec<_> = table.ids().map(|span| table.uncompressed_range(span)).collect();
        assert_eq!(uncompressed, [0..100, 100..250, 250..300]);
        assert_eq!(table.header_range(), 0..10);
    }

    #[test]
    fn lookup_finds_the_span_of_each_byte() {
        let table = table();
        let check = |offset, expected: Option<u32>| {
            assert_eq!(table.span_at(offset), expected.map(SpanId), "{offset}");
        };
        check(0, Some(0));
        check(99, Some(0));
        check(100, Some(1));
        check(299, Some(2));
        check(300, None);
        check(u64::MAX, None);
    }

    #[test]
    fn covering_stops_at_the_last_byte_wanted() {
        let table = table();
        let check = |range: Range<u64>, expected: Range<u32>| {
            let found: Vec<_> = table.spans_covering(range.clone()).map(|span| span.0).collect();
            assert_eq!(found, expected.collect::<Vec<_>>(), "{range:?}");
        };
        check(0..100, 0..1);
        check(0..101, 0..2);
        check(99..250, 0..2);
        check(0..u64::MAX, 0..3);
        check(299..300, 2..3);
        check(100..100, 0..0);
        check(300..400, 0..0);
    }

    #[test]
    fn windows_lie_in_their_records() {
        let table = table();
        let found: Vec<_> = table.ids().map(|span| table.window(span)).collect();
        let second = 1000 + 12 + 32785 + 17;
        let inside = |position| Some(Window::Inside(position));
        assert_eq!(found, [None, inside(second), inside(second + 32785)]);
        let version_1 = SpanTable::try_from(SpanParts { unrecorded: 1, ..parts() }).unwrap();
        assert_eq!(version_1.window(SpanId(1)), inside(1000 + 12 + 17));
        assert_eq!(version_1.window(SpanId(3)), None);
        assert_eq!(table.windows_apart(), None);
    }

    #[test]
    fn windows_apart_lie_in_their_frames() {
        let frame = |range| Some(WindowFrame { range, digest: Digest::of(b"a frame") });
        let frames = vec![None, frame(0..70), frame(70..100)];
        let table = SpanTable::try_from(SpanParts { apart: Some(frames.clone()), ..parts() });
        let table = table.unwrap();
        let found: Vec<_> = table.ids().map(|span| table.window(span)).collect();
        let expected: Vec<_> =
            frames.iter().map(|frame| frame.as_ref().map(Window::Apart)).collect();
        assert_eq!(found, expected);
        assert_eq!(table.windows_apart(), Some(100));
    }

    #[test]
    fn padding_behind_the_archive_may_fill_the_last_span() {
        let check = |uncompressed_size, expected: [Range<u64>; 3], covering: u32| {
            let parts = SpanParts { uncompressed_size, ..parts() };
            let table = SpanTable::try_from(parts).unwrap();
            let ranges: Vec<_> = table.ids().map(|span| table.uncompressed_range(span)).collect();
            assert_eq!(ranges, expected);
            let last = table.span_at(uncompressed_size - 1).map(|span| span.0);
            assert_eq!(last, Some(covering - 1));
            assert_eq!(table.span_at(uncompressed_size), None);
            assert_eq!(table.spans_covering(0..1000).len(), covering as usize);
        };
        check(251, [0..100, 100..250, 250..251], 3);
        check(250, [0..100, 100..250, 250..250], 2);
        check(240, [0..100, 100..240, 240..240], 2);
        check(99, [0..99, 99..99, 99..99], 1);
    }

    #[test]
    fn impossible_tables_are_refused() {
        let check = |change: fn(&mut SpanParts)| {
            let mut parts = parts();
            change(&mut parts);
            SpanTable::try_from(parts).unwrap_err();
        };
        check(|parts| parts.checkpoints.clear());
        check(|parts| parts.digests.clear());
        check(|parts| {
            parts.checkpoints.clear();
            parts.digests.clear();
        });
        check(|parts| parts.checkpoints[0].uncompressed = 1);
        check(|parts| parts.checkpoints[0].compressed = u64::MAX);
        check(|parts| parts.checkpoints[1].compressed = 9);
        check(|parts| parts.checkpoints[1].uncompressed = 0);
        check(|parts| parts.checkpoints[1].uncompressed = 250);
        check(|parts| parts.checkpoints[1].bits = 8);
        check(|parts| parts.checkpoints[2].uncompressed = 1 << 40);
        check(|parts| parts.checkpoints[2].compressed = 100);
        check(|parts| parts.compressed_size = 80);
        check(|parts| parts.uncompressed_size = 1 << 40);
    }
}

//! The shape of a layer as the planner sees it: numbered spans with two byte ranges each.

use std::ops::Range;

/// The spans of one layer.
///
/// Spans are numbered from 0 in the order of the layer. Both kinds of range ascend with the number.
/// The uncompressed ranges follow each other without gaps and start at 0; the compressed ranges of
/// neighbours may share a byte, because a gzip block can end in the middle of one.
pub trait Spans {
    /// How many spans the layer has.
    fn len(&self) -> u32;

    /// Where the span lies in the compressed blob, in bytes.
    fn compressed(&self, span: u32) -> Range<u64>;

    /// Where the span lies in the uncompressed tar, in bytes.
    fn uncompressed(&self, span: u32) -> Range<u64>;

    /// Whether the layer has no spans at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How long the compressed blob is up to the end of its last span, in bytes.
    fn compressed_len(&self) -> u64 {
        self.len().checked_sub(1).map_or(0, |last| self.compressed(last).end)
    }

    /// How long the uncompressed layer is, in bytes.
    fn uncompressed_len(&self) -> u64 {
        self.len().checked_sub(1).map_or(0, |last| self.uncompressed(last).end)
    }
}

/// The spans that hold the uncompressed bytes `wanted`; what lies behind the end of the layer is
/// ignored, and an empty range needs no span.
#[must_use]
pub fn covering(spans: &dyn Spans, wanted: &Range<u64>) -> Range<u32> {
    let end = wanted.end.min(spans.uncompressed_len());
    if wanted.start >= end {
        return 0..0;
    }
    let first = first_ending_after(spans, wanted.start);
    let last = first_ending_after(spans, end - 1);
    first..(last + 1)
}

/// The first span whose uncompressed end lies behind `offset`; `len()` if there is none.
fn first_ending_after(spans: &dyn Spans, offset: u64) -> u32 {
    let (mut low, mut high) = (0, spans.len());
    while low < high {
        let middle = low + (high - low) / 2;
        if spans.uncompressed(middle).end > offset {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A layer written down as compressed and uncompressed lengths. With `shared`, each compressed
    /// range but the last takes in the first byte of its neighbour.
    #[derive(Debug, Clone)]
    pub(crate) struct Table {
        pub(crate) lengths: Vec<(u64, u64)>,
        pub(crate) shared: bool,
    }

    impl Table {
        pub(crate) fn new(lengths: &[(u64, u64)]) -> Self {
            Self { lengths: lengths.to_vec(), shared: false }
        }

        pub(crate) fn even(count: usize, compressed: u64, uncompressed: u64) -> Self {
            Self { lengths: vec![(compressed, uncompressed); count], shared: false }
        }
    }

    impl Spans for Table {
        fn len(&self) -> u32 {
            u32::try_from(self.lengths.len()).unwrap()
        }

        fn compressed(&self, span: u32) -> Range<u64> {
            let at = usize::try_from(span).unwrap();
            let start: u64 = self.lengths[..at].iter().map(|length| length.0).sum();
            let shared = u64::from(self.shared && span + 1 < self.len());
            start..start + self.lengths[at].0 + shared
        }

        fn uncompressed(&self, span: u32) -> Range<u64> {
            let at = usize::try_from(span).unwrap();
            let start: u64 = self.lengths[..at].iter().map(|length| length.1).sum();
            start..start + self.lengths[at].1
        }
    }

    #[track_caller]
    fn check(wanted: Range<u64>, expected: Range<u32>) {
        let layer = Table::new(&[(10, 100), (20, 50), (1, 0), (30, 200)]);
        assert_eq!(covering(&layer, &wanted), expected);
    }

    #[test]
    fn a_range_is_covered_by_the_spans_that_hold_its_bytes() {
        check(0..1, 0..1);
        check(0..100, 0..1);
        check(99..101, 0..2);
        check(100..150, 1..2);
        check(149..151, 1..4);
        check(150..350, 3..4);
        check(0..350, 0..4);
    }

    #[test]
    fn bytes_behind_the_end_need_no_span() {
        check(349..9_999, 3..4);
        check(350..400, 0..0);
        check(u64::MAX - 1..u64::MAX, 0..0);
    }

    #[test]
    fn an_empty_range_or_layer_needs_no_span() {
        check(7..7, 0..0);
        assert_eq!(covering(&Table::new(&[]), &(0..10)), 0..0);
        assert!(Table::new(&[]).is_empty());
        assert_eq!(Table::new(&[]).compressed_len(), 0);
    }
}

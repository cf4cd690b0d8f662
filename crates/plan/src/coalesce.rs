//! Neighbours that share one ranged request.
//!
//! Each request costs a round trip, so a few bytes too many are cheaper than one request more:
//! merging the 519 spans of a measured start into 94 requests costs 1 % more bytes.

use std::ops::Range;

use crate::Spans;

/// One ranged request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// The spans whose bytes arrive; some of them may be present already (the gaps).
    pub spans: Range<u32>,
    /// The range of the compressed blob, in bytes.
    pub bytes: Range<u64>,
}

/// Merges wanted spans into as few ranged requests as the bounds allow.
///
/// `wanted` must ascend; a number given twice counts once, and one behind the last span ends the
/// list. No request is longer than `max_bytes`, unless it is for one span that is longer. Spans
/// that nobody wants are fetched again only where they fill a gap of at most `max_gap` compressed
/// bytes between two that somebody does.
#[must_use]
pub fn coalesce(
    spans: &dyn Spans,
    wanted: impl IntoIterator<Item = u32>,
    max_bytes: u64,
    max_gap: u64,
) -> Vec<Fetch> {
    let mut fetches: Vec<Fetch> = Vec::new();
    for span in wanted.into_iter().take_while(|span| *span < spans.len()) {
        let merged = fetches.last().and_then(|last| last.with(spans, span, max_bytes, max_gap));
        match (merged, fetches.last_mut()) {
            (Some(merged), Some(last)) => *last = merged,
            _ => fetches.push(Fetch::of(spans, span)),
        }
    }
    fetches
}

impl Fetch {
    /// The request for one span.
    pub(crate) fn of(spans: &dyn Spans, span: u32) -> Self {
        Self { spans: span..span + 1, bytes: spans.compressed(span) }
    }

    /// This request made longer to take in a later `span`, if the bounds allow it.
    pub(crate) fn with(
        &self,
        spans: &dyn Spans,
        span: u32,
        max_bytes: u64,
        max_gap: u64,
    ) -> Option<Self> {
        if span < self.spans.end {
            return Some(self.clone());
        }
        let more = spans.compressed(span);
        let gap = more.start.saturating_sub(self.bytes.end);
        let bytes = self.bytes.start..more.end.max(self.bytes.end);
        let near = span == self.spans.end || gap <= max_gap;
        let small = bytes.end - bytes.start <= max_bytes;
        (near && small).then_some(Self { spans: self.spans.start..span + 1, bytes })
    }

    /// This request made longer to take in the span before it, if the bounds allow it.
    pub(crate) fn with_previous(&self, spans: &dyn Spans, max_bytes: u64) -> Option<Self> {
        let span = self.spans.start.checked_sub(1)?;
        let bytes = spans.compressed(span).start.min(self.bytes.start)..self.bytes.end;
        let small = bytes.end - bytes.start <= max_bytes;
        small.then_some(Self { spans: span..self.spans.end, bytes })
    }

    /// How many bytes the request asks for.
    #[must_use]
    pub const fn byte_len(&self) -> u64 {
        self.bytes.end.saturating_sub(self.bytes.start)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::spans::tests::Table;

    #[track_caller]
    fn check(wanted: &[u32], max_bytes: u64, max_gap: u64, expected: &[(Range<u32>, Range<u64>)]) {
        let mut layer = Table::even(8, 100, 1000);
        layer.shared = true;
        let found = coalesce(&layer, wanted.iter().copied(), max_bytes, max_gap);
        let found: Vec<_> = found.into_iter().map(|fetch| (fetch.spans, fetch.bytes)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn neighbours_that_share_a_byte_become_one_request() {
        check(&[], 1000, 0, &[]);
        check(&[2], 1000, 0, &[(2..3, 200..301)]);
        check(&[2, 3, 4], 1000, 0, &[(2..5, 200..501)]);
        check(&[6, 7], 1000, 0, &[(6..8, 600..800)]);
    }

    #[test]
    fn a_request_ends_where_it_would_grow_too_long() {
        check(&[0, 1, 2, 3], 201, 0, &[(0..2, 0..201), (2..4, 200..401)]);
        check(&[0, 1, 2], 200, 0, &[(0..1, 0..101), (1..2, 100..201), (2..3, 200..301)]);
    }

    #[test]
    fn one_span_may_be_longer_than_a_request() {
        check(&[0, 1], 10, 0, &[(0..1, 0..101), (1..2, 100..201)]);
    }

    #[test]
    fn present_spans_are_fetched_again_only_to_close_a_small_gap() {
        check(&[0, 2], 1000, 98, &[(0..1, 0..101), (2..3, 200..301)]);
        check(&[0, 2], 1000, 99, &[(0..3, 0..301)]);
        check(&[0, 3, 7], 1000, 200, &[(0..4, 0..401), (7..8, 700..800)]);
        check(&[0, 2], 300, 99, &[(0..1, 0..101), (2..3, 200..301)]);
    }

    #[test]
    fn a_number_twice_counts_once_and_one_behind_the_end_ends_the_list() {
        check(&[1, 1, 2, 2], 1000, 0, &[(1..3, 100..301)]);
        check(&[7, 8, 9], 1000, 0, &[(7..8, 700..800)]);
    }

    proptest! {
        #[test]
        fn requests_cover_what_is_wanted_and_keep_the_bounds(
            lengths in prop::collection::vec((1_u64..300, 1_u64..1000), 1..60),
            shared: bool,
            wanted in prop::collection::btree_set(0_u32..70, 0..60),
            max_bytes in 0_u64..2000,
            max_gap in 0_u64..600,
        ) {
            let layer = Table { lengths, shared };
            let fetches = coalesce(&layer, wanted.iter().copied(), max_bytes, max_gap);
            let wanted: BTreeSet<u32> = wanted.range(..layer.len()).copied().collect();
            let mut seen = BTreeSet::new();
            let mut before = 0;
            for fetch in fetches {
                prop_assert!(fetch.spans.start >= before, "in order, each span once");
                before = fetch.spans.end;
                prop_assert_eq!(fetch.bytes.start, layer.compressed(fetch.spans.start).start);
                prop_assert_eq!(fetch.bytes.end, layer.compressed(fetch.spans.end - 1).end);
                prop_assert!(wanted.contains(&fetch.spans.start));
                prop_assert!(wanted.contains(&(fetch.spans.end - 1)));
                prop_assert!(fetch.byte_len() <= max_bytes || fetch.spans.len() == 1);
                let mut unwanted = 0;
                for span in fetch.spans.clone() {
                    unwanted = if wanted.contains(&span) { 0 } else {
                        unwanted + layer.compressed(span).end - layer.compressed(span).start
                    };
                    // A gap is measured between wanted ends, which may share a byte on each side.
                    prop_assert!(unwanted <= max_gap + 2 * fetch.spans.len() as u64);
                }
                seen.extend(fetch.spans.filter(|span| wanted.contains(span)));
            }
            prop_assert_eq!(seen, wanted);
        }
    }
}

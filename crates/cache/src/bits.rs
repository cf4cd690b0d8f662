//! Sets of span numbers: one shared by threads, and its snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

/// A set of span numbers of one layer, as it was at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanSet {
    words: Vec<u64>,
    len: u32,
}

impl SpanSet {
    /// How many spans the layer has, in the set or not.
    #[must_use]
    pub const fn span_count(&self) -> u32 {
        self.len
    }

    /// Whether the span is in the set.
    #[must_use]
    pub fn contains(&self, span: u32) -> bool {
        let (word, bit) = place(span);
        span < self.len && self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// How many spans are in the set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// The spans of the set in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.len).filter(|span| self.contains(*span))
    }
}

/// A set of span numbers that threads change and read without a lock.
///
/// All accesses are sequentially consistent: eviction relies on one order of a cleared bit and a
/// noted use.
#[derive(Debug)]
pub(crate) struct AtomicSpanSet {
    words: Vec<AtomicU64>,
    len: u32,
}

impl AtomicSpanSet {
    pub(crate) fn new(len: u32) -> Self {
        let words = len.div_ceil(u64::BITS);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect(), len }
    }

    pub(crate) fn contains(&self, span: u32) -> bool {
        let (word, bit) = place(span);
        self.words.get(word).is_some_and(|word| word.load(Ordering::SeqCst) & bit != 0)
    }

    /// Adds the span and says whether it was missing before.
    pub(crate) fn insert(&self, span: u32) -> bool {
        let (word, bit) = place(span);
        span < self.len
            && self
                .words
                .get(word)
                .is_some_and(|word| word.fetch_or(bit, Ordering::SeqCst) & bit == 0)
    }

    /// Takes the span out and says whether it was in the set.
    pub(crate) fn remove(&self, span: u32) -> bool {
        let (word, bit) = place(span);
        self.words.get(word).is_some_and(|word| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0)
    }

    /// The first span from `from` on that is not in the set.
    pub(crate) fn first_outside(&self, from: u32) -> Option<u32> {
        let (first, bit) = place(from);
        let before = bit - 1;
        self.words.iter().enumerate().skip(first).find_map(|(index, word)| {
            let mut word = word.load(Ordering::SeqCst);
            if index == first {
                word |= before;
            }
            let bit = word.trailing_ones();
            let base = u32::try_from(index).ok()?.checked_mul(u64::BITS)?;
            (bit < u64::BITS).then_some(base + bit).filter(|span| *span < self.len)
        })
    }

    pub(crate) fn snapshot(&self) -> SpanSet {
        SpanSet {
            words: self.words.iter().map(|word| word.load(Ordering::SeqCst)).collect(),
            len: self.len,
        }
    }
}

fn place(span: u32) -> (usize, u64) {
    let word = usize::try_from(span / u64::BITS).expect("a usize holds 26 bits");
    (word, 1 << (span % u64::BITS))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(
            len in 1_u32..300,
            changes in prop::collection::vec((0_u32..320, any::<bool>()), 0..200),
        ) {
            let set = AtomicSpanSet::new(len);
            let mut model = BTreeSet::new();
            for (span, add) in changes {
                let changed = if add { set.insert(span) } else { set.remove(span) };
                let expected = if add { span < len && model.insert(span) } else { model.remove(&span) };
                prop_assert_eq!(changed, expected);
            }
            let snapshot = set.snapshot();
            prop_assert_eq!(snapshot.iter().collect::<BTreeSet<_>>(), model.clone());
            prop_assert_eq!(usize::try_from(snapshot.count()).unwrap(), model.len());
            for span in 0..320 {
                prop_assert_eq!(set.contains(span), model.contains(&span));
                prop_assert_eq!(snapshot.contains(span), model.contains(&span));
                prop_assert_eq!(set.first_outside(span), (span..len).find(|at| !model.contains(at)));
            }
        }
    }
}

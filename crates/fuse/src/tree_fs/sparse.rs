//! Where the bytes of a sparse file lie, for reads from its middle.

use std::ops::Range;

use crate::reply::Piece;

/// The pieces of a sparse file with the place of each among the stored bytes.
#[derive(Debug)]
pub(super) struct SparseIndex {
    /// Ascending and disjoint.
    pieces: Vec<Stored>,
}

#[derive(Debug, Clone, Copy)]
struct Stored {
    /// In the logical file.
    at: u64,
    len: u64,
    /// Bytes of all pieces before it.
    before: u64,
}

impl Stored {
    fn end(&self) -> u64 {
        self.at.saturating_add(self.len)
    }

    /// The part of it that lies in `range`, in the logical file.
    fn part(&self, range: &Range<u64>) -> Range<u64> {
        let start = self.at.max(range.start);
        start..self.end().min(range.end).max(start)
    }
}

impl SparseIndex {
    pub(super) fn new(pieces: &[(u64, u64)]) -> Self {
        let mut before = 0_u64;
        let with_places = pieces.iter().map(|&(at, len)| {
            let piece = Stored { at, len, before };
            before = before.saturating_add(len);
            piece
        });
        Self { pieces: with_places.filter(|piece| piece.len > 0).collect() }
    }

    /// How many bytes are stored.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.pieces.last().map_or(0, |last| last.before.saturating_add(last.len))
    }

    /// Which of the stored bytes a range of the logical file has; empty if it is one hole.
    pub(super) fn stored_range(&self, range: &Range<u64>) -> Range<u64> {
        let (Some(first), Some(last)) = (self.touched(range).first(), self.touched(range).last())
        else {
            return 0..0;
        };
        let start = first.before.saturating_add(range.start.saturating_sub(first.at));
        let end = last.before.saturating_add(range.end.min(last.end()) - last.at);
        start..end
    }

    /// Where these stored bytes belong, counted from the start of the range.
    pub(super) fn pieces_in(&self, range: &Range<u64>) -> Vec<Piece> {
        let in_range = self.touched(range).iter().map(|piece| piece.part(range));
        let place = |part: Range<u64>| {
            let at = usize::try_from(part.start - range.start).ok()?;
            Some(Piece { at, len: usize::try_from(part.end - part.start).ok()? })
        };
        in_range.filter_map(place).collect()
    }

    /// The pieces of which a part lies in `range`.
    fn touched(&self, range: &Range<u64>) -> &[Stored] {
        let first = self.pieces.partition_point(|piece| piece.end() <= range.start);
        let end = self.pieces.partition_point(|piece| piece.at < range.end);
        self.pieces.get(first..end).unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECES: [(u64, u64); 4] = [(10, 5), (15, 0), (20, 5), (100, 50)];

    #[test]
    fn every_range_is_put_together_right() {
        let index = SparseIndex::new(&PIECES);
        let stored: Vec<u8> = (1..=60).collect();
        let mut logical = [0_u8; 160];
        let mut next = stored.iter();
        for (at, len) in PIECES {
            for place in at..at + len {
                logical[usize::try_from(place).unwrap()] = *next.next().unwrap();
            }
        }
        for start in 0..160_u64 {
            for end in start + 1..=160 {
                let range = start..end;
                let bytes = index.stored_range(&range);
                let bytes =
                    usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap();
                let mut bytes = &stored[bytes];
                let mut read = vec![0; usize::try_from(end - start).unwrap()];
                for piece in index.pieces_in(&range) {
                    let (head, tail) = bytes.split_at(piece.len);
                    read[piece.at..piece.at + piece.len].copy_from_slice(head);
                    bytes = tail;
                }
                assert!(bytes.is_empty(), "{range:?}");
                let expect = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
                assert_eq!(read, logical[expect], "{range:?}");
            }
        }
        assert_eq!(index.stored_bytes(), 60);
    }

    #[test]
    fn a_hostile_map_does_not_overflow() {
        let index = SparseIndex::new(&[(u64::MAX - 1, u64::MAX), (5, u64::MAX), (0, 3)]);
        for range in [0..10, 3..u64::MAX, u64::MAX - 2..u64::MAX] {
            index.stored_range(&range);
            drop(index.pieces_in(&range));
        }
        assert_eq!(index.stored_bytes(), u64::MAX);
    }
}

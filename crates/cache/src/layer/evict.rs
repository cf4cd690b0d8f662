//! Giving up spans: first the map forgets them, then their blocks become holes.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Layer, SpanState, ticks};
use crate::disk::{self, Name};

/// What an eviction did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evicted {
    /// The spans that are missing now.
    pub spans: Vec<u32>,
    /// How many bytes of whole blocks were made holes.
    pub punched: u64,
}

/// Spans could not be evicted.
#[derive(Debug, thiserror::Error)]
pub enum EvictError {
    /// The layer is sealed: watch its file again, then unseal it, then evict.
    #[error("the layer is sealed and must be unsealed before a part of it is evicted")]
    Sealed,
    /// The disk failed. The spans are missing, and their bytes may still take up room.
    #[error("evicting spans from the layer cache")]
    Io(#[from] io::Error),
}

/// What is punched and counted: the largest block that file systems commonly use.
pub(crate) const BLOCK: u64 = 4096;

/// How long an eviction waits for those who read; it is tried again when somebody needs the room.
const PATIENCE: Duration = Duration::from_millis(200);

impl Layer {
    /// Makes spans missing and gives their room back to the disk.
    ///
    /// Left out are spans that are missing already, those used within the last `idle`, and those whose
    /// bytes `is_read` says somebody waits for or was allowed to read and may not have read yet. It is
    /// asked while nobody holds [`reading`](Self::reading), and must neither block nor call the layer.
    /// If somebody holds on to that, or readers are [unknown](Self::unknown_reader), all are left out.
    /// Blocks at the edges that hold bytes of other spans stay.
    ///
    /// # Guarantees
    ///
    /// At no moment, not even after a power loss, does the map vouch for a hole: the records are
    /// cleared and flushed before a block is punched.
    ///
    /// # Errors
    ///
    /// The layer is sealed, or the disk failed.
    pub fn evict(
        &self,
        spans: &[u32],
        idle: Duration,
        is_read: &dyn Fn(&Range<u64>) -> bool,
    ) -> Result<Evicted, EvictError> {
        let _one_at_a_time = self.evictions.lock();
        let victims = self.choose(spans, ticks(idle), is_read)?;
        if victims.is_empty() {
            return Ok(Evicted { spans: victims, punched: 0 });
        }
        let result = self.forget_and_punch(&victims);
        for &span in &victims {
            self.leaving.remove(span);
        }
        Ok(Evicted { punched: result?, spans: victims })
    }

    /// Makes spans missing and leaves their bytes where they are, so that they are made again.
    ///
    /// It needs no grace: whoever is about to read still reads the same bytes.
    ///
    /// # Errors
    ///
    /// The layer is sealed, or the disk failed.
    pub fn forget(&self, spans: &[u32]) -> Result<(), EvictError> {
        let mut map = self.map.lock();
        if map.sealed.is_some() {
            return Err(EvictError::Sealed);
        }
        self.losses.fetch_add(1, Ordering::SeqCst);
        for &span in spans {
            self.set_state(span, SpanState::Missing);
            self.clear_record(&mut map, span)?;
        }
        let file = map.file.clone();
        drop(map);
        // An old record must not come back after a power loss: it may have been found wrong.
        if let Some(file) = file {
            disk::sync(&file, Name::Map)?;
        }
        Ok(())
    }

    /// Makes those of the spans that can go missing in memory, so that nobody relies on them.
    fn choose(
        &self,
        spans: &[u32],
        idle: u32,
        is_read: &dyn Fn(&Range<u64>) -> bool,
    ) -> Result<Vec<u32>, EvictError> {
        let Some(_nobody_reads_or_writes) = self.punching.try_write_for(PATIENCE) else {
            return Ok(Vec::new());
        };
        let can_go = |span: &&u32| {
            self.state(**span) != SpanState::Missing
                && !self.is_in_use(**span, idle)
                && !is_read(&self.shape.range(**span))
        };
        let can_go: Vec<u32> = spans.iter().filter(can_go).copied().collect();
        let map = self.map.lock();
        if map.sealed.is_some() {
            return Err(EvictError::Sealed);
        }
        let mut victims = Vec::new();
        for span in can_go {
            self.set_state(span, SpanState::Missing);
            if self.leaving.insert(span) {
                victims.push(span);
            }
        }
        if !victims.is_empty() {
            self.losses.fetch_add(1, Ordering::SeqCst);
        }
        victims.sort_unstable();
        Ok(victims)
    }

    fn forget_and_punch(&self, victims: &[u32]) -> io::Result<u64> {
        let mut map = self.map.lock();
        for &span in victims {
            self.clear_record(&mut map, span)?;
        }
        let file = map.file.clone();
        // Nobody who marks another span waits for the disk.
        drop(map);
        if let Some(file) = file {
            disk::sync(&file, Name::Map)?;
        }
        self.punch_blocks(victims)
    }

    fn punch_blocks(&self, spans: &[u32]) -> io::Result<u64> {
        let mut punched = 0;
        for run in runs(spans) {
            let bytes = self.shape.range(run.start).start..self.shape.range(run.end - 1).end;
            let blocks = whole_blocks(&bytes, self.shape.bytes);
            if blocks.is_empty()
                || !disk::punch(&self.data, blocks.start, blocks.end - blocks.start)?
            {
                continue;
            }
            punched += blocks.end - blocks.start;
        }
        Ok(punched)
    }
}

/// The blocks that hold no byte outside of `range`, in a file of `len` bytes.
pub(crate) fn whole_blocks(range: &Range<u64>, len: u64) -> Range<u64> {
    let start = range.start.next_multiple_of(BLOCK);
    let end =
        if range.end == len { len.next_multiple_of(BLOCK) } else { range.end / BLOCK * BLOCK };
    start..end.max(start)
}

/// Runs of neighbours in ascending numbers.
fn runs(spans: &[u32]) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for &span in spans {
        match runs.last_mut() {
            Some(run) if span <= run.end => run.end = run.end.max(span + 1),
            _ => runs.push(span..span + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_blocks(range: Range<u64>, len: u64, expected: Range<u64>) {
        assert_eq!(whole_blocks(&range, len), expected);
    }

    #[test]
    fn only_blocks_without_foreign_bytes_are_punched() {
        check_blocks(0..4096, 10_000, 0..4096);
        check_blocks(0..4095, 10_000, 0..0);
        check_blocks(1..8192, 10_000, 4096..8192);
        check_blocks(1..8191, 10_000, 4096..4096);
        check_blocks(4097..8191, 10_000, 8192..8192);
    }

    #[test]
    fn the_last_block_belongs_to_the_last_span() {
        check_blocks(5000..10_000, 10_000, 8192..12_288);
        check_blocks(9000..10_000, 10_000, 12_288..12_288);
    }

    #[test]
    fn neighbours_are_punched_together() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[1, 2, 2, 3, 7, 9, 10]), [1..4, 7..8, 9..11]);
    }
}

//! Checked access to the bytes of an image.

use super::ReadError;

/// The bytes of an image and how many more of them may be looked at.
#[derive(Debug)]
pub(super) struct Source<'a> {
    bytes: &'a [u8],
    /// Inodes of a hostile image may all refer to the same bytes. Those of a sound one do not, so
    /// looking at each byte about twice is enough.
    budget: u64,
}

impl<'a> Source<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Self { bytes, budget: len.saturating_mul(2).saturating_add(4096) }
    }

    /// `len` bytes from `at`.
    pub(super) fn get(&self, at: u64, len: u64) -> Result<&'a [u8], ReadError> {
        let end = at.checked_add(len).and_then(|end| usize::try_from(end).ok());
        usize::try_from(at)
            .ok()
            .zip(end)
            .and_then(|(at, end)| self.bytes.get(at..end))
            .ok_or(ReadError::Corrupt { at, what: "it goes on past the end of the image" })
    }

    /// As [`Source::get`], counted against the budget.
    pub(super) fn take(&mut self, at: u64, len: u64) -> Result<&'a [u8], ReadError> {
        let what = "inodes share their content";
        self.budget = self.budget.checked_sub(len).ok_or(ReadError::Corrupt { at, what })?;
        self.get(at, len)
    }
}

/// Little-endian numbers in bytes that are known to be long enough; 0 beyond their end.
pub(super) trait Fields {
    fn array<const N: usize>(&self, at: usize) -> [u8; N];

    fn u8_at(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.array(at))
    }
    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }
    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }
    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }
}

impl Fields for [u8] {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
    }
}

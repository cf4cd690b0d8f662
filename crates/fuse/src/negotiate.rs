//! What session and kernel agree on, once for the life of a mount.

use sys::fuse_device::{InitReply, InitRequest, MAJOR, MAX_MINOR, MIN_MINOR, init};

use crate::filesystem::{DirectReads, Filesystem, Xattrs};

/// Bytes of a write; none is ever received, but it bounds how long a request can be, so small.
const MAX_WRITE: u32 = 4096;
/// Asked for; the kernel may allow less (`fs.fuse.max_pages_limit`).
const MAX_PAGES: u16 = 256;
/// Reads ahead may wait for a network: the kernel's own limit of 12 would stop everything behind
/// the first slow ones. The pages are taken from memory before the limit counts, so it saves none.
const MAX_BACKGROUND: u16 = 16384;
/// Above it the kernel leaves out reading ahead.
const CONGESTION: u16 = 12288;
/// The kernel takes the smaller of this and its own.
const MAX_READAHEAD: u32 = 16 << 20;
/// First byte of the note.
const NOTE_VERSION: u8 = 1;

/// What was agreed on when the file system was mounted. A successor needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    minor: u32,
    flags: u64,
    max_write: u32,
    max_pages: u16,
    may_resend: bool,
}

impl Negotiated {
    /// How many bytes [`to_bytes`](Self::to_bytes) gives.
    pub const LEN: usize = 20;

    /// Answers the kernel's offer; `None` if its protocol is too old.
    pub(crate) fn answer(
        offer: &InitRequest,
        fs: &dyn Filesystem,
        default_permissions: bool,
    ) -> Option<(Self, InitReply)> {
        if offer.major != MAJOR || offer.minor < MIN_MINOR {
            return None;
        }
        let mut wanted = init::ASYNC_READ
            | init::DO_READDIRPLUS
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::NO_OPEN_SUPPORT
            | init::NO_OPENDIR_SUPPORT
            | init::NO_EXPORT_SUPPORT
            | init::HAS_RESEND;
        if fs.direct_reads() == DirectReads::Parallel {
            wanted |= init::ASYNC_DIO;
        }
        if fs.xattrs() == Xattrs::Acls {
            wanted |= init::POSIX_ACL;
        }
        // The kernel refuses the connection if it is asked for without default_permissions.
        if default_permissions {
            wanted |= init::ALLOW_IDMAP;
        }
        let flags = offer.flags & wanted;
        let negotiated = Self {
            minor: offer.minor.min(MAX_MINOR),
            flags,
            max_write: MAX_WRITE,
            max_pages: MAX_PAGES,
            may_resend: flags & init::HAS_RESEND != 0,
        };
        let reply = InitReply {
            minor: negotiated.minor,
            max_readahead: MAX_READAHEAD,
            flags,
            max_background: MAX_BACKGROUND,
            congestion_threshold: CONGESTION,
            max_write: MAX_WRITE,
            max_pages: MAX_PAGES,
        };
        Some((negotiated, reply))
    }

    /// For a connection whose predecessor died between its answer to the kernel and its note.
    /// Everything that a session looks at is in the requests themselves.
    pub(crate) fn unknown() -> Self {
        Self {
            minor: MIN_MINOR,
            flags: 0,
            max_write: MAX_WRITE,
            max_pages: MAX_PAGES,
            may_resend: true,
        }
    }

    /// Whether the kernel sends unanswered requests again to a successor (Linux 6.9). Without, a
    /// read that was under way when its daemon died waits until it is killed.
    #[must_use]
    pub fn may_resend(&self) -> bool {
        self.may_resend
    }

    /// Bytes of the longest request.
    pub(crate) fn request_len(&self) -> usize {
        let write = usize::try_from(self.max_write).unwrap_or(usize::MAX);
        write.saturating_add(4096).max(sys::fuse_device::MIN_REQUEST_BUFFER)
    }

    /// Bytes of an ordinary read.
    pub(crate) fn read_len(&self) -> usize {
        usize::from(self.max_pages) * 4096
    }

    /// The note for a successor.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut note = [0; Self::LEN];
        note[0] = NOTE_VERSION;
        note[1] = u8::from(self.may_resend);
        note[2..4].copy_from_slice(&self.max_pages.to_le_bytes());
        note[4..8].copy_from_slice(&self.minor.to_le_bytes());
        note[8..12].copy_from_slice(&self.max_write.to_le_bytes());
        note[12..].copy_from_slice(&self.flags.to_le_bytes());
        note
    }

    /// Reads a note of a predecessor; `None` if it is none. A session then asks the kernel what it
    /// can and assumes the rest.
    #[must_use]
    pub fn from_bytes(note: &[u8]) -> Option<Self> {
        let note: &[u8; Self::LEN] = note.try_into().ok()?;
        let (&[version, may_resend], rest) = note.split_first_chunk()?;
        let (max_pages, rest) = rest.split_first_chunk()?;
        let (minor, rest) = rest.split_first_chunk()?;
        let (max_write, flags) = rest.split_first_chunk()?;
        let read = Self {
            minor: u32::from_le_bytes(*minor),
            flags: u64::from_le_bytes(flags.try_into().ok()?),
            max_write: u32::from_le_bytes(*max_write),
            max_pages: u16::from_le_bytes(*max_pages),
            may_resend: may_resend == 1,
        };
        let sane = version == NOTE_VERSION && may_resend <= 1 && read.max_write <= 64 << 20;
        sane.then_some(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_back() {
        let negotiated = Negotiated {
            minor: 40,
            flags: init::HAS_RESEND | init::ASYNC_READ,
            max_write: 4096,
            max_pages: 256,
            may_resend: true,
        };
        assert_eq!(Negotiated::from_bytes(&negotiated.to_bytes()), Some(negotiated));
    }

    #[test]
    fn foreign_notes_are_refused() {
        let good = Negotiated::unknown().to_bytes();
        for len in 0..good.len() {
            assert_eq!(Negotiated::from_bytes(&good[..len]), None);
        }
        let mut newer = good;
        newer[0] = 2;
        assert_eq!(Negotiated::from_bytes(&newer), None);
        let mut huge = good;
        huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Negotiated::from_bytes(&huge), None);
    }
}

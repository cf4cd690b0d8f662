//! Numbers of the FUSE protocol, and a reader for its messages.
//!
//! Source: `include/uapi/linux/fuse.h` of Linux, protocol 7.31 (Linux 5.4) to 7.44. All integers
//! have the machine's byte order.

/// The protocol's major version.
pub const MAJOR: u32 = 7;
/// The oldest minor version that is spoken: all structures have had their present size since.
pub const MIN_MINOR: u32 = 31;
/// The newest minor version that is spoken; it brought `FUSE_NOTIFY_RESEND`.
pub const MAX_MINOR: u32 = 40;
/// The inode number of the root directory.
pub const ROOT_INO: u64 = 1;
/// Set by the kernel in the `unique` of a request that it sends again.
pub const UNIQUE_RESEND: u64 = 1 << 63;
/// Bytes of the header before every request.
pub const IN_HEADER_LEN: usize = 40;
/// Bytes of the header before every reply and notification.
pub const OUT_HEADER_LEN: usize = 16;

pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const TMPFILE: u32 = 51;
}

pub(super) mod notify {
    pub(crate) const INVAL_INODE: u32 = 2;
    pub(crate) const INVAL_ENTRY: u32 = 3;
    pub(crate) const RESEND: u32 = 7;
}

/// Flags of `FUSE_INIT`; those from bit 32 on travel in the second word.
pub mod init {
    /// Several reads of one file at a time.
    pub const ASYNC_READ: u64 = 1;
    /// Directory entries come with their attributes.
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    /// Direct reads are split and sent at once.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// `ENOSYS` to an open means that none needs to be sent any more.
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    /// Lookups and listings of one directory at the same time.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// The kernel enforces access control lists.
    pub const POSIX_ACL: u64 = 1 << 20;
    /// `max_pages` of the reply counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// Targets of symbolic links are cached.
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    /// `ENOSYS` to an opendir means that none needs to be sent any more.
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    /// The second word of flags counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// No file handles for NFS.
    pub const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    /// The kernel can send unanswered requests again (Linux 6.9).
    pub const HAS_RESEND: u64 = 1 << 39;
    /// Mounts with mapped ids are allowed (Linux 6.12); needs `default_permissions`.
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// Takes numbers off the front of a message; `None` where it ends too early.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_ne_bytes)
    }

    /// The bytes before the next NUL, which must exist.
    pub(super) fn name(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|&byte| byte == 0)?;
        let (name, rest) = self.0.split_at(end);
        self.0 = rest.get(1..)?;
        Some(name)
    }
}

//! Numbers of the format, named as in `erofs_fs.h` of Linux.

/// log2 of the bytes of a block in images written here.
pub(crate) const BLOCK_BITS: u8 = 9;
/// Bytes of a block in images written here; a tar's.
pub(crate) const BLOCK_BYTES: u64 = 1 << BLOCK_BITS;

pub(crate) const SUPER_OFFSET: usize = 1024;
pub(crate) const SUPER_BYTES: usize = 128;
pub(crate) const MAGIC: u32 = 0xE0F5_E1E2;
pub(crate) const FEATURE_COMPAT_SB_CHKSUM: u32 = 1;
pub(crate) const FEATURE_COMPAT_MTIME: u32 = 2;
pub(crate) const FEATURE_INCOMPAT_CHUNKED_FILE: u32 = 4;
pub(crate) const FEATURE_INCOMPAT_DEVICE_TABLE: u32 = 8;

pub(crate) const DEVICE_SLOT_BYTES: usize = 128;
pub(crate) const DEVICE_TAG_BYTES: usize = 64;

/// Inodes begin at multiples of this; inode numbers count them.
pub(crate) const INODE_SLOT_BYTES: u64 = 32;
pub(crate) const EXTENDED_INODE_BYTES: u64 = 64;
pub(crate) const INODE_EXTENDED: u16 = 1;
/// Where the data layout is in `i_format`.
pub(crate) const LAYOUT_SHIFT: u16 = 1;
pub(crate) const LAYOUT_FLAT_PLAIN: u16 = 0;
pub(crate) const LAYOUT_FLAT_INLINE: u16 = 2;
pub(crate) const LAYOUT_CHUNK_BASED: u16 = 4;

pub(crate) const CHUNK_INDEX_BYTES: u64 = 8;
pub(crate) const CHUNK_FORMAT_BLOCK_BITS: u16 = 0x1f;
pub(crate) const CHUNK_FORMAT_INDEXES: u16 = 0x20;
/// The block address of a hole.
pub(crate) const NULL_ADDRESS: u32 = u32::MAX;

pub(crate) const DIRENT_BYTES: usize = 12;
pub(crate) const FILE_TYPE_REGULAR: u8 = 1;
pub(crate) const FILE_TYPE_DIRECTORY: u8 = 2;
pub(crate) const FILE_TYPE_CHAR: u8 = 3;
pub(crate) const FILE_TYPE_BLOCK: u8 = 4;
pub(crate) const FILE_TYPE_FIFO: u8 = 5;
pub(crate) const FILE_TYPE_SYMLINK: u8 = 7;

pub(crate) const XATTR_HEADER_BYTES: u64 = 12;
pub(crate) const XATTR_ENTRY_BYTES: usize = 4;
/// Prefixes of names, each with the number that stands for it.
pub(crate) const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

pub(crate) const S_IFMT: u16 = 0o170_000;
pub(crate) const S_IFIFO: u16 = 0o010_000;
pub(crate) const S_IFCHR: u16 = 0o020_000;
pub(crate) const S_IFDIR: u16 = 0o040_000;
pub(crate) const S_IFBLK: u16 = 0o060_000;
pub(crate) const S_IFREG: u16 = 0o100_000;
pub(crate) const S_IFLNK: u16 = 0o120_000;

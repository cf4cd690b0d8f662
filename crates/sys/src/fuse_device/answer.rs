//! What the kernel is told: the bodies of replies, appended to a buffer.

use super::abi::{MAJOR, init};

/// Tells the kernel to keep something for ever (in seconds).
const FOR_EVER: u64 = u64::MAX / 4;
/// The block size reported to `stat` and `statfs`, in bytes.
const BLOCK_SIZE: u32 = 4096;
/// Bytes of a `fuse_entry_out`.
const ENTRY_LEN: usize = 128;
/// Bytes of a `fuse_dirent` without its name.
const DIRENT_LEN: usize = 24;

/// How long the kernel may keep what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// Until the file system ends.
    Always,
    /// Not at all: it asks each time.
    Never,
}

impl Validity {
    fn seconds(self) -> u64 {
        match self {
            Self::Always => FOR_EVER,
            Self::Never => 0,
        }
    }
}

/// Attributes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Bytes that it occupies; rounded up to 512 for `st_blocks`.
    pub stored: u64,
    /// Seconds since 1970 and nanoseconds, of all three times.
    pub mtime: (i64, u32),
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Number of names.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
}

impl Attr {
    fn encode(&self, out: &mut Vec<u8>) {
        put_u64s(out, &[self.ino, self.size, self.stored.div_ceil(512)]);
        put_u64s(out, &[self.mtime.0.cast_unsigned(); 3]);
        put_u32s(out, &[self.mtime.1; 3]);
        let (major, minor) = self.device;
        // As new_encode_dev() of the kernel.
        let device = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
        put_u32s(out, &[self.mode, self.links, self.uid, self.gid, device, BLOCK_SIZE, 0]);
    }
}

/// Figures of a file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statfs {
    /// Bytes of all files.
    pub bytes: u64,
    /// Number of files.
    pub files: u64,
}

/// The reply to [`Operation::Init`](super::Operation::Init).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitReply {
    /// Protocol version that is spoken from now on.
    pub minor: u32,
    /// Bytes to read ahead at most.
    pub max_readahead: u32,
    /// What is wanted of the kernel's offer.
    pub flags: u64,
    /// How many requests nobody waits for directly may be under way.
    pub max_background: u16,
    /// From how many of them on reading ahead is left out.
    pub congestion_threshold: u16,
    /// Bytes of a write; also bounds how long a request can be.
    pub max_write: u32,
    /// Pages of a read at most.
    pub max_pages: u16,
}

impl InitReply {
    /// The body of the reply.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let (low, high) = split_flags(self.flags);
        put_u32s(&mut out, &[MAJOR, self.minor, self.max_readahead, low]);
        out.extend_from_slice(&self.max_background.to_ne_bytes());
        out.extend_from_slice(&self.congestion_threshold.to_ne_bytes());
        let granularity_of_times = 1;
        put_u32s(&mut out, &[self.max_write, granularity_of_times]);
        out.extend_from_slice(&self.max_pages.to_ne_bytes());
        let map_alignment = 0_u16;
        out.extend_from_slice(&map_alignment.to_ne_bytes());
        let max_stack_depth = 0;
        put_u32s(&mut out, &[high, max_stack_depth]);
        out.resize(64, 0);
        out
    }

    /// The body of the reply to a kernel that speaks a newer major version: it then asks again.
    #[must_use]
    pub fn encode_older_major(minor: u32) -> Vec<u8> {
        Self {
            minor,
            max_readahead: 0,
            flags: 0,
            max_background: 0,
            congestion_threshold: 0,
            max_write: 0,
            max_pages: 0,
        }
        .encode()
    }
}

fn split_flags(flags: u64) -> (u32, u32) {
    let flags = if flags >> 32 == 0 { flags } else { flags | init::INIT_EXT };
    let [a, b, c, d, e, f, g, h] = flags.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// The body of the reply to `getattr`.
pub fn attr(out: &mut Vec<u8>, attr: &Attr, validity: Validity) {
    put_u64s(out, &[validity.seconds(), 0]);
    attr.encode(out);
}

/// The body of the reply to `lookup`.
pub fn entry(out: &mut Vec<u8>, attr: &Attr, names: Validity, attrs: Validity) {
    let generation = 0;
    put_u64s(out, &[attr.ino, generation, names.seconds(), attrs.seconds(), 0]);
    attr.encode(out);
}

/// The body of the reply to `lookup` for a name that does not exist and never will.
pub fn no_entry(out: &mut Vec<u8>) {
    put_u64s(out, &[0, 0, FOR_EVER, 0]);
    out.resize(out.len() + ENTRY_LEN - 32, 0);
}

/// The body of the reply to `opendir`: nothing is cached.
pub fn opened(out: &mut Vec<u8>) {
    put_u64s(out, &[0, 0]);
}

/// The body of the reply to `statfs`.
pub fn statfs(out: &mut Vec<u8>, figures: &Statfs) {
    let blocks = figures.bytes.div_ceil(u64::from(BLOCK_SIZE));
    put_u64s(out, &[blocks, 0, 0, figures.files, 0]);
    let longest_name = 255;
    put_u32s(out, &[BLOCK_SIZE, longest_name, BLOCK_SIZE, 0]);
    put_u32s(out, &[0; 6]);
}

/// The body of the reply to `getxattr` and `listxattr` that only asked for the length.
pub fn xattr_len(out: &mut Vec<u8>, len: u32) {
    put_u32s(out, &[len, 0]);
}

/// One entry of a directory.
#[derive(Debug, Clone, Copy)]
pub struct Dirent<'a> {
    /// Its inode number.
    pub ino: u64,
    /// Where the entry after it begins.
    pub next_offset: u64,
    /// Type (and permissions) as in `st_mode`.
    pub mode: u32,
    /// Its name.
    pub name: &'a [u8],
}

/// Collects entries of a directory until the kernel's buffer is full.
#[derive(Debug)]
pub struct DirBuffer<'a> {
    out: &'a mut Vec<u8>,
    limit: usize,
}

impl<'a> DirBuffer<'a> {
    /// Appends to `out` until it holds `limit` bytes.
    pub fn new(out: &'a mut Vec<u8>, limit: usize) -> Self {
        Self { out, limit }
    }

    /// Adds an entry of `readdir`; false if there is no room for it.
    #[must_use]
    pub fn push(&mut self, entry: &Dirent<'_>) -> bool {
        self.has_room(DIRENT_LEN, entry) && self.put_dirent(entry)
    }

    /// Adds an entry of `readdirplus`; false if there is no room for it. Without attributes
    /// (for `.` and `..`) the kernel makes no inode of it.
    #[must_use]
    pub fn push_plus(
        &mut self,
        entry: &Dirent<'_>,
        attr: Option<&Attr>,
        names: Validity,
        attrs: Validity,
    ) -> bool {
        if !self.has_room(ENTRY_LEN + DIRENT_LEN, entry) {
            return false;
        }
        match attr {
            Some(attr) => super::answer::entry(self.out, attr, names, attrs),
            None => self.out.resize(self.out.len() + ENTRY_LEN, 0),
        }
        self.put_dirent(entry)
    }

    fn has_room(&self, fixed: usize, entry: &Dirent<'_>) -> bool {
        let len = (fixed + entry.name.len()).next_multiple_of(8);
        self.out.len() + len <= self.limit
    }

    fn put_dirent(&mut self, entry: &Dirent<'_>) -> bool {
        let Ok(name_len) = u32::try_from(entry.name.len()) else { return false };
        put_u64s(self.out, &[entry.ino, entry.next_offset]);
        put_u32s(self.out, &[name_len, (entry.mode & 0o170_000) >> 12]);
        self.out.extend_from_slice(entry.name);
        // Both structures are multiples of 8 and so is what was there before.
        self.out.resize(self.out.len().next_multiple_of(8), 0);
        true
    }
}

fn put_u64s(out: &mut Vec<u8>, numbers: &[u64]) {
    numbers.iter().for_each(|number| out.extend_from_slice(&number.to_ne_bytes()));
}

fn put_u32s(out: &mut Vec<u8>, numbers: &[u32]) {
    numbers.iter().for_each(|number| out.extend_from_slice(&number.to_ne_bytes()));
}

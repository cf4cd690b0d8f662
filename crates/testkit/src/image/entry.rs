//! Tar entries as values, strange ones included.

use super::content::Content;

/// The modification time of an entry that sets none: 2023-11-14 22:13:20 UTC.
pub const DEFAULT_MTIME: i64 = 1_700_000_000;

/// One entry of a tar. What it says need not make sense; it is written as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// The name, as it shall stand in the archive.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: TarKind,
    /// The mode field.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Owner's name.
    pub uname: Vec<u8>,
    /// Group's name.
    pub gname: Vec<u8>,
    /// Modification time: seconds since 1970, rounded down.
    pub mtime: i64,
    /// The rest of it, in nanoseconds below 10^9.
    pub mtime_nanos: u32,
    /// Extended attributes: name with its prefix, value. Written as `SCHILY.xattr.` records.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Further PAX records, written first and in this order. Keys cannot have a `=`.
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
    /// How to write what does not fit into a plain header.
    pub dialect: Dialect,
}

/// What a tar entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    /// A regular file.
    File(Content),
    /// A regular file with holes.
    Sparse(SparseContent),
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// Another name of an earlier entry.
    HardLink(Vec<u8>),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A file of which only some pieces are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseContent {
    /// Offset and bytes of each piece, ascending and disjoint. GNU tar only makes, and only
    /// understands, pieces of whole 512-byte blocks, but for the last; Go takes any.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// The size of the file.
    pub size: u64,
    /// How it is written.
    pub format: SparseFormat,
}

impl SparseContent {
    /// The whole file, holes filled with zeros.
    ///
    /// # Panics
    /// If the pieces do not lie in the file, or it is larger than memory can be.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let index = |offset: u64| usize::try_from(offset).expect("fixtures fit into memory");
        let mut bytes = vec![0; index(self.size)];
        for (offset, piece) in &self.pieces {
            let start = index(*offset);
            bytes[start..start + piece.len()].copy_from_slice(piece);
        }
        bytes
    }
}

/// The forms in which GNU tar has written sparse files over the years.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SparseFormat {
    /// Entries of type `S`, the map in and after the header.
    OldGnu,
    /// PAX records for each piece.
    Pax00,
    /// One PAX record with the map.
    Pax01,
    /// The map at the start of the data.
    Pax10,
}

/// How to write what does not fit into a plain header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dialect {
    /// As PAX records; a plain header where those are not needed.
    #[default]
    Pax,
    /// Like [`Dialect::Pax`], but names that can be split go into the ustar prefix field.
    Ustar,
    /// As GNU's long names and binary numbers. Fractions of seconds are lost.
    Gnu,
}

impl TarEntry {
    /// An entry of root's with the usual mode of its kind.
    pub fn new(name: impl Into<Vec<u8>>, kind: TarKind) -> Self {
        let mode = match kind {
            TarKind::Directory => 0o755,
            TarKind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        Self {
            name: name.into(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            uname: Vec::new(),
            gname: Vec::new(),
            mtime: DEFAULT_MTIME,
            mtime_nanos: 0,
            xattrs: Vec::new(),
            pax: Vec::new(),
            dialect: Dialect::Pax,
        }
    }

    /// A regular file.
    pub fn file(name: impl Into<Vec<u8>>, content: impl Into<Content>) -> Self {
        Self::new(name, TarKind::File(content.into()))
    }

    /// A directory; as is the custom, with a slash at the end of its name.
    pub fn directory(name: impl Into<Vec<u8>>) -> Self {
        let mut name = name.into();
        if !name.ends_with(b"/") {
            name.push(b'/');
        }
        Self::new(name, TarKind::Directory)
    }

    /// A symbolic link.
    pub fn symlink(name: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Self {
        Self::new(name, TarKind::Symlink(target.into()))
    }

    /// A hard link.
    pub fn hard_link(name: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Self {
        Self::new(name, TarKind::HardLink(target.into()))
    }

    /// Sets the mode.
    #[must_use]
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// Sets user and group.
    #[must_use]
    pub fn owner(self, uid: u64, gid: u64) -> Self {
        Self { uid, gid, ..self }
    }

    /// Sets the modification time.
    #[must_use]
    pub fn mtime(self, seconds: i64, nanos: u32) -> Self {
        Self { mtime: seconds, mtime_nanos: nanos, ..self }
    }

    /// Adds an extended attribute.
    #[must_use]
    pub fn xattr(mut self, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name.into(), value.into()));
        self
    }

    /// Adds a PAX record.
    #[must_use]
    pub fn pax(mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        self.pax.push((key.into(), value.into()));
        self
    }

    /// Sets the dialect.
    #[must_use]
    pub fn dialect(self, dialect: Dialect) -> Self {
        Self { dialect, ..self }
    }
}

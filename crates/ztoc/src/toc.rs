//! The table of contents of one layer: what its tar says, entry by entry, in archive order.

use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// A table of contents, in archive order. It is in memory as long as somebody holds it, and is read again for
/// whoever asks later: that of a large layer takes tens of megabytes, and a mounted one is seldom asked for.
pub struct Toc {
    held: Mutex<Weak<Vec<TocEntry>>>,
    open: Box<dyn Fn() -> Result<Entries, ReadTocError> + Send + Sync>,
}

/// Entries in archive order, read one after the other.
pub type Entries = Box<dyn Iterator<Item = Result<TocEntry, ReadTocError>>>;

/// A table of contents that was there once cannot be read again.
#[derive(Debug, Clone, thiserror::Error)]
#[error("reading the table of contents again")]
pub struct ReadTocError(#[source] Arc<dyn Error + Send + Sync>);

impl ReadTocError {
    /// Says why.
    pub fn new(why: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(Arc::from(why.into()))
    }
}

impl Toc {
    /// One that is read from what `open` opens.
    pub fn later(open: impl Fn() -> Result<Entries, ReadTocError> + Send + Sync + 'static) -> Self {
        Self { held: Mutex::default(), open: Box::new(open) }
    }

    /// Its entries. Whoever asks first reads them; the others wait for him.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read(&self) -> Result<Arc<Vec<TocEntry>>, ReadTocError> {
        let mut held = self.held();
        if let Some(entries) = held.upgrade() {
            return Ok(entries);
        }
        let entries = Arc::new((self.open)()?.collect::<Result<_, _>>()?);
        *held = Arc::downgrade(&entries);
        Ok(entries)
    }

    /// Its entries one after the other, for who does not hold them.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn entries(&self) -> Result<Entries, ReadTocError> {
        self.get().map_or_else(|| (self.open)(), |held| Ok(one_by_one(held)))
    }

    /// Gives it its entries, which were read already, and returns them to be held.
    pub fn set(&self, entries: Vec<TocEntry>) -> Arc<Vec<TocEntry>> {
        let entries = Arc::new(entries);
        *self.held() = Arc::downgrade(&entries);
        entries
    }

    /// Its entries, if somebody holds them.
    #[must_use]
    pub fn get(&self) -> Option<Arc<Vec<TocEntry>>> {
        self.held().upgrade()
    }

    fn held(&self) -> MutexGuard<'_, Weak<Vec<TocEntry>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Vec<TocEntry>> for Toc {
    /// One that is in memory for good.
    fn from(entries: Vec<TocEntry>) -> Self {
        let entries = Arc::new(entries);
        let held = Mutex::new(Arc::downgrade(&entries));
        Self { held, open: Box::new(move || Ok(one_by_one(Arc::clone(&entries)))) }
    }
}

fn one_by_one(entries: Arc<Vec<TocEntry>>) -> Entries {
    Box::new((0..entries.len()).map_while(move |at| entries.get(at).cloned()).map(Ok))
}

impl fmt::Debug for Toc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.get().map(|entries| entries.len());
        f.debug_struct("Toc").field("entries", &entries).finish_non_exhaustive()
    }
}

/// What a tar entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of an earlier entry.
    HardLink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// A point in time: seconds since 1970 (may be negative) and nanoseconds (below 10^9).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mtime {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// The rest.
    pub nanos: u32,
}

/// Where the data of a sparse file lies: ascending, disjoint pieces of the logical file, whose bytes
/// follow one another in the archive. Everything between them is zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SparseMap {
    /// (offset in the logical file, length), in bytes.
    pub pieces: Vec<(u64, u64)>,
    /// The size of the logical file in bytes.
    pub logical_size: u64,
}

/// What a PAX record takes beside its text: two lists, and what an allocator adds. Without it records
/// of a few bytes would take twenty times what they are counted for.
pub(crate) const RECORD_BYTES: usize = 96;

/// One entry of a layer's tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocEntry {
    /// The name as it stands in the archive (leading `./`, trailing `/` and all); bytes, not text.
    pub name: Vec<u8>,
    /// What it makes.
    pub kind: EntryKind,
    /// Where its data begins in the uncompressed tar; for an entry without data, where it would.
    pub offset: u64,
    /// How many bytes of data the archive holds for it.
    pub size: u64,
    /// The target of a link, else empty.
    pub linkname: Vec<u8>,
    /// The mode field, raw.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Owner's name.
    pub uname: Vec<u8>,
    /// Group's name.
    pub gname: Vec<u8>,
    /// Modification time.
    pub mtime: Mtime,
    /// Device numbers, of devices only.
    pub device: (u32, u32),
    /// All PAX records of the entry, sorted by key (extended attributes are those that begin with
    /// `SCHILY.xattr.`).
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of a sparse file, where its data lies.
    pub sparse: Option<SparseMap>,
}

impl TocEntry {
    /// An entry without data, owned by root, from 1970, that its owner may read and write.
    #[must_use]
    pub fn new(name: impl Into<Vec<u8>>, kind: EntryKind) -> Self {
        Self {
            name: name.into(),
            kind,
            offset: 0,
            size: 0,
            linkname: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            uname: Vec::new(),
            gname: Vec::new(),
            mtime: Mtime::default(),
            device: (0, 0),
            pax: Vec::new(),
            sparse: None,
        }
    }

    /// The extended attributes: (name, value), sorted by name.
    pub fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.pax.iter().filter_map(|(key, value)| {
            Some((key.strip_prefix(b"SCHILY.xattr.".as_slice())?, value.as_slice()))
        })
    }

    /// About how many bytes of memory its names and PAX records take.
    #[must_use]
    pub fn text_bytes(&self) -> u64 {
        let names = [&self.name, &self.linkname, &self.uname, &self.gname];
        let records = self.pax.iter().flat_map(|(key, value)| [key, value]);
        let text = names.into_iter().chain(records).map(Vec::len).fold(0, usize::saturating_add);
        let records = self.pax.len().saturating_mul(RECORD_BYTES);
        u64::try_from(text.saturating_add(records)).unwrap_or(u64::MAX)
    }

    /// About how many bytes of memory it takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let fields = u64::try_from(size_of::<Self>()).unwrap_or(u64::MAX);
        fields.saturating_add(self.text_bytes())
    }

    /// The size of the file that it makes.
    #[must_use]
    pub fn logical_size(&self) -> u64 {
        self.sparse.as_ref().map_or(self.size, |map| map.logical_size)
    }
}

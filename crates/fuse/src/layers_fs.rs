//! One folder with a file for each layer, for loop devices to lie over.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;
use sys::fuse_device::{Attr, Errno, Statfs};

use crate::bytes::Bytes;
use crate::filesystem::{DirEntry, DirSink, DirectReads, Filesystem, Ino, Names, Xattrs};
use crate::reply::{Piece, ReadReply};

/// As in ext4, and as the kernel is told by `statfs`.
const LONGEST_NAME: usize = 255;
/// A layer's bytes are for the daemon's own loop devices.
const FILE_MODE: u32 = 0o100_400;
const ROOT_MODE: u32 = 0o040_500;

/// A layer as a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// Its inode number: above 1, the same in every successor, and never used for another layer
    /// while the file system is mounted, because the kernel keeps its pages.
    pub ino: Ino,
    /// Its name.
    pub name: Vec<u8>,
    /// Its number for [`Bytes::read`].
    pub layer: u32,
    /// Bytes of the uncompressed layer.
    pub len: u64,
    /// Size of the file, at least `len`; the rest is zeros. Loop devices want a multiple of their
    /// block size.
    pub size: u64,
}

/// A layer cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddFileError {
    /// There is another file with that name or number.
    #[error("there is already another file named {:?} or with inode number {}", String::from_utf8_lossy(&file.name), file.ino.0)]
    Taken {
        /// The file that was to be added.
        file: LayerFile,
    },
    /// Its name, number or size cannot be those of a file.
    #[error("no file can be named {:?} with inode number {}, {} bytes of data and a size of {}", String::from_utf8_lossy(&file.name), file.ino.0, file.len, file.size)]
    Invalid {
        /// The file that was to be added.
        file: LayerFile,
    },
}

/// A flat folder of layers. Files can be added and removed while it is mounted.
pub struct LayersFs {
    bytes: Arc<dyn Bytes>,
    files: RwLock<BTreeMap<Ino, LayerFile>>,
}

impl std::fmt::Debug for LayersFs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayersFs").field("files", &self.files.read()).finish_non_exhaustive()
    }
}

impl LayersFs {
    /// An empty folder, to be filled with layers that `bytes` can give.
    #[must_use]
    pub fn new(bytes: Arc<dyn Bytes>) -> Self {
        Self { bytes, files: RwLock::new(BTreeMap::new()) }
    }

    /// Adds a file; the same file a second time is no error.
    ///
    /// # Errors
    /// See [`AddFileError`].
    pub fn add(&self, file: LayerFile) -> Result<(), AddFileError> {
        if !is_valid(&file) {
            return Err(AddFileError::Invalid { file });
        }
        let mut files = self.files.write();
        let is_other = |other: &&LayerFile| other.ino == file.ino || other.name == file.name;
        match files.values().find(is_other) {
            None => {
                files.insert(file.ino, file);
                Ok(())
            }
            Some(other) if *other == file => Ok(()),
            Some(_) => Err(AddFileError::Taken { file }),
        }
    }

    /// Removes a file and says whether there was one. Whoever has it open gets `ESTALE` for what the
    /// kernel does not hold.
    pub fn remove(&self, ino: Ino) -> bool {
        self.files.write().remove(&ino).is_some()
    }

    fn file(&self, ino: Ino) -> Result<LayerFile, Errno> {
        self.files.read().get(&ino).cloned().ok_or(Errno::STALE)
    }
}

impl Filesystem for LayersFs {
    fn names(&self) -> Names {
        Names::Changing
    }

    fn xattrs(&self) -> Xattrs {
        Xattrs::None
    }

    fn direct_reads(&self) -> DirectReads {
        DirectReads::Parallel
    }

    fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attr>, Errno> {
        if parent != Ino::ROOT {
            return Err(Errno::NOTDIR);
        }
        Ok(self.files.read().values().find(|file| file.name == name).map(attr_of))
    }

    fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        if ino == Ino::ROOT { Ok(root_attr()) } else { self.file(ino).map(|file| attr_of(&file)) }
    }

    fn readlink(&self, _ino: Ino) -> Result<Cow<'_, [u8]>, Errno> {
        Err(Errno::INVAL)
    }

    fn parent(&self, _directory: Ino) -> Result<Ino, Errno> {
        Ok(Ino::ROOT)
    }

    fn readdir(&self, directory: Ino, after: u64, sink: &mut DirSink<'_>) -> Result<(), Errno> {
        if directory != Ino::ROOT {
            return Err(Errno::NOTDIR);
        }
        // A file's number is its cookie, so a place stays right when others come and go.
        let first = Ino(after.saturating_add(1));
        for (ino, file) in self.files.read().range(first..) {
            if !sink.push(&DirEntry { name: &file.name, cookie: ino.0, attr: attr_of(file) }) {
                break;
            }
        }
        Ok(())
    }

    fn getxattr(&self, _ino: Ino, _name: &[u8]) -> Result<Cow<'_, [u8]>, Errno> {
        Err(Errno::NODATA)
    }

    fn listxattr(&self, _ino: Ino, _names: &mut Vec<u8>) -> Result<(), Errno> {
        Ok(())
    }

    fn statfs(&self) -> Statfs {
        let files = self.files.read();
        Statfs {
            bytes: files.values().map(|file| file.size).fold(0, u64::saturating_add),
            files: u64::try_from(files.len()).unwrap_or(u64::MAX).saturating_add(1),
        }
    }

    fn read(&self, ino: Ino, range: Range<u64>, reply: ReadReply) {
        let (layer, file_len, size) = match self.files.read().get(&ino) {
            Some(file) => (file.layer, file.len, file.size),
            None => return reply.error(Errno::STALE),
        };
        let clamp = |limit: u64| range.start.min(limit)..range.end.min(limit);
        let stored = clamp(file_len);
        let Ok(total) = usize::try_from(clamp(size).end - clamp(size).start) else {
            return reply.error(Errno::INVAL);
        };
        let Ok(len) = usize::try_from(stored.end - stored.start) else {
            return reply.error(Errno::INVAL);
        };
        if len == 0 {
            return reply.zeros(total);
        }
        let then = move |found: Result<(&std::fs::File, u64), Errno>| match found {
            Ok((file, offset)) if len == total => reply.file(file, offset, len),
            Ok((file, offset)) => reply.scattered(file, offset, total, &[Piece { at: 0, len }]),
            Err(errno) => reply.error(errno),
        };
        self.bytes.read(layer, stored, Box::new(then));
    }
}

fn is_valid(file: &LayerFile) -> bool {
    let name = file.name.as_slice();
    let is_name = !matches!(name, b"" | b"." | b"..")
        && name.len() <= LONGEST_NAME
        && !name.iter().any(|byte| matches!(byte, b'/' | 0));
    let is_ino = file.ino > Ino::ROOT && file.ino.0 <= u64::MAX / 2;
    is_name && is_ino && file.len <= file.size && i64::try_from(file.size).is_ok()
}

fn root_attr() -> Attr {
    Attr { ino: Ino::ROOT.0, size: 4096, mode: ROOT_MODE, links: 2, ..empty_attr() }
}

fn attr_of(file: &LayerFile) -> Attr {
    Attr {
        ino: file.ino.0,
        size: file.size,
        stored: file.len,
        mode: FILE_MODE,
        links: 1,
        ..empty_attr()
    }
}

/// Everything belongs to root and was made in 1970.
fn empty_attr() -> Attr {
    Attr {
        ino: 0,
        size: 0,
        stored: 0,
        mtime: (0, 0),
        mode: 0,
        links: 0,
        uid: 0,
        gid: 0,
        device: (0, 0),
    }
}

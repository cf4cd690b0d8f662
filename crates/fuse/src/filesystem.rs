//! What a file system has to tell; everything about the protocol is left out.

use std::borrow::Cow;
use std::ops::Range;

use sys::fuse_device::{Attr, DirBuffer, Dirent, Errno, Statfs, Validity};

use crate::reply::ReadReply;

/// The number by which the kernel knows a file. It must mean the same file for as long as the file
/// system is mounted, also in a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory.
    pub const ROOT: Self = Self(sys::fuse_device::ROOT_INO);
}

/// Whether names can come and go while the file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// Never: the kernel remembers every name, directory and missing name.
    Fixed,
    /// They do: the kernel asks each time.
    Changing,
}

/// Which extended attributes a file system has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Xattrs {
    /// None at all: the kernel asks once.
    None,
    /// Some.
    Some,
    /// Also access control lists, which the kernel is to enforce.
    Acls,
}

/// How reads with `O_DIRECT` are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectReads {
    /// The reader waits for each, and can be killed while it waits.
    Killable,
    /// Many at a time, for loop devices: over a file that is read one by one, a read whose bytes are
    /// missing would hold up all others. Whoever else reads directly cannot be killed.
    Parallel,
}

/// A read-only file system.
///
/// All functions but [`read`](Self::read) are answered at once and must not wait for anything but what the first
/// of them has to get ready.
pub trait Filesystem: Send + Sync + 'static {
    /// Whether names change.
    fn names(&self) -> Names;

    /// Which extended attributes there are.
    fn xattrs(&self) -> Xattrs;

    /// How reads with `O_DIRECT` are made.
    fn direct_reads(&self) -> DirectReads {
        DirectReads::Killable
    }

    /// The attributes of the child `name`; `None` if there is none.
    ///
    /// # Errors
    /// `ENOTDIR`, `ESTALE` for a file that is not there any more.
    fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attr>, Errno>;

    /// The attributes of a file.
    ///
    /// # Errors
    /// `ESTALE` for a file that is not there any more.
    fn getattr(&self, ino: Ino) -> Result<Attr, Errno>;

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// `EINVAL` for anything else.
    fn readlink(&self, ino: Ino) -> Result<Cow<'_, [u8]>, Errno>;

    /// The directory that holds a directory; the root's is the root.
    ///
    /// # Errors
    /// As for [`getattr`](Self::getattr).
    fn parent(&self, directory: Ino) -> Result<Ino, Errno>;

    /// Gives the entries of a directory (without `.` and `..`) that come after the one whose
    /// [`DirEntry::cookie`] was `after`, or all for 0, until the sink is full.
    ///
    /// # Errors
    /// `ENOTDIR`, and as for [`getattr`](Self::getattr).
    fn readdir(&self, directory: Ino, after: u64, sink: &mut DirSink<'_>) -> Result<(), Errno>;

    /// The value of an extended attribute.
    ///
    /// # Errors
    /// `ENODATA` if the file does not have it.
    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Cow<'_, [u8]>, Errno>;

    /// Appends the names of all extended attributes, each with a NUL behind it.
    ///
    /// # Errors
    /// As for [`getattr`](Self::getattr).
    fn listxattr(&self, ino: Ino, names: &mut Vec<u8>) -> Result<(), Errno>;

    /// Figures of the whole.
    fn statfs(&self) -> Statfs;

    /// Reads bytes of a regular file. The range may go past the end; the reply ends there.
    ///
    /// The reply may be given at once or later, from any thread. Must not wait for bytes.
    fn read(&self, ino: Ino, range: Range<u64>, reply: ReadReply);
}

/// One entry of a directory.
#[derive(Debug, Clone, Copy)]
pub struct DirEntry<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Names its place in the directory, for good; not 0, and at most `u64::MAX / 2`.
    pub cookie: u64,
    /// Its attributes.
    pub attr: Attr,
}

/// Takes entries of a directory until there is no more room.
#[derive(Debug)]
pub struct DirSink<'a> {
    pub(crate) buffer: DirBuffer<'a>,
    /// With attributes (`readdirplus`).
    pub(crate) plus: bool,
    pub(crate) names: Validity,
    /// An entry did not fit.
    pub(crate) is_full: bool,
}

impl DirSink<'_> {
    /// The offsets 1 and 2 stand for `.` and `..`.
    pub(crate) const DOTS: u64 = 2;

    /// Adds an entry; false if it does not fit, and then no other will.
    #[must_use]
    pub fn push(&mut self, entry: &DirEntry<'_>) -> bool {
        let dirent = Dirent {
            ino: entry.attr.ino,
            next_offset: entry.cookie.saturating_add(Self::DOTS),
            mode: entry.attr.mode,
            name: entry.name,
        };
        let fits = if self.plus {
            self.buffer.push_plus(&dirent, Some(&entry.attr), self.names, Validity::Always)
        } else {
            self.buffer.push(&dirent)
        };
        self.is_full |= !fits;
        fits
    }

    pub(crate) fn push_dot(&mut self, ino: Ino, next_offset: u64, name: &[u8]) -> bool {
        let directory_mode = 0o040_000;
        let dirent = Dirent { ino: ino.0, next_offset, mode: directory_mode, name };
        if self.plus {
            self.buffer.push_plus(&dirent, None, Validity::Never, Validity::Never)
        } else {
            self.buffer.push(&dirent)
        }
    }
}

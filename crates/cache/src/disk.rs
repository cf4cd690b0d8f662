//! Every change that the store makes on disk, so that tests can stop it before each one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

/// A file of a layer, by its name in the layer's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Name {
    Data,
    Map,
    MapTmp,
    Sealed,
    SealedTmp,
}

impl Name {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Map => "map",
            Self::MapTmp => "map.tmp",
            Self::Sealed => "sealed",
            Self::SealedTmp => "sealed.tmp",
        }
    }
}

/// One change, as tests see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op<'a> {
    Write { name: Name, offset: u64, bytes: &'a [u8] },
    Length { name: Name, bytes: u64 },
    Punch { offset: u64, len: u64 },
    Sync(Name),
    Rename { from: Name, to: Name },
    Unlink(Name),
    SyncFolder,
}

pub(crate) fn write_at(file: &File, name: Name, bytes: &[u8], offset: u64) -> io::Result<()> {
    observe(&Op::Write { name, offset, bytes })?;
    file.write_all_at(bytes, offset)
}

pub(crate) fn set_len(file: &File, name: Name, bytes: u64) -> io::Result<()> {
    observe(&Op::Length { name, bytes })?;
    file.set_len(bytes)
}

/// Makes whole blocks of `data` a hole. Says whether the file system can.
pub(crate) fn punch(data: &File, offset: u64, len: u64) -> io::Result<bool> {
    observe(&Op::Punch { offset, len })?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match rustix::fs::fallocate(data, flags, offset, len) {
            Ok(()) => return Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until the file's bytes have reached the disk.
pub(crate) fn sync(file: &File, name: Name) -> io::Result<()> {
    observe(&Op::Sync(name))?;
    file.sync_data()
}

pub(crate) fn sync_folder(folder: impl AsFd) -> io::Result<()> {
    observe(&Op::SyncFolder)?;
    Ok(rustix::fs::fsync(folder)?)
}

pub(crate) fn unlink(folder: impl AsFd, name: Name) -> io::Result<()> {
    observe(&Op::Unlink(name))?;
    match rustix::fs::unlinkat(folder, name.as_str(), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Puts a new file in the place of an old one, so that a crash leaves the one or the other.
///
/// The file and its name have reached the disk when this returns.
pub(crate) fn replace(
    folder: impl AsFd + Copy,
    (tmp, name): (Name, Name),
    bytes: &[u8],
) -> io::Result<File> {
    unlink(folder, tmp)?;
    let file = open_new(folder, tmp)?;
    write_at(&file, tmp, bytes, 0)?;
    sync(&file, tmp)?;
    observe(&Op::Rename { from: tmp, to: name })?;
    rustix::fs::renameat(folder, tmp.as_str(), folder, name.as_str())?;
    sync_folder(folder)?;
    Ok(file)
}

/// Opens a file of the layer for reading and writing, if there is one.
pub(crate) fn open(folder: impl AsFd, name: Name) -> io::Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::openat(folder, name.as_str(), flags, Mode::empty()) {
        Ok(file) => Ok(Some(file.into())),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes a file of the layer that is not there yet.
pub(crate) fn open_new(folder: impl AsFd, name: Name) -> io::Result<File> {
    observe(&Op::Length { name, bytes: 0 })?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(folder, name.as_str(), flags, Mode::RUSR | Mode::WUSR)?.into())
}

pub(crate) fn open_folder(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Reads a small file whole; one longer than `most` is cut there, which its decoder then refuses.
pub(crate) fn read(file: &File, most: u64) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len().min(most);
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Whether an error came about because a disk, or the user's share of it, is full.
#[must_use]
pub fn is_no_room(error: &(dyn std::error::Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.filter_map(|cause| cause.downcast_ref()).any(is_full)
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(not(test))]
#[expect(clippy::unnecessary_wraps, reason = "the tests' recorder refuses changes")]
const fn observe(_op: &Op<'_>) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
fn observe(op: &Op<'_>) -> io::Result<()> {
    recorder::observe(op)
}

#[cfg(test)]
pub(crate) mod recorder;

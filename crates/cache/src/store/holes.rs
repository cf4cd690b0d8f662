//! Whether the file system can give a punched block back.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::disk;

/// What the file system of a store does with holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoleSupport {
    /// Punching frees blocks, and unwritten ranges take up none.
    Full,
    /// It refuses to punch.
    NoPunching,
    /// It punches, but the blocks stay taken.
    NothingFreed,
    /// It does not know where its holes are.
    NoSparseFiles,
}

const PROBE_LEN: u64 = 256 << 10;

/// Tries on a file without a name, so that a crash leaves nothing behind.
///
/// On a full disk it cannot be tried, and a daemon must start there all the same: then it is hoped
/// for. Where the hope is wrong, punching says so.
pub(crate) fn probe(root: &Path) -> io::Result<HoleSupport> {
    match attempt(root) {
        Err(error) if disk::is_full(&error) => Ok(HoleSupport::Full),
        result => result,
    }
}

fn attempt(root: &Path) -> io::Result<HoleSupport> {
    let file = unnamed(root)?;
    file.write_all_at(&vec![0xa5; usize::try_from(PROBE_LEN).map_err(io::Error::other)?], 0)?;
    file.set_len(2 * PROBE_LEN)?;
    // Blocks may be given out only when they are written.
    file.sync_all()?;
    let before = file.metadata()?.blocks();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(&file, flags, 0, PROBE_LEN / 2) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(HoleSupport::NoPunching),
        Err(errno) => return Err(errno.into()),
    }
    file.sync_all()?;
    if before * 512 >= 2 * PROBE_LEN {
        return Ok(HoleSupport::NoSparseFiles);
    }
    if file.metadata()?.blocks() >= before {
        return Ok(HoleSupport::NothingFreed);
    }
    Ok(match rustix::fs::seek(&file, SeekFrom::Data(0)) {
        Ok(at) if at == PROBE_LEN / 2 => HoleSupport::Full,
        _ => HoleSupport::NoSparseFiles,
    })
}

/// A file that is gone when it is closed.
pub(super) fn unnamed(root: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(root, flags | OFlags::TMPFILE, mode) {
        Ok(file) => Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let path = root.join("probe");
            let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::TRUNC, mode)?;
            std::fs::remove_file(&path)?;
            Ok(file.into())
        }
        Err(errno) => Err(errno.into()),
    }
}

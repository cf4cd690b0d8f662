//! The folder of a run, and how one is told whose process was killed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use sys::mount::Unmount;
use tempfile::TempDir;

/// A folder for the files of one run. It belongs to the run for as long as a lock in it is held, which
/// ends with its process, however that ends.
#[derive(Debug)]
pub(super) struct RunFolder {
    dir: TempDir,
    lock: File,
}

impl RunFolder {
    /// Makes one below the root folder `root`.
    pub(super) fn create(root: &Path) -> Result<Self> {
        let runs = runs(root);
        fs::create_dir_all(&runs).with_context(|| format!("making {}", runs.display()))?;
        // Nobody may take it for an abandoned one before it is locked.
        let _making = lock(&runs.join(LOCK), FlockOperation::LockShared)?;
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&runs);
        let dir = dir.with_context(|| format!("making a folder in {}", runs.display()))?;
        let lock = lock(&dir.path().join(LOCK), FlockOperation::LockExclusive)?;
        Ok(Self { dir, lock })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Lets the programs that are started from now on hold the folder as well, should they live longer.
    pub(super) fn share(&self) -> Result<()> {
        fcntl_setfd(&self.lock, FdFlags::empty()).context("sharing the lock of the run")
    }

    /// Removes it.
    pub(super) fn close(self) -> Result<()> {
        self.dir.close().context("removing the folder of the run")
    }
}

/// Removes what killed runs have left below the root folder `root`: their mounts and their folders.
/// `unmount` unmounts an image.
pub(crate) fn clear_abandoned(root: &Path, unmount: &dyn Fn(&Path)) -> Result<()> {
    let runs = runs(root);
    if !runs.is_dir() {
        return Ok(());
    }
    let _clearing = lock(&runs.join(LOCK), FlockOperation::LockExclusive)?;
    for entry in fs::read_dir(&runs).with_context(|| format!("reading {}", runs.display()))? {
        let dir = entry?.path();
        let is_run = dir
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
        if !is_run || !is_abandoned(&dir) {
            continue;
        }
        match clear(&dir, unmount) {
            Ok(()) => tracing::info!(dir = %dir.display(), "folder of a killed run removed"),
            Err(err) => {
                let error = crate::failure::in_full(&err);
                tracing::warn!(dir = %dir.display(), error, "folder of a killed run stays behind");
            }
        }
    }
    Ok(())
}

fn clear(dir: &Path, unmount: &dyn Fn(&Path)) -> Result<()> {
    let mounted = || -> io::Result<Vec<PathBuf>> {
        let mounts = sys::mount::mountinfo()?.into_iter().map(|mount| mount.point);
        Ok(mounts.filter(|point| point.starts_with(dir)).collect())
    };
    let lower = dir.join(LOWER);
    // The last one first: mounts lie over one another.
    for point in mounted()?.iter().rev() {
        match *point == lower {
            true => unmount(point),
            false => sys::mount::unmount(point, Unmount::Detach)
                .with_context(|| format!("unmounting {}", point.display()))?,
        }
    }
    // What is still mounted must not be emptied.
    anyhow::ensure!(mounted()?.is_empty(), "something is still mounted there");
    fs::remove_dir_all(dir).context("removing it")
}

fn is_abandoned(dir: &Path) -> bool {
    let Ok(file) = File::open(dir.join(LOCK)) else { return true };
    flock(&file, FlockOperation::NonBlockingLockExclusive) != Err(Errno::WOULDBLOCK)
}

fn lock(path: &Path, how: FlockOperation) -> Result<File> {
    let context = || format!("locking {}", path.display());
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.with_context(context)?;
    flock(&file, how).with_context(context)?;
    Ok(file)
}

fn runs(root: &Path) -> PathBuf {
    root.join("run")
}

/// Where in the folder the image is mounted.
pub(super) const LOWER: &str = "lower";
const LOCK: &str = "lock";
const PREFIX: &str = "run-";

//! A writable view of a read-only image.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sys::mount::{FsContext, MountAttrFlags, MountError, Overlay, Unmount, mount_overlay};

/// An overlay over an image. Dropping it unmounts it and removes what was written.
#[derive(Debug)]
pub(crate) struct Rootfs {
    path: PathBuf,
    /// Holds `upper` and `work`.
    changes: PathBuf,
    in_memory: bool,
}

impl Rootfs {
    /// Lays a writable layer in `dir` over `lower`. Where the file system of `dir` cannot hold one, as
    /// overlayfs itself cannot, it is kept in memory.
    pub(crate) fn over(lower: &Path, dir: &Path) -> Result<Self> {
        let (path, changes) = (dir.join("rootfs"), dir.join("changes"));
        for folder in [&path, &changes] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        // From here on, dropping it removes what was made.
        let mut rootfs = Self { path, changes, in_memory: false };
        let on_disk = match rootfs.mount(lower)? {
            Ok(()) => return Ok(rootfs),
            Err(err) => err,
        };
        tracing::info!(error = %on_disk, "changes are kept in memory");
        mount_tmpfs(&rootfs.changes, "0755").context("mounting memory for changes")?;
        rootfs.in_memory = true;
        rootfs
            .mount(lower)?
            .with_context(|| format!("laying a writable layer over {}", lower.display()))?;
        Ok(rootfs)
    }

    /// The outer error is not overlayfs' own.
    fn mount(&self, lower: &Path) -> Result<Result<(), MountError>> {
        let (upper, work) = (self.changes.join("upper"), self.changes.join("work"));
        for folder in [&upper, &work] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let flags: &[&str] = if in_user_namespace() { &["userxattr"] } else { &[] };
        let lower = [lower.to_owned()];
        let overlay = Overlay { lower: &lower, upper: Some(&upper), work: Some(&work), flags };
        Ok(mount_overlay(overlay, &self.path).map(drop))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        // EINVAL where it was not mounted.
        sys::mount::unmount(&self.path, Unmount::Detach).ok();
        if self.in_memory {
            sys::mount::unmount(&self.changes, Unmount::Detach).ok();
        }
        let removed = fs::remove_dir(&self.path).and_then(|()| fs::remove_dir_all(&self.changes));
        if let Err(err) = removed {
            tracing::warn!(path = %self.path.display(), error = %err, "a writable layer stays behind");
        }
    }
}

/// Mounts memory on `target`.
pub(super) fn mount_tmpfs(target: &Path, mode: &str) -> Result<(), MountError> {
    let context = FsContext::open("tmpfs")?;
    context.set_string("mode", mode)?;
    context.create()?;
    context.mount_at(target, MountAttrFlags::empty())
}

/// Whether our root is not the machine's: overlayfs then may not use `trusted.` attributes.
pub(crate) fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let whole = ["0", "0", "4294967295"];
    !map.is_empty() && !map.split_ascii_whitespace().eq(whole)
}

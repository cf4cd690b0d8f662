//! A mount that no path leads to: nobody else sees it, and it goes away with its descriptor however
//! the test ends.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

#[derive(Debug)]
pub(crate) struct Mounted {
    root: OwnedFd,
}

impl Mounted {
    pub(crate) fn new(image: &Path, devices: &[PathBuf]) -> io::Result<Self> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", image)?;
        for device in devices {
            fsconfig_set_string(&context, "device", device)?;
        }
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
        let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(Self { root })
    }

    /// A path to its root, for as long as this lives.
    pub(crate) fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd()))
    }
}

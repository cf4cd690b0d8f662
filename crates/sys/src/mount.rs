//! The new mount API, and what the kernel says about mounts.
//!
//! Options go one by one through `fsconfig`, because `mount(2)` ends at one page: 29 devices of an
//! EROFS image. A refusal carries what the file system wrote to the context's log.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
pub use rustix::mount::MountAttrFlags;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

pub use self::bdi::{Bdi, ReadAheadError};
pub use self::kernel_log::KernelLog;
use self::kernel_log::KernelLogTail;
pub use self::mountinfo::{Device, MountEntry, ParseMountinfoError, mountinfo, parse_mountinfo};

mod bdi;
mod kernel_log;
mod mountinfo;

/// `fsconfig` takes strings of at most 255 bytes.
const MAX_STRING_LEN: usize = 255;

/// A mount could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel does not know the file system.
    #[error("this kernel has no file system {fstype:?}")]
    UnknownFileSystem {
        /// Its name.
        fstype: String,
    },
    /// The file system does not mount over this file; over a loop device it would.
    #[error("{fstype} cannot be mounted over a plain file here{log}")]
    NeedsBlockDevice {
        /// The file system.
        fstype: String,
        /// What it said.
        log: KernelLog,
    },
    /// The kernel refused.
    #[error("cannot {step} for a mount of {fstype}{log}")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// The file system.
        fstype: String,
        /// What it said.
        log: KernelLog,
        /// The error number.
        source: Errno,
    },
}

impl MountError {
    /// The kernel's error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::UnknownFileSystem { .. } => Errno::NODEV,
            Self::NeedsBlockDevice { .. } => Errno::NOTBLK,
            Self::Refused { source, .. } => *source,
        }
    }
}

/// A file system that is being configured.
///
/// Dropping it before [`mount_at`](Self::mount_at) leaves nothing behind.
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
    fstype: String,
    /// Files named by the number of their descriptor, which some file systems open in `create`.
    files: Vec<OwnedFd>,
    tail: Option<KernelLogTail>,
}

impl FsContext {
    /// Starts to configure a file system of the given type, for example `"erofs"`.
    ///
    /// # Errors
    /// [`MountError::UnknownFileSystem`], or `EPERM`.
    pub fn open(fstype: &str) -> Result<Self, MountError> {
        let tail = KernelLogTail::new();
        match rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(fd) => Ok(Self { fd, fstype: fstype.to_owned(), files: Vec::new(), tail }),
            Err(Errno::NODEV) => Err(MountError::UnknownFileSystem { fstype: fstype.to_owned() }),
            Err(source) => Err(MountError::Refused {
                step: "open a context",
                fstype: fstype.to_owned(),
                log: KernelLog::default(),
                source,
            }),
        }
    }

    /// Sets `key=value`.
    ///
    /// # Errors
    /// `EINVAL` for an option that the file system does not know, or a value above 255 bytes.
    pub fn set_string(&self, key: &str, value: impl AsRef<OsStr>) -> Result<(), MountError> {
        let set = rustix::mount::fsconfig_set_string(&self.fd, key, value.as_ref());
        self.done("set an option", set)
    }

    /// Sets an option that is the path of an existing file, of any length.
    ///
    /// # Errors
    /// `ENOENT`, and as for [`set_string`](Self::set_string).
    pub fn set_file(&mut self, key: &str, path: &Path) -> Result<(), MountError> {
        if path.as_os_str().len() <= MAX_STRING_LEN {
            return self.set_string(key, path);
        }
        let opened = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let file = self.done("open a file named in an option", opened)?;
        self.set_string(key, format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        self.files.push(file);
        Ok(())
    }

    /// Sets an option without a value.
    ///
    /// # Errors
    /// `EINVAL` for an option that the file system does not know.
    pub fn set_flag(&self, key: &str) -> Result<(), MountError> {
        self.done("set an option", rustix::mount::fsconfig_set_flag(&self.fd, key))
    }

    /// Sets an option to a descriptor.
    ///
    /// # Errors
    /// `EINVAL` for an option that the file system does not know.
    pub fn set_fd(&self, key: &str, fd: BorrowedFd<'_>) -> Result<(), MountError> {
        self.done("set an option", rustix::mount::fsconfig_set_fd(&self.fd, key, fd))
    }

    /// Makes the file system, which is not visible anywhere yet.
    ///
    /// # Errors
    /// Whatever the file system finds wrong; [`MountError::NeedsBlockDevice`].
    pub fn create(&self) -> Result<(), MountError> {
        self.done("create the file system", rustix::mount::fsconfig_create(&self.fd))
    }

    /// Puts the file system made by [`create`](Self::create) on the folder (or file) `target`.
    ///
    /// # Errors
    /// `ENOENT` if `target` does not exist.
    pub fn mount_at(&self, target: &Path, attributes: MountAttrFlags) -> Result<(), MountError> {
        let mounted = rustix::mount::fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes);
        let tree = self.done("make the mount", mounted)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        let moved = rustix::mount::move_mount(&tree, "", CWD, target, flags);
        self.done("attach to the target", moved)
    }

    /// Takes what the file system has written to its log so far: errors, warnings and notes.
    #[must_use]
    pub fn warnings(&self) -> KernelLog {
        let mut lines = Vec::new();
        let mut buffer = [0; 4096];
        // One message for each read, until ENODATA.
        while let Ok(len) = rustix::io::read(&self.fd, &mut buffer) {
            if len == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&buffer[..len]);
            // Messages begin with their level: "e ", "w " or "i ".
            let text = text.trim_end();
            lines.push(text.get(2..).unwrap_or(text).to_owned());
        }
        KernelLog(lines)
    }

    fn done<T>(&self, step: &'static str, result: Result<T, Errno>) -> Result<T, MountError> {
        let fstype = || self.fstype.clone();
        result.map_err(|source| match source {
            Errno::NOTBLK => {
                MountError::NeedsBlockDevice { fstype: fstype(), log: self.complaints() }
            }
            source => {
                MountError::Refused { step, fstype: fstype(), log: self.complaints(), source }
            }
        })
    }

    /// What was written to either log.
    fn complaints(&self) -> KernelLog {
        let mut log = self.warnings();
        log.0.extend(self.tail.iter().flat_map(|tail| tail.lines_of(&self.fstype)));
        log
    }
}

/// What came of [`mount_erofs`].
#[derive(Debug)]
pub struct ErofsMount {
    /// Where the read-ahead of a file-backed mount is set, if that could be found out. A mount over
    /// a block device uses the device's.
    pub bdi: Option<Bdi>,
    /// What the kernel noted.
    pub log: KernelLog,
}

/// Mounts an EROFS image read-only on `target`, with its data devices in the order of the image's
/// device table. Image and devices may be files (Linux 6.12) or block devices.
///
/// All devices of the table must be given: with none at all the kernel mounts as well, and reads
/// other places.
///
/// # Errors
/// [`MountError::NeedsBlockDevice`] where files cannot be mounted; `EINVAL` for a wrong number of
/// devices or a damaged image; `EBADMSG` for a wrong checksum of the superblock.
pub fn mount_erofs(
    source: &Path,
    devices: &[PathBuf],
    target: &Path,
) -> Result<ErofsMount, MountError> {
    let mut context = FsContext::open("erofs")?;
    context.set_file("source", source)?;
    for device in devices {
        context.set_file("device", device)?;
    }
    context.set_flag("ro")?;
    let bdi = {
        // Of two mounts that are made at the same time it cannot be told whose is whose.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock();
        let before = Bdi::all_of("erofs");
        context.create()?;
        Bdi::new_one("erofs", &before)
    };
    context.mount_at(target, MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    Ok(ErofsMount { bdi, log: context.warnings() })
}

/// An overlay to be mounted.
#[derive(Debug, Clone, Copy)]
pub struct Overlay<'a> {
    /// The layers below, the topmost first.
    pub lower: &'a [PathBuf],
    /// The folder that takes the changes, or `None` for a read-only overlay.
    pub upper: Option<&'a Path>,
    /// An empty folder on the file system of `upper`.
    pub work: Option<&'a Path>,
    /// Options without a value, for example `"userxattr"` or `"volatile"`.
    pub flags: &'a [&'a str],
}

/// Mounts an overlay on `target`.
///
/// # Errors
/// `EINVAL` for layers that overlayfs cannot use (the log says why), `ELOOP` for too deep a stack.
pub fn mount_overlay(overlay: Overlay<'_>, target: &Path) -> Result<KernelLog, MountError> {
    let Overlay { lower, upper, work, flags } = overlay;
    let mut context = FsContext::open("overlay")?;
    context.set_string("source", "overlay")?;
    set_lower(&mut context, lower)?;
    for (key, folder) in [("upperdir", upper), ("workdir", work)] {
        if let Some(folder) = folder {
            context.set_string(key, escaped(folder, b"\\"))?;
        }
    }
    for flag in flags {
        context.set_flag(flag)?;
    }
    context.create()?;
    context.mount_at(target, MountAttrFlags::empty())?;
    Ok(context.warnings())
}

/// One by one from Linux 6.8 on; before, all in one string.
fn set_lower(context: &mut FsContext, lower: &[PathBuf]) -> Result<(), MountError> {
    let Some((first, rest)) = lower.split_first() else {
        return Ok(());
    };
    if context.set_file("lowerdir+", first).is_ok() {
        return rest.iter().try_for_each(|folder| context.set_file("lowerdir+", folder));
    }
    let folders: Vec<_> = lower.iter().map(|folder| escaped(folder, b"\\:")).collect();
    context.set_string("lowerdir", folders.join(OsStr::new(":")))
}

/// The path with a backslash before each of the given bytes.
fn escaped(path: &Path, special: &[u8]) -> std::ffi::OsString {
    let mut bytes = Vec::with_capacity(path.as_os_str().len());
    for &byte in path.as_os_str().as_bytes() {
        if special.contains(&byte) {
            bytes.push(b'\\');
        }
        bytes.push(byte);
    }
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

/// Shows the file or folder `source`, with all mounts below it, at `target` too.
///
/// # Errors
/// `ENOENT`, `EPERM`.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_bind_recursive(source, target)?)
}

/// Shows `source`, without mounts below it, at `target` too, and read-only there.
///
/// # Errors
/// `ENOENT`, `EPERM`. Nothing stays mounted then.
pub fn bind_read_only(source: &Path, target: &Path) -> io::Result<()> {
    rustix::mount::mount_bind(source, target)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    rustix::mount::mount_remount(target, flags, "").map_err(|err| {
        // A writable view must not stay where a read-only one was asked for; the first error counts.
        unmount(target, Unmount::Detach).ok();
        err.into()
    })
}

/// A view of `source`, without mounts below it, that is mounted nowhere. It keeps the file system alive, but keeps
/// nobody from unmounting it, and goes with its descriptor.
///
/// # Errors
/// `ENOENT`, `EPERM` without `CAP_SYS_ADMIN`.
pub fn detached(source: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rustix::mount::open_tree(CWD, source, flags)?)
}

/// Shows `source`, without mounts below it, at `target` too: read-only, and each id as `namespace` has it
/// outside.
///
/// # Errors
/// `EINVAL` where the file system cannot be shown so, `EPERM` without `CAP_SYS_ADMIN` over it.
pub fn bind_mapped(source: &Path, target: &Path, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let tree = detached(source)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: the path is a string that ends with a zero, and the kernel reads as many bytes of the attributes as
    // there are.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(&tree, "", CWD, target, flags)?)
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Fails with `EBUSY` while something is open.
    Now,
    /// Disappears from the tree at once, and ends when the last open file is closed.
    Detach,
}

/// Unmounts what is on `target`, which is not followed if it is a link.
///
/// # Errors
/// `EINVAL` if nothing is mounted there, `EBUSY`.
pub fn unmount(target: &Path, how: Unmount) -> io::Result<()> {
    let how = match how {
        Unmount::Now => UnmountFlags::empty(),
        Unmount::Detach => UnmountFlags::DETACH,
    };
    Ok(rustix::mount::unmount(target, how | UnmountFlags::NOFOLLOW)?)
}

/// Cuts `target` and all mounts below it off from other mount namespaces.
///
/// # Errors
/// `EINVAL` if `target` is not a mount point.
pub fn make_private(target: &Path) -> io::Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change(target, private)?)
}

/// Where a path lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// The mount, as numbered in `mountinfo`.
    pub mount_id: u64,
    /// The device number of the file system.
    pub device: Device,
}

/// Finds out on which mount and file system a path lies. Links are not followed, and the file
/// system's server is not asked.
///
/// # Errors
/// `ENOENT` and the like.
pub fn location(path: &Path) -> io::Result<Location> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::MNT_ID)?;
    let device = Device { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
    Ok(Location { mount_id: stat.stx_mnt_id, device })
}

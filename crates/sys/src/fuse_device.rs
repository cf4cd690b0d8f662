//! `/dev/fuse`: mounting, reading requests, replying, asking for unanswered requests again.
//!
//! A connection lives as long as any process holds its descriptor. All threads read from the one
//! descriptor: what was read from a descriptor made with `FUSE_DEV_IOC_CLONE` fails when the process
//! dies, even if another process holds the original.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};

use crate::mount::{Bdi, FsContext, MountAttrFlags, location};

pub use self::abi::{
    IN_HEADER_LEN, MAJOR, MAX_MINOR, MIN_MINOR, OUT_HEADER_LEN, ROOT_INO, UNIQUE_RESEND, init,
};
pub use self::answer::{Attr, DirBuffer, Dirent, InitReply, Statfs, Validity};
pub use self::request::{InitRequest, Operation, ParseRequestError, Request};
pub use self::wait::{Stop, Waiter, Woken};
pub use rustix::io::Errno;

mod abi;
pub mod answer;
mod request;
mod wait;

#[cfg(test)]
mod tests;

/// Device number of `/dev/fuse`, see `Documentation/admin-guide/devices.txt` of Linux.
const DEVICE: (u32, u32) = (10, 229);
/// The shortest buffer that the kernel accepts for a request (`FUSE_MIN_READ_BUFFER`).
pub const MIN_REQUEST_BUFFER: usize = 8192;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// What stands as the source in `/proc/mounts`.
    pub fsname: String,
    /// The type in `/proc/mounts` is then `fuse.<subtype>`.
    pub subtype: Option<String>,
    /// Who may use it.
    pub access: Access,
    /// The kernel checks permissions by mode and owner.
    pub default_permissions: bool,
    /// Bytes of one read at most; without, the kernel's limit.
    pub max_read: Option<u32>,
}

/// Who may use a FUSE mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only the user that mounts; not even root.
    Mounter,
    /// Everybody whom permissions allow (`allow_other`).
    Everybody,
}

/// A FUSE file system could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountFuseError {
    /// There is no FUSE here, or no right to it.
    #[error("cannot open /dev/fuse; load the kernel module fuse, or give this process the device")]
    OpenDevice(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot mount FUSE on {}", target.display())]
    Mount {
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        source: crate::mount::MountError,
    },
}

/// The daemon's end of a mounted FUSE file system.
///
/// Dropping it does not unmount. If it was the last descriptor of the connection, every access to
/// the mount fails with `ENOTCONN` from then on.
#[derive(Debug)]
pub struct Connection {
    device: OwnedFd,
    /// Known to be mounted with `default_permissions`.
    default_permissions: bool,
}

impl Connection {
    /// Mounts a read-only FUSE file system on the folder `target`. Works in a user namespace too.
    ///
    /// Accesses to the mount wait until requests are read.
    ///
    /// # Errors
    /// See [`MountFuseError`].
    pub fn mount(target: &Path, options: &MountOptions) -> Result<Self, MountFuseError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let device = rustix::fs::open("/dev/fuse", flags, Mode::empty())
            .map_err(|errno| MountFuseError::OpenDevice(errno.into()))?;
        mount_device(&device, target, options)
            .map_err(|source| MountFuseError::Mount { target: target.to_owned(), source })?;
        Ok(Self { device, default_permissions: options.default_permissions })
    }

    /// Goes on with the connection of another process.
    ///
    /// # Errors
    /// `InvalidInput` if it is no descriptor of `/dev/fuse`.
    pub fn from_fd(device: OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&device)?;
        let number = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || number != DEVICE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is not one of /dev/fuse",
            ));
        }
        let flags = rustix::fs::fcntl_getfl(&device)?;
        rustix::fs::fcntl_setfl(&device, flags | OFlags::NONBLOCK)?;
        Ok(Self { device, default_permissions: false })
    }

    /// Whether the kernel is known to check permissions itself.
    #[must_use]
    pub fn has_default_permissions(&self) -> bool {
        self.default_permissions
    }

    /// Whether the kernel still has the file system, wherever it is mounted, and even if it is mounted
    /// nowhere any more but somebody has a file of it open.
    ///
    /// # Errors
    /// When the descriptor cannot be polled.
    pub fn is_connected(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.device, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now))?;
        Ok(!fds[0].revents().contains(PollFlags::ERR))
    }

    /// Reads one request and gives its length; `None` if there is none now.
    ///
    /// `buffer` must hold at least [`MIN_REQUEST_BUFFER`] bytes and the negotiated longest write
    /// with its headers.
    ///
    /// # Errors
    /// `ENODEV` if the file system was unmounted, `EPERM` if it was never mounted, `EINVAL` if the
    /// buffer is too short.
    pub fn read_request(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.device, &mut *buffer) {
                Ok(len) => return Ok(Some(len)),
                Err(Errno::AGAIN) => return Ok(None),
                // ENOENT: the request was interrupted while it was copied, the next one is fine.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(Errno::CONNABORTED) => return Err(Errno::NODEV.into()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Answers a request with a body or an error number.
    ///
    /// # Errors
    /// `ENOENT` if nobody waits for it any more, `ENODEV` or `EPERM` after unmounting.
    pub fn reply(&self, unique: u64, body: Result<&[u8], Errno>) -> io::Result<()> {
        match body {
            Ok(body) => self.send(0, unique, body),
            Err(errno) => self.send(-errno.raw_os_error(), unique, &[]),
        }
    }

    /// Asks the kernel to send all requests again that were read and not answered.
    ///
    /// They come with [`UNIQUE_RESEND`] set in `unique` and must be answered with it.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.9.
    pub fn resend(&self) -> io::Result<()> {
        self.notify(abi::notify::RESEND, &[])
    }

    /// Makes the kernel forget attributes and cached bytes `offset..offset + len` of an inode; a
    /// negative offset leaves the bytes, a `len` of 0 goes to the end.
    ///
    /// Waits for reads of these bytes: never call it from the thread that is to answer them.
    ///
    /// # Errors
    /// `ENOENT` if the kernel does not know the inode.
    pub fn inval_inode(&self, ino: u64, offset: i64, len: i64) -> io::Result<()> {
        let mut body = Vec::with_capacity(24);
        body.extend_from_slice(&ino.to_ne_bytes());
        body.extend_from_slice(&offset.to_ne_bytes());
        body.extend_from_slice(&len.to_ne_bytes());
        self.notify(abi::notify::INVAL_INODE, &body)
    }

    /// Makes the kernel forget a name in a directory, also one remembered as missing.
    ///
    /// Waits for lookups in that directory: never call it from the thread that is to answer them.
    ///
    /// # Errors
    /// `ENOENT` if the kernel does not know the name, `ENAMETOOLONG`.
    pub fn inval_entry(&self, parent: u64, name: &[u8]) -> io::Result<()> {
        let len = u32::try_from(name.len()).map_err(|_too_long| Errno::NAMETOOLONG)?;
        let mut body = Vec::with_capacity(17 + name.len());
        body.extend_from_slice(&parent.to_ne_bytes());
        body.extend_from_slice(&len.to_ne_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(name);
        body.push(0);
        self.notify(abi::notify::INVAL_ENTRY, &body)
    }

    fn notify(&self, code: u32, body: &[u8]) -> io::Result<()> {
        self.send(code.cast_signed(), 0, body)
    }

    fn send(&self, code: i32, unique: u64, body: &[u8]) -> io::Result<()> {
        let len = u32::try_from(OUT_HEADER_LEN + body.len()).map_err(|_too_long| Errno::TOOBIG)?;
        let mut header = [0; OUT_HEADER_LEN];
        header[..4].copy_from_slice(&len.to_ne_bytes());
        header[4..8].copy_from_slice(&code.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        // The kernel takes a message whole or not at all.
        rustix::io::retry_on_intr(|| rustix::io::writev(&self.device, &parts))?;
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn mount_device(
    device: &OwnedFd,
    target: &Path,
    options: &MountOptions,
) -> Result<(), crate::mount::MountError> {
    let context = FsContext::open("fuse")?;
    context.set_string("source", &options.fsname)?;
    if let Some(subtype) = &options.subtype {
        context.set_string("subtype", subtype)?;
    }
    // As text: before Linux 6.11 the option is a number, later one or the other.
    context.set_string("fd", device.as_raw_fd().to_string())?;
    context.set_string("rootmode", "40000")?;
    context.set_string("user_id", rustix::process::geteuid().as_raw().to_string())?;
    context.set_string("group_id", rustix::process::getegid().as_raw().to_string())?;
    if options.access == Access::Everybody {
        context.set_flag("allow_other")?;
    }
    if options.default_permissions {
        context.set_flag("default_permissions")?;
    }
    if let Some(max_read) = options.max_read {
        context.set_string("max_read", max_read.to_string())?;
    }
    context.set_flag("ro")?;
    context.create()?;
    context.mount_at(target, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// The settings of a FUSE mount's page cache.
///
/// Read-ahead starts at 128 KiB and cannot be raised by `INIT`. Needs no running session: the
/// mount's device number is known without asking it.
///
/// # Errors
/// `ENOENT` if nothing is there or if it has none.
pub fn bdi_of(mount: &Path) -> io::Result<Bdi> {
    Bdi::of_device(location(mount)?.device).ok_or_else(|| Errno::NOENT.into())
}

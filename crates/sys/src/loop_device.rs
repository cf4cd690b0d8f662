//! Loop devices over files, and changing the file below a live one.
//!
//! Source of formats: `linux/loop.h`. `LOOP_CONFIGURE` needs Linux 5.8.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Getter, IntegerSetter, Ioctl, IoctlOutput, NoArg, Opcode, Setter};

use crate::fanotify::FileId;

const LOOP_CLR_FD: Opcode = 0x4C01;
const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_CHANGE_FD: Opcode = 0x4C06;
const LOOP_SET_DIRECT_IO: Opcode = 0x4C08;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often a free device is asked for when others are faster to take it.
const MAX_ATTEMPTS: usize = 64;

/// A loop device could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There are no loop devices here.
    #[error("cannot open {}; is the kernel module \"loop\" there, and are we root?", path.display())]
    Unavailable {
        /// What could not be opened.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
    /// The kernel refused.
    #[error("cannot {step} a loop device")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: Errno,
    },
}

/// How a file is shown as a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopOptions {
    /// Whether it can be written to.
    pub access: Access,
    /// The smallest unit of access in bytes: a power of two from 512 to the page size.
    pub block_size: u32,
    /// The size of the device in bytes, or `None` for the file's. Whole sectors of 512 bytes are
    /// shown, and the rest is not.
    pub size_limit: Option<u64>,
    /// What happens when the last user closes it.
    pub on_last_close: OnLastClose,
    /// Whether the file's own page cache is left out.
    pub caching: Caching,
}

impl Default for LoopOptions {
    fn default() -> Self {
        Self {
            access: Access::ReadOnly,
            block_size: 512,
            size_limit: None,
            on_last_close: OnLastClose::Stay,
            caching: Caching::Buffered,
        }
    }
}

/// Whether a device can be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It cannot; only then can the file below be changed later.
    ReadOnly,
    /// It can, if the file is open for writing.
    ReadWrite,
}

/// What happens to a device that nobody uses any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLastClose {
    /// It stays.
    Stay,
    /// It is detached.
    Detach,
}

/// Whether the file below is read through its page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// It is.
    Buffered,
    /// It is not (`O_DIRECT`), where its file system can do so.
    Direct,
}

/// A block device over a file.
///
/// Dropping it detaches the file; if the device is mounted, when it is unmounted.
#[derive(Debug)]
pub struct LoopDevice {
    device: OwnedFd,
    path: PathBuf,
    persistent: bool,
}

impl LoopDevice {
    /// Shows `file` as a new block device.
    ///
    /// # Errors
    /// [`AttachError`]; `EBADF` if the file is not open for what the options ask.
    pub fn attach(file: BorrowedFd<'_>, options: LoopOptions) -> Result<Self, AttachError> {
        let control_path = Path::new("/dev/loop-control");
        let control = open_device(control_path, OFlags::RDWR)?;
        let config = Config::new(file, options);
        for _ in 0..MAX_ATTEMPTS {
            // SAFETY: `GetFree` is LOOP_CTL_GET_FREE, which takes no argument.
            let number = unsafe { rustix::ioctl::ioctl(&control, GetFree) }
                .map_err(|source| AttachError::Refused { step: "find", source })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open_device(&path, OFlags::RDWR)?;
            // SAFETY: the argument of LOOP_CONFIGURE is `struct loop_config`.
            let configure = unsafe { Setter::<LOOP_CONFIGURE, Config>::new(config) };
            // SAFETY: the kernel only reads the argument; the file named in it is open.
            match unsafe { rustix::ioctl::ioctl(&device, configure) } {
                Ok(()) => return Ok(Self { device, path, persistent: false }),
                // Another process was faster.
                Err(Errno::BUSY) => {}
                Err(source) => return Err(AttachError::Refused { step: "configure", source }),
            }
        }
        Err(AttachError::Refused { step: "find", source: Errno::BUSY })
    }

    /// Takes over a device that exists, for example one that a dead predecessor had made. It stays
    /// attached when this is dropped, until [`detach`](Self::detach).
    ///
    /// # Errors
    /// [`AttachError::Unavailable`].
    pub fn open(path: &Path) -> Result<Self, AttachError> {
        let device = open_device(path, OFlags::RDONLY)?;
        Ok(Self { device, path: path.to_owned(), persistent: true })
    }

    /// The device's path, for example `/dev/loop3`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts another file below the device, which may be mounted. It must show the same bytes: what is
    /// in the page cache stays there.
    ///
    /// # Errors
    /// `EINVAL` if the device is writable or the files differ in size.
    pub fn change_fd(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let number = file.as_raw_fd().cast_unsigned() as usize;
        // SAFETY: LOOP_CHANGE_FD takes the number of an open descriptor, not a pointer.
        let change = unsafe { IntegerSetter::<LOOP_CHANGE_FD>::new_usize(number) };
        // SAFETY: as above; the kernel takes its own reference to the file.
        Ok(unsafe { rustix::ioctl::ioctl(&self.device, change) }?)
    }

    /// Sets whether the file below is read through its page cache. The kernel does so of its own accord
    /// when the file below is changed for one that cannot be read otherwise.
    ///
    /// # Errors
    /// `EINVAL` if the file's file system cannot do without.
    pub fn set_caching(&self, caching: Caching) -> io::Result<()> {
        let direct = usize::from(caching == Caching::Direct);
        // SAFETY: LOOP_SET_DIRECT_IO takes 0 or 1, not a pointer.
        let set = unsafe { IntegerSetter::<LOOP_SET_DIRECT_IO>::new_usize(direct) };
        // SAFETY: as above.
        Ok(unsafe { rustix::ioctl::ioctl(&self.device, set) }?)
    }

    /// Which file is below, and how.
    ///
    /// # Errors
    /// `ENXIO` if no file is attached.
    pub fn status(&self) -> io::Result<LoopStatus> {
        // SAFETY: LOOP_GET_STATUS64 fills `struct loop_info64`, of which every bit pattern is valid.
        let get = unsafe { Getter::<LOOP_GET_STATUS64, Info>::new() };
        // SAFETY: as above.
        let info = unsafe { rustix::ioctl::ioctl(&self.device, get) }?;
        Ok(LoopStatus {
            file: FileId { dev: info.device, ino: info.inode },
            number: info.number,
            size_limit: (info.size_limit != 0).then_some(info.size_limit),
            access: if info.flags & LO_FLAGS_READ_ONLY == 0 {
                Access::ReadWrite
            } else {
                Access::ReadOnly
            },
            on_last_close: if info.flags & LO_FLAGS_AUTOCLEAR == 0 {
                OnLastClose::Stay
            } else {
                OnLastClose::Detach
            },
            caching: if info.flags & LO_FLAGS_DIRECT_IO == 0 {
                Caching::Buffered
            } else {
                Caching::Direct
            },
        })
    }

    /// Sets up to how many KiB are read at once ahead of a sequential reader.
    ///
    /// # Errors
    /// `EROFS` where `/sys` is read-only.
    pub fn set_read_ahead(&self, kib: u32) -> io::Result<()> {
        let name = self.path.file_name().unwrap_or_default();
        let file = Path::new("/sys/block").join(name).join("queue/read_ahead_kb");
        std::fs::write(file, kib.to_string())
    }

    /// Detaches the file; if the device is in use, when the last user closes it.
    ///
    /// # Errors
    /// `ENXIO` if no file is attached.
    pub fn detach(mut self) -> io::Result<()> {
        self.persistent = true;
        self.clear()
    }

    /// Leaves the device attached for good.
    pub fn into_persistent(mut self) {
        self.persistent = true;
    }

    fn clear(&self) -> io::Result<()> {
        // SAFETY: LOOP_CLR_FD takes no argument.
        let clear = unsafe { NoArg::<LOOP_CLR_FD>::new() };
        // SAFETY: as above.
        Ok(unsafe { rustix::ioctl::ioctl(&self.device, clear) }?)
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if !self.persistent {
            // It fails only if someone else has detached it already.
            self.clear().ok();
        }
    }
}

/// What is below a loop device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopStatus {
    /// The file.
    pub file: FileId,
    /// The number in the device's name.
    pub number: u32,
    /// The size that was asked for in bytes, or `None` for the file's.
    pub size_limit: Option<u64>,
    /// Whether it can be written to.
    pub access: Access,
    /// What happens when the last user closes it. `Detach` also means that detaching is under way.
    pub on_last_close: OnLastClose,
    /// Whether the file's own page cache is left out.
    pub caching: Caching,
}

fn open_device(path: &Path, access: OFlags) -> Result<OwnedFd, AttachError> {
    rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| AttachError::Unavailable { path: path.to_owned(), source })
}

/// `LOOP_CTL_GET_FREE`: no argument, the result is the number of a free device.
struct GetFree;

// SAFETY: the opcode takes no argument and writes no memory.
unsafe impl Ioctl for GetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut libc::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut libc::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

/// `struct loop_info64`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Info {
    /// In the form of `st_dev`.
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

impl Config {
    fn new(file: BorrowedFd<'_>, options: LoopOptions) -> Self {
        let LoopOptions { access, block_size, size_limit, on_last_close, caching } = options;
        let read_only = if access == Access::ReadOnly { LO_FLAGS_READ_ONLY } else { 0 };
        let detach = if on_last_close == OnLastClose::Detach { LO_FLAGS_AUTOCLEAR } else { 0 };
        let direct = if caching == Caching::Direct { LO_FLAGS_DIRECT_IO } else { 0 };
        let info = Info {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: size_limit.unwrap_or(0),
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: read_only | detach | direct,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        };
        Self { fd: file.as_raw_fd().cast_unsigned(), block_size, info, reserved: [0; 8] }
    }
}

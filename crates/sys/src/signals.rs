//! Signals as something to be read, instead of something that interrupts.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::ptr;

/// A signal that a service is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// The terminal is gone.
    Hangup,
    /// Ctrl-C.
    Interrupt,
    /// Please end.
    Terminate,
}

impl Signal {
    const ALL: [Self; 3] = [Self::Hangup, Self::Interrupt, Self::Terminate];

    fn number(self) -> libc::c_int {
        match self {
            Self::Hangup => libc::SIGHUP,
            Self::Interrupt => libc::SIGINT,
            Self::Terminate => libc::SIGTERM,
        }
    }
}

/// The signals of this process, held back until they are read.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Holds [`Signal`]s back from the calling thread and those that it starts from now on; to be
    /// called before there are others. They stay held back when this is dropped.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn hold() -> io::Result<Self> {
        let mut set = empty_set();
        for signal in Signal::ALL {
            // SAFETY: `set` is an initialized set and the number is that of a signal.
            unsafe { libc::sigaddset(&raw mut set, signal.number()) };
        }
        block(libc::SIG_BLOCK, &set)?;
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: `set` is an initialized set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Takes one signal that has come, or `None`. Does not wait: poll the descriptor.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn next(&self) -> io::Result<Option<Signal>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let len = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for the one structure that is asked for.
        let n_read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), len) };
        if n_read < 0 {
            let err = io::Error::last_os_error();
            return match err.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(err),
            };
        }
        // SAFETY: all its fields are integers, zero at first and then written by the kernel.
        let info = unsafe { info.assume_init() };
        Ok(Signal::ALL.into_iter().find(|signal| signal.number().cast_unsigned() == info.ssi_signo))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Starts a process from which no signals are held back: without this it would inherit what
/// [`Signals::hold`] did, and could not be terminated.
///
/// # Errors
/// Those of [`Command::spawn`].
pub fn spawn_unblocked(command: &mut Command) -> io::Result<Child> {
    // SAFETY: between fork and exec only sigprocmask is called, which is async-signal-safe, on a set
    // on the stack.
    let command = unsafe { command.pre_exec(|| block(libc::SIG_SETMASK, &empty_set())) };
    command.spawn()
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initializes the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: as above.
    unsafe { set.assume_init() }
}

fn block(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: `set` is an initialized set; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(how, ptr::from_ref(set), ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

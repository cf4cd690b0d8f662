//! Namespaces of the calling thread.
//!
//! Only what `rustix` leaves unsafe or what takes more than one call; entering a namespace, `chroot`
//! and `pivot_root` are safe there.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use rustix::thread::UnshareFlags;

/// What a thread can have for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// Control groups.
    Cgroup,
    /// The name of the machine.
    HostName,
    /// System V and POSIX message queues, semaphores and shared memory.
    Ipc,
    /// Mounts. Until [`make_private`](crate::mount::make_private), changes may still spread.
    Mount,
    /// Network devices.
    Network,
    /// Process ids, of children from now on.
    Pid,
    /// Users and capabilities. Only possible while the process has one thread.
    User,
}

impl Namespace {
    fn flag(self) -> UnshareFlags {
        match self {
            Self::Cgroup => UnshareFlags::NEWCGROUP,
            Self::HostName => UnshareFlags::NEWUTS,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Mount => UnshareFlags::NEWNS,
            Self::Network => UnshareFlags::NEWNET,
            Self::Pid => UnshareFlags::NEWPID,
            Self::User => UnshareFlags::NEWUSER,
        }
    }
}

/// Gives the calling thread, and the threads and processes it starts from now on, namespaces of
/// their own.
///
/// # Errors
/// `EPERM` without the right to do so, `EINVAL` for a user namespace when there are several threads.
pub fn unshare(namespaces: &[Namespace]) -> io::Result<()> {
    let flags =
        namespaces.iter().fold(UnshareFlags::empty(), |flags, namespace| flags | namespace.flag());
    // SAFETY: `Namespace` has no counterpart of CLONE_FILES, the one flag that would make descriptors
    // mean different files in different threads.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// A run of user or group ids that a user namespace shows under other numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first id, as seen inside.
    pub inside: u32,
    /// The first id, as seen by the parent namespace.
    pub outside: u32,
    /// How many ids follow one another.
    pub count: u32,
}

/// Sets which ids exist in the user namespace that the process has just made with [`unshare`].
///
/// An unprivileged process may map one id of each kind: its own.
///
/// # Errors
/// `EPERM` for ids that the process may not map, or when they are set already.
pub fn map_ids(users: &[IdRange], groups: &[IdRange]) -> io::Result<()> {
    fs::write("/proc/self/uid_map", lines(users))?;
    match fs::write("/proc/self/gid_map", lines(groups)) {
        // An unprivileged process must first give up setgroups(2) (user_namespaces(7)).
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
            fs::write("/proc/self/setgroups", "deny")?;
            fs::write("/proc/self/gid_map", lines(groups))
        }
        written => written,
    }
}

/// Makes a user namespace with these ids, for mounts to be shown with. No process is in it.
///
/// # Errors
/// `EPERM` without the right to map these ids, `ENOSPC` and `EUSERS` when there are too many namespaces.
pub fn user_namespace(users: &[IdRange], groups: &[IdRange]) -> io::Result<OwnedFd> {
    let (ready, tell) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let tell_fd = tell.as_raw_fd();
    // Whoever has threads cannot make one for himself.
    // SAFETY: the child makes system calls only, none of which takes a lock that another thread may hold.
    let child = match unsafe { libc::fork() } {
        0 => enter_user_namespace(tell_fd),
        pid => Pid::from_raw(pid).filter(|_| pid > 0).map(Child),
    };
    let child = child.ok_or_else(io::Error::last_os_error)?;
    drop(tell);
    let mut errno = [0; 4];
    if rustix::io::read(&ready, &mut errno)? != errno.len() {
        return Err(io::Error::other("the process that makes a user namespace ended"));
    }
    match i32::from_ne_bytes(errno) {
        0 => {}
        errno => return Err(io::Error::from_raw_os_error(errno)),
    }
    let of_child = format!("/proc/{}", child.0.as_raw_nonzero());
    fs::write(format!("{of_child}/uid_map"), lines(users))?;
    fs::write(format!("{of_child}/gid_map"), lines(groups))?;
    Ok(File::open(format!("{of_child}/ns/user"))?.into())
}

/// Says through `tell` what came of it, and stays until it is killed.
fn enter_user_namespace(tell: RawFd) -> ! {
    // SAFETY: takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: takes no pointers; there is one thread here.
    let errno = match unsafe { libc::unshare(libc::CLONE_NEWUSER) } {
        0 => 0,
        _ => io::Error::last_os_error().raw_os_error().unwrap_or(libc::EPERM),
    };
    let errno = errno.to_ne_bytes();
    // SAFETY: the kernel reads as many bytes as there are.
    unsafe { libc::write(tell, errno.as_ptr().cast(), errno.len()) };
    loop {
        // SAFETY: takes nothing.
        unsafe { libc::pause() };
    }
}

/// A process that waits to be killed.
struct Child(Pid);

impl Drop for Child {
    fn drop(&mut self) {
        // It is ours until it was waited for: the number means nobody else.
        if kill_process(self.0, Signal::KILL).is_ok() {
            while let Err(Errno::INTR) = waitpid(Some(self.0), WaitOptions::empty()) {}
        }
    }
}

fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().fold(String::new(), |mut text, IdRange { inside, outside, count }| {
        writeln!(text, "{inside} {outside} {count}").expect("a String takes all that is written");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_namespace_has_the_ids_that_were_asked_for_and_no_process() {
        let range = |inside, outside, count| IdRange { inside, outside, count };
        let namespace = user_namespace(&[range(0, 7, 1)], &[range(0, 8, 2)]).unwrap();
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        let link = format!("/proc/self/fd/{}", namespace.as_raw_fd());
        let made = fs::read_link(link).unwrap();
        assert!(made.to_string_lossy().starts_with("user:["), "{made:?}");
        assert_ne!(made, own);
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
        // One after the other must not overlap.
        let twice = [range(0, 7, 2), range(1, 9, 2)];
        user_namespace(&twice, &[range(0, 8, 1)]).unwrap_err();
    }
}

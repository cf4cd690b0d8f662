//! Namespaces of the calling thread.
//!
//! Only what `rustix` leaves unsafe or what takes more than one call; entering a namespace, `chroot`
//! and `pivot_root` are safe there.

use std::fmt::Write as _;
use std::io;

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
    std::fs::write("/proc/self/uid_map", lines(users))?;
    match std::fs::write("/proc/self/gid_map", lines(groups)) {
        // An unprivileged process must first give up setgroups(2) (user_namespaces(7)).
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
            std::fs::write("/proc/self/setgroups", "deny")?;
            std::fs::write("/proc/self/gid_map", lines(groups))
        }
        written => written,
    }
}

fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().fold(String::new(), |mut text, IdRange { inside, outside, count }| {
        writeln!(text, "{inside} {outside} {count}").expect("a String takes all that is written");
        text
    })
}

//! systemd's own keeper of descriptors, the "file descriptor store".
//!
//! The unit needs `Type=notify` and a `FileDescriptorStoreMax=` above the number of descriptors.
//! systemd drops silently what is above the limit, and says nothing back at all. So it is a second
//! holder beside the keeper, for when both processes die, and not its replacement; it also closes
//! everything when the unit is stopped, unless there is `FileDescriptorStorePreserve=` (systemd 254).
//!
//! What was written to the socket counts although the writer is dead before systemd reads it: systemd
//! reads its notifications before it looks at processes that ended.
//!
//! A note travels as a second descriptor, of a small memory file. Source of the protocol:
//! `sd_notify(3)` and `sd_listen_fds(3)`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use parking_lot::Mutex;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

use crate::protocol::{Held, MAX_NOTE_LEN};

/// The end of the name of a descriptor that holds a note.
const NOTE_SUFFIX: &str = ".note";

/// systemd takes names of up to 255 characters.
const MAX_NAME_LEN: usize = 255 - NOTE_SUFFIX.len();

/// systemd could not be told something.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// Names there are printable ASCII without colons, and not long; notes are not longer than the
    /// keeper's.
    #[error("systemd cannot keep {name:?} with a note of {note_len} bytes")]
    Invalid {
        /// The name.
        name: String,
        /// The length of the note in bytes.
        note_len: usize,
    },
    /// The notification did not arrive.
    #[error("cannot {step} systemd's notification socket")]
    Notify {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// The descriptor store of the systemd unit that this process is.
#[derive(Debug)]
pub struct SystemdStore {
    socket: OwnedFd,
    address: SocketAddrUnix,
    inherited: Mutex<Vec<Held>>,
}

impl SystemdStore {
    /// Uses the socket that `NOTIFY_SOCKET` names, and what systemd handed over at the start, as
    /// [`inherited`] makes it of `LISTEN_FDS`.
    ///
    /// # Errors
    /// [`SystemdError::Notify`] for a path that cannot be one of a socket.
    pub fn new(
        notify_socket: &OsStr,
        inherited: Vec<(String, OwnedFd)>,
    ) -> Result<Self, SystemdError> {
        let notify =
            |step| move |err: rustix::io::Errno| SystemdError::Notify { step, source: err.into() };
        let address = match notify_socket.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name),
            path => SocketAddrUnix::new(path),
        };
        let address = address.map_err(notify("use the name of"))?;
        let (family, kind) = (AddressFamily::UNIX, SocketType::DGRAM);
        let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)
            .map_err(notify("make a socket for"))?;
        Ok(Self { socket, address, inherited: Mutex::new(with_notes(inherited)) })
    }

    /// Tells systemd that the service serves.
    ///
    /// # Errors
    /// [`SystemdError::Notify`]
    pub fn ready(&self) -> Result<(), SystemdError> {
        self.notify("READY=1", &[])
    }

    /// Tells systemd that the service is alive, for a unit with `WatchdogSec=`.
    ///
    /// # Errors
    /// [`SystemdError::Notify`]
    pub fn alive(&self) -> Result<(), SystemdError> {
        self.notify("WATCHDOG=1", &[])
    }

    /// Lets systemd hold a duplicate of `fd`, in place of what it held under that name.
    ///
    /// # Errors
    /// [`SystemdError`]; that systemd's store is full cannot be found out.
    pub fn put(&self, name: &str, note: &[u8], fd: BorrowedFd<'_>) -> Result<(), SystemdError> {
        if !is_valid(name) || note.len() > MAX_NOTE_LEN {
            return Err(SystemdError::Invalid { name: name.to_owned(), note_len: note.len() });
        }
        // systemd keeps descriptors of the same name beside each other.
        self.remove(name)?;
        self.store(name, fd)?;
        if note.is_empty() {
            return Ok(());
        }
        let note_fd = sys::memory_file::make("hermes-note", note)
            .map_err(|source| SystemdError::Notify { step: "make a note for", source })?;
        self.store(&format!("{name}{NOTE_SUFFIX}"), note_fd.as_fd())
    }

    /// Lets systemd close what it holds under that name.
    ///
    /// # Errors
    /// [`SystemdError`]
    pub fn remove(&self, name: &str) -> Result<(), SystemdError> {
        self.notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])?;
        self.notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}{NOTE_SUFFIX}"), &[])
    }

    /// Takes what systemd handed over at the start. It stays in systemd's store.
    #[must_use]
    pub fn take_all(&self) -> Vec<Held> {
        std::mem::take(&mut self.inherited.lock())
    }

    fn store(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), SystemdError> {
        // Without FDPOLL=0 systemd drops a descriptor that reports an error or a hang-up.
        self.notify(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), &[fd])
    }

    fn notify(&self, text: &str, fds: &[BorrowedFd<'_>]) -> Result<(), SystemdError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            let pushed = ancillary.push(SendAncillaryMessage::ScmRights(fds));
            debug_assert!(pushed, "there is room for the one descriptor");
        }
        let parts = [IoSlice::new(text.as_bytes())];
        rustix::io::retry_on_intr(|| {
            let flags = SendFlags::NOSIGNAL;
            rustix::net::sendmsg_addr(&self.socket, &self.address, &parts, &mut ancillary, flags)
        })
        .map(drop)
        .map_err(|err| SystemdError::Notify { step: "write to", source: err.into() })
    }
}

/// Takes over the descriptors that systemd handed over, with their names. To be called at the very
/// start of the process, with the values of `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`.
///
/// Values that are not meant for this process mean no descriptors.
///
/// # Errors
/// `EBADF` if the descriptors are not there, `AlreadyExists` when called again.
pub fn inherited(
    listen_pid: &str,
    listen_fds: &str,
    listen_fdnames: &str,
) -> io::Result<Vec<(String, OwnedFd)>> {
    let n_fds = match (listen_pid.parse::<u32>(), listen_fds.parse()) {
        (Ok(pid), Ok(n_fds)) if pid == std::process::id() && n_fds > 0 => n_fds,
        _ => return Ok(Vec::new()),
    };
    let fds = sys::descriptors::inherited(n_fds)?;
    let names =
        listen_fdnames.split(':').map(str::to_owned).chain(std::iter::repeat_with(String::new));
    Ok(names.zip(fds).collect())
}

fn is_valid(name: &str) -> bool {
    let printable = |byte: u8| byte.is_ascii_graphic() && byte != b':';
    (1..=MAX_NAME_LEN).contains(&name.len())
        && name.bytes().all(printable)
        && !name.ends_with(NOTE_SUFFIX)
}

/// Joins descriptors and their notes. A note that cannot be read counts as empty.
fn with_notes(inherited: Vec<(String, OwnedFd)>) -> Vec<Held> {
    let (notes, fds): (Vec<_>, Vec<_>) =
        inherited.into_iter().partition(|(name, _)| name.ends_with(NOTE_SUFFIX));
    let note_of = |name: &str| {
        let note = notes.iter().find(|(note, _)| note.strip_suffix(NOTE_SUFFIX) == Some(name))?;
        let file = File::from(note.1.try_clone().ok()?);
        sys::memory_file::read(&file, MAX_NOTE_LEN).ok()
    };
    fds.into_iter()
        .map(|(name, fd)| Held { note: note_of(&name).unwrap_or_default(), name, fd })
        .collect()
}

#[cfg(test)]
mod tests {
    use sys::fanotify::FileId;

    use super::*;

    /// As much of systemd as keeps descriptors: in the order in which they came, newest first.
    struct FakeSystemd {
        _folder: tempfile::TempDir,
        path: std::path::PathBuf,
        socket: OwnedFd,
        stored: Vec<(String, OwnedFd)>,
    }

    impl FakeSystemd {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("notify");
            let (family, kind) = (AddressFamily::UNIX, SocketType::DGRAM);
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(family, kind, flags, None).unwrap();
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            Self { _folder: folder, path, socket, stored: Vec::new() }
        }

        fn store(&self, inherited: Vec<(String, OwnedFd)>) -> SystemdStore {
            SystemdStore::new(self.path.as_os_str(), inherited).unwrap()
        }

        /// Does what it was told. The kernel queues ten messages, so not to be put off.
        fn work(&mut self) {
            let stored = &mut self.stored;
            let mut buffer = [0; 512];
            while let Ok(mut got) = sys::descriptors::receive(self.socket.as_fd(), &mut buffer) {
                let text = std::str::from_utf8(&buffer[..got.len]).unwrap();
                let (what, name) = text.split_once("\nFDNAME=").unwrap();
                match what {
                    "FDSTORE=1\nFDPOLL=0" => {
                        stored.insert(0, (name.to_owned(), got.fds.pop().unwrap()));
                    }
                    "FDSTOREREMOVE=1" => stored.retain(|(stored, _)| stored != name),
                    other => panic!("systemd does not know {other:?}"),
                }
            }
        }
    }

    #[test]
    fn what_is_put_comes_back_in_the_next_process() {
        let mut systemd = FakeSystemd::new();
        let store = systemd.store(Vec::new());
        assert!(store.take_all().is_empty());
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        for (name, note, file) in [
            ("group", b"".as_slice(), &files[0]),
            ("layer", b"old", &files[0]),
            ("layer", b"new", &files[1]),
            ("gone", b"note", &files[0]),
        ] {
            store.put(name, note, file.as_fd()).unwrap();
            systemd.work();
        }
        store.remove("gone").unwrap();
        systemd.work();

        let handed_over = std::mem::take(&mut systemd.stored);
        let mut held = systemd.store(handed_over).take_all();
        held.sort_by(|a, b| a.name.cmp(&b.name));
        let found: Vec<_> = held
            .iter()
            .map(|held| {
                let id = FileId::of(held.fd.as_fd()).unwrap();
                (held.name.as_str(), held.note.as_slice(), id)
            })
            .collect();
        let id = |file: &File| FileId::of(file.as_fd()).unwrap();
        let expected = [("group", b"".as_slice(), id(&files[0])), ("layer", b"new", id(&files[1]))];
        assert_eq!(found, expected);
    }

    #[test]
    fn names_that_systemd_would_change_are_refused() {
        let mut systemd = FakeSystemd::new();
        let store = systemd.store(Vec::new());
        let file = tempfile::tempfile().unwrap();
        for name in ["", "a:b", "a b", "a\nb", "é", "x.note", &"x".repeat(251)] {
            let err = store.put(name, b"", file.as_fd()).expect_err(name);
            assert!(matches!(err, SystemdError::Invalid { .. }), "{err:?}");
        }
        systemd.work();
        assert!(systemd.stored.is_empty());
    }

    #[track_caller]
    fn check_not_for_us(pid: &str, fds: &str) {
        assert!(inherited(pid, fds, "").unwrap().is_empty());
    }

    #[test]
    fn what_is_for_others_is_not_taken() {
        let own = std::process::id().to_string();
        check_not_for_us("", "");
        check_not_for_us("1", "3");
        check_not_for_us(&own, "0");
        check_not_for_us(&own, "-1");
        check_not_for_us(&own, "70000");
    }
}

//! The other half of the tests that need a second process: this same program, started again.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

use rustix::net::SocketType;
use sys::descriptors::{self, Received};
use sys::fanotify::Group;
use sys::journal::Journal;

use crate::rig::{next_event, readable_within};

/// A process of this program with a socket to it. Killed and reaped when dropped.
pub(crate) struct Other {
    process: Child,
    socket: OwnedFd,
}

impl Other {
    /// Starts the process and tells it what to do.
    pub(crate) fn start(role: &str, fds: &[BorrowedFd<'_>]) -> Self {
        let (socket, theirs) = descriptors::pair().unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child::play_a_role", "--nocapture"])
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        descriptors::send(socket.as_fd(), role.as_bytes(), fds).unwrap();
        Self { process, socket }
    }

    /// Waits for the process' report.
    #[track_caller]
    pub(crate) fn report(&self) -> String {
        let patience = std::time::Duration::from_secs(20);
        assert!(readable_within(self.socket.as_fd(), patience), "the child says nothing");
        let mut buffer = [0; 64];
        let Received { len, .. } = descriptors::receive(self.socket.as_fd(), &mut buffer).unwrap();
        assert!(len > 0, "the child has died");
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    /// SIGKILL, and gone when this returns.
    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Not a test: passes at once unless standard input is a socket of [`Other`].
#[test]
fn play_a_role() {
    let stdin = std::io::stdin();
    let socket = stdin.as_fd();
    if rustix::net::sockopt::socket_type(socket) != Ok(SocketType::SEQPACKET) {
        return;
    }
    let mut buffer = [0; 64];
    let Received { len, fds } = descriptors::receive(socket, &mut buffer).unwrap();
    match (&buffer[..len], fds.as_slice()) {
        (b"read an event", _) => read_an_event(socket, fds, None),
        (b"read an event and tag it", _) => read_an_event(socket, fds, Some(77)),
        (b"write and read", [file]) => write_and_read(socket, file),
        (role, fds) => panic!("an unknown role: {role:?} with {} descriptors", fds.len()),
    }
}

/// Reads one event and never answers it.
fn read_an_event(socket: BorrowedFd<'_>, fds: Vec<OwnedFd>, tag: Option<u64>) {
    let [group, journal] = <[OwnedFd; 2]>::try_from(fds).unwrap();
    let (group, journal) = (Group::from_fd(group), Journal::open(journal).unwrap());
    let event = next_event(&group, &journal);
    if let Some(tag) = tag {
        event.set_tag(tag);
    }
    descriptors::send(socket, event.number().to_string().as_bytes(), &[]).unwrap();
    // Until killed: the other end says nothing more.
    let mut buffer = [0; 64];
    descriptors::receive(socket, &mut buffer).unwrap();
}

fn write_and_read(socket: BorrowedFd<'_>, file: &OwnedFd) {
    let file = File::from(file.try_clone().unwrap());
    file.write_all_at(b"written by another process", 8192).unwrap();
    let mut bytes = [0; 7];
    file.read_exact_at(&mut bytes, 8192).unwrap();
    assert_eq!(&bytes, b"written");
    descriptors::send(socket, b"done", &[]).unwrap();
}

//! The daemon's side.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use sys::descriptors::{self, Received};

use crate::protocol::{Held, MAX_PACKET_LEN, Refusal, Reply, Request, is_command, is_valid};

/// The keeper does nothing but answer. One that takes longer is stopped or swapped out.
const PATIENCE: Duration = Duration::from_secs(10);

/// A request to the keeper failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or the connection broke: the keeper is dead, and a new one must be started and
    /// given everything again.
    #[error("the keeper at {} cannot be reached", socket.display())]
    Gone {
        /// Where it should be.
        socket: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The keeper cannot do it.
    #[error("the keeper refused to {what} {name:?}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// About which descriptor.
        name: String,
        /// Why not.
        source: Refusal,
    },
    /// Name or note are too long, or the name is empty.
    #[error("{name:?} with a note of {note_len} bytes cannot be kept")]
    Invalid {
        /// The name.
        name: String,
        /// The length of the note in bytes.
        note_len: usize,
    },
}

/// A connection to the keeper. Requests of several threads go one after the other.
///
/// The descriptor ([`AsFd`]) hangs up (`POLLHUP`) as soon as the keeper dies, and is readable for no
/// other reason while no request is under way.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    path: PathBuf,
    /// Held from a request to the end of its answer.
    turn: Mutex<()>,
}

impl Client {
    /// Connects to the keeper that listens at `path`.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let gone = |source| ClientError::Gone { socket: path.to_owned(), source };
        let socket = descriptors::connect(path).map_err(gone)?;
        for kind in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, kind, Some(PATIENCE)).map_err(|err| gone(err.into()))?;
        }
        Ok(Self { socket, path: path.to_owned(), turn: Mutex::new(()) })
    }

    /// Tells the keeper that this process is the daemon: if it dies without
    /// [`goodbye`](Self::goodbye), the keeper starts it again.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn daemon(&self) -> Result<(), ClientError> {
        self.done("serve", "", Request::Daemon, &[])
    }

    /// Tells the keeper with which command line the daemon is started when it dies, in place of what the
    /// keeper was told before. With an empty one it is not started.
    ///
    /// # Errors
    /// [`ClientError::Refused`] by an older keeper, [`ClientError::Invalid`] for a command line of more
    /// than 4 KiB or with zero bytes, [`ClientError::Gone`].
    pub fn respawn(&self, command: &[OsString]) -> Result<(), ClientError> {
        let mut bytes = Vec::new();
        for argument in command {
            bytes.extend_from_slice(argument.as_bytes());
            bytes.push(0);
        }
        let is_plain = command.iter().all(|argument| !argument.as_bytes().contains(&0));
        if !is_plain || !is_command(&bytes) {
            let name = "the daemon's command line".to_owned();
            return Err(ClientError::Invalid { name, note_len: bytes.len() });
        }
        self.done("start", "the daemon", Request::Respawn { command: &bytes }, &[])
    }

    /// Tells the keeper that this process ends on purpose. What it holds stays.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn goodbye(&self) -> Result<(), ClientError> {
        self.done("let go", "", Request::Goodbye, &[])
    }

    /// Lets the keeper hold a duplicate of `fd`, in place of what it held under that name.
    ///
    /// When this returns, the descriptor survives this process.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn put(&self, name: &str, note: &[u8], fd: BorrowedFd<'_>) -> Result<(), ClientError> {
        if !is_valid(name, note) {
            return Err(ClientError::Invalid { name: name.to_owned(), note_len: note.len() });
        }
        self.done("keep", name, Request::Put { name, note }, &[fd])
    }

    /// Lets the keeper close what it holds under that name. It is no error if there is nothing.
    ///
    /// # Errors
    /// [`ClientError::Gone`], or [`ClientError::Invalid`] for a name that cannot be.
    pub fn remove(&self, name: &str) -> Result<(), ClientError> {
        if !is_valid(name, &[]) {
            return Err(ClientError::Invalid { name: name.to_owned(), note_len: 0 });
        }
        match self.done("remove", name, Request::Remove { name }, &[]) {
            Err(ClientError::Refused { source: Refusal::NotHeld, .. }) => Ok(()),
            removed => removed,
        }
    }

    /// Gets duplicates of everything that the keeper holds, in the order of their names.
    ///
    /// # Errors
    /// [`ClientError::Gone`]; also if this process has no room for so many descriptors.
    pub fn take_all(&self) -> Result<Vec<Held>, ClientError> {
        let _turn = self.turn.lock();
        self.send(Request::List, &[])?;
        let mut held = Vec::new();
        let mut buffer = [0; MAX_PACKET_LEN];
        loop {
            let (reply, fd) = self.receive(&mut buffer)?;
            match (reply, fd) {
                (Reply::Held { name, note }, Some(fd)) => {
                    held.push(Held { name: name.to_owned(), note: note.to_owned(), fd });
                }
                (Reply::End, None) => return Ok(held),
                _ => return Err(self.nonsense()),
            }
        }
    }

    /// The keeper's process id, in its own process namespace.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn pid(&self) -> Result<u32, ClientError> {
        match self.ask(Request::Ping, &[])? {
            Answer::Pid(pid) => Ok(pid),
            Answer::Done | Answer::Refused(_) => Err(self.nonsense()),
        }
    }

    /// Lets the keeper close everything and end: readers that wait get what the file holds, so
    /// nothing may be mounted any more.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn shutdown(self) -> Result<(), ClientError> {
        self.done("shut down", "", Request::Shutdown, &[])?;
        self.wait_closed(Some(PATIENCE)).map_err(|source| self.gone(source))?;
        Ok(())
    }

    /// Whether the keeper has died since this connection was made.
    #[must_use]
    pub fn closed(&self) -> bool {
        // A poll that fails says nothing good about the connection.
        self.wait_closed(Some(Duration::ZERO)).unwrap_or(true)
    }

    /// Waits until the keeper has died, or at most for `patience`. Returns whether it has.
    ///
    /// # Errors
    /// Those of `poll`.
    pub fn wait_closed(&self, patience: Option<Duration>) -> io::Result<bool> {
        // Hanging up is reported without being asked for.
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::empty())];
        let patience = patience.map(|patience| {
            Timespec::try_from(patience).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
        });
        let n_ready = rustix::io::retry_on_intr(|| poll(&mut fds, patience.as_ref()))?;
        Ok(n_ready > 0)
    }

    fn done(
        &self,
        what: &'static str,
        name: &str,
        request: Request<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        match self.ask(request, fds)? {
            Answer::Done => Ok(()),
            Answer::Refused(source) => {
                Err(ClientError::Refused { what, name: name.to_owned(), source })
            }
            Answer::Pid(_) => Err(self.nonsense()),
        }
    }

    fn ask(&self, request: Request<'_>, fds: &[BorrowedFd<'_>]) -> Result<Answer, ClientError> {
        let _turn = self.turn.lock();
        self.send(request, fds)?;
        match self.receive(&mut [0; MAX_PACKET_LEN])?.0 {
            Reply::Done => Ok(Answer::Done),
            Reply::Refused(refusal) => Ok(Answer::Refused(refusal)),
            Reply::Pid(pid) => Ok(Answer::Pid(pid)),
            Reply::Held { .. } | Reply::End => Err(self.nonsense()),
        }
    }

    fn send(&self, request: Request<'_>, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        descriptors::send(self.socket.as_fd(), &request.encode(), fds)
            .map(drop)
            .map_err(|source| self.gone(source))
    }

    fn receive<'a>(
        &self,
        buffer: &'a mut [u8],
    ) -> Result<(Reply<'a>, Option<OwnedFd>), ClientError> {
        let Received { len, mut fds } = descriptors::receive(self.socket.as_fd(), buffer)
            .map_err(|source| self.gone(source))?;
        if len == 0 {
            return Err(self.gone(io::ErrorKind::UnexpectedEof.into()));
        }
        let reply = Reply::decode(&buffer[..len]).ok_or_else(|| self.nonsense())?;
        Ok((reply, fds.pop()))
    }

    fn gone(&self, source: io::Error) -> ClientError {
        ClientError::Gone { socket: self.path.clone(), source }
    }

    fn nonsense(&self) -> ClientError {
        self.gone(io::Error::new(io::ErrorKind::InvalidData, "the answer makes no sense"))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A reply in one packet, without what it borrows.
enum Answer {
    Done,
    Refused(Refusal),
    Pid(u32),
}

/// A keeper could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program could not be run.
    #[error("cannot run {program:?} as keeper")]
    Spawn {
        /// Which program.
        program: OsString,
        /// Why not.
        source: io::Error,
    },
    /// It ended before it listened; it has said why on standard error.
    #[error("{program:?} ended before it was ready to keep anything")]
    Ended {
        /// Which program.
        program: OsString,
    },
    /// It listens, but not for us.
    #[error("cannot connect to the new keeper")]
    Connect {
        /// Why not.
        source: ClientError,
    },
}

/// Starts a keeper and connects to it once it listens at `socket`.
///
/// `command` must run [`serve()`](crate::serve()) with its standard input as
/// [`KeeperOptions::ready`](crate::KeeperOptions::ready).
///
/// # Errors
/// [`StartError`]
pub fn start(command: &mut Command, socket: &Path) -> Result<Client, StartError> {
    let program = command.get_program().to_owned();
    let spawn = |source| StartError::Spawn { program: program.clone(), source };
    let (mut ready, theirs) = io::pipe().map_err(spawn)?;
    command.stdin(Stdio::from(theirs));
    let spawned = command.spawn().map_err(spawn);
    // The command keeps our copy of the writing end, and with it the pipe would never end.
    command.stdin(Stdio::null());
    let mut keeper = spawned?;
    let mut byte = [0];
    if io::Read::read_exact(&mut ready, &mut byte).is_err() {
        keeper.wait().map_err(spawn)?;
        return Err(StartError::Ended { program });
    }
    Client::connect(socket).map_err(|source| StartError::Connect { source })
}

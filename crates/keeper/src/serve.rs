//! The keeper's main loop: one thread, one `poll`, no more code than needed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::process::{Resource, Rlimit};
use sys::descriptors::{self, Peer, Received};
use sys::signals::{Signal, Signals};

use crate::machine;
use crate::protocol::{MAX_PACKET_LEN, Refusal, Reply, Request};
use crate::respawn::Daemons;

/// A daemon needs one; more are for commands that look around.
const MAX_CONNECTIONS: usize = 64;

/// How long no connection is accepted after one could not be.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// How long another keeper may take to listen, or to be dead.
const OTHERS_START: Duration = Duration::from_secs(5);

const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How often, at the end of the machine.
const LOOK_FOR_READERS: Duration = Duration::from_millis(50);

/// The kernel ends this process last.
const OOM_SCORE: &str = "-999";

/// How a keeper is run.
#[derive(Debug)]
pub struct KeeperOptions {
    /// Where it listens. What is there already is replaced. At most 107 bytes.
    pub socket: PathBuf,
    /// Where it writes its process id. The file is locked for as long as the keeper lives, so there is
    /// one keeper for each such file, and it stays, empty, when the keeper ends.
    pub pid_file: PathBuf,
    /// The command line that starts the daemon again when it has died, or `None` if someone else
    /// does that.
    pub respawn: Option<Vec<OsString>>,
    /// Gets one byte when the keeper listens, and is then closed.
    pub ready: Option<OwnedFd>,
}

/// The keeper could not start, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// There is one already.
    #[error("another keeper holds the lock on {}", pid_file.display())]
    Running {
        /// The locked file.
        pid_file: PathBuf,
    },
    /// A file or the socket could not be made.
    #[error("cannot {step} {}", path.display())]
    Path {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Runs the keeper until it is told to shut down, or to terminate while it holds nothing, or while the machine
/// ends and all readers have.
///
/// Assumes to be the only code of its process: signals are held back, and limits and the session are
/// changed.
///
/// # Errors
/// [`ServeError`]. Once it listens, only a `poll` that fails ends it.
pub fn serve(options: KeeperOptions) -> Result<(), ServeError> {
    let KeeperOptions { socket, pid_file, respawn, ready } = options;
    let system = |step| move |source| ServeError::System { step, source };
    let lock = lock(&pid_file, &socket)?;
    let signals = Signals::hold().map_err(system("hold signals back"))?;
    // A keeper that leads a session already is as well off.
    rustix::process::setsid().ok();
    raise_file_limit();
    let children_oom_score = protect_from_oom();
    let listener = listen(&socket)?;
    if let Some(ready) = ready {
        // Whoever waited for it and is gone does not matter.
        File::from(ready).write_all(b"\n").ok();
    }
    let mut keeper = Keeper {
        signals,
        listener,
        paused_until: None,
        connections: Vec::new(),
        held: BTreeMap::new(),
        daemons: Daemons::new(respawn, children_oom_score),
        last: false,
    };
    tracing::info!(socket = %socket.display(), "the keeper listens");
    let ended = keeper.run().map_err(system("wait for requests"));
    std::fs::remove_file(&socket).map_err(|source| ServeError::Path {
        step: "remove",
        path: socket,
        source,
    })?;
    lock.set_len(0).map_err(|source| ServeError::Path { step: "empty", path: pid_file, source })?;
    ended
}

struct Keeper {
    signals: Signals,
    listener: OwnedFd,
    paused_until: Option<Instant>,
    connections: Vec<Connection>,
    held: BTreeMap<String, Entry>,
    daemons: Daemons,
    /// Whether it ends as soon as nobody is left who depends on what is held.
    last: bool,
}

struct Entry {
    note: Vec<u8>,
    fd: OwnedFd,
}

struct Connection {
    socket: OwnedFd,
    peer: Peer,
    output: Output,
}

/// What a connection still has to get. Until then no further request of it is read.
enum Output {
    Nothing,
    Packet(Vec<u8>),
    /// Everything held, from the first name after this one on.
    List {
        after: Option<String>,
    },
}

/// Whether to go on.
#[derive(PartialEq, Eq)]
enum Flow {
    Continue,
    End,
}

/// What of a connection to do.
#[derive(PartialEq, Eq)]
enum Fate {
    Keep,
    Close,
}

impl Keeper {
    fn run(&mut self) -> io::Result<()> {
        loop {
            let ready = self.wait()?;
            if ready.signals && self.take_signals()? == Flow::End {
                return Ok(());
            }
            if self.last && !machine::has_readers() {
                tracing::info!("nobody is left who reads: the keeper ends with the machine");
                return Ok(());
            }
            self.daemons.look_after();
            if ready.listener {
                self.accept();
            }
            for index in ready.connections.into_iter().rev() {
                match self.attend(index) {
                    Ok(Attended::Fate(Fate::Keep)) => {}
                    Ok(Attended::Fate(Fate::Close)) | Err(_) => {
                        self.connections.swap_remove(index);
                    }
                    Ok(Attended::Shutdown) => return Ok(()),
                }
            }
        }
    }

    fn wait(&mut self) -> io::Result<Ready> {
        let now = Instant::now();
        self.paused_until = self.paused_until.filter(|until| *until > now);
        let accepting = self.paused_until.is_none() && self.connections.len() < MAX_CONNECTIONS;
        let listener_flags = if accepting { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), listener_flags),
        ];
        fds.extend(self.connections.iter().map(Connection::poll_fd));
        let n_connections = self.connections.len();
        fds.extend(self.daemons.pidfds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let look_again = self.last.then(|| now + LOOK_FOR_READERS);
        let deadlines = [self.daemons.due(), self.paused_until, look_again];
        let deadline = deadlines.into_iter().flatten().min();
        let patience = deadline.map(|deadline| deadline.saturating_duration_since(now));
        // A deadline of seconds fits.
        let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
        rustix::io::retry_on_intr(|| poll(&mut fds, patience.as_ref()))?;
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let connections = (0..n_connections).filter(|index| is_ready(&fds[2 + index])).collect();
        Ok(Ready { signals: is_ready(&fds[0]), listener: is_ready(&fds[1]), connections })
    }

    fn take_signals(&mut self) -> io::Result<Flow> {
        while let Some(signal) = self.signals.next()? {
            match (signal, self.held.len()) {
                (Signal::Terminate, 0) => return Ok(Flow::End),
                (Signal::Terminate, _) if machine::is_ending() => self.last = true,
                (Signal::Terminate, n_held) => tracing::warn!(
                    n_held,
                    "told to terminate, but readers depend on what is held; unmount first"
                ),
                (Signal::Hangup | Signal::Interrupt, _) => {}
            }
        }
        Ok(Flow::Continue)
    }

    fn accept(&mut self) {
        let accepted = descriptors::accept(self.listener.as_fd())
            .and_then(|socket| descriptors::peer(socket.as_fd()).map(|peer| (socket, peer)));
        match accepted {
            Ok((socket, peer)) if is_trusted(peer) => {
                self.connections.push(Connection { socket, peer, output: Output::Nothing });
            }
            Ok((_, peer)) => tracing::warn!(peer.uid, peer.pid, "a stranger was turned away"),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) => {
                tracing::warn!(error = %err, "a connection could not be accepted");
                self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
            }
        }
    }

    /// Sends what a connection still has to get, or answers its next request.
    fn attend(&mut self, index: usize) -> io::Result<Attended> {
        let connection = &mut self.connections[index];
        if matches!(connection.output, Output::Nothing) {
            let mut buffer = [0; MAX_PACKET_LEN];
            let received = match descriptors::receive(connection.socket.as_fd(), &mut buffer) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Attended::Fate(Fate::Keep));
                }
                Err(err) if err.kind() == io::ErrorKind::InvalidData => None,
                received => Some(received?),
            };
            if received.as_ref().is_some_and(|received| received.len == 0) {
                return Ok(Attended::Fate(Fate::Close));
            }
            let output = match received {
                Some(Received { len, mut fds }) => {
                    let peer = connection.peer;
                    self.answer(Request::decode(&buffer[..len]), fds.pop(), peer)
                }
                None => Answer::from(Reply::Refused(Refusal::NoDescriptor)),
            };
            let connection = &mut self.connections[index];
            match output {
                Answer::Output(output) => connection.output = output,
                Answer::Shutdown => {
                    // It is only polite: the end of the connection says the same.
                    descriptors::send(connection.socket.as_fd(), &Reply::Done.encode(), &[]).ok();
                    return Ok(Attended::Shutdown);
                }
            }
        }
        self.connections[index].flush(&self.held).map(|()| Attended::Fate(Fate::Keep))
    }

    fn answer(&mut self, request: Option<Request<'_>>, fd: Option<OwnedFd>, peer: Peer) -> Answer {
        match (request, fd) {
            (None, _) => Reply::Refused(Refusal::Unknown).into(),
            (Some(Request::Put { .. }), None) => Reply::Refused(Refusal::NoDescriptor).into(),
            (Some(Request::Put { name, note }), Some(fd)) => {
                self.held.insert(name.to_owned(), Entry { note: note.to_owned(), fd });
                Reply::Done.into()
            }
            (Some(Request::Remove { name }), _) => match self.held.remove(name) {
                Some(_) => Reply::Done.into(),
                None => Reply::Refused(Refusal::NotHeld).into(),
            },
            (Some(Request::List), _) => Answer::Output(Output::List { after: None }),
            (Some(Request::Ping), _) => Reply::Pid(std::process::id()).into(),
            (Some(Request::Daemon), _) => {
                self.daemons.hello(peer.pid);
                Reply::Done.into()
            }
            (Some(Request::Goodbye), _) => {
                self.daemons.goodbye(peer.pid);
                Reply::Done.into()
            }
            (Some(Request::Respawn { command }), _) => {
                self.daemons.start_with(command);
                Reply::Done.into()
            }
            (Some(Request::Shutdown), _) => {
                tracing::info!(n_held = self.held.len(), "told to shut down");
                Answer::Shutdown
            }
        }
    }
}

struct Ready {
    signals: bool,
    listener: bool,
    connections: Vec<usize>,
}

enum Answer {
    Output(Output),
    Shutdown,
}

impl From<Reply<'_>> for Answer {
    fn from(reply: Reply<'_>) -> Self {
        Self::Output(Output::Packet(reply.encode()))
    }
}

enum Attended {
    Fate(Fate),
    Shutdown,
}

impl Connection {
    fn poll_fd(&self) -> PollFd<'_> {
        let flags = match self.output {
            Output::Nothing => PollFlags::IN,
            Output::Packet(_) | Output::List { .. } => PollFlags::OUT,
        };
        PollFd::from_borrowed_fd(self.socket.as_fd(), flags)
    }

    /// Sends until all is sent or the socket is full.
    fn flush(&mut self, held: &BTreeMap<String, Entry>) -> io::Result<()> {
        loop {
            let (sent, next) = match &self.output {
                Output::Nothing => return Ok(()),
                Output::Packet(packet) => (self.send(packet, &[])?, Output::Nothing),
                Output::List { after } => match following(held, after.as_deref()) {
                    Some((name, Entry { note, fd })) => {
                        let packet = Reply::Held { name, note }.encode();
                        let next = Output::List { after: Some(name.clone()) };
                        (self.send(&packet, &[fd.as_fd()])?, next)
                    }
                    None => (self.send(&Reply::End.encode(), &[])?, Output::Nothing),
                },
            };
            match sent {
                Sent::Yes => self.output = next,
                Sent::Full => return Ok(()),
            }
        }
    }

    fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<Sent> {
        match descriptors::send(self.socket.as_fd(), packet, fds) {
            Ok(_) => Ok(Sent::Yes),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Full),
            Err(err) => Err(err),
        }
    }
}

enum Sent {
    Yes,
    Full,
}

fn following<'a>(
    held: &'a BTreeMap<String, Entry>,
    after: Option<&str>,
) -> Option<(&'a String, &'a Entry)> {
    let start = after.map_or(Bound::Unbounded, Bound::Excluded);
    held.range::<str, _>((start, Bound::Unbounded)).next()
}

fn is_trusted(peer: Peer) -> bool {
    peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw()
}

/// Locks the file and writes our process id into it. Whoever has it locked and does not listen at the
/// `socket` is about to do so, or to die.
fn lock(path: &Path, socket: &Path) -> Result<File, ServeError> {
    let failed = |step| move |source| ServeError::Path { step, path: path.to_owned(), source };
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|err| failed("open")(err.into()))?;
    let deadline = Instant::now() + OTHERS_START;
    loop {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(err) => return Err(failed("lock")(err.into())),
        }
        if UnixStream::connect(socket).is_ok() || Instant::now() > deadline {
            return Err(ServeError::Running { pid_file: path.to_owned() });
        }
        // Nothing tells of either.
        std::thread::park_timeout(LOOK_AGAIN);
    }
    let mut file = File::from(fd);
    file.set_len(0).map_err(failed("empty"))?;
    writeln!(file, "{}", std::process::id()).map_err(failed("write"))?;
    Ok(file)
}

/// Only called with the lock held, so what is at the path belongs to a dead keeper.
fn listen(path: &Path) -> Result<OwnedFd, ServeError> {
    let failed = |step| move |source| ServeError::Path { step, path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(failed("replace")(err)),
        _ => {}
    }
    let listener = descriptors::listen(path).map_err(failed("listen at"))?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)
        .map_err(|err| failed("restrict")(err.into()))?;
    Ok(listener)
}

/// As far as it is allowed: every layer costs a descriptor.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(err) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(error = %err, "the limit of open files stays as it is");
    }
}

/// Returns the score to give to the daemon, which must not be protected as we are.
fn protect_from_oom() -> Option<String> {
    let path = "/proc/self/oom_score_adj";
    let before = std::fs::read_to_string(path).ok()?;
    match std::fs::write(path, OOM_SCORE) {
        Ok(()) => Some(before.trim_end().to_owned()),
        Err(err) => {
            tracing::debug!(error = %err, "not protected from running out of memory");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_ourselves_are_trusted() {
        let own = rustix::process::geteuid().as_raw();
        let check = |uid, expected| assert_eq!(is_trusted(Peer { pid: 1, uid, gid: 0 }), expected);
        check(0, true);
        check(own, true);
        check(own.wrapping_add(65534), false);
    }
}

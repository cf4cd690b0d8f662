//! The threads that serve one mounted file system.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use sys::fuse_device::{
    Connection, Errno, InitReply, MAJOR, MAX_MINOR, Operation, Request, Stop, Waiter,
};

use crate::dispatch;
use crate::filesystem::Filesystem;
use crate::interrupt::Waiting;
use crate::negotiate::Negotiated;
use crate::pool::Pool;

/// How a session is run.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// How many threads read and answer requests; at least one.
    pub threads: usize,
    /// The predecessor's [`Session::negotiated`]; `None` right after mounting.
    pub negotiated: Option<Negotiated>,
}

/// A session could not be started. The mount is as before, unless the connection that was handed over
/// was the last descriptor of it.
#[derive(Debug, thiserror::Error)]
pub enum StartSessionError {
    /// The kernel's protocol is older than Linux 5.4's, or another one.
    #[error("the kernel speaks FUSE {major}.{minor}, too old for this program")]
    Protocol {
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The connection's other end is gone: it was unmounted.
    #[error("the FUSE file system is not mounted any more")]
    Unmounted,
    /// The device or the system refused.
    #[error("cannot {step} to serve a FUSE file system")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// A served file system.
///
/// Ending a session, by [`stop`](Self::stop) or by dropping it, never unmounts: accesses wait until
/// a successor serves them, as long as anybody holds a descriptor of the connection. There should be
/// one session at a time on a connection.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    negotiated: Negotiated,
}

/// What the threads of a session and its unanswered reads have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    connection: Connection,
    pub(crate) waiting: Waiting,
    pub(crate) pool: Pool,
    stop: Stop,
    stopping: AtomicBool,
    unmounted: Mutex<bool>,
    unmounted_changed: Condvar,
}

impl Session {
    /// Serves `fs` on a connection: a new one, or that of a predecessor, whose unanswered requests
    /// then come again.
    ///
    /// # Errors
    /// See [`StartSessionError`].
    #[expect(clippy::needless_pass_by_value, reason = "the threads own it, each a clone")]
    pub fn start(
        connection: Connection,
        fs: Arc<dyn Filesystem>,
        options: &SessionOptions,
    ) -> Result<Self, StartSessionError> {
        let (negotiated, origin) = match options.negotiated {
            Some(negotiated) => (negotiated, Origin::TakenOver),
            None => initialise(&connection, fs.as_ref())?,
        };
        let n_threads = options.threads.max(1);
        let shared = Arc::new(Shared {
            connection,
            waiting: Waiting::default(),
            pool: Pool::new(negotiated.read_len(), 2 * n_threads),
            stop: Stop::new().map_err(io_error("make an eventfd"))?,
            stopping: AtomicBool::new(false),
            unmounted: Mutex::new(false),
            unmounted_changed: Condvar::new(),
        });
        let mut session = Self { shared, threads: Vec::with_capacity(n_threads), negotiated };
        for number in 0..n_threads {
            session.spawn(number, &fs)?;
        }
        if origin == Origin::TakenOver {
            session.take_over()?;
        }
        Ok(session)
    }

    /// What a successor needs.
    #[must_use]
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// The connection, to duplicate its descriptor or to tell the kernel something.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.shared.connection
    }

    /// Whether the file system was unmounted (everywhere), so that nothing is left to serve.
    #[must_use]
    pub fn is_unmounted(&self) -> bool {
        *self.shared.unmounted.lock()
    }

    /// Waits until the file system is unmounted.
    pub fn wait_unmounted(&self) {
        let mut unmounted = self.shared.unmounted.lock();
        while !*unmounted {
            self.shared.unmounted_changed.wait(&mut unmounted);
        }
    }

    /// Ends the threads and leaves the mount to a successor.
    ///
    /// Requests that are being answered are answered. Reads that wait for their bytes stay with the
    /// kernel: their replies may still bring bytes, errors are not sent any more.
    pub fn stop(self) {
        drop(self);
    }

    fn spawn(&mut self, number: usize, fs: &Arc<dyn Filesystem>) -> Result<(), StartSessionError> {
        let waiter = Waiter::new(&self.shared.connection, &self.shared.stop)
            .map_err(io_error("make an epoll descriptor"))?;
        let worker = Worker {
            shared: Arc::clone(&self.shared),
            fs: Arc::clone(fs),
            waiter,
            request_len: self.negotiated.request_len(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("fuse-{number}"))
            .spawn(move || worker.run())
            .map_err(io_error("start a thread"))?;
        self.threads.push(thread);
        Ok(())
    }

    fn take_over(&self) -> Result<(), StartSessionError> {
        match self.shared.connection.resend() {
            Ok(()) => Ok(()),
            Err(error) if self.negotiated.may_resend() => {
                Err(device_error("ask for unanswered requests")(error))
            }
            Err(_old_kernel) => {
                tracing::warn!(
                    "this kernel cannot send requests again (Linux 6.9 can): reads that were under \
                     way when the previous daemon ended wait until they are killed"
                );
                Ok(())
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.stop.raise();
        for thread in self.threads.drain(..) {
            // A worker catches the panics of its file system, and has no others.
            thread.join().ok();
        }
    }
}

impl Shared {
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Sends a reply. That it cannot be delivered is nobody's concern any more: the request was
    /// interrupted, has been answered, or went with the mount.
    pub(crate) fn reply(&self, unique: u64, body: Result<&[u8], Errno>) {
        if let Err(error) = self.connection.reply(unique, body) {
            let gone = [Errno::NOENT, Errno::NODEV, Errno::PERM, Errno::CONNABORTED];
            if !Errno::from_io_error(&error).is_some_and(|errno| gone.contains(&errno)) {
                tracing::error!(%error, unique, "the kernel refused a FUSE reply");
            }
        }
    }

    fn set_unmounted(&self) {
        *self.unmounted.lock() = true;
        self.unmounted_changed.notify_all();
    }
}

/// One thread.
struct Worker {
    shared: Arc<Shared>,
    fs: Arc<dyn Filesystem>,
    waiter: Waiter,
    request_len: usize,
}

impl Worker {
    fn run(self) {
        let mut request = vec![0; self.request_len];
        let mut scratch = Vec::new();
        while !self.shared.is_stopping() {
            match self.shared.connection.read_request(&mut request) {
                Ok(Some(len)) => {
                    dispatch::serve(&self.shared, &self.fs, &request[..len], &mut scratch);
                }
                Ok(None) => {
                    if self
                        .waiter
                        .wait(self.shared.waiting.timeout())
                        .is_err_and(|error| log_wait(&error))
                    {
                        return;
                    }
                }
                Err(error) => return self.end(&error),
            }
            for unique in self.shared.waiting.take_dying(Instant::now()) {
                self.shared.reply(unique, Err(Errno::INTR));
            }
        }
    }

    fn end(&self, error: &io::Error) {
        if Errno::from_io_error(error) != Some(Errno::NODEV) {
            tracing::error!(%error, "cannot read from /dev/fuse; one thread less serves it");
            return;
        }
        self.shared.set_unmounted();
    }
}

fn log_wait(error: &io::Error) -> bool {
    tracing::error!(%error, "cannot wait at /dev/fuse; one thread less serves it");
    true
}

/// How a session came to its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Mounted,
    TakenOver,
}

/// Speaks `FUSE_INIT`, also if a predecessor died before it, in the middle of it or right after.
fn initialise(
    connection: &Connection,
    fs: &dyn Filesystem,
) -> Result<(Negotiated, Origin), StartSessionError> {
    let mut message = vec![0; Negotiated::unknown().request_len()];
    // The kernel queues INIT before mount() returns, and nothing else before it is answered: no
    // message means that a predecessor has read it, and perhaps answered it.
    let mut has_resent = false;
    loop {
        let read = connection.read_request(&mut message);
        let Some(len) = read.map_err(device_error("read from /dev/fuse"))? else {
            if has_resent || connection.resend().is_err() {
                return Ok((Negotiated::unknown(), Origin::TakenOver));
            }
            has_resent = true;
            continue;
        };
        let request = Request::parse(&message[..len]);
        let Ok(Request { unique, operation: Operation::Init(offer), .. }) = request else {
            // It comes again when the threads are there to answer it.
            return Ok((Negotiated::unknown(), Origin::TakenOver));
        };
        if offer.major > MAJOR {
            // The kernel then asks again in our version.
            send_init(connection, unique, &InitReply::encode_older_major(MAX_MINOR))?;
            continue;
        }
        let permissions = connection.has_default_permissions();
        let Some((negotiated, reply)) = Negotiated::answer(&offer, fs, permissions) else {
            let (major, minor) = (offer.major, offer.minor);
            return Err(StartSessionError::Protocol { major, minor });
        };
        send_init(connection, unique, &reply.encode())?;
        return Ok((negotiated, Origin::Mounted));
    }
}

fn send_init(connection: &Connection, unique: u64, body: &[u8]) -> Result<(), StartSessionError> {
    connection.reply(unique, Ok(body)).map_err(device_error("answer FUSE_INIT"))
}

fn device_error(step: &'static str) -> impl FnOnce(io::Error) -> StartSessionError {
    move |source| match Errno::from_io_error(&source) {
        Some(Errno::NODEV) => StartSessionError::Unmounted,
        _ => StartSessionError::Io { step, source },
    }
}

fn io_error(step: &'static str) -> impl FnOnce(io::Error) -> StartSessionError {
    move |source| StartSessionError::Io { step, source }
}

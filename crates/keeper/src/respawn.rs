//! Which process is the daemon, and starting it again when it dies.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The wait before the first attempt; doubled with each that fails.
const FIRST_DELAY: Duration = Duration::from_millis(50);
const LAST_DELAY: Duration = Duration::from_secs(5);

/// A daemon that has lived for so long was started well.
const WELL: Duration = Duration::from_secs(10);

/// The processes that are or were the daemon.
#[derive(Debug)]
pub(crate) struct Daemons {
    /// `None` if someone else starts the daemon.
    command: Option<Vec<OsString>>,
    /// What a started daemon's `oom_score_adj` is set to.
    oom_score: Option<String>,
    processes: Vec<Process>,
    /// When the daemon is to be started.
    due: Option<Instant>,
    delay: Duration,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    /// Readable when the process has ended.
    pidfd: OwnedFd,
    /// Set if we have started it and must reap it.
    child: Option<Child>,
    /// Whether its death is a reason to start the daemon.
    needed: bool,
    since: Instant,
}

impl Daemons {
    pub(crate) fn new(command: Option<Vec<OsString>>, oom_score: Option<String>) -> Self {
        let command = command.filter(|command| !command.is_empty());
        Self { command, oom_score, processes: Vec::new(), due: None, delay: FIRST_DELAY }
    }

    /// From now on the daemon is started with another command line: arguments with a zero byte after
    /// each. With an empty one it is not started.
    pub(crate) fn start_with(&mut self, command: &[u8]) {
        let arguments = command.split_inclusive(|byte| *byte == 0);
        let arguments = arguments.map(|argument| argument.strip_suffix(&[0]).unwrap_or(argument));
        let arguments = arguments.map(|argument| OsStr::from_bytes(argument).to_owned());
        self.command = Some(arguments.collect()).filter(|command: &Vec<_>| !command.is_empty());
    }

    /// To be polled for `IN`; [`look_after`](Self::look_after) does the rest.
    pub(crate) fn pidfds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.processes.iter().map(|process| process.pidfd.as_fd())
    }

    /// When [`look_after`](Self::look_after) must be called at the latest.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The process is the daemon now, and no other is.
    pub(crate) fn hello(&mut self, pid: i32) {
        for process in &mut self.processes {
            process.needed = process.pid == pid;
        }
        self.due = None;
        if self.processes.iter().any(|process| process.needed) {
            return;
        }
        match watch(pid) {
            Ok(pidfd) => self.add(pid, pidfd, None),
            Err(err) if err.kind() == io::ErrorKind::Unsupported => {
                tracing::error!(error = %err, "the daemon cannot be watched or started again");
            }
            // It is dead already.
            Err(err) => {
                tracing::warn!(pid, error = %err, "the daemon cannot be watched");
                self.schedule(Duration::ZERO);
            }
        }
    }

    /// The process ends on purpose.
    pub(crate) fn goodbye(&mut self, pid: i32) {
        for process in &mut self.processes {
            process.needed &= process.pid != pid;
        }
    }

    /// Reaps what has ended, and starts the daemon if it is time.
    pub(crate) fn look_after(&mut self) {
        let mut index = 0;
        while index < self.processes.len() {
            if has_ended(&self.processes[index].pidfd) {
                let process = self.processes.swap_remove(index);
                self.ended(process);
            } else {
                index += 1;
            }
        }
        if self.due.is_some_and(|due| due <= Instant::now()) {
            self.due = None;
            self.start();
        }
    }

    fn ended(&mut self, process: Process) {
        let Process { pid, child, needed, since, .. } = process;
        let status = child.and_then(|mut child| child.wait().ok());
        if needed {
            let lived = since.elapsed();
            tracing::warn!(pid, ?status, ?lived, "the daemon has died");
            self.schedule(lived);
        }
    }

    fn schedule(&mut self, lived: Duration) {
        if self.command.is_none() {
            return;
        }
        if lived >= WELL {
            self.delay = FIRST_DELAY;
        }
        self.due = Some(Instant::now() + self.delay);
        self.delay = (self.delay * 2).min(LAST_DELAY);
    }

    fn start(&mut self) {
        let Some((program, arguments)) = self.command.as_deref().and_then(<[_]>::split_first)
        else {
            return;
        };
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        match spawn(&mut command) {
            Ok((pid, pidfd, child)) => {
                tracing::info!(pid, program = %program.display(), "the daemon is started again");
                if let Some(score) = &self.oom_score {
                    // It only raises what the child has from us, so it is allowed; and if the child
                    // has died already there is nothing to raise.
                    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score).ok();
                }
                self.add(pid, pidfd, Some(child));
            }
            Err(err) => {
                let program = program.display();
                tracing::error!(%program, error = %err, "the daemon cannot be started");
                self.schedule(Duration::ZERO);
            }
        }
    }

    fn add(&mut self, pid: i32, pidfd: OwnedFd, child: Option<Child>) {
        let process = Process { pid, pidfd, child, needed: true, since: Instant::now() };
        self.processes.push(process);
    }
}

fn spawn(command: &mut Command) -> io::Result<(i32, OwnedFd, Child)> {
    let mut child = sys::signals::spawn_unblocked(command)?;
    let pid = i32::try_from(child.id()).expect("process ids are below 2^22");
    match watch(pid) {
        Ok(pidfd) => Ok((pid, pidfd, child)),
        Err(err) => {
            // Not watched it would never be reaped, and perhaps be started twice.
            child.kill()?;
            child.wait()?;
            Err(err)
        }
    }
}

fn watch(pid: i32) -> io::Result<OwnedFd> {
    // 0 is the pid of a process in another process namespace.
    let pid = Pid::from_raw(pid).filter(|pid| pid.as_raw_pid() > 0);
    let pid = pid.ok_or_else(|| {
        io::Error::new(io::ErrorKind::Unsupported, "it lives in another process namespace")
    })?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&at_once)).is_ok_and(|n_ready| n_ready > 0)
}

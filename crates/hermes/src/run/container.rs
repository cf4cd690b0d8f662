//! A running container.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use sys::namespace::Namespace;
use sys::signals::{Signal, Signals};

use super::bundle;
use super::program::Program;
use crate::args::RuntimeChoice;

/// What starts containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Runtime {
    /// Our own namespaces.
    Own,
    /// A program with runc's command line.
    Oci(PathBuf),
}

impl Runtime {
    /// What was asked for, if it is there.
    pub(crate) fn choose(choice: RuntimeChoice) -> Result<Self> {
        let find = |name: &str| crate::args::find_program(name).map(Self::Oci);
        let missing = |name: &str| {
            format!("{name} is not on the PATH; --runtime chroot needs no other program")
        };
        match choice {
            RuntimeChoice::Chroot => Ok(Self::Own),
            RuntimeChoice::Auto => Ok(find("runc").or_else(|| find("crun")).unwrap_or(Self::Own)),
            RuntimeChoice::Runc => find("runc").with_context(|| missing("runc")),
            RuntimeChoice::Crun => find("crun").with_context(|| missing("crun")),
        }
    }
}

/// Where a container reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    /// As we do.
    Inherited,
    /// Pipes for standard input and output; standard error is ours.
    Piped,
}

/// A program that runs in an image. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Container {
    pidfd: OwnedFd,
    waiter: Option<JoinHandle<io::Result<ExitStatus>>>,
    /// With [`Streams::Piped`], until taken.
    pub(crate) stdin: Option<ChildStdin>,
    /// With [`Streams::Piped`], until taken.
    pub(crate) stdout: Option<ChildStdout>,
    /// How to remove what an OCI runtime has made.
    remove: Option<Command>,
}

/// What the thread that starts a container tells.
type Started = (OwnedFd, Option<ChildStdin>, Option<ChildStdout>);

impl Container {
    /// Starts `program` with `rootfs` as its root; `dir` is for files of ours and must outlive it.
    pub(crate) fn start(
        runtime: &Runtime,
        dir: &Path,
        rootfs: &Path,
        program: &Program,
        streams: Streams,
    ) -> Result<Self> {
        let (mut command, remove) = match runtime {
            Runtime::Own => (own(dir, rootfs, program)?, None),
            Runtime::Oci(runtime) => {
                let bundle = bundle::write(dir, rootfs, program, streams)?;
                (bundle.run(runtime), Some(bundle.delete(runtime)))
            }
        };
        if streams == Streams::Piped {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            // Ctrl-C at a terminal is for us then, not for a program that is not at one.
            command.process_group(0);
        }
        let (sender, started) = mpsc::channel();
        let own = *runtime == Runtime::Own;
        // Namespaces are a thread's; and the death of this thread is the container's death.
        let thread = std::thread::Builder::new().name("container".to_owned());
        let waiter = thread
            .spawn(move || spawn_and_wait(command, own, &sender))
            .context("starting a thread")?;
        let (pidfd, stdin, stdout) = match started.recv() {
            Ok(started) => started,
            Err(_no_process) => match waiter.join() {
                Ok(Err(err)) => return Err(err).context("starting the container"),
                _ => bail!("the container was not started"),
            },
        };
        Ok(Self { pidfd, waiter: Some(waiter), stdin, stdout, remove })
    }

    /// Waits until it ends, and hands signals on to it: what does not heed them is killed. Returns the
    /// program's exit code, or 128 + the signal that ended it.
    pub(crate) fn wait(&mut self, signals: &Signals) -> Result<u8> {
        let mut kill_at: Option<Instant> = None;
        while !self.has_ended(signals, kill_at)? {
            if let Some(signal) = signals.next()? {
                self.signal(match signal {
                    Signal::Hangup => rustix::process::Signal::HUP,
                    Signal::Interrupt => rustix::process::Signal::INT,
                    Signal::Terminate => rustix::process::Signal::TERM,
                });
                kill_at.get_or_insert_with(|| Instant::now() + GRACE);
            }
            if kill_at.is_some_and(|at| at <= Instant::now()) {
                self.kill();
                kill_at = None;
            }
        }
        self.join()
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        if let Some(mut remove) = self.remove.take() {
            // Its first process is no child of ours, so its runtime must do it.
            quietly(&mut remove);
        }
        self.signal(rustix::process::Signal::KILL);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        // ESRCH: it has ended.
        pidfd_send_signal(&self.pidfd, signal).ok();
    }

    /// Waits for its end, a signal or a point in time.
    fn has_ended(&self, signals: &Signals, until: Option<Instant>) -> Result<bool> {
        let mut fds =
            [PollFd::new(&self.pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.map(Timespec::try_from).transpose()?;
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!fds[0].revents().is_empty()),
            Err(err) => Err(err).context("waiting for the container"),
        }
    }

    fn join(&mut self) -> Result<u8> {
        let Some(waiter) = self.waiter.take() else { bail!("the container was waited for before") };
        let Ok(status) = waiter.join() else { bail!("the container cannot be waited for") };
        Ok(exit_code(status.context("waiting for the container")?))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.waiter.is_some() {
            self.kill();
            if let Err(err) = self.join() {
                tracing::warn!(error = %err, "a container's end is not known");
            }
        }
        if let Some(mut remove) = self.remove.take() {
            quietly(&mut remove);
        }
    }
}

/// Runs a command whose failure changes nothing: what it removes may be gone already.
fn quietly(command: &mut Command) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Err(err) = command.status() {
        tracing::warn!(?command, error = %err, "a command cannot be run");
    }
}

/// Our own program as the first process of a container.
fn own(dir: &Path, rootfs: &Path, program: &Program) -> Result<Command> {
    let file = dir.join("program.json");
    std::fs::write(&file, serde_json::to_vec(program)?)
        .with_context(|| format!("writing {}", file.display()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("container-init").arg(rootfs).arg(file);
    Ok(command)
}

fn spawn_and_wait(
    mut command: Command,
    own: bool,
    sender: &mpsc::Sender<Started>,
) -> io::Result<ExitStatus> {
    if own {
        sys::namespace::unshare(&[
            Namespace::Mount,
            Namespace::Pid,
            Namespace::HostName,
            Namespace::Ipc,
        ])?;
    }
    let mut child = sys::signals::spawn_unblocked(&mut command)?;
    drop(command);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("a process id above 2^31"))?;
    // Before it is waited for: then the number is still its own.
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    // Whoever asked waits for this.
    sender.send((pidfd, child.stdin.take(), child.stdout.take())).ok();
    child.wait()
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// How long a program has to end after a signal.
const GRACE: Duration = Duration::from_secs(5);

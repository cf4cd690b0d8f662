//! A daemon of the demo's own, with an empty cache.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::stop::Stop;
use crate::args::{DaemonTuning, GlobalArguments};
use crate::client;
use crate::daemon::StatusReport;
use crate::output::Output;
use crate::protocol::Request;

/// A root folder with a daemon and a keeper. Dropping it ends both.
#[derive(Debug)]
pub(super) struct Node {
    common: GlobalArguments,
    output: Output,
}

impl Node {
    pub(super) fn start(common: &GlobalArguments, output: Output) -> Result<Self> {
        let node = Self { common: common.clone(), output };
        crate::spawn::daemon(common, &common.root, &DaemonTuning::default())?;
        Ok(node)
    }

    fn status(&self) -> Result<Option<StatusReport>> {
        client::ask(&self.common, &self.output, &Request::Status)
    }

    /// Compressed bytes since the daemon started.
    pub(super) fn bytes_fetched(&self) -> Result<u64> {
        Ok(self.status()?.context("the daemon does not answer")?.bytes_fetched)
    }

    /// Kills the daemon and waits until its successor answers; returns how long that took.
    pub(super) fn kill_daemon(&self, stop: &Stop) -> Result<Duration> {
        let status = self.status()?.context("the daemon does not answer")?;
        let pid = status.daemon.pid.context("the daemon does not know its process")?;
        let begin = Instant::now();
        rustix::process::kill_process(raw(pid)?, Signal::KILL).context("killing the daemon")?;
        while begin.elapsed() < PATIENCE {
            stop.check()?;
            // It may die while it answers, or its socket may have nobody behind it yet.
            if let Ok(Some(status)) = self.status()
                && status.daemon.pid.is_some_and(|other| other != pid)
            {
                return Ok(begin.elapsed());
            }
            std::thread::park_timeout(PAUSE);
        }
        bail!("the daemon was killed, and nobody has started another one")
    }

    fn end(&self) -> Result<()> {
        let status = self.status().ok().flatten();
        if let Some(pid) = status.and_then(|status| status.daemon.pid) {
            end_process(pid, Signal::TERM)?;
        }
        // Without mounts it ends with the daemon. One that stays would start the daemon again.
        if let Some(pid) = keeper_pid(&self.common.root) {
            end_process(pid, Signal::TERM)?;
            if let Some(pid) = self.status().ok().flatten().and_then(|status| status.daemon.pid) {
                end_process(pid, Signal::KILL)?;
            }
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(err) = self.end() {
            tracing::warn!(
                error = crate::failure::in_full(&err),
                "a process of the demo may stay behind"
            );
        }
    }
}

fn keeper_pid(root: &Path) -> Option<u32> {
    std::fs::read_to_string(root.join("keeper.pid")).ok()?.trim().parse().ok()
}

fn raw(pid: u32) -> Result<Pid> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.context("a process id above 2^31")
}

/// Tells a process to end, and makes it.
fn end_process(pid: u32, signal: Signal) -> Result<()> {
    let Ok(pidfd) = pidfd_open(raw(pid)?, PidfdFlags::empty()) else { return Ok(()) };
    for signal in [signal, Signal::KILL] {
        // ESRCH: it has ended.
        pidfd_send_signal(&pidfd, signal).ok();
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        if poll(&mut fds, Some(&GRACE))? > 0 {
            return Ok(());
        }
    }
    bail!("process {pid} does not end")
}

const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);
const GRACE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

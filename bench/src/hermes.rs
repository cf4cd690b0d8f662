//! Hermes on this machine, in a folder of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use tempfile::TempDir;
use testnode::{Cache, output, wait_until};

use crate::hermes_binary;

/// How long a whole image may take to be complete.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a process may take to end.
const GRACE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// A way in which `hermes` mounts.
pub const BACKENDS: [&str; 3] = ["erofs", "erofs-loop", "fuse"];

/// A root folder, with a daemon as soon as something is mounted. Dropping it ends and removes it all.
#[derive(Debug)]
pub struct Hermes {
    program: PathBuf,
    dir: TempDir,
}

impl Hermes {
    /// Builds the program and makes an empty folder on the disk of the test cache.
    ///
    /// # Errors
    /// When either fails.
    pub fn new() -> Result<Self> {
        let program = hermes_binary()?;
        let dir = tempfile::Builder::new().prefix("bench-").tempdir_in(Cache::locate().folder());
        Ok(Self { program, dir: dir.context("making a folder for the benchmark")? })
    }

    /// A path in the folder, for whatever the benchmark needs besides.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `hermes` and returns what it prints.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.path("root")).args(["--output", "json"]);
        command.args(["--docker-config", "/nonexistent"]).args(arguments);
        let printed = output(&mut command)?;
        Ok(serde_json::from_str(&printed).unwrap_or_default())
    }

    /// Mounts an image through a back end on a folder of that name, and returns the folder.
    ///
    /// # Errors
    /// As [`Hermes::run`].
    pub fn mount(&self, image: &str, backend: &str, completion: &str) -> Result<PathBuf> {
        let dir = self.path(backend);
        let place = dir.to_str().context("a path that is not text")?;
        self.run(&["mount", "--backend", backend, "--completion", completion, image, place])?;
        Ok(dir)
    }

    /// Unmounts what [`Hermes::mount`] mounted through `backend`, and empties the cache.
    ///
    /// # Errors
    /// As [`Hermes::run`].
    pub fn forget(&self, backend: &str) -> Result<()> {
        let dir = self.path(backend);
        self.run(&["umount", dir.to_str().context("a path that is not text")?])?;
        self.run(&["cache", "prune"]).map(drop)
    }

    /// What `hermes status` says.
    ///
    /// # Errors
    /// As [`Hermes::run`].
    pub fn status(&self) -> Result<Value> {
        self.run(&["status"])
    }

    /// Waits until all that is mounted is complete and proven.
    ///
    /// # Errors
    /// When that takes more than ten minutes.
    pub fn until_sealed(&self) -> Result<()> {
        wait_until("all layers to be sealed", PATIENCE, || {
            let status = self.status()?;
            let mounts = status["mounts"].as_array().context("no list of mounts")?;
            Ok(mounts.iter().all(|mount| mount["sealed"] == true))
        })
    }

    /// The process of the daemon, if one runs.
    ///
    /// # Errors
    /// As [`Hermes::run`].
    pub fn daemon(&self) -> Result<Option<i32>> {
        Ok(pid_of(&self.status()?, "daemon"))
    }

    /// Unmounts everything and ends the daemon.
    ///
    /// # Errors
    /// As [`Hermes::run`], and when a process does not end.
    pub fn stop(&self) -> Result<()> {
        let status = self.status()?;
        for mount in status["mounts"].as_array().into_iter().flatten() {
            self.run(&["umount", "--lazy", mount["dir"].as_str().unwrap_or_default()])?;
        }
        if let Some(pid) = pid_of(&status, "daemon") {
            end_process(pid)?;
        }
        // Without mounts the keeper ends with the daemon; what else there is, is not needed.
        let keeper = fs::read_to_string(self.path("root/keeper.pid")).unwrap_or_default();
        keeper.trim().parse().map_or(Ok(()), end_process)
    }
}

impl Drop for Hermes {
    fn drop(&mut self) {
        if let Err(err) = self.stop() {
            complain(&format!("a benchmark may leave a daemon behind: {err:#}"));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        for point in points.filter(|point| Path::new(point).starts_with(self.dir.path())) {
            Command::new("umount").args(["-l", point]).status().ok();
        }
    }
}

fn pid_of(status: &Value, process: &str) -> Option<i32> {
    i32::try_from(status[process]["pid"].as_i64()?).ok()
}

/// Asks a process to end, and makes it.
fn end_process(pid: i32) -> Result<()> {
    let pid = Pid::from_raw(pid).context("a process without a number")?;
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    for signal in [Signal::TERM, Signal::KILL] {
        // ESRCH: it has ended.
        pidfd_send_signal(&pidfd, signal).ok();
        if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&GRACE))? > 0 {
            return Ok(());
        }
    }
    anyhow::bail!("process {} does not end", pid.as_raw_pid())
}

/// Says something on standard error, whoever listens.
fn complain(what: &str) {
    std::io::Write::write_all(&mut std::io::stderr(), format!("{what}\n").as_bytes()).ok();
}

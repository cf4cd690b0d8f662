//! A machine that systemd runs as its first process, on the disk of a node: for what happens at a boot.
//!
//! The node around it is the world that outlives it: it has the disk, and runs the registry.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::node::{Node, output};
use crate::wait::wait_until;

/// Run in the node, as the first process of the machine.
const BOOT: &str = include_str!("boot.sh");
/// How long a boot may take, and the end of the machine. Less than the 90 s after which systemd gives up on
/// a process that does not end: that is a failure.
const LIMIT: Duration = Duration::from_secs(60);

/// A running machine with systemd as process 1, in pid, mount, uts, ipc and cgroup namespaces of its own
/// within its node.
///
/// Dropping it is a loss of power: its processes and mounts are gone, its disk (all of the node but `/run`
/// and `/tmp`) stays for the next [`Node::boot`].
#[derive(Debug)]
pub struct Booted {
    node: Node,
    /// `nsenter`, which ends when systemd has ended.
    nsenter: Child,
    /// systemd, as the node counts.
    pid: u32,
}

impl Node {
    /// Boots the disk of the node into what systemd calls `multi-user.target`, with the network of the node.
    /// One machine at a time can have the disk.
    ///
    /// # Errors
    /// When the host has no cgroups of version 2, or systemd is not done within a minute.
    pub fn boot(&self) -> Result<Booted> {
        self.boot_with(&[])
    }

    /// As [`boot`](Self::boot), with no network but loopback: nothing that the node runs can be reached.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_without_network(&self) -> Result<Booted> {
        self.boot_with(&["--net"])
    }

    fn boot_with(&self, more_namespaces: &[&str]) -> Result<Booted> {
        let cgroups = self.unified_cgroup().context("the host has no cgroups of version 2")?;
        let mut enter = self.command("unshare");
        enter.args(["--mount", "--pid", "--uts", "--ipc"]).args(more_namespaces);
        enter.args(["--fork", "--kill-child=KILL", "--propagation", "private"]);
        enter.args(["bash", "-c", BOOT, "boot"]).arg(&cgroups.inside);
        // Only who is in the node's cgroup may go to one below it.
        let mut command = Command::new("sh");
        command.args(["-ec", "echo $$ > \"$0/cgroup.procs\"; exec \"$@\""]).arg(&cgroups.outside);
        command.arg(enter.get_program()).args(enter.get_args());
        let log = File::create(self.log_path("boot")).context("making a log")?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut nsenter = command.spawn().context("running sh")?;
        let line = nsenter.stdout.take().and_then(|out| BufReader::new(out).lines().next());
        let pid = line.and_then(|line| line.ok()?.parse().ok());
        let mut booted = Booted { node: self.clone(), nsenter, pid: pid.unwrap_or_default() };
        if pid.is_none() {
            bail!("booting: {:?}\n{}", booted.nsenter.wait(), self.log("boot"));
        }
        let mut state = String::new();
        let waited = wait_until("systemd to have booted", LIMIT, || {
            if let Some(status) = booted.nsenter.try_wait().context("waiting for systemd")? {
                bail!("it ended: {status}\n{}", self.log("boot"));
            }
            let show = ["show", "--value", "--property=SystemState"];
            state = booted.run("systemctl", &show).unwrap_or_default();
            // A unit of the host's kernel that cannot start here is nobody's fault.
            Ok(matches!(state.trim(), "running" | "degraded"))
        });
        waited.with_context(|| {
            format!("{state}{}", booted.run("systemctl", &["list-jobs"]).unwrap_or_default())
        })?;
        Ok(booted)
    }
}

impl Booted {
    /// A command that will run in the machine, as root, with a clean environment.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.node.command("nsenter");
        command.arg(format!("--target={}", self.pid));
        command
            .args(["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--"])
            .arg(program);
        command
    }

    /// Runs a program in the machine and returns what it wrote to stdout.
    ///
    /// # Errors
    /// When it cannot be run or fails, with what it wrote to stderr.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        output(self.command(program).args(args))
    }

    /// Runs lines of bash in the machine and returns what they wrote to stdout. They stop at the first
    /// command that fails.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn bash(&self, lines: &str) -> Result<String> {
        self.run("bash", &["-euo", "pipefail", "-c", lines])
    }

    /// What systemd says of a unit's property.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub fn property(&self, unit: &str, property: &str) -> Result<String> {
        let show = ["show", "--value", "--property", property, unit];
        Ok(self.run("systemctl", &show)?.trim().to_owned())
    }

    /// Has systemd shut the machine down, and waits until nothing of it runs.
    ///
    /// # Errors
    /// When that takes longer than a minute: something did not want to end.
    pub fn power_off(mut self) -> Result<()> {
        // Who asks ends with the machine, and may not hear that it was heard.
        let asked = self.run("systemctl", &["poweroff"]);
        let nsenter = &mut self.nsenter;
        let off = || Ok(nsenter.try_wait().context("waiting for systemd")?.is_some());
        wait_until("the machine to be off", LIMIT, off)
            .with_context(|| format!("asked for it: {asked:?}; what runs:\n{}", self.processes()))
    }

    fn processes(&self) -> String {
        self.run("ps", &["axf"]).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Keeps the end of the journal for who looks at a failed test.
    fn keep_journal(&self) {
        let journal = ["--no-pager", "--lines=100", "--output=short-monotonic"];
        let journal = self.run("journalctl", &journal).unwrap_or_else(|error| format!("{error:#}"));
        std::fs::write(self.node.log_path("journal"), journal).ok();
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        if !matches!(self.nsenter.try_wait(), Ok(None)) {
            return;
        }
        self.keep_journal();
        // The kernel ends everything with the first process. The node does it if this fails.
        let kill = self.node.run("kill", &["-KILL", &self.pid.to_string()]);
        kill.and_then(|_| self.nsenter.wait().context("waiting for systemd")).ok();
    }
}

//! A program that keeps running in a node.

use std::fs::{self, File};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::node::Node;
use crate::wait::wait_until;

/// How long a daemon may take to start or to stop. Two cores that also build take their time.
const LIMIT: Duration = Duration::from_secs(60);

/// A program that keeps running in a node, with its log at [`Node::log`] of its name.
///
/// Dropping it kills it, and only it: its children live on until the node ends, as they do when a
/// daemon dies on a real machine.
#[derive(Debug)]
pub struct Daemon {
    node: Node,
    name: String,
    /// Ends when the program ends.
    nsenter: Child,
    /// As the node counts.
    pid: u32,
}

impl Node {
    /// Starts a program in the node. `name` is that of its log, to which a second program of the same
    /// name appends.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, name: &str, program: &str, args: &[&str]) -> Result<Daemon> {
        self.spawn_with(name, program, args, &[])
    }

    /// Starts a program in the node with additions to its environment.
    ///
    /// # Errors
    /// As [`Node::spawn`].
    pub fn spawn_with(
        &self,
        name: &str,
        program: &str,
        args: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Daemon> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path(name))
            .with_context(|| format!("opening the log of {name}"))?;
        let pid_file = format!("/run/{name}.testnode-pid");
        let mut command = self.command("env");
        command.args(environment.iter().map(|(key, value)| format!("{key}={value}")));
        // The name is complete when it appears, and the shell becomes the program.
        command.args(["sh", "-c", "echo $$ > \"$0.new\" && mv \"$0.new\" \"$0\" && exec \"$@\""]);
        command.arg(&pid_file).arg(program).args(args);
        command.stdout(log.try_clone().context("sharing a log")?).stderr(log);
        let nsenter = command.spawn().with_context(|| format!("starting {name}"))?;
        let mut daemon = Daemon { node: self.clone(), name: name.to_owned(), nsenter, pid: 0 };
        let pid_file = self.path(&pid_file);
        let mut text = String::new();
        daemon.wait_ready("the process to exist", || {
            text = fs::read_to_string(&pid_file).unwrap_or_default();
            Ok(!text.is_empty())
        })?;
        fs::remove_file(&pid_file).context("removing a file of a process id")?;
        daemon.pid = text.trim().parse().context("reading a file of a process id")?;
        Ok(daemon)
    }
}

impl Daemon {
    /// The process id, as the node counts.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.node.log(&self.name)
    }

    /// Waits until `condition` holds, for up to a minute.
    ///
    /// # Errors
    /// At once when the program ends or `condition` fails, else when the minute is over; with the log.
    pub fn wait_ready(
        &mut self,
        what: &str,
        mut condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let nsenter = &mut self.nsenter;
        let waited = wait_until(what, LIMIT, || {
            // Asked first: what was done just before the end counts.
            let ready = condition()?;
            if let (false, Some(status)) = (ready, nsenter.try_wait().context("waiting")?) {
                bail!("it ended: {status}");
            }
            Ok(ready)
        });
        waited.with_context(|| format!("{} is not ready; its log:\n{}", self.name, self.log()))
    }

    /// Sends a signal, `TERM` for example.
    ///
    /// # Errors
    /// When there is no such signal or the process is gone.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let mut kill: Command = self.node.command("kill");
        crate::node::output(kill.arg(format!("-{signal}")).arg(self.pid.to_string())).map(drop)
    }

    /// Waits for the program to end by itself, for up to a minute.
    ///
    /// # Errors
    /// When the minute is over.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let (nsenter, mut status) = (&mut self.nsenter, None);
        wait_until(&format!("{} to end", self.name), LIMIT, || {
            status = nsenter.try_wait().context("waiting")?;
            Ok(status.is_some())
        })?;
        status.context("a process that has ended has a status")
    }

    /// Asks it to end with SIGTERM and waits for that.
    ///
    /// # Errors
    /// When it is gone already, or does not end within a minute.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.signal("TERM")?;
        self.wait()
    }

    /// Kills it without a warning and waits until it is gone.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill(mut self) -> Result<()> {
        self.signal("KILL")?;
        self.wait().map(drop)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already, or killed now; the node ends what is left in any case.
        if self.pid != 0 && matches!(self.nsenter.try_wait(), Ok(None)) {
            self.signal("KILL").and_then(|()| self.wait()).ok();
        }
    }
}

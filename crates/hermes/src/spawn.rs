//! Starting our own program again: as daemon, as keeper.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::args::{DaemonTuning, GlobalArguments, SERVICE_ENVIRONMENT};

/// Our own program, also when its file was replaced or removed.
fn program() -> &'static Path {
    Path::new("/proc/self/exe")
}

/// The command line of a daemon of `root`.
fn daemon_arguments(
    (common, root): (&GlobalArguments, &Path),
    tuning: &DaemonTuning,
    config: Option<&Path>,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["--root".into(), root.into()];
    arguments.extend(["--log".into(), common.log.clone().into(), "daemon".into()]);
    if let Some(quota) = tuning.quota {
        arguments.extend(["--quota".into(), quota.to_string().into()]);
    }
    if let Some(grace) = tuning.eviction_grace {
        arguments.extend(["--eviction-grace".into(), format!("{}us", grace.as_micros()).into()]);
    }
    if let Some(config) = config {
        arguments.extend(["--config".into(), config.into()]);
    }
    for rule in &tuning.without {
        arguments.extend(["--without".into(), rule.name().into()]);
    }
    arguments
}

/// The command line that starts a daemon like this one again.
pub(crate) fn respawn(
    root: (&GlobalArguments, &Path),
    tuning: &DaemonTuning,
    config: Option<&Path>,
) -> Result<Vec<OsString>> {
    // The keeper outlives this file, so it must know it by its name.
    let exe = installed(std::env::current_exe().context("finding our own program")?);
    let mut command = vec![exe.into_os_string()];
    command.extend(daemon_arguments(root, tuning, config));
    Ok(command)
}

/// The command that runs a keeper, which starts the daemon again by the command line `respawn`.
pub(crate) fn keeper(
    common: &GlobalArguments,
    root: &Path,
    respawn: &[OsString],
) -> Result<Command> {
    let mut command = Command::new(program());
    command.arg("--root").arg(root).arg("--log").arg(&common.log).arg("keeper");
    if !respawn.is_empty() {
        command.arg("--").args(respawn);
    }
    detach(&mut command, root)?;
    Ok(command)
}

/// Where our program is installed, also if its file was replaced since we were started: the kernel
/// then marks the name of the old one.
fn installed(exe: PathBuf) -> PathBuf {
    match exe.to_str().and_then(|name| name.strip_suffix(" (deleted)")) {
        Some(name) => PathBuf::from(name),
        None => exe,
    }
}

/// Who starts a daemon again when it dies. Commands leave it to them, because they know how the daemon
/// was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restarter {
    Nobody,
    Keeper,
    Systemd,
}

impl Restarter {
    const fn word(self) -> &'static str {
        match self {
            Self::Nobody => "",
            Self::Keeper => "keeper",
            Self::Systemd => "systemd",
        }
    }

    /// Writes it down for commands that come after the daemon's death.
    pub(crate) fn write_down(self, lock: &File) -> Result<()> {
        lock.set_len(0)
            .and_then(|()| lock.write_all_at(self.word().as_bytes(), 0))
            .context("writing to the lock of the root folder")
    }

    /// Who is expected to start a daemon of `root`.
    pub(crate) fn of(root: &Path) -> Self {
        let word = std::fs::read_to_string(root.join(LOCK)).unwrap_or_default();
        let is_there = |restarter: &Self| match restarter {
            Self::Keeper => keeper::Client::connect(&root.join("keeper.sock")).is_ok(),
            Self::Nobody | Self::Systemd => true,
        };
        let known = [Self::Keeper, Self::Systemd].into_iter();
        known.filter(|known| known.word() == word).find(is_there).unwrap_or(Self::Nobody)
    }
}

/// The file that a daemon locks.
pub(crate) const LOCK: &str = "daemon.lock";

/// What became of a daemon that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Started {
    /// It serves.
    Serves,
    /// The root folder has another one, which may not serve yet, or not any more.
    GaveWay,
}

impl Started {
    const ALL: [Self; 2] = [Self::Serves, Self::GaveWay];

    const fn byte(self) -> u8 {
        match self {
            Self::Serves => b'r',
            Self::GaveWay => b'w',
        }
    }

    /// Tells whoever started this daemon: one byte into the pipe that is our input.
    pub(crate) fn say(self) -> Result<()> {
        rustix::io::write(io::stdin(), &[self.byte()]).context("telling how the start went")?;
        Ok(())
    }
}

/// Starts a daemon of `root` and waits until it serves, or gives way to another one.
pub(crate) fn daemon(
    common: &GlobalArguments,
    root: &Path,
    tuning: &DaemonTuning,
) -> Result<Started> {
    std::fs::create_dir_all(root).with_context(|| format!("making {}", root.display()))?;
    let (mut ready, theirs) = io::pipe()?;
    let mut command = Command::new(program());
    command.args(daemon_arguments((common, root), tuning, None)).arg("--ready-on-stdin");
    detach(&mut command, root)?;
    command.stdin(Stdio::from(theirs));
    // A command that holds signals back must not pass that on.
    let mut child = sys::signals::spawn_unblocked(&mut command).context("starting the daemon")?;
    // The command holds our copy of the writing end, and with it the pipe would never end.
    drop(command);
    let mut byte = [0];
    // At the end of the pipe the byte stays what it is.
    ready.read_exact(&mut byte).ok();
    if let Some(started) = Started::ALL.into_iter().find(|started| started.byte() == byte[0]) {
        return Ok(started);
    }
    let status = child.wait()?;
    bail!("the daemon did not start ({status}): {}", last_words(root))
}

/// A process of its own, whose messages go to the log of the root folder.
fn detach(command: &mut Command, root: &Path) -> Result<()> {
    let log = root.join("daemon.log");
    let open = || File::options().create(true).append(true).open(&log);
    let (out, err) = (open(), open());
    let context = || format!("opening {}", log.display());
    command.stdout(out.with_context(context)?).stderr(err.with_context(context)?);
    command.current_dir("/").process_group(0);
    // Whatever service the caller belongs to, this process is not it.
    for name in SERVICE_ENVIRONMENT {
        command.env_remove(name);
    }
    Ok(())
}

/// The end of the daemon's log.
fn last_words(root: &Path) -> String {
    let log = std::fs::read_to_string(root.join("daemon.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("; ")
}

//! Talking to the daemon of a root folder.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::retry_on_intr;
use serde::de::DeserializeOwned;

use crate::args::{DaemonTuning, GlobalArguments};
use crate::failure::Failure;
use crate::output::Output;
use crate::protocol::{Reply, Request};
use crate::spawn::{Restarter, Started};

/// Sends `request` and waits for its answer, showing progress meanwhile. `None` if no daemon says
/// anything.
pub(crate) fn ask<T: DeserializeOwned>(
    common: &GlobalArguments,
    output: &Output,
    request: &Request,
) -> Result<Option<T>> {
    let socket = common.root.join("daemon.sock");
    let Ok(mut stream) = UnixStream::connect(&socket) else { return Ok(None) };
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    if stream.write_all(&line).is_err() {
        return Ok(None);
    }
    let mut replies = BufReader::new(stream).lines().peekable();
    // A daemon that was killed takes connections until its last thread is dead.
    if !matches!(replies.peek(), Some(Ok(_))) {
        return Ok(None);
    }
    let progress = output.progress();
    for line in replies {
        let line = line.context("waiting for the daemon's answer")?;
        match serde_json::from_str(&line).context("the daemon's answer cannot be read")? {
            Reply::Progress { what, done, total } => progress.show(&what, done, total),
            Reply::Done(value) => return Ok(Some(serde_json::from_value(value)?)),
            Reply::Failed { exit, message } => return Err(Failure { exit, message }.into()),
        }
    }
    anyhow::bail!(
        "the daemon ended before it answered; see {}",
        common.root.join("daemon.log").display()
    )
}

/// As [`ask`], with a daemon that is started if none runs. One that is just being started by somebody
/// else, or is about to end, is waited for.
pub(crate) fn ask_or_start<T: DeserializeOwned>(
    common: &GlobalArguments,
    output: &Output,
    tuning: &DaemonTuning,
    request: &Request,
) -> Result<T> {
    if let Some(answer) = ask(common, output, request)? {
        return Ok(answer);
    }
    let root = std::path::absolute(&common.root)?;
    std::fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
    let sockets = Sockets::watch(&root)?;
    let expected = Instant::now() + RESTART;
    while Restarter::of(&root) != Restarter::Nobody && Instant::now() < expected {
        sockets.wait_for_another()?;
        if let Some(answer) = ask(common, output, request)? {
            return Ok(answer);
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let started = crate::spawn::daemon(common, &root, tuning)?;
        if let Some(answer) = ask(common, output, request)? {
            return Ok(answer);
        }
        if started == Started::GaveWay {
            sockets.wait_for_another()?;
            if let Some(answer) = ask(common, output, request)? {
                return Ok(answer);
            }
        }
    }
    let log = root.join("daemon.log");
    anyhow::bail!("no daemon answers for {PATIENCE:?}; see {}", log.display())
}

/// The sockets that daemons of a root folder make when they serve.
struct Sockets {
    inotify: OwnedFd,
}

impl Sockets {
    fn watch(root: &Path) -> Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let inotify = inotify::init(flags).context("watching for a daemon")?;
        inotify::add_watch(&inotify, root, inotify::WatchFlags::MOVED_TO)
            .with_context(|| format!("watching {}", root.display()))?;
        Ok(Self { inotify })
    }

    /// Returns when there may be another one, or none is about to come: the daemon that one was
    /// expected of may have died.
    fn wait_for_another(&self) -> Result<()> {
        let mut fds = [PollFd::new(&self.inotify, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, Some(&LOOK_AGAIN))).context("waiting for a daemon")?;
        // What is read does not matter, only that the next wait is for something newer.
        let mut events = [0; 4096];
        while rustix::io::read(&self.inotify, &mut events).is_ok_and(|n_read| n_read > 0) {}
        Ok(())
    }
}

/// A daemon takes over hundreds of mounts in less.
const PATIENCE: Duration = Duration::from_secs(60);
/// A keeper lets a daemon that dies again and again wait for 5 s, any other for a tenth of one.
const RESTART: Duration = Duration::from_secs(6);
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

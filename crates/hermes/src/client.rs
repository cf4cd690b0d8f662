//! Talking to the daemon of a root folder.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use crate::args::{DaemonTuning, GlobalArguments};
use crate::failure::Failure;
use crate::output::Output;
use crate::protocol::{Reply, Request};

/// Sends `request` and waits for its answer, showing progress meanwhile. `None` if no daemon runs.
pub(crate) fn ask<T: DeserializeOwned>(
    common: &GlobalArguments,
    output: &Output,
    request: &Request,
) -> Result<Option<T>> {
    let socket = common.root.join("daemon.sock");
    let Ok(mut stream) = UnixStream::connect(&socket) else { return Ok(None) };
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).context("asking the daemon")?;
    let progress = output.progress();
    for line in BufReader::new(stream).lines() {
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

/// As [`ask`], with a daemon that is started if none runs.
pub(crate) fn ask_or_start<T: DeserializeOwned>(
    common: &GlobalArguments,
    output: &Output,
    tuning: &DaemonTuning,
    request: &Request,
) -> Result<T> {
    if let Some(answer) = ask(common, output, request)? {
        return Ok(answer);
    }
    let started = crate::spawn::daemon(common, &std::path::absolute(&common.root)?, tuning);
    match (ask(common, output, request)?, started) {
        // Another command may have started one at the same moment: then ours gave way to it.
        (Some(answer), _) => Ok(answer),
        (None, Err(err)) => Err(err),
        (None, Ok(())) => {
            anyhow::bail!("the daemon ended at once; see its log in {}", common.root.display())
        }
    }
}

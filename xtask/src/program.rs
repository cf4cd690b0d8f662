//! Running other programs, and finding this project.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// How much of a quiet program's output is shown when it fails.
const TAIL_BYTES: u64 = 8 << 10;

/// The root of the clone that this program was built from.
pub(crate) fn project_root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Runs a program whose output the user sees.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", shown(command));
    let status = command.status().with_context(|| format!("running {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a program whose output the user sees only if it fails; says what it does and how long it took.
pub(crate) fn run_quietly(what: &str, command: &mut Command) -> Result<()> {
    println!("{what} …");
    let begin = Instant::now();
    let mut log = tempfile::tempfile().context("making a temporary file")?;
    let clone = |log: &File| log.try_clone().context("sharing a temporary file");
    command.stdin(Stdio::null()).stdout(clone(&log)?).stderr(clone(&log)?);
    let status = command.status().with_context(|| format!("running {}", shown(command)))?;
    if !status.success() {
        bail!("{what}: {} failed: {status}\n{}", shown(command), tail(&mut log)?);
    }
    println!("{what}: done in {:.0} s", begin.elapsed().as_secs_f32());
    Ok(())
}

/// Runs a program and returns what it wrote to stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {}", shown(command)))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}\n{complaint}", shown(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("reading {}", shown(command)))
}

fn tail(log: &mut File) -> Result<String> {
    let end = log.seek(SeekFrom::End(0)).context("reading a log")?;
    log.seek(SeekFrom::Start(end.saturating_sub(TAIL_BYTES))).context("reading a log")?;
    let mut bytes = Vec::new();
    log.read_to_end(&mut bytes).context("reading a log")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The command line, without the settings of the environment.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

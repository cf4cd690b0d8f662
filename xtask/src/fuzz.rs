//! Builds and runs the fuzz targets in `fuzz/`.
//!
//! They have the layout of `cargo fuzz`, which a developer may use on them. It wants a nightly compiler
//! for its sanitizers; here the coverage that steers libFuzzer is enough, and the stable compiler gives
//! that: outside of `crates/sys` there is no unsafe code for a sanitizer to look at.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use testnode::wait_until;

use crate::leftovers::Footprint;
use crate::program::{output, run};

/// What `cargo fuzz` passes to the compiler, without a sanitizer.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 -Cdebug-assertions";

/// What one input may cost. Decoders are bounded: more of either is a bug of its own.
const MAX_MEMORY_MIB: u32 = 1024;
const MAX_SECONDS_PER_INPUT: u32 = 10;

/// A target and the process that runs it.
#[derive(Debug)]
struct Run {
    name: String,
    process: Child,
    log: PathBuf,
    /// Where it leaves an input that fails.
    artifacts: PathBuf,
}

/// Builds into `target_dir` and runs every target for `time`, as many at once as there are cores.
pub(crate) fn run_all(
    root: &Path,
    target_dir: &Path,
    time: Duration,
    footprint: &Footprint,
) -> Result<()> {
    let folder = root.join("fuzz");
    if !folder.join("Cargo.toml").exists() {
        bail!("fuzz/Cargo.toml is missing: every decoder of foreign bytes needs a target there");
    }
    let targets = build(&folder, target_dir)?;
    if targets.is_empty() {
        bail!("fuzz/Cargo.toml has no targets");
    }
    let n_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let scratch = footprint.scratch("fuzz")?;
    let mut waiting: VecDeque<(String, PathBuf)> = targets.into();
    let mut running = Vec::new();
    let mut failures = Vec::new();
    // Beyond the time that libFuzzer keeps by itself: loading the corpus, one last slow input.
    let limit = time * 2 + Duration::from_secs(120);
    while !waiting.is_empty() || !running.is_empty() {
        while running.len() < n_cores
            && let Some((name, program)) = waiting.pop_front()
        {
            running.push(start(&folder, &scratch, name, &program, time, footprint)?);
        }
        let mut ended = None;
        let waited = wait_until("a fuzz target to end", limit, || {
            ended = position_of_ended(&mut running)?;
            Ok(ended.is_some())
        });
        let Some(index) = ended else {
            running.iter_mut().for_each(|run| drop(run.process.kill()));
            return waited;
        };
        failures.extend(report(running.swap_remove(index))?);
    }
    fs::remove_dir_all(&scratch).context("removing the scratch folder")?;
    if !failures.is_empty() {
        bail!("fuzz targets failed: {}", failures.join(", "));
    }
    Ok(())
}

/// Builds the targets; returns their names and programs.
fn build(folder: &Path, target_dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let host = output(Command::new("rustc").args(["--print", "host-tuple"]))?;
    // With a target named, build scripts and macros stay without instruments.
    let args = ["build", "--release", "--bins", "--locked", "--target", host.trim()];
    let cargo = || {
        let mut cargo = testnode::cargo();
        cargo.args(args).current_dir(folder);
        cargo.env("RUSTFLAGS", RUSTFLAGS).env("CARGO_TARGET_DIR", target_dir);
        cargo
    };
    run(&mut cargo())?;
    let messages = output(cargo().args(["--quiet", "--message-format=json"]))?;
    let mut targets = Vec::new();
    for line in messages.lines() {
        let message: Message = serde_json::from_str(line).context("reading cargo's messages")?;
        if let Some(program) = message.executable {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            targets.push((name, program));
        }
    }
    targets.sort();
    Ok(targets)
}

fn start(
    folder: &Path,
    scratch: &Path,
    name: String,
    program: &Path,
    time: Duration,
    footprint: &Footprint,
) -> Result<Run> {
    let found = scratch.join(&name);
    let artifacts = folder.join("artifacts").join(&name);
    for new in [&found, &artifacts] {
        fs::create_dir_all(new).with_context(|| format!("making {}", new.display()))?;
    }
    let log = scratch.join(format!("{name}.log"));
    let out = fs::File::create(&log).context("making a log")?;
    let mut command = Command::new(program);
    // New inputs go into the first folder; the corpus in the tree is only read.
    command.arg(&found);
    let corpus = folder.join("corpus").join(&name);
    if corpus.is_dir() {
        command.arg(corpus);
    }
    command
        .arg(format!("-max_total_time={}", time.as_secs()))
        .arg(format!("-rss_limit_mb={MAX_MEMORY_MIB}"))
        .arg(format!("-timeout={MAX_SECONDS_PER_INPUT}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-verbosity=1"])
        .stdin(Stdio::null())
        .stdout(out.try_clone().context("sharing a log")?)
        .stderr(out);
    println!("fuzz {name}: {} s …", time.as_secs());
    let process =
        footprint.confine(&mut command).spawn().with_context(|| format!("starting {name}"))?;
    Ok(Run { name, process, log, artifacts })
}

fn position_of_ended(running: &mut [Run]) -> Result<Option<usize>> {
    for (index, run) in running.iter_mut().enumerate() {
        if run.process.try_wait().with_context(|| format!("waiting for {}", run.name))?.is_some() {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// Says how a target did; returns its name if it failed.
fn report(mut run: Run) -> Result<Option<String>> {
    let status = run.process.wait().with_context(|| format!("waiting for {}", run.name))?;
    let bytes = fs::read(&run.log).with_context(|| format!("reading {}", run.log.display()))?;
    let log = String::from_utf8_lossy(&bytes);
    if !status.success() {
        let lines: Vec<&str> = log.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        return Ok(Some(run.name));
    }
    // Empty, since nothing failed; the folder above is, once the last target is done.
    fs::remove_dir(&run.artifacts).ok();
    run.artifacts.parent().map(fs::remove_dir);
    let executed = log.lines().find_map(|l| l.strip_prefix("stat::number_of_executed_units:"));
    println!("fuzz {}: ok, {} inputs", run.name, executed.unwrap_or("?").trim());
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How a target does that runs `script` with its folder for failing inputs.
    fn reported(script: &str) -> (Option<String>, bool) {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = dir.path().join("artifacts/target");
        fs::create_dir_all(&artifacts).unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "stat::number_of_executed_units: 7\n").unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(&artifacts);
        let process = command.spawn().unwrap();
        let run = Run { name: "target".to_owned(), process, log, artifacts: artifacts.clone() };
        let failed = report(run).unwrap();
        (failed, artifacts.join("crash-1").exists())
    }

    #[test]
    fn a_failing_input_is_left_and_fails_the_run() {
        let failed = reported("echo input > \"$1/crash-1\"; exit 77");
        assert_eq!(failed, (Some("target".to_owned()), true));
        assert_eq!(reported("exit 0"), (None, false));
    }
}

//! What the kernel says of a process.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The seconds that a process has had on processors. `proc` is its folder, such as `/proc/1`.
///
/// # Errors
/// When there is no such process.
pub fn cpu_seconds(proc: &Path) -> Result<f64> {
    let stat = read(proc, "stat")?;
    // proc_pid_stat(5): after the name, which may hold anything, fields 14 and 15 are ticks.
    let (_, fields) = stat.rsplit_once(')').context("reading the state of a process")?;
    let fields = fields.split_whitespace().skip(11).take(2);
    let ticks: f64 = fields.map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / TICKS_PER_SECOND)
}

/// A size in MiB that `/proc/PID/status` has under this name, such as `VmRSS`.
///
/// # Errors
/// When there is no such process, or no such line.
pub fn mib(proc: &Path, name: &str) -> Result<f64> {
    let status = read(proc, "status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0).with_context(|| format!("no {name}"))
}

fn read(proc: &Path, file: &str) -> Result<String> {
    let path = proc.join(file);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// What the kernel counts in, on every architecture that we know.
const TICKS_PER_SECOND: f64 = 100.0;

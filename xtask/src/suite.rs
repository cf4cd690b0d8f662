//! `cargo xtask test`: every check and test, one after the other, with a table at the end.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testnode::Cache;

use crate::leftovers::Footprint;
use crate::program::{output, project_root, run};
use crate::{fuzz, setup, tidy};

/// How long each fuzz target runs.
const FUZZ_TIME: Duration = Duration::from_secs(60);
/// Rust's build output in the cache is thrown away when it is larger than this: each clone adds its own
/// crates to it, and cargo never removes any.
const MAX_TARGET_MIB: u64 = 24 << 10;

/// Which steps to run.
#[derive(Debug)]
pub(crate) enum Selection {
    All,
    /// All but those that take minutes.
    Quick,
    Only(&'static Step),
}

impl Selection {
    pub(crate) fn only(name: &str) -> Result<Self> {
        match STEPS.iter().find(|step| step.name == name) {
            Some(step) => Ok(Self::Only(step)),
            None => bail!("there is no step `{name}`, only {}", step_names().join(", ")),
        }
    }

    fn includes(&self, step: &Step) -> bool {
        match self {
            Self::All => true,
            Self::Quick => !step.slow,
            Self::Only(only) => only.name == step.name,
        }
    }
}

/// One row of the table.
#[derive(Debug)]
pub(crate) struct Step {
    name: &'static str,
    slow: bool,
    how: fn(&Run) -> Result<()>,
}

const STEPS: &[Step] = &[
    Step { name: "fmt", slow: false, how: fmt },
    Step { name: "tidy", slow: false, how: |_| tidy::tidy() },
    Step { name: "clippy", slow: false, how: clippy },
    Step { name: "doc", slow: false, how: doc },
    Step { name: "alone", slow: true, how: alone },
    Step { name: "test", slow: false, how: tests },
    Step { name: "fuzz", slow: true, how: fuzzing },
];

pub(crate) fn step_names() -> Vec<&'static str> {
    STEPS.iter().map(|step| step.name).collect()
}

/// What the steps share.
struct Run {
    root: PathBuf,
    footprint: Footprint,
}

/// Runs set-up, the selected steps, and the check for leftovers. A failed step does not keep the others
/// from running: one run shows all that is wrong.
pub(crate) fn test(selection: &Selection) -> Result<()> {
    let begin = Instant::now();
    println!("{}", setup::describe_machine()?);
    let cache = Cache::locate();
    let mut table = Table::default();
    table.row("setup", setup::setup);
    if table.failed() {
        return table.finish(begin);
    }
    let run = Run { root: project_root(), footprint: Footprint::begin(&cache)? };
    trim(&cache.folder().join("target"))?;
    for step in STEPS.iter().filter(|step| selection.includes(step)) {
        table.row(step.name, || (step.how)(&run));
    }
    let Run { footprint, .. } = run;
    table.row("leftovers", || footprint.end(&cache));
    table.finish(begin)
}

/// The steps that have run.
#[derive(Default)]
struct Table {
    rows: Vec<(&'static str, Duration, bool)>,
}

impl Table {
    fn row(&mut self, name: &'static str, how: impl FnOnce() -> Result<()>) {
        println!("\n== {name} ==");
        let begin = Instant::now();
        let result = how();
        if let Err(error) = &result {
            println!("{name}: {error:#}");
        }
        self.rows.push((name, begin.elapsed(), result.is_ok()));
    }

    fn failed(&self) -> bool {
        self.rows.iter().any(|(_, _, ok)| !ok)
    }

    fn finish(&self, begin: Instant) -> Result<()> {
        println!();
        for (name, time, ok) in &self.rows {
            let verdict = if *ok { "ok" } else { "FAILED" };
            println!("{name:<10} {:>7.1} s  {verdict}", time.as_secs_f32());
        }
        println!("{:<10} {:>7.1} s", "total", begin.elapsed().as_secs_f32());
        if self.failed() {
            bail!("not all steps succeeded");
        }
        Ok(())
    }
}

impl Run {
    /// A cargo command in the project, with build output in the cache.
    fn cargo(&self, args: &[&str]) -> Command {
        let mut cargo = testnode::cargo();
        cargo.args(args).current_dir(&self.root);
        cargo.env("CARGO_TARGET_DIR", target_dir(&Cache::locate()));
        self.footprint.confine(&mut cargo);
        cargo
    }
}

fn fmt(r: &Run) -> Result<()> {
    run(&mut r.cargo(&["fmt", "--all", "--check"]))?;
    run(&mut r.cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))
}

fn clippy(r: &Run) -> Result<()> {
    let args = ["clippy", "--locked", "--workspace", "--all-targets", "--all-features"];
    run(r.cargo(&args).args(["--", "-D", "warnings"]))
}

fn doc(r: &Run) -> Result<()> {
    let args = ["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"];
    run(r.cargo(&args).env("RUSTDOCFLAGS", "-D warnings"))
}

/// Each crate by itself: built together they lend each other features of their dependencies.
fn alone(r: &Run) -> Result<()> {
    let list = output(&mut r.cargo(&["metadata", "--format-version=1", "--no-deps"]))?;
    let metadata: serde_json::Value =
        serde_json::from_str(&list).context("reading the output of cargo metadata")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut failed = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package has no name")?;
        let check = run(&mut r.cargo(&["check", "--locked", "--quiet", "--package", name]));
        failed.extend(check.err().map(|_| name));
    }
    if !failed.is_empty() {
        bail!("these crates do not compile alone: {}", failed.join(", "));
    }
    Ok(())
}

fn tests(r: &Run) -> Result<()> {
    run(&mut r.cargo(&["test", "--locked", "--workspace", "--no-fail-fast"]))
}

fn fuzzing(r: &Run) -> Result<()> {
    let target = target_dir(&Cache::locate()).join("fuzz");
    fuzz::run_all(&r.root, &target, FUZZ_TIME, &r.footprint)
}

/// The caller's choice, or the cache.
fn target_dir(cache: &Cache) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| cache.folder().join("target"), PathBuf::from)
}

/// Removes the build output if it has grown too large.
fn trim(target: &Path) -> Result<()> {
    if !target.exists() {
        return Ok(());
    }
    let size = output(Command::new("du").args(["--summarize", "--block-size=1M"]).arg(target))?;
    let mib: u64 = size.split_whitespace().next().unwrap_or_default().parse().context("du")?;
    if mib > MAX_TARGET_MIB {
        println!("removing {mib} MiB of old build output from {}", target.display());
        fs::remove_dir_all(target).context("removing old build output")?;
    }
    Ok(())
}

//! Cold starts: from the user's command to the first good answer of a container whose image is at the
//! other end of a link, by Hermes and its peers side by side. See `bench/README.md`.

mod images;
mod probe;
mod run;
mod stage;
mod systems;
mod table;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use testnode::LinkShape;

use crate::images::Image;
use crate::run::{Cell, ColdStart, cold_start};
use crate::stage::Stage;
use crate::systems::{HermesTuning, System};
use crate::table::{CellReport, Report};

/// Measures cold starts.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rates and round trips
    #[arg(long, value_delimiter = ',', default_value = "1gbit/20ms,1gbit/1ms,100mbit/20ms")]
    links: Vec<NamedLink>,
    /// What is started
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Image::value_variants().to_vec())]
    images: Vec<Image>,
    /// What starts it
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = System::value_variants().to_vec())]
    systems: Vec<System>,
    /// Cold starts of each image over each link by each system
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Where `cold.json`, or `cold-LABEL.json`, is written [default: bench/results]
    #[arg(long)]
    out: Option<PathBuf>,
    /// What this run is called
    #[arg(long)]
    label: Option<String>,
    /// Keep what daemons and commands of the last run of each cell say, in this folder
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Measure this program instead of building it
    #[arg(long, value_name = "FILE")]
    hermes: Option<PathBuf>,
    /// An argument for `hermes daemon`; again for more
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    hermes_arg: Vec<String>,
    /// An argument for `hermes run`; again for more
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    run_arg: Vec<String>,
    /// An argument for `hermes index build`; again for more
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    index_arg: Vec<String>,
    /// What Hermes logs
    #[arg(long, value_name = "FILTER", default_value = "info")]
    hermes_log: String,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// A link as the caller wrote it.
#[derive(Debug, Clone)]
struct NamedLink {
    name: String,
    shape: LinkShape,
}

impl std::str::FromStr for NamedLink {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self { name: text.to_owned(), shape: text.parse()? })
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let hermes = match &arguments.hermes {
        Some(file) => std::path::absolute(file)?,
        None => bench::hermes_binary()?,
    };
    let stage = Stage::set(images::registry_storage()?, hermes).context("starting the registry")?;
    let mut report = Report {
        benchmark: "cold",
        label: arguments.label.clone(),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cores: std::thread::available_parallelism()?.get(),
        hermes: HermesTuning {
            daemon: arguments.hermes_arg.clone(),
            run: arguments.run_arg.clone(),
            index: arguments.index_arg.clone(),
            log: arguments.hermes_log.clone(),
        },
        indexes: Vec::new(),
        cells: Vec::new(),
    };
    if arguments.systems.contains(&System::Hermes) {
        for image in &arguments.images {
            report.indexes.push(stage.index(*image, &report.hermes)?);
        }
    }
    say(&CellReport::head());
    for image in &arguments.images {
        for link in &arguments.links {
            for cell in measure(&stage, &arguments, &report.hermes, *image, link) {
                say(&cell.line());
                report.cells.push(cell);
            }
            // After each, so that an interrupted run leaves what it has.
            write(&arguments, &report)?;
        }
    }
    Ok(())
}

/// All runs of an image over a link. The systems take turns, so that what else happens on the machine
/// is spread over them.
fn measure(
    stage: &Stage,
    arguments: &Arguments,
    tuning: &HermesTuning,
    image: Image,
    link: &NamedLink,
) -> Vec<CellReport> {
    let mut runs: Vec<Vec<ColdStart>> = vec![Vec::new(); arguments.systems.len()];
    for _ in 0..arguments.runs {
        for (system, runs) in arguments.systems.iter().zip(&mut runs) {
            let logs = arguments.logs.as_deref();
            let cell = Cell { image, link: link.shape, system: *system, tuning, logs };
            match cold_start(stage, cell) {
                Ok(run) => runs.push(run),
                // The others are worth having all the same.
                Err(error) => say(&format!("{} with {}: {error:#}", image.name(), system.name())),
            }
        }
    }
    let overlayfs = arguments.systems.iter().position(|system| *system == System::Overlayfs);
    let overlayfs_warm = overlayfs.and_then(|at| {
        let warm: Vec<f64> = runs[at].iter().filter_map(|run| run.warm_seconds).collect();
        bench::median(&warm)
    });
    let report = |(system, runs): (&System, Vec<ColdStart>)| {
        CellReport::new(image.name(), link.name.clone(), system.name(), runs, overlayfs_warm)
    };
    arguments.systems.iter().zip(runs).map(report).collect()
}

fn write(arguments: &Arguments, report: &Report) -> Result<()> {
    let out = arguments.out.clone().unwrap_or_else(bench::results_dir);
    std::fs::create_dir_all(&out).with_context(|| format!("making {}", out.display()))?;
    let name = match &arguments.label {
        Some(label) => format!("cold-{label}.json"),
        None => "cold.json".to_owned(),
    };
    let file = out.join(name);
    std::fs::write(&file, serde_json::to_vec_pretty(report)?)
        .with_context(|| format!("writing {}", file.display()))
}

/// Tells whoever waits. Nobody may be there to hear it.
fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").ok();
}

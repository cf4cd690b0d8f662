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

use crate::images::{Image, Needed};
use crate::run::{Cell, ColdStart, Warm, cold_start};
use crate::stage::{Share, Stage};
use crate::systems::{Contestant, HermesTuning, System};
use crate::table::{CellReport, ImageReport, Report, Summary};

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
    /// Where `cold.json` and `.svg`, or `cold-LABEL.…`, are written [default: bench/results]
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
    /// Hermes once more, with these arguments for `hermes daemon` too; again for more
    #[arg(long, value_name = "NAME=ARG,ARG", value_parser = named)]
    variant: Vec<(String, String)>,
    /// Hermes once more, as this program; again for more
    #[arg(long, value_name = "NAME=FILE", value_parser = named)]
    rival: Vec<(String, String)>,
    /// What the nodes get of the processors
    #[arg(long, value_enum, default_value_t = Share::Ordinary)]
    share: Share,
    /// Leave out warm starts, and with them all that is compared with one
    #[arg(long)]
    no_warm: bool,
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

/// Reads `NAME=WHAT`.
fn named(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, what) = parts.ok_or_else(|| format!("`{text}` is not NAME=…"))?;
    Ok((name.to_owned(), what.to_owned()))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let hermes = match &arguments.hermes {
        Some(file) => std::path::absolute(file)?,
        None => bench::hermes_binary()?,
    };
    let mut programs = vec![(hermes, format!("{PROGRAMS}/hermes"))];
    for (name, file) in &arguments.rival {
        programs.push((std::path::absolute(file)?, format!("{RIVALS}/{name}/hermes")));
    }
    let storage = images::registry_storage()?;
    let stage =
        Stage::set(&storage, &programs, arguments.share).context("starting the registry")?;
    let mut report = Report {
        benchmark: "cold",
        label: arguments.label.clone(),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cores: std::thread::available_parallelism()?.get(),
        share: arguments.share,
        contestants: contestants(&arguments),
        index_arguments: arguments.index_arg.clone(),
        images: Vec::new(),
        cells: Vec::new(),
    };
    say(&CellReport::head());
    for image in &arguments.images {
        let needed = Needed::of(&storage, *image)?;
        let has_hermes = report.contestants.iter().any(|c| c.system.is_hermes());
        let index = has_hermes.then(|| stage.index(*image, &arguments.index_arg)).transpose()?;
        report.images.push(ImageReport::new(*image, needed, index));
        for link in &arguments.links {
            let round = Round { stage: &stage, arguments: &arguments, image: *image, needed, link };
            for cell in round.measure(&report.contestants) {
                say(&cell.line());
                report.cells.push(cell);
            }
            // After each, so that an interrupted run leaves what it has.
            write(&arguments, &report)?;
        }
    }
    Ok(())
}

/// Who takes part, in the order of their turns.
fn contestants(arguments: &Arguments) -> Vec<Contestant> {
    let tuning = HermesTuning {
        folder: PROGRAMS.to_owned(),
        daemon: arguments.hermes_arg.clone(),
        run: arguments.run_arg.clone(),
        log: arguments.hermes_log.clone(),
    };
    let of_system = |system: &System| Contestant {
        name: system.name().to_owned(),
        system: *system,
        hermes: tuning.clone(),
    };
    let hermes = |name: &str, hermes: HermesTuning| Contestant {
        name: name.to_owned(),
        system: System::Hermes,
        hermes,
    };
    let variants = arguments.variant.iter().map(|(name, more)| {
        let more = more.split(',').filter(|argument| !argument.is_empty()).map(str::to_owned);
        let daemon = tuning.daemon.iter().cloned().chain(more).collect();
        hermes(name, HermesTuning { daemon, ..tuning.clone() })
    });
    let rivals = arguments.rival.iter().map(|(name, _)| {
        hermes(name, HermesTuning { folder: format!("{RIVALS}/{name}"), ..tuning.clone() })
    });
    arguments.systems.iter().map(of_system).chain(variants).chain(rivals).collect()
}

/// An image and a link.
struct Round<'a> {
    stage: &'a Stage,
    arguments: &'a Arguments,
    image: Image,
    needed: Needed,
    link: &'a NamedLink,
}

impl Round<'_> {
    /// All runs. The contestants take turns, so that what else happens on the machine is spread over
    /// them.
    fn measure(&self, contestants: &[Contestant]) -> Vec<CellReport> {
        let mut runs: Vec<Vec<ColdStart>> = vec![Vec::new(); contestants.len()];
        for _ in 0..self.arguments.runs {
            for (contestant, runs) in contestants.iter().zip(&mut runs) {
                match cold_start(self.stage, self.cell(contestant)) {
                    Ok(run) => runs.push(run),
                    // The others are worth having all the same.
                    Err(error) => {
                        say(&format!("{}, {}: {error:#}", self.image.name(), contestant.name));
                    }
                }
            }
        }
        let overlayfs = contestants.iter().position(|c| c.system == System::Overlayfs);
        let overlayfs_warm = overlayfs.and_then(|at| {
            let warm: Vec<f64> = runs[at].iter().filter_map(|run| run.warm_seconds).collect();
            bench::median(&warm)
        });
        let report = |(contestant, runs): (&Contestant, Vec<ColdStart>)| {
            let summary = Summary::of(&runs, overlayfs_warm, |warm| {
                self.needed.lower_bound(self.link.shape, warm)
            });
            CellReport {
                image: self.image.name(),
                link: self.link.name.clone(),
                contestant: contestant.name.clone(),
                summary,
                runs,
            }
        };
        contestants.iter().zip(runs).map(report).collect()
    }

    fn cell<'a>(&'a self, contestant: &'a Contestant) -> Cell<'a> {
        let warm = if self.arguments.no_warm { Warm::LeftOut } else { Warm::Measured };
        let logs = self.arguments.logs.as_deref();
        Cell { image: self.image, link: self.link.shape, contestant, warm, logs }
    }
}

fn write(arguments: &Arguments, report: &Report) -> Result<()> {
    let out = arguments.out.clone().unwrap_or_else(bench::results_dir);
    std::fs::create_dir_all(&out).with_context(|| format!("making {}", out.display()))?;
    let name = arguments.label.as_ref().map_or_else(|| "cold".to_owned(), |l| format!("cold-{l}"));
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    for (extension, content) in [("json", json), ("svg", report.picture().into_bytes())] {
        let file = out.join(&name).with_extension(extension);
        std::fs::write(&file, content).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

/// Tells whoever waits. Nobody may be there to hear it.
fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").ok();
}

/// The folder of our program in the nodes.
const PROGRAMS: &str = "/usr/local/bin";
/// The folder of folders of others.
const RIVALS: &str = "/opt/rivals";

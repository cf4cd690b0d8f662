//! Results: medians of the runs of a cell, for people and as JSON.

use bench::median;
use bench::report::{Better, Figure};
use serde::Serialize;

use crate::images::{Image, Needed};
use crate::run::ColdStart;
use crate::stage::Share;
use crate::systems::{Contestant, System};

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) benchmark: &'static str,
    /// What the caller calls this run.
    pub(crate) label: Option<String>,
    pub(crate) kernel: String,
    pub(crate) cores: usize,
    /// Of the processors.
    pub(crate) share: Share,
    pub(crate) contestants: Vec<Contestant>,
    /// Arguments of `hermes index build`.
    pub(crate) index_arguments: Vec<String>,
    pub(crate) images: Vec<ImageReport>,
    pub(crate) cells: Vec<CellReport>,
}

impl Report {
    /// The answers of all runs, a figure for each image and link.
    pub(crate) fn picture(&self) -> String {
        let has_overlayfs = self.contestants.iter().any(|c| c.system == System::Overlayfs);
        let mut figures: Vec<(String, Figure)> = Vec::new();
        for cell in &self.cells {
            let what = format!("{}, {}: first good answer", cell.image, cell.link);
            if figures.last().is_none_or(|(last, _)| *last != what) {
                let figure = Figure::new(what.clone(), "s", Better::Lower);
                let overlayfs = System::Overlayfs.name();
                let figure = if has_overlayfs { figure.against(overlayfs) } else { figure };
                figures.push((what, figure));
            }
            if let Some((_, figure)) = figures.last_mut() {
                for run in &cell.runs {
                    figure.push(&cell.contestant, run.answer_seconds);
                }
            }
        }
        bench::report::svg("cold", figures.into_iter().map(|(_, figure)| figure))
    }
}

/// An image that is started.
#[derive(Debug, Serialize)]
pub(crate) struct ImageReport {
    pub(crate) name: &'static str,
    #[serde(flatten)]
    needed: Needed,
    /// What `hermes index build` took, on the registry's side of the link.
    index_seconds: Option<f64>,
}

impl ImageReport {
    pub(crate) fn new(image: Image, needed: Needed, index_seconds: Option<f64>) -> Self {
        Self { name: image.name(), needed, index_seconds }
    }
}

/// An image, a link and a contestant.
#[derive(Debug, Serialize)]
pub(crate) struct CellReport {
    pub(crate) image: &'static str,
    pub(crate) link: String,
    pub(crate) contestant: String,
    pub(crate) summary: Summary,
    pub(crate) runs: Vec<ColdStart>,
}

/// Medians over the runs of a cell.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) answer_seconds: Option<f64>,
    /// The fastest of the runs.
    pub(crate) best_answer_seconds: Option<f64>,
    pub(crate) running_seconds: Option<f64>,
    /// The warm start that the cell is compared with: its own, else that of overlayfs.
    pub(crate) warm_seconds: Option<f64>,
    /// That of overlayfs in the same runs, if it took part.
    pub(crate) overlayfs_warm_seconds: Option<f64>,
    /// `answer_seconds` without `warm_seconds`.
    pub(crate) beyond_warm_seconds: Option<f64>,
    /// `answer_seconds` divided by that.
    pub(crate) stall_ratio: Option<f64>,
    /// `answer_seconds` divided by the fewest seconds that this start can take.
    pub(crate) bound_ratio: Option<f64>,
    pub(crate) megabytes_in: Option<f64>,
    pub(crate) requests: Option<f64>,
    pub(crate) blocked_reads: Option<f64>,
    pub(crate) daemon_cpu_seconds: Option<f64>,
    pub(crate) whole_seconds: Option<f64>,
    pub(crate) sealed_seconds: Option<f64>,
    pub(crate) load: Option<f64>,
}

impl Summary {
    /// Sums up `runs`. `bound` gives the fewest seconds that a start can take whose warm start takes so
    /// many.
    pub(crate) fn of(
        runs: &[ColdStart],
        overlayfs_warm: Option<f64>,
        bound: impl Fn(f64) -> f64,
    ) -> Self {
        let middle = |figure: &dyn Fn(&ColdStart) -> Option<f64>| {
            median(&runs.iter().filter_map(figure).collect::<Vec<f64>>())
        };
        let status = |run: &ColdStart, name: &str| run.hermes.as_ref()?.status[name].as_f64();
        let answer_seconds = middle(&|run| Some(run.answer_seconds));
        let warm_seconds = middle(&|run| run.warm_seconds).or(overlayfs_warm);
        let compared = answer_seconds.zip(warm_seconds);
        Self {
            answer_seconds,
            best_answer_seconds: runs.iter().map(|run| run.answer_seconds).min_by(f64::total_cmp),
            running_seconds: middle(&|run| Some(run.running_seconds)),
            warm_seconds,
            overlayfs_warm_seconds: overlayfs_warm,
            beyond_warm_seconds: compared.map(|(cold, warm)| cold - warm),
            stall_ratio: compared.map(|(cold, warm)| cold / warm),
            bound_ratio: compared.map(|(cold, warm)| cold / bound(warm)),
            megabytes_in: middle(&|run| Some(megabytes(run.bytes_in))),
            requests: middle(&|run| status(run, "requests")),
            blocked_reads: middle(&|run| status(run, "blocked_reads")),
            daemon_cpu_seconds: middle(&|run| Some(run.hermes.as_ref()?.daemon_cpu_seconds)),
            whole_seconds: middle(&|run| run.hermes.as_ref()?.whole_seconds),
            sealed_seconds: middle(&|run| run.hermes.as_ref()?.sealed_seconds),
            load: middle(&|run| Some(run.load)),
        }
    }

    /// The figures of a line, with their digits after the point; in the order of [`COLUMNS`].
    fn figures(&self) -> [(Option<f64>, usize); COLUMNS.len()] {
        [
            (self.answer_seconds, 3),
            (self.best_answer_seconds, 3),
            (self.running_seconds, 3),
            (self.warm_seconds, 3),
            (self.beyond_warm_seconds, 3),
            (self.stall_ratio, 2),
            (self.bound_ratio, 2),
            (self.megabytes_in, 1),
            (self.requests, 0),
            (self.blocked_reads, 0),
            (self.daemon_cpu_seconds, 2),
            (self.whole_seconds, 2),
            (self.sealed_seconds, 2),
            (self.load, 1),
        ]
    }
}

impl CellReport {
    /// The head of the table whose lines [`CellReport::line`] makes.
    pub(crate) fn head() -> String {
        line("image", "link", "system", COLUMNS.map(str::to_owned))
    }

    /// A line for people; times in seconds.
    pub(crate) fn line(&self) -> String {
        let figures = self.summary.figures().map(|(value, digits)| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        });
        line(self.image, &self.link, &self.contestant, figures)
    }
}

fn line(image: &str, link: &str, system: &str, figures: [String; COLUMNS.len()]) -> String {
    let figures = figures.map(|figure| format!(" {figure:>8}")).concat();
    format!("{image:<7} {link:<13} {system:<12}{figures}")
}

const COLUMNS: [&str; 14] = [
    "answer", "best", "running", "warm", "beyond", "stall", "/bound", "MB in", "GETs", "blocked",
    "CPU", "whole", "sealed", "load",
];

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

//! Results: medians of the runs of a cell, for people and as JSON.

use bench::median;
use serde::Serialize;

use crate::run::ColdStart;
use crate::stage::BuiltIndex;
use crate::systems::HermesTuning;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) benchmark: &'static str,
    /// What the caller calls this run.
    pub(crate) label: Option<String>,
    pub(crate) kernel: String,
    pub(crate) cores: usize,
    pub(crate) hermes: HermesTuning,
    pub(crate) indexes: Vec<BuiltIndex>,
    pub(crate) cells: Vec<CellReport>,
}

/// An image, a link and a system.
#[derive(Debug, Serialize)]
pub(crate) struct CellReport {
    pub(crate) image: &'static str,
    pub(crate) link: String,
    pub(crate) system: &'static str,
    pub(crate) summary: Summary,
    pub(crate) runs: Vec<ColdStart>,
}

/// Medians over the runs of a cell.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) answer_seconds: Option<f64>,
    pub(crate) running_seconds: Option<f64>,
    /// The same system's warm start.
    pub(crate) warm_seconds: Option<f64>,
    /// `answer_seconds` without the warm start that the cell is compared with: its own, else that of
    /// overlayfs.
    pub(crate) beyond_warm_seconds: Option<f64>,
    /// `answer_seconds` divided by that warm start.
    pub(crate) stall_ratio: Option<f64>,
    pub(crate) megabytes_in: Option<f64>,
    pub(crate) requests: Option<f64>,
    pub(crate) blocked_reads: Option<f64>,
    pub(crate) sealed_seconds: Option<f64>,
}

impl CellReport {
    /// Sums up `runs`; `overlayfs_warm` is what it is compared with if it has no warm start.
    pub(crate) fn new(
        image: &'static str,
        link: String,
        system: &'static str,
        runs: Vec<ColdStart>,
        overlayfs_warm: Option<f64>,
    ) -> Self {
        let middle = |figure: &dyn Fn(&ColdStart) -> Option<f64>| {
            median(&runs.iter().filter_map(figure).collect::<Vec<f64>>())
        };
        let status = |run: &ColdStart, name: &str| run.hermes.as_ref()?.status[name].as_f64();
        let answer_seconds = middle(&|run| Some(run.answer_seconds));
        let warm_seconds = middle(&|run| run.warm_seconds);
        let compared = answer_seconds.zip(warm_seconds.or(overlayfs_warm));
        let summary = Summary {
            answer_seconds,
            running_seconds: middle(&|run| Some(run.running_seconds)),
            warm_seconds,
            beyond_warm_seconds: compared.map(|(cold, warm)| cold - warm),
            stall_ratio: compared.map(|(cold, warm)| cold / warm),
            megabytes_in: middle(&|run| Some(megabytes(run.bytes_in))),
            requests: middle(&|run| status(run, "requests")),
            blocked_reads: middle(&|run| status(run, "blocked_reads")),
            sealed_seconds: middle(&|run| Some(run.hermes.as_ref()?.sealed_seconds)),
        };
        Self { image, link, system, summary, runs }
    }

    /// The head of the table whose lines [`CellReport::line`] makes.
    pub(crate) fn head() -> String {
        format!(
            "{:<7} {:<13} {:<10} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>6} {:>7} {:>8}",
            "image",
            "link",
            "system",
            "answer",
            "running",
            "warm",
            "beyond",
            "stall",
            "MB in",
            "GETs",
            "blocked",
            "sealed"
        )
    }

    /// A line for people; times in seconds.
    pub(crate) fn line(&self) -> String {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let Summary {
            answer_seconds,
            running_seconds,
            warm_seconds,
            beyond_warm_seconds,
            stall_ratio,
            megabytes_in,
            requests,
            blocked_reads,
            sealed_seconds,
        } = self.summary;
        format!(
            "{:<7} {:<13} {:<10} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>6} {:>7} {:>8}",
            self.image,
            self.link,
            self.system,
            number(answer_seconds, 3),
            number(running_seconds, 3),
            number(warm_seconds, 3),
            number(beyond_warm_seconds, 3),
            number(stall_ratio, 2),
            number(megabytes_in, 1),
            number(requests, 0),
            number(blocked_reads, 0),
            number(sealed_seconds, 2),
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

//! What was measured: as a table, as JSON, and as a plot.

mod plot;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use crate::{median, results_dir};

/// What every local benchmark can be told.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// How often everything is measured
    #[arg(long, value_name = "N")]
    pub runs: Option<usize>,
    /// Folder for the results [default: bench/results]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

/// The results of one benchmark.
#[derive(Debug, Serialize)]
pub struct Report {
    benchmark: &'static str,
    machine: Machine,
    runs: usize,
    /// What was measured on: sizes, versions.
    facts: BTreeMap<&'static str, serde_json::Value>,
    figures: Vec<Figure>,
}

/// Where it was measured.
#[derive(Debug, Serialize)]
struct Machine {
    kernel: String,
    processor: String,
    cores: usize,
    memory_bytes: u64,
    /// How many others wanted a processor at the end, on average over five minutes.
    load: f64,
}

/// Which values are the good ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// The small ones: times, memory.
    Lower,
    /// The large ones: rates.
    Higher,
}

/// What is aimed at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// So many times as good as the baseline, or better.
    RatioAtLeast(f64),
    /// This median, or a smaller one.
    MedianBelow(f64),
}

/// One thing that was measured, for each of the alternatives.
#[derive(Debug, Serialize)]
pub struct Figure {
    what: String,
    unit: &'static str,
    better: Better,
    baseline: Option<&'static str>,
    target: Option<Target>,
    /// For whom the target is.
    of: Vec<&'static str>,
    series: Vec<Series>,
}

/// The values of one alternative, in the order of the runs.
#[derive(Debug, Serialize)]
struct Series {
    name: String,
    values: Vec<f64>,
    median: f64,
    /// The median, over the runs, of how many times as good as the baseline this is.
    ratio: Option<f64>,
    met: Option<bool>,
}

impl Report {
    /// Starts with nothing measured.
    #[must_use]
    pub fn new(benchmark: &'static str, runs: usize) -> Self {
        let machine = Machine::this();
        Self { benchmark, machine, runs, facts: BTreeMap::new(), figures: Vec::new() }
    }

    /// Notes something about what was measured.
    pub fn fact(&mut self, name: &'static str, value: impl Into<serde_json::Value>) {
        self.facts.insert(name, value.into());
    }

    /// Adds a figure that has all its values.
    pub fn add(&mut self, figure: Figure) {
        self.figures.push(figure.evaluated());
    }

    /// Prints the table and writes `NAME.json` and `NAME.svg`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(mut self, options: &Options) -> Result<()> {
        self.machine.load = load();
        let dir = options.out.clone().unwrap_or_else(results_dir);
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let path = |extension| dir.join(self.benchmark).with_extension(extension);
        let json = serde_json::to_string_pretty(&self).context("encoding the results")?;
        for (path, content) in
            [(path("json"), json + "\n"), (path("svg"), plot::svg(self.benchmark, &self.figures))]
        {
            fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        }
        std::io::stdout().write_all(self.table().as_bytes()).context("printing the results")
    }

    fn table(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.facts {
            push_line(&mut text, format_args!("{name}: {value}"));
        }
        for figure in &self.figures {
            push_line(&mut text, format_args!("\n{} ({})", figure.what, figure.unit));
            for series in &figure.series {
                let Series { name, values, median, ratio, met } = series;
                let (least, most) = bounds(values);
                let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}x"));
                let verdict = met.map_or("", |met| if met { "ok" } else { "MISSED" });
                push_line(
                    &mut text,
                    format_args!(
                        "  {name:<24} {:>10} ({:>9} - {:>9}) {ratio:>8}  {verdict}",
                        number(*median),
                        number(least),
                        number(most)
                    ),
                );
            }
            match figure.target {
                Some(Target::RatioAtLeast(ratio)) => push_line(
                    &mut text,
                    format_args!("  target: {ratio}x of {}", figure.baseline.unwrap_or_default()),
                ),
                Some(Target::MedianBelow(most)) => {
                    push_line(&mut text, format_args!("  target: {} at most", number(most)));
                }
                None => {}
            }
        }
        text
    }
}

/// A picture of figures that have all their values.
#[must_use]
pub fn svg(title: &str, figures: impl IntoIterator<Item = Figure>) -> String {
    plot::svg(title, &figures.into_iter().map(Figure::evaluated).collect::<Vec<Figure>>())
}

impl Figure {
    /// Begins a figure without values.
    #[must_use]
    pub fn new(what: impl Into<String>, unit: &'static str, better: Better) -> Self {
        let (what, baseline, target) = (what.into(), None, None);
        Self { what, unit, better, baseline, target, of: Vec::new(), series: Vec::new() }
    }

    /// Names the alternative that the others are compared with, run by run.
    #[must_use]
    pub fn against(self, baseline: &'static str) -> Self {
        Self { baseline: Some(baseline), ..self }
    }

    /// Says what is aimed at for the alternatives `of`.
    #[must_use]
    pub fn target(self, target: Target, of: &[&'static str]) -> Self {
        Self { target: Some(target), of: of.to_vec(), ..self }
    }

    /// Adds the value of the next run of `name`.
    pub fn push(&mut self, name: &str, value: f64) {
        match self.series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.values.push(value),
            None => self.series.push(Series {
                name: name.to_owned(),
                values: vec![value],
                median: 0.0,
                ratio: None,
                met: None,
            }),
        }
    }

    fn evaluated(mut self) -> Self {
        let baseline =
            self.series.iter().find(|series| Some(series.name.as_str()) == self.baseline);
        let baseline = baseline.map(|series| series.values.clone());
        for series in &mut self.series {
            series.median = median(&series.values).unwrap_or(f64::NAN);
            let ratios = baseline.iter().flatten().zip(&series.values);
            let ratios: Vec<f64> = ratios
                .map(|(base, own)| match self.better {
                    Better::Lower => base / own,
                    Better::Higher => own / base,
                })
                .collect();
            series.ratio = median(&ratios);
            let wanted = self.target.filter(|_| self.of.contains(&series.name.as_str()));
            series.met = wanted.and_then(|target| match target {
                Target::RatioAtLeast(least) => series.ratio.map(|ratio| ratio >= least),
                Target::MedianBelow(most) => Some(series.median <= most),
            });
        }
        self
    }
}

impl Machine {
    fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_once(':'));
            value.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.trim_end_matches(" kB").parse().unwrap_or(0_u64);
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib << 10,
            load: 0.0,
        }
    }
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|load| load.parse().ok()).unwrap_or(f64::NAN)
}

/// The smallest and the largest.
fn bounds(values: &[f64]) -> (f64, f64) {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    (least, values.iter().copied().fold(f64::NEG_INFINITY, f64::max))
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        small if small < 10.0 => format!("{value:.2}"),
        medium if medium < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn push_line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a String takes all that is written");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(better: Better, target: Target, values: [&[f64]; 2], expected: (f64, bool)) {
        let mut figure = Figure::new("speed", "s", better).against("old").target(target, &["new"]);
        values[0].iter().for_each(|value| figure.push("old", *value));
        values[1].iter().for_each(|value| figure.push("new", *value));
        let figure = figure.evaluated();
        assert_eq!(figure.series[0].met, None);
        assert_eq!(
            (figure.series[1].ratio, figure.series[1].met),
            (Some(expected.0), Some(expected.1))
        );
    }

    #[test]
    fn ratios_are_taken_run_by_run() {
        let twice = Target::RatioAtLeast(2.0);
        // The machine was ten times as slow in the second run, for both.
        check(Better::Lower, twice, [&[4.0, 40.0, 4.0], &[2.0, 20.0, 1.0]], (2.0, true));
        check(Better::Higher, twice, [&[4.0], &[6.0]], (1.5, false));
        check(Better::Lower, Target::MedianBelow(10.0), [&[20.0], &[10.0]], (2.0, true));
    }

    #[test]
    fn a_report_has_all_that_was_pushed() {
        let mut figure = Figure::new("a < b", "ms", Better::Lower).against("one");
        figure.push("one", 3.0);
        figure.push("two", 1.5);
        let mut report = Report::new("test", 1);
        report.fact("bytes", 5);
        report.add(figure);
        let table = report.table();
        assert!(table.contains("bytes: 5") && table.contains("2.00x"), "{table}");
        let plot = plot::svg("test", &report.figures);
        assert!(plot.contains("a &lt; b") && plot.contains("two") && plot.ends_with("</svg>\n"));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["figures"][0]["series"][1]["ratio"], 2.0);
    }
}

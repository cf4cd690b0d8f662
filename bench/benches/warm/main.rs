//! Whole images, warm: the back ends beside the same layers unpacked on the disk under overlayfs.

mod storms;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bench::hermes::{BACKENDS, Hermes};
use bench::layers::{Layers, Subject};
use bench::report::{Better, Figure, Options, Report, Target};
use clap::Parser;
use sys::mount::{Overlay, mount_overlay};
use testkit::registry::Registry;
use testnode::output;

use crate::storms::Files;

const OVERLAYFS: &str = "overlayfs";
/// The back ends that must be as fast.
const KERNEL: [&str; 2] = ["erofs", "erofs-loop"];
const LEAST: f64 = 0.95;

fn main() -> Result<()> {
    let options = Options::parse();
    let runs = options.runs.unwrap_or(15);
    let layers = Layers::make()?;
    let hermes = Hermes::new()?;
    let mut places = vec![(OVERLAYFS, unpack(&layers, &hermes)?)];
    places.extend(mount(&layers, &hermes)?);
    let all: Vec<Files> =
        places.iter().map(|(_, place)| Files::find(place)).collect::<Result<_>>()?;
    ensure!(all.iter().all(|files| files.counts() == all[0].counts()), "the trees differ");

    let mut figures = Figures::new();
    for run in 0..runs {
        figures.measure(run, &places, &all)?;
    }
    let mut report = Report::new("warm", runs);
    report.fact(
        "image, bytes of tar",
        layers.of(Subject::Tree)?.iter().map(|l| l.tar_size).sum::<u64>(),
    );
    report.fact("files, folders", format!("{:?}", all[0].counts()));
    figures.0.into_iter().flat_map(|(figures, _)| figures).for_each(|figure| report.add(figure));
    report.finish(&options)
}

/// Unpacks the layers and lays an overlay over them, as a container has it.
fn unpack(layers: &Layers, hermes: &Hermes) -> Result<PathBuf> {
    let mut lower = Vec::new();
    for (number, layer) in layers.of(Subject::Tree)?.iter().enumerate() {
        let dir = hermes.path(&format!("lower-{number}"));
        fs::create_dir(&dir)?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--gzip", "--preserve-permissions", "--numeric-owner", "--xattrs"]);
        output(tar.arg("--xattrs-include=*").arg("--file").arg(&layer.path).arg("-C").arg(&dir))?;
        lower.push(dir);
    }
    lower.reverse();
    // Pages that wait for being written are slower to read than clean ones.
    rustix::fs::syncfs(fs::File::open(hermes.path(""))?)?;
    let [place, upper, work] = [OVERLAYFS, "upper", "work"].map(|name| hermes.path(name));
    [&place, &upper, &work].into_iter().try_for_each(fs::create_dir)?;
    let (upper, work) = (Some(upper.as_path()), Some(work.as_path()));
    mount_overlay(Overlay { lower: &lower, upper, work, flags: &[] }, &place)?;
    Ok(place)
}

/// Mounts the image through each back end, all complete.
fn mount(layers: &Layers, hermes: &Hermes) -> Result<Vec<(&'static str, PathBuf)>> {
    let registry = Registry::start(testkit::registry::Options::default())?;
    let image = layers.image(Subject::Tree)?.push_to(&registry, "tree", "1")?;
    hermes.run(&["index", "build", &image.reference])?;
    let mounts =
        BACKENDS.map(|backend| Ok((backend, hermes.mount(&image.reference, backend, "now")?)));
    let mounts = mounts.into_iter().collect::<Result<Vec<_>>>()?;
    hermes.until_sealed()?;
    Ok(mounts)
}

/// Gives a value for each figure.
type Measure = fn(&Path, &Files) -> Result<Vec<f64>>;

/// What is measured together, and how.
struct Figures(Vec<(Vec<Figure>, Measure)>);

impl Figures {
    fn new() -> Self {
        let target = Target::RatioAtLeast(LEAST);
        let rate = |what, unit| Figure::new(what, unit, Better::Higher).against(OVERLAYFS);
        let aimed = |what, unit| vec![rate(what, unit).target(target, &KERNEL)];
        let seconds = |what| Figure::new(what, "s", Better::Lower).against(OVERLAYFS);
        let import = vec![
            seconds("Python imports 500 modules").target(target, &KERNEL),
            seconds("Python imports 500 modules, processor time"),
        ];
        Self(vec![
            (aimed("sequential read of large files", "MB/s"), |_, files| one(files.sequential())),
            (aimed("random reads of 4 KiB", "1000/s"), |_, files| one(files.random())),
            (aimed("stat", "1000/s"), |_, files| one(files.stat())),
            (aimed("readdir", "1000 entries/s"), |_, files| one(files.read_dir())),
            (vec![rate("small files read", "1000/s")], |_, files| one(files.open())),
            (import, |place, _| Ok(storms::import(place)?.to_vec())),
        ])
    }

    fn measure(
        &mut self,
        run: usize,
        places: &[(&'static str, PathBuf)],
        all: &[Files],
    ) -> Result<()> {
        for (figures, measure) in &mut self.0 {
            for turn in 0..places.len() {
                // Whoever comes first has the processor's caches in another state.
                let at = (run + turn) % places.len();
                let (name, place) = &places[at];
                let again = || measure(place, &all[at]);
                // The first time all that is needed comes into memory, if it was not there.
                let values = again().and_then(|_cold| again());
                let values = values.with_context(|| format!("measuring {name}"))?;
                for (figure, value) in figures.iter_mut().zip(values) {
                    figure.push(name, value);
                }
            }
        }
        Ok(())
    }
}

fn one(value: Result<f64>) -> Result<Vec<f64>> {
    Ok(vec![value?])
}

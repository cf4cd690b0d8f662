//! A daemon with many images mounted: its memory, what it computes while nothing happens, and how soon more
//! of them are back after its death.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bench::hermes::{BACKENDS, Hermes};
use bench::process::{cpu_seconds, mib};
use bench::report::{Better, Figure, Options, Report, Target};
use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};
use testkit::image::{Compression, Image, ImageBuilder, LayerBuilder};
use testkit::registry::Registry;
use testnode::wait_until;

/// Whose memory is looked at.
const IMAGES: usize = 50;
/// Who have to be back.
const IMAGES_BACK: usize = 200;
/// Files of each image; what a language's run time has.
const FILES: usize = 4000;
const MOST_MIB: f64 = 150.0;
const MOST_SECONDS_BACK: f64 = 1.0;
/// Of a processor.
const MOST_IDLE: f64 = 0.01;
const IDLE: Duration = Duration::from_secs(20);

fn main() -> Result<()> {
    let options = Options::parse();
    let runs = options.runs.unwrap_or(3);
    let registry = Registry::start(testkit::registry::Options::default())?;
    let hermes = Hermes::new()?;
    let mut images = Vec::new();
    for number in 0..IMAGES_BACK {
        let image = image(number).push_to(&registry, &format!("many-{number}"), "1")?;
        hermes.run(&["index", "build", &image.reference])?;
        images.push(image.reference);
    }
    let figure = |what, unit| Figure::new(what, unit, Better::Lower);
    let below = Target::MedianBelow;
    let mut memory = figure("memory of the daemon", "MiB").target(below(MOST_MIB), &BACKENDS);
    let mut idle =
        figure("processors used while nothing happens", "1").target(below(MOST_IDLE), &BACKENDS);
    let mut back = figure("from the daemon's death until all mounts are served", "s")
        .target(below(MOST_SECONDS_BACK), &BACKENDS);
    for _ in 0..runs {
        for backend in BACKENDS {
            let run = run(&hermes, backend, &images)?;
            memory.push(backend, run.memory);
            idle.push(backend, run.idle);
            back.push(backend, run.back);
        }
    }
    let mut report = Report::new("many", runs);
    report.fact("images", IMAGES);
    report.fact("images that have to be back", IMAGES_BACK);
    report.fact("files of each", FILES);
    [memory, idle, back].into_iter().for_each(|figure| report.add(figure));
    report.finish(&options)
}

/// An image that shares nothing with another.
fn image(number: usize) -> Image {
    let file = |file: usize| {
        let name = format!("usr/lib/package-{}/module_{file}.py", file / 100);
        (name, format!("# image {number}, file {file}\n").repeat(40).into_bytes())
    };
    let add = |layer: LayerBuilder, (name, content)| layer.file(name, content);
    let layer = (0..FILES).map(file).fold(LayerBuilder::new(), add).build();
    ImageBuilder::new().layer(layer, Compression::Gzip { level: 6 }).build()
}

struct Run {
    /// In MiB.
    memory: f64,
    /// In processors.
    idle: f64,
    /// In seconds.
    back: f64,
}

fn run(hermes: &Hermes, backend: &str, images: &[String]) -> Result<Run> {
    let mount = |number: usize, image: &String| {
        let dir = hermes.path(&format!("{backend}-{number}"));
        let dir = dir.to_str().context("a path that is not text")?;
        // As unsealed as they can be: a sealed layer needs less.
        hermes.run(&["mount", "--backend", backend, "--completion", "never", image, dir])
    };
    let images = images.iter().enumerate();
    images.clone().take(IMAGES).try_for_each(|(n, image)| mount(n, image).map(drop))?;
    let daemon = hermes.daemon()?.context("the daemon is gone")?;
    let proc = PathBuf::from(format!("/proc/{daemon}"));
    let before = cpu_seconds(&proc)?;
    std::thread::park_timeout(IDLE);
    let idle = (cpu_seconds(&proc)? - before) / IDLE.as_secs_f64();
    let memory = mib(&proc, "VmRSS")?;
    images.clone().skip(IMAGES).try_for_each(|(n, image)| mount(n, image).map(drop))?;
    let pid = Pid::from_raw(daemon).context("a process without a number")?;
    let begin = Instant::now();
    kill_process(pid, Signal::KILL)?;
    wait_until("another daemon to serve all mounts", Duration::from_secs(60), || {
        let status = hermes.status()?;
        let mounts = status["mounts"].as_array().map_or(0, Vec::len);
        Ok(status["daemon"]["pid"].as_i64() != Some(daemon.into()) && mounts == images.len())
    })?;
    let back = begin.elapsed().as_secs_f64();
    hermes.stop()?;
    hermes.run(&["cache", "prune"])?;
    Ok(Run { memory, idle, back })
}

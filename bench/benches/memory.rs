//! The memory of the daemon while a large layer completes behind a reader's back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use bench::hermes::{BACKENDS, Hermes};
use bench::layers::{Layers, Subject};
use bench::process::mib;
use bench::report::{Better, Figure, Options, Report, Target};
use clap::Parser;
use testkit::registry::Registry;

const MOST_MIB: f64 = 100.0;

fn main() -> Result<()> {
    let options = Options::parse();
    let runs = options.runs.unwrap_or(3);
    let layers = Layers::make()?;
    let layer = layers.of(Subject::Huge)?.pop().context("no layer")?;
    let registry = Registry::start(testkit::registry::Options::default())?;
    let image = layers.image(Subject::Huge)?.push_to(&registry, "huge", "1")?;
    let hermes = Hermes::new()?;
    hermes.run(&["index", "build", &image.reference])?;

    let target = Target::MedianBelow(MOST_MIB);
    let figure = |what, unit| Figure::new(what, unit, Better::Lower);
    let mut peak = figure("peak memory of the daemon", "MiB").target(target, &BACKENDS);
    let mut swollen = figure("of which not of files", "MiB");
    let mut seconds = figure("time until the layer was sealed", "s");
    let mut reads = Figure::new("reads meanwhile", "1", Better::Higher);
    for _ in 0..runs {
        for backend in BACKENDS {
            let run = complete(&hermes, backend, &image.reference)?;
            peak.push(backend, run.peak);
            swollen.push(backend, run.anonymous);
            seconds.push(backend, run.seconds);
            reads.push(backend, run.reads);
        }
    }
    let mut report = Report::new("memory", runs);
    report.fact("layer, compressed bytes", layer.size);
    report.fact("layer, bytes of tar", layer.tar_size);
    [peak, swollen, seconds, reads].into_iter().for_each(|figure| report.add(figure));
    report.finish(&options)
}

struct Run {
    /// In MiB.
    peak: f64,
    anonymous: f64,
    seconds: f64,
    reads: f64,
}

/// Mounts the image and reads from it until it is whole.
fn complete(hermes: &Hermes, backend: &str, image: &str) -> Result<Run> {
    let begin = Instant::now();
    let root = hermes.mount(image, backend, "now")?;
    let sealed = AtomicBool::new(false);
    let reads = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_on(&root, &sealed));
        let waited = hermes.until_sealed();
        sealed.store(true, Ordering::Relaxed);
        let reads = reader.join();
        waited?;
        reads.unwrap_or_else(|_panic| anyhow::bail!("the reader panicked"))
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    let daemon = hermes.daemon()?.context("the daemon is gone")?;
    let proc = PathBuf::from(format!("/proc/{daemon}"));
    let (peak, anonymous) = (mib(&proc, "VmHWM")?, mib(&proc, "RssAnon")?);
    let run = Run { peak, anonymous, seconds, reads };
    hermes.forget(backend)?;
    // The next run begins with a daemon that has not grown yet.
    hermes.stop()?;
    Ok(run)
}

/// Reads a page here and there in every file, again and again. Returns how many.
fn read_on(root: &Path, sealed: &AtomicBool) -> Result<f64> {
    let files = files_below(root)?;
    let mut count = 0.0;
    for (number, path) in files.iter().cycle().enumerate().step_by(97) {
        if sealed.load(Ordering::Relaxed) {
            break;
        }
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let at = u64::try_from(number)?.wrapping_mul(0x9e37_79b9_7f4a_7c15) % size.max(1);
        file.read_at(&mut [0; 4096], at)?;
        count += 1.0;
    }
    Ok(count)
}

fn files_below(root: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut waiting) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

//! How long a reader waits for 4 KiB in the middle of a span that nobody has touched.
//!
//! The registry is on loopback, and nothing is completed in the background.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use artifacts::IndexStore;
use bench::hermes::{BACKENDS, Hermes};
use bench::layers::{Layers, Subject};
use bench::median;
use bench::report::{Better, Figure, Options, Report, Target};
use clap::Parser;
use oci::Digest;
use testkit::image::ImageRefs;
use testkit::registry::Registry;
use testnode::wait_until;
use ztoc::{EntryKind, TocEntry};

const PAGE: u64 = 4096;
/// A file of which no more than a span and its neighbour are fetched at a time.
const LARGE: u64 = 9 << 20;
/// Arguments of `hermes index build`: so long are the spans of layers below 512 MB.
const SHORT: &[&str] = &["--span-size", "1m"];
const PATIENCE: Duration = Duration::from_secs(60);
const N_READS: usize = 250;
const MOST_MS: f64 = 10.0;

fn main() -> Result<()> {
    let options = Options::parse();
    let runs = options.runs.unwrap_or(3);
    let layers = Layers::make()?;
    let registry = Registry::start(testkit::registry::Options::default())?;
    let image = layers.image(Subject::Large)?.push_to(&registry, "large", "1")?;
    // Each with a cache of its own: what one has fetched the others have not.
    let nodes = BACKENDS.iter().map(|_backend| Hermes::new()).collect::<Result<Vec<Hermes>>>()?;

    let mut report = Report::new("latency", runs);
    let target = Target::MedianBelow(MOST_MS);
    for (spans, arguments) in [("of 2.5 MiB, the default here", &[][..]), ("of 1 MiB", SHORT)] {
        let places = index(&nodes, &image, arguments)?;
        let figure = |what| Figure::new(format!("{what}, spans {spans}"), "ms", Better::Lower);
        let mut middle = figure("median of the reads").target(target, &BACKENDS);
        let mut worst = figure("99th percentile of the reads");
        for _ in 0..runs {
            for (backend, mut waits) in BACKENDS.into_iter().zip(read_all(&nodes, &image, &places)?)
            {
                waits.sort_by(f64::total_cmp);
                middle.push(backend, median(&waits).context("no reads")?);
                worst.push(backend, waits[(waits.len() * 99).div_ceil(100) - 1]);
            }
        }
        report.fact("reads in each run", places.len());
        report.add(middle);
        report.add(worst);
    }
    report.finish(&options)
}

/// Builds the index in the first node and copies it to the others. Returns where to read.
fn index(nodes: &[Hermes], image: &ImageRefs, arguments: &[&str]) -> Result<Vec<Place>> {
    let (first, others) = nodes.split_first().context("no node")?;
    first.run(&["index", "rm", &image.layers[0].to_string()]).ok();
    first.run(&[&["index", "build", &image.reference], arguments].concat())?;
    let from = first.path("root/index");
    for other in others {
        let to = other.path("root/index");
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    places(first, &image.layers[0])
}

/// Where to read: a file, and the offset of a page in it.
type Place = (String, u64);

/// The middle of every second span, where it lies in a large file: around small files more than what
/// was asked for is fetched.
fn places(hermes: &Hermes, layer: &Digest) -> Result<Vec<Place>> {
    let store = IndexStore::open(&hermes.path("root/index"))?;
    let index = store.load(layer)?.context("the index is gone")?;
    let spans = &index.ztoc.spans;
    let middles = spans.ids().step_by(2).map(|span| {
        let range = spans.uncompressed_range(span);
        range.start.midpoint(range.end)
    });
    let toc = index.toc.read()?;
    let mut places: Vec<Place> = middles.filter_map(|at| place(&toc, at)).collect();
    ensure!(places.len() >= 200, "only {} spans can be read", places.len());
    // In no order that could be foreseen.
    places.sort_by_key(|(path, at)| Digest::of(format!("{path} {at}").as_bytes()).hex());
    places.truncate(N_READS);
    Ok(places)
}

fn place(toc: &[TocEntry], at: u64) -> Option<Place> {
    let covers = |entry: &&TocEntry| (entry.offset..entry.offset + entry.size).contains(&at);
    let large = |entry: &&TocEntry| entry.kind == EntryKind::File && entry.size >= LARGE;
    let entry = toc.iter().find(covers).filter(large)?;
    let name = String::from_utf8(entry.name.clone()).ok()?;
    Some((name, (at - entry.offset) / PAGE * PAGE))
}

/// Mounts the image, reads each place once, and forgets it all; each back end in its node, in turn.
/// Milliseconds, for each back end.
fn read_all(nodes: &[Hermes], image: &ImageRefs, places: &[Place]) -> Result<Vec<Vec<f64>>> {
    let pairs = || nodes.iter().zip(BACKENDS);
    let mount = |(node, backend): (&Hermes, &str)| node.mount(&image.reference, backend, "never");
    let roots = pairs().map(mount).collect::<Result<Vec<_>>>()?;
    let mut waits = vec![Vec::new(); nodes.len()];
    for place in places {
        for ((node, root), waits) in nodes.iter().zip(&roots).zip(&mut waits) {
            until_quiet(node)?;
            let wait = read(root, place).with_context(|| format!("reading {}", place.0))?;
            waits.push(wait);
        }
    }
    for (node, backend) in pairs() {
        let blocked = node.status()?["blocked_reads"].as_u64().unwrap_or_default();
        // Now and then a guess was right.
        let enough = places.len() - places.len() / 20;
        ensure!(usize::try_from(blocked)? >= enough, "only {blocked} reads had to wait");
        node.forget(backend)?;
        node.stop()?;
    }
    Ok(waits)
}

fn read(root: &Path, (name, at): &Place) -> Result<f64> {
    let file = File::open(root.join(name))?;
    let mut page = [0; 4096];
    let begin = Instant::now();
    file.read_exact_at(&mut page, *at)?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// Waits until what the last read made the daemon fetch has come.
fn until_quiet(hermes: &Hermes) -> Result<()> {
    let mut last = None;
    wait_until("the daemon to be idle", PATIENCE, || {
        let now = hermes.status()?["mounts"][0]["bytes_present"].as_u64();
        Ok(std::mem::replace(&mut last, now) == now)
    })
}

//! What a container's start asks of a snapshotter: Prepare, Mounts and Remove through containerd's socket, of
//! Hermes beside containerd's own overlayfs.

use anyhow::{Context, Result};
use bench::report::{Better, Figure, Options, Report, Target};
use clap::Parser;
use testnode::{Cache, ContainerdVersion, Network, Node, NodeOptions, proxy_config};

const SOCKET: &str = "/run/hermes/containerd.sock";
const NAMES: [&str; 2] = ["overlayfs", "hermes"];

/// Rounds of both in each run.
const ROUNDS: &str = "400x";

const MEASURE: &str = "
export CONTAINERD=/run/containerd/containerd.sock SNAPSHOTTERS=overlayfs,hermes
/opt/peers/snapshotter-suite -test.run '^$' -test.bench Calls -test.benchtime $1
";

fn main() -> Result<()> {
    let options = Options::parse();
    let runs = options.runs.unwrap_or(5);
    let hermes = (bench::hermes_binary()?, "/usr/local/bin/hermes".to_owned());
    // On a disk, not on the node's overlay: neither can be durable there.
    let disk = bench::hermes::Hermes::new()?;
    let binds = ["hermes", "containerd"].map(|name| (disk.path(name), format!("/var/lib/{name}")));
    for (dir, _) in &binds {
        std::fs::create_dir_all(dir).context("making a folder")?;
    }
    let peers = (Cache::locate().existing_peers()?, "/opt/peers".to_owned());
    let binds = [&[hermes, peers], &binds[..]].concat();
    let node = Node::start_with(&NodeOptions { network: Network::Own, binds })?;
    node.write("/etc/hermes/config.toml", "")?;
    let mut daemon =
        node.spawn("hermes", "hermes", &["daemon", "--config", "/etc/hermes/config.toml"])?;
    daemon.wait_ready("its socket", || Ok(node.path(SOCKET).exists()))?;
    let _containerd =
        node.containerd(ContainerdVersion::Newest, &proxy_config("hermes", SOCKET))?;
    node.write("/srv/measure", MEASURE)?;

    let mut median = Figure::new("Prepare, Mounts and Remove, median", "µs", Better::Lower)
        .against("overlayfs")
        .target(Target::RatioAtLeast(1.0), &["hermes"]);
    let mut worst = Figure::new("99th percentile", "µs", Better::Lower).against("overlayfs");
    for _ in 0..runs {
        let printed = node.run("bash", &["-eu", "/srv/measure", ROUNDS])?;
        for name in NAMES {
            median.push(name, metric(&printed, &format!("{name}-median-us"))?);
            worst.push(name, metric(&printed, &format!("{name}-p99-us"))?);
        }
    }
    let mut report = Report::new("calls", runs);
    report.fact("rounds", ROUNDS);
    [median, worst].into_iter().for_each(|figure| report.add(figure));
    report.finish(&options)
}

/// A figure as Go's benchmarks print it: the number, and then its unit.
fn metric(printed: &str, unit: &str) -> Result<f64> {
    let words: Vec<&str> = printed.split_whitespace().collect();
    let at = words.iter().position(|word| *word == unit);
    let value = at.and_then(|at| words.get(at.checked_sub(1)?)?.parse().ok());
    value.with_context(|| format!("no {unit} in {printed}"))
}

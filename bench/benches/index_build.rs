//! Building the index of one large layer: Hermes beside both of AWS's tools, on the same file.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bench::hermes_binary;
use bench::layers::{Layers, Subject};
use bench::report::{Better, Figure, Options, Report, Target};
use clap::Parser;
use sys::usage::Usage;
use testkit::image::PackedLayer;
use testnode::{Cache, Containerd, ContainerdVersion, Node};

const HERMES: &str = "hermes";
/// It copies the layer to `/tmp`, which is memory here: the harder rival where disks are slow.
const SOCI: &str = "soci 0.4.1";
/// With `/tmp` on the disk, as on most machines.
const SOCI_DISK: &str = "soci 0.4.1, copy on disk";
const SOCI15: &str = "soci 0.15";
const ALL: [&str; 4] = [HERMES, SOCI, SOCI_DISK, SOCI15];

/// What the index may cost besides its own size.
const MEMORY: f64 = 64.0;
const MIB: f64 = 1_048_576.0;

fn main() -> Result<()> {
    let options = Options::parse();
    let runs = options.runs.unwrap_or(5);
    let layers = Layers::make()?;
    let layer = layers.of(Subject::Large)?.pop().context("no layer")?;
    let stage = Stage::prepare(&layers, &layer)?;
    let mut figures = Figures::new();
    let mut built = 0.0;
    stage.read_all()?;
    for _ in 0..runs {
        for tool in ALL {
            stage.clean(tool)?;
            let begin = Instant::now();
            let usage = stage.build(tool)?;
            let seconds = begin.elapsed().as_secs_f64();
            if tool == HERMES {
                built = stage.ztoc_bytes()?;
            }
            figures.push(tool, &layer, seconds, &usage);
        }
    }
    let mut report = Report::new("index_build", runs);
    report.fact("layer, compressed bytes", layer.size);
    report.fact("layer, bytes of tar", layer.tar_size);
    report.fact("zTOCs of Hermes, bytes", built);
    figures.finish(&mut report, built);
    report.finish(&options)
}

/// A node with the tools in it and the image for each of them.
struct Stage {
    node: Node,
    _containerd: Containerd,
    _layout: tempfile::TempDir,
}

/// Where the layout is in the node; SOCI 0.15 adds to it.
const LAYOUT: &str = "/layout";
/// What containerd calls the image.
const IMAGE: &str = "bench.test/large:1";

impl Stage {
    fn prepare(layers: &Layers, layer: &PackedLayer) -> Result<Self> {
        let cache = Cache::locate();
        let layout = tempfile::Builder::new().prefix("bench-").tempdir_in(cache.folder())?;
        let image = layers.image(Subject::Large)?;
        image.write_layout(layout.path(), "large").context("writing a layout")?;
        fs::copy(layout.path().join("index.json"), layout.path().join("index.before"))?;
        let binds = vec![
            (hermes_binary()?, "/usr/local/bin/hermes".to_owned()),
            (layout.path().to_owned(), LAYOUT.to_owned()),
        ];
        let node = Node::start_and_bind(binds)?;
        let containerd = node.containerd(ContainerdVersion::Packaged, "version = 2\n")?;
        node.bash(&format!(
            "tar -C {LAYOUT} --exclude index.before -c . |
               ctr image import --no-unpack --digests --base-name bench.test/large -
             ctr image tag \"$(ctr image list -q | head -1)\" {IMAGE}
             mkdir -p /srv/tmp"
        ))
        .with_context(|| format!("importing {}", layer.path.display()))?;
        Ok(Self { node, _containerd: containerd, _layout: layout })
    }

    /// Has the layer in memory wherever a tool reads it: disks are not what is compared.
    fn read_all(&self) -> Result<()> {
        let content = "/var/lib/containerd/io.containerd.content.v1.content/blobs";
        // containerd removes meanwhile what the tool before has left.
        let read = format!("find {LAYOUT}/blobs {content} -type f -exec cat {{}} + >/dev/null");
        self.node.bash(&format!("{read} || true")).map(drop)
    }

    /// Removes what the tool has made before.
    fn clean(&self, tool: &str) -> Result<()> {
        let lines = match tool {
            HERMES => "rm -rf /var/lib/hermes/*".to_owned(),
            SOCI | SOCI_DISK => "rm -rf /var/lib/soci-snapshotter-grpc/*".to_owned(),
            SOCI15 => format!(
                "cp {LAYOUT}/index.before {LAYOUT}/index.json
                 find {LAYOUT}/blobs -newer {LAYOUT}/index.before -type f -delete"
            ),
            _ => bail!("no tool {tool}"),
        };
        self.node.bash(&lines).map(drop)
    }

    fn build(&self, tool: &str) -> Result<Usage> {
        let layout = format!("{LAYOUT}:large");
        let oci = format!("oci:{layout}");
        let program: &[&str] = match tool {
            HERMES => &["hermes", "index", "build", &oci],
            SOCI | SOCI_DISK => &["soci", "create", IMAGE],
            SOCI15 => &["/opt/peers/soci15", "create", &layout],
            _ => bail!("no tool {tool}"),
        };
        let temporary = if tool == SOCI_DISK { "/srv/tmp" } else { "/tmp" };
        let mut command = self.node.command("env");
        command.arg(format!("TMPDIR={temporary}")).args(program);
        let child = command.stdout(Stdio::null()).spawn().context("running nsenter")?;
        let usage = sys::usage::wait(child).context("waiting for a tool")?;
        if !usage.status.success() {
            bail!("{program:?}: {}", usage.status);
        }
        Ok(usage)
    }

    /// The size of the documents that Hermes has made: its own, and that for SOCI.
    fn ztoc_bytes(&self) -> Result<f64> {
        let folder: PathBuf = self.node.path("/var/lib/hermes/index");
        let sizes = fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len()));
        Ok(float(sizes.sum::<Result<u64>>()?))
    }
}

/// What is measured.
struct Figures {
    rate: Figure,
    wall: Figure,
    cpu: Figure,
    memory: Figure,
    written: Figure,
}

impl Figures {
    fn new() -> Self {
        let figure = |what, unit, better| Figure::new(what, unit, better).against(SOCI);
        Self {
            rate: figure("throughput", "MB/s of tar", Better::Higher)
                .target(Target::RatioAtLeast(2.0), &[HERMES]),
            wall: figure("time", "s", Better::Lower),
            cpu: figure("processor time", "s", Better::Lower),
            memory: figure("peak memory", "MiB", Better::Lower),
            written: figure("written to disk", "MiB", Better::Lower),
        }
    }

    fn push(&mut self, tool: &'static str, layer: &PackedLayer, seconds: f64, usage: &Usage) {
        self.rate.push(tool, float(layer.tar_size) / 1e6 / seconds);
        self.wall.push(tool, seconds);
        self.cpu.push(tool, usage.cpu.as_secs_f64());
        self.memory.push(tool, float(usage.peak_memory) / MIB);
        self.written.push(tool, float(usage.written) / MIB);
    }

    fn finish(self, report: &mut Report, ztoc: f64) {
        let most = Target::MedianBelow(MEMORY + ztoc / MIB);
        let memory = self.memory.target(most, &[HERMES]);
        for figure in [self.rate, self.wall, self.cpu, memory, self.written] {
            report.add(figure);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "no count of bytes here reaches 2^53")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

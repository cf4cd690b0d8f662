//! What the local benchmarks measure: layers of real files, made once and kept beside the other parts
//! of tests.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;
use oci::Hasher;
use testkit::image::{Image, ImageBuilder, PackedLayer};
use testnode::{Cache, output};

/// How the layers are made.
const RECIPE: &str = include_str!("../layers.sh");
/// What is known of each layer: its name, the digests of blob and tar, and the size of the tar.
const LIST: &str = "list";

/// An image of the benchmarks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Debian, Python and libraries for it: three layers, 0.9 GB unpacked.
    Tree,
    /// One layer of more than 1 GB compressed.
    Large,
    /// One layer of more than 5 GB unpacked.
    Huge,
}

impl Subject {
    const ALL: [Self; 3] = [Self::Tree, Self::Large, Self::Huge];

    const fn layers(self) -> &'static [&'static str] {
        match self {
            Self::Tree => &["base", "python", "libraries"],
            Self::Large => &["large"],
            Self::Huge => &["huge"],
        }
    }
}

/// The layers on disk.
#[derive(Debug, Clone)]
pub struct Layers {
    folder: PathBuf,
}

impl Layers {
    /// Finds them, or makes them: that takes ten minutes and a network.
    ///
    /// # Errors
    /// When `cargo xtask setup` has not run, or Debian's packages cannot be had.
    pub fn make() -> Result<Self> {
        let cache = Cache::locate();
        let root = cache.existing_root()?;
        let _lock = cache.lock()?;
        let folder = cache.part("bench-layers", &[RECIPE]);
        Cache::make(&folder, |out| make(out, &mirror_of(&root)?))?;
        Ok(Self { folder })
    }

    /// The layers of an image, the lowest first.
    ///
    /// # Errors
    /// When what is known of them cannot be read.
    pub fn of(&self, subject: Subject) -> Result<Vec<PackedLayer>> {
        let list = self.folder.join(LIST);
        let list =
            fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
        let find = |name: &&str| {
            let line = list.lines().find(|line| line.split(' ').next() == Some(*name));
            self.layer(line.with_context(|| format!("no layer {name}"))?)
        };
        subject.layers().iter().map(find).collect()
    }

    /// An image.
    ///
    /// # Errors
    /// As [`Layers::of`].
    pub fn image(&self, subject: Subject) -> Result<Image> {
        let layers = self.of(subject)?;
        Ok(layers.iter().fold(ImageBuilder::new(), ImageBuilder::packed_layer).build())
    }

    fn layer(&self, line: &str) -> Result<PackedLayer> {
        let fields: Vec<&str> = line.split(' ').collect();
        let [name, digest, diff_id, tar_size] = fields[..] else {
            bail!("{line}: not four fields")
        };
        let path = blob(&self.folder, name);
        Ok(PackedLayer {
            digest: digest.parse()?,
            size: path.metadata().context("looking at a layer")?.len(),
            diff_id: diff_id.parse()?,
            tar_size: tar_size.parse()?,
            entries: 0,
            path,
        })
    }
}

fn blob(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.tar.gz"))
}

fn make(out: &Path, mirror: &str) -> Result<()> {
    let mut command = Command::new("bash");
    command.args(["-c", RECIPE, "layers.sh"]).arg(out).arg(mirror);
    output(&mut command).context("making the layers of the benchmarks")?;
    let mut list = String::new();
    for name in Subject::ALL.iter().flat_map(|subject| subject.layers()) {
        let mut reader = GzDecoder::new(Hashing::new(File::open(blob(out, name))?));
        let mut tar = Hashing::new(&mut reader);
        io::copy(&mut tar, &mut io::sink()).context("reading a layer")?;
        let (diff_id, tar_size) = (tar.hasher.finish(), tar.len);
        let digest = reader.into_inner().hasher.finish();
        writeln!(list, "{name} {digest} {diff_id} {tar_size}")?;
    }
    fs::write(out.join(LIST), list).context("writing down the layers")
}

/// Hashes and counts what is read.
struct Hashing<R> {
    inner: R,
    hasher: Hasher,
    len: u64,
}

impl<R> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hasher: Hasher::new(), len: 0 }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        self.len += u64::try_from(n).map_err(io::Error::other)?;
        Ok(n)
    }
}

/// The mirror that a Debian root was made from.
fn mirror_of(root: &Path) -> Result<String> {
    let sources = fs::read_to_string(root.join("etc/apt/sources.list"));
    let sources = sources.context("reading the sources of the Debian root")?;
    let mirror = sources.lines().find_map(|line| line.strip_prefix("deb ")?.split(' ').next());
    Ok(mirror.context("the Debian root has no mirror")?.to_owned())
}

//! What programs do with files, again and again.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// Files of at least this size are read as large ones.
const LARGE: u64 = 2 << 20;
/// How much is read at once by a sequential reader.
const PIECE: usize = 256 << 10;
const PAGE: usize = 4096;
const N_RANDOM: u32 = 200_000;

/// What is in a tree.
pub(crate) struct Files {
    /// Everything, by its full path.
    all: Vec<PathBuf>,
    folders: Vec<PathBuf>,
    /// Regular files below the large ones.
    small: Vec<PathBuf>,
    large: Vec<(File, u64)>,
}

impl Files {
    /// Looks through the tree in `root`.
    pub(crate) fn find(root: &Path) -> Result<Self> {
        let mut files = Self { all: vec![], folders: vec![], small: vec![], large: vec![] };
        let mut waiting = vec![root.to_owned()];
        while let Some(folder) = waiting.pop() {
            let mut entries: Vec<PathBuf> =
                fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
            entries.sort();
            for path in entries {
                let metadata = fs::symlink_metadata(&path)?;
                if metadata.is_dir() {
                    waiting.push(path.clone());
                } else if metadata.is_file() && metadata.len() >= LARGE {
                    files.large.push((File::open(&path)?, metadata.len()));
                } else if metadata.is_file() {
                    files.small.push(path.clone());
                }
                files.all.push(path);
            }
            files.folders.push(folder);
        }
        Ok(files)
    }

    /// How many entries and folders there are.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.all.len(), self.folders.len())
    }

    /// MB/s of reading large files to their ends.
    pub(crate) fn sequential(&self) -> Result<f64> {
        let mut buffer = vec![0; PIECE];
        let begin = Instant::now();
        let mut bytes = 0;
        for (file, _) in &self.large {
            let mut at = 0;
            loop {
                let n = file.read_at(&mut buffer, at)?;
                if n == 0 {
                    break;
                }
                at += u64::try_from(n)?;
            }
            bytes += at;
        }
        Ok(rate(bytes, begin) / 1e6)
    }

    /// Thousands of reads a second, of pages anywhere in large files.
    pub(crate) fn random(&self) -> Result<f64> {
        let mut buffer = [0; PAGE];
        let mut state = 1_u64;
        let begin = Instant::now();
        for _ in 0..N_RANDOM {
            // Knuth's generator: the same places in every tree.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let files = u64::try_from(self.large.len())?;
            let (file, size) = &self.large[usize::try_from((state >> 33) % files)?];
            file.read_exact_at(&mut buffer, (state >> 20) % (size / 4096) * 4096)?;
        }
        Ok(rate(N_RANDOM.into(), begin) / 1e3)
    }

    /// Thousands of calls of `stat` a second.
    pub(crate) fn stat(&self) -> Result<f64> {
        let begin = Instant::now();
        for path in &self.all {
            fs::symlink_metadata(path)?;
        }
        Ok(rate(u64::try_from(self.all.len())?, begin) / 1e3)
    }

    /// Thousands of entries a second that are read from folders.
    pub(crate) fn read_dir(&self) -> Result<f64> {
        let begin = Instant::now();
        let mut entries = 0;
        for folder in &self.folders {
            for entry in fs::read_dir(folder)? {
                entry?;
                entries += 1;
            }
        }
        Ok(rate(entries, begin) / 1e3)
    }

    /// Thousands of small files a second that are read whole.
    pub(crate) fn open(&self) -> Result<f64> {
        let mut content = Vec::with_capacity(PIECE);
        let begin = Instant::now();
        for path in &self.small {
            content.clear();
            File::open(path)?.read_to_end(&mut content)?;
        }
        Ok(rate(u64::try_from(self.small.len())?, begin) / 1e3)
    }
}

/// Has Python import the modules that the image names; seconds by the clock, and of processor time.
pub(crate) fn import(root: &Path) -> Result<[f64; 2]> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-euc", ENTER, "enter"]);
    command.arg(root).arg(IMPORT).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("PYTHONHASHSEED", "0").env("OPENBLAS_NUM_THREADS", "1").env("HOME", "/tmp");
    let begin = Instant::now();
    let child = command.stdin(Stdio::null()).spawn().context("running Python")?;
    let usage = sys::usage::wait(child).context("waiting for Python")?;
    ensure!(usage.status.success(), "Python in {}: {}", root.display(), usage.status);
    Ok([begin.elapsed().as_secs_f64(), usage.cpu.as_secs_f64()])
}

/// Some of the modules want a folder that they can write to.
const ENTER: &str =
    r#"mount -t tmpfs tmpfs "$1/tmp"; exec chroot "$1" /usr/bin/python3 -B -W ignore -c "$2""#;

/// What it takes to end in order is none of the file system's business.
const IMPORT: &str = "
import importlib, os
for name in open('/bench/modules'):
    importlib.import_module(name.strip())
os._exit(0)
";

#[expect(clippy::cast_precision_loss, reason = "no count here reaches 2^53")]
fn rate(count: u64, begin: Instant) -> f64 {
    count as f64 / begin.elapsed().as_secs_f64()
}

//! What the daemon says of itself and its mounts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use fill::Layer;
use mounts::{Backend, MountState, Mounted};
use oci::Digest;
use serde::{Deserialize, Serialize};

use super::Daemon;
use super::images::LoadedImage;
use super::room::Shortage;

/// The daemon and its mounts.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StatusReport {
    pub(crate) root: PathBuf,
    pub(crate) daemon: ProcessReport,
    pub(crate) keeper: ProcessReport,
    pub(crate) mounts: Vec<MountReport>,
    pub(crate) cache_bytes: u64,
    /// Disk space that the cache may take.
    pub(crate) quota: Option<u64>,
    /// What is wrong with the room, if anything is.
    pub(crate) room: Option<String>,
    pub(crate) bytes_fetched: u64,
    pub(crate) requests: u64,
    pub(crate) blocked_reads: u64,
    pub(crate) failed_spans: u64,
}

/// A process, if it lives.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ProcessReport {
    pub(crate) pid: Option<u32>,
}

/// One mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MountReport {
    pub(crate) image: String,
    pub(crate) digest: Digest,
    pub(crate) dir: PathBuf,
    pub(crate) backend: Backend,
    /// `served`, `lost` or `detached`.
    pub(crate) state: String,
    /// Uncompressed bytes of all layers.
    pub(crate) bytes_total: u64,
    pub(crate) bytes_present: u64,
    /// Compressed bytes that came from the registry since the daemon started.
    pub(crate) bytes_fetched: u64,
    pub(crate) sealed: bool,
    pub(crate) waiting_reads: u64,
    /// How long the longest of them has waited.
    pub(crate) waiting_seconds: f64,
    /// What they wait for.
    pub(crate) waiting_files: Vec<String>,
    /// What whoever asked for the mount should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) warnings: Vec<String>,
}

/// Why an image is lazy or not.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExplainReport {
    pub(crate) mount: MountReport,
    /// Where the index came from.
    pub(crate) index: String,
    pub(crate) layers: Vec<LayerReport>,
    /// What is wrong with the room, if anything is.
    pub(crate) room: Option<String>,
    pub(crate) slowest_reads: Vec<SlowReport>,
    /// Why better back ends are not used.
    pub(crate) unavailable: Vec<(Backend, String)>,
}

/// One layer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LayerReport {
    pub(crate) digest: Digest,
    pub(crate) bytes_total: u64,
    pub(crate) bytes_present: u64,
    pub(crate) sealed: bool,
    /// Whether it can only be read from its beginning.
    pub(crate) in_order: bool,
    /// Why its index is not believed any more.
    pub(crate) revoked: Option<String>,
    /// Why it is not completed, if it is not.
    pub(crate) left_out: Option<Shortage>,
}

/// A read that waited.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SlowReport {
    pub(crate) seconds: f64,
    pub(crate) file: String,
    pub(crate) pid: i32,
}

/// What is known of a mount; without an image if that could not be loaded.
pub(super) fn of_mount(mounted: &Mounted, image: Option<&LoadedImage>) -> MountReport {
    let record = &mounted.record;
    let layers = image.map_or(&[][..], |image| image.layers.as_slice());
    let waiting: Vec<_> = layers.iter().map(|layer| layer.waiting()).collect();
    let longest = waiting.iter().filter_map(|(_, since)| *since).min();
    MountReport {
        image: image.map_or_else(String::new, |image| image.record.name.clone()),
        digest: record.manifest,
        dir: record.dir.clone(),
        backend: record.backend,
        state: match mounted.state {
            MountState::Served => "served",
            MountState::Lost => "lost",
            MountState::Detached => "detached",
            MountState::Gone => "gone",
        }
        .to_owned(),
        bytes_total: image.map_or(0, LoadedImage::bytes_total),
        bytes_present: image.map_or(0, LoadedImage::bytes_present),
        bytes_fetched: layers.iter().map(|layer| layer.bytes_fetched()).sum(),
        sealed: image.is_some_and(LoadedImage::is_sealed),
        waiting_reads: waiting.iter().map(|(count, _)| *count as u64).sum(),
        waiting_seconds: longest.map_or(0.0, |since| since.elapsed().as_secs_f64()),
        waiting_files: image.map_or_else(Vec::new, waiting_files),
        warnings: Vec::new(),
    }
}

fn waiting_files(image: &LoadedImage) -> Vec<String> {
    let mut files = Vec::new();
    for layer in &image.layers {
        for range in layer.waiting_ranges() {
            files.push(file_at(image, layer, range.start));
        }
    }
    files.sort();
    files.dedup();
    files.truncate(FILES_SHOWN);
    files
}

/// The file of the image that the byte of a layer belongs to.
fn file_at(image: &LoadedImage, layer: &Arc<Layer>, offset: u64) -> String {
    let number = image.layers.iter().position(|other| Arc::ptr_eq(other, layer));
    let number = number.and_then(|number| u32::try_from(number).ok());
    let node = number.and_then(|number| image.tree.file_at(number, offset));
    match node {
        Some(node) => format!(
            "/{}",
            String::from_utf8_lossy(&image.tree.path_of(node)).trim_start_matches('/')
        ),
        None => format!("byte {offset} of layer {}", layer.digest()),
    }
}

impl Daemon {
    pub(super) fn status(&self) -> StatusReport {
        self.reap();
        let images = self.images.lock();
        let mounts = self.front_ends.list();
        let mounts = mounts.iter().map(|mounted| {
            of_mount(mounted, images.get(&mounted.record.manifest).map(AsRef::as_ref))
        });
        let figures = self.engine.figures();
        let (cache_bytes, quota) = (self.store.usage().unwrap_or_default(), self.store.quota());
        if quota.is_some_and(|quota| cache_bytes > quota) {
            self.pressure.notify_one();
        }
        StatusReport {
            root: self.root.clone(),
            daemon: ProcessReport { pid: Some(std::process::id()) },
            keeper: ProcessReport { pid: self.keeper.lock().pid().ok() },
            mounts: mounts.collect(),
            cache_bytes,
            quota,
            room: self.room_trouble(),
            bytes_fetched: figures.bytes_fetched,
            requests: figures.requests,
            blocked_reads: figures.blocked_reads,
            failed_spans: figures.failed_spans,
        }
    }

    pub(super) fn explain(&self, what: &str) -> Result<ExplainReport> {
        let mounts = self.front_ends.list();
        let images = self.images.lock();
        let dir = std::fs::canonicalize(what).ok();
        let named = what.parse::<artifacts::ImageName>().map(|name| name.to_string()).ok();
        for mounted in &mounts {
            let Some(image) = images.get(&mounted.record.manifest) else { continue };
            let by_name = named.as_deref() == Some(image.record.name.as_str());
            if dir.as_deref() == Some(mounted.record.dir.as_path()) || by_name {
                return Ok(self.explain_mount(mounted, image));
            }
        }
        bail!("{what} is not mounted here; `hermes status` lists what is")
    }

    fn explain_mount(&self, mounted: &Mounted, image: &LoadedImage) -> ExplainReport {
        let layers = image.layers.iter().map(|layer| LayerReport {
            digest: *layer.digest(),
            bytes_total: layer.bytes(),
            bytes_present: layer.bytes_present(),
            sealed: layer.is_sealed(),
            in_order: layer.is_in_order(),
            revoked: layer.revoked(),
            left_out: self.left_out(layer),
        });
        let slowest = self.engine.slowest_reads();
        let slowest = slowest.iter().filter_map(|read| {
            let layer = image.layers.iter().find(|layer| *layer.digest() == read.layer)?;
            let file = file_at(image, layer, read.range.start);
            Some(SlowReport { seconds: seconds(read.waited), file, pid: read.pid })
        });
        let probe = self.front_ends.probe();
        let why_not = |backend: Backend| Some((backend, probe.why_not(backend)?.to_owned()));
        ExplainReport {
            mount: of_mount(mounted, Some(image)),
            index: image.record.index.clone(),
            layers: layers.collect(),
            room: self.room_trouble(),
            slowest_reads: slowest.take(FILES_SHOWN).collect(),
            unavailable: Backend::ALL.into_iter().filter_map(why_not).collect(),
        }
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

const FILES_SHOWN: usize = 10;

//! What the daemon says of itself and its mounts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Result, bail};
use artifacts::ImageName;
use fill::Layer;
use mounts::{Backend, MountState, Mounted};
use oci::{Digest, Platform};
use policy::{Mode, Reason, Selected};
use serde::{Deserialize, Serialize};

use super::Daemon;
use super::decisions::DecisionReport;
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
    /// Policies that are in force; `None` if containerd is not served.
    pub(crate) policies: Option<usize>,
    /// Why some of the policies' folder is not in force.
    pub(crate) policy_trouble: Vec<String>,
    /// The back ends that do not work here, and why.
    #[serde(default)]
    pub(crate) unavailable: Vec<(Backend, String)>,
    /// Whether the kubelet asks here for images, and there is nobody to hand that on to.
    #[serde(default)]
    pub(crate) kubelet_asks: bool,
    /// How often each reason has decided of an image that containerd pulled, since the daemon started.
    pub(crate) decisions: BTreeMap<Reason, u64>,
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
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct ExplainReport {
    /// What containerd was told when the image was pulled.
    pub(crate) decision: Option<DecisionReport>,
    /// If it is mounted; otherwise what follows is empty.
    pub(crate) mount: Option<MountReport>,
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
pub(super) fn file_at(image: &LoadedImage, layer: &Arc<Layer>, offset: u64) -> String {
    let number = image.layers.iter().position(|other| Arc::ptr_eq(other, layer));
    let number = number.and_then(|number| u32::try_from(number).ok());
    let found = number.zip(image.tree.get().ok());
    let path = found.and_then(|(number, tree)| Some(tree.path_of(tree.file_at(number, offset)?)));
    match path {
        Some(path) => format!("/{}", String::from_utf8_lossy(&path).trim_start_matches('/')),
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
            policies: self.policies.get().map(|policies| policies.current().len()),
            policy_trouble: self.policies.get().map_or_else(Vec::new, |all| all.trouble()),
            unavailable: self.unavailable(),
            kubelet_asks: self.kubelet_asks.load(Ordering::Relaxed),
            decisions: self.decisions.lock().counts().clone(),
            bytes_fetched: figures.bytes_fetched,
            requests: figures.requests,
            blocked_reads: figures.blocked_reads,
            failed_spans: figures.failed_spans,
        }
    }

    pub(super) fn explain(&self, what: &str) -> Result<ExplainReport> {
        let named = what.parse::<ImageName>().ok();
        let name = named.as_ref().map(ImageName::to_string);
        let decision = name.and_then(|name| self.decisions.lock().of(&name).cloned());
        let dir = match std::fs::canonicalize(what) {
            Ok(dir) => Some(dir),
            Err(_not_one) => self.dir_of_container(what)?,
        };
        let manifest = decision.as_ref().and_then(|decision| decision.manifest.parse().ok());
        let mounts = self.front_ends.list();
        let images = self.images.lock();
        for mounted in &mounts {
            let Some(image) = images.get(&mounted.record.manifest) else { continue };
            let by_name = named.as_ref().is_some_and(|name| name.to_string() == image.record.name);
            let by_dir = dir.as_deref() == Some(mounted.record.dir.as_path());
            if by_dir || by_name || manifest == Some(mounted.record.manifest) {
                return Ok(self.explain_mount(mounted, image));
            }
        }
        if decision.is_some() {
            return Ok(ExplainReport { decision, ..ExplainReport::default() });
        }
        bail!(
            "{what} is neither mounted here nor was it pulled since the daemon started; `hermes status` lists what is mounted{}",
            self.forecast(named)
        )
    }

    /// What would be decided of an image, as the end of a sentence.
    fn forecast(&self, image: Option<ImageName>) -> String {
        let (Some(ImageName::Registry(image)), Some(policies)) = (image, self.policies.get())
        else {
            return String::new();
        };
        match policies.current().select(&image, &Platform::host()) {
            Ok(Selected { policy, mode: Mode::Lazy, .. }) => {
                format!("; policy `{policy}` makes it lazy if it has an index")
            }
            Ok(Selected { policy, mode: Mode::Eager, .. }) => {
                format!("; policy `{policy}` wants it eager")
            }
            Err((reason, Some(policy))) => {
                format!("; it would not be lazy: {}, says policy `{policy}`", reason.name())
            }
            Err((reason, None)) => format!("; it would not be lazy: {}", reason.name()),
        }
    }

    /// The folder of the image that a container of containerd runs on, by its id or the first 12 digits or
    /// more of it.
    fn dir_of_container(&self, id: &str) -> Result<Option<PathBuf>> {
        let is_id = |name: &str| name == id || (id.len() >= SHORT_ID && name.starts_with(id));
        for mount in sys::mount::mountinfo()? {
            let mut parts = mount.point.iter().rev().map(|part| part.to_string_lossy());
            let is_its_root = parts.next().is_some_and(|name| name == "rootfs")
                && parts.next().is_some_and(|name| is_id(&name));
            if !is_its_root {
                continue;
            }
            let mut options = mount.super_options.split(',');
            // What is below may be named as it was while containerd showed it to a user namespace.
            let upper = options.find_map(|option| option.strip_prefix("upperdir="));
            let snapshots = self.snapshots.get().and_then(Weak::upgrade);
            let (Some(upper), Some(snapshots)) = (upper, snapshots) else { return Ok(None) };
            return Ok(snapshots.image_below(Path::new(upper))?);
        }
        Ok(None)
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
        ExplainReport {
            decision: self.decisions.lock().of(&image.record.name).cloned(),
            mount: Some(of_mount(mounted, Some(image))),
            index: image.record.index.clone(),
            layers: layers.collect(),
            room: self.room_trouble(),
            slowest_reads: slowest.take(FILES_SHOWN).collect(),
            unavailable: self.unavailable(),
        }
    }

    /// The back ends that do not work here, and why.
    fn unavailable(&self) -> Vec<(Backend, String)> {
        let probe = self.front_ends.probe();
        let why_not = |backend: Backend| Some((backend, probe.why_not(backend)?.to_owned()));
        Backend::ALL.into_iter().filter_map(why_not).collect()
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// Shorter ones may be names of images.
const SHORT_ID: usize = 12;

const FILES_SHOWN: usize = 10;

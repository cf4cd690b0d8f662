//! containerd's lazy images: which they are, and how their layers are mounted.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use artifacts::{FoundManifest, ImageName, IndexOutcome, Origin, OriginError};
use futures_util::FutureExt;
use oci::{Descriptor, Digest, Platform, Reference};
use opentelemetry::trace::FutureExt as _;
use parking_lot::Mutex;
use policy::{Behaviour, Mode, Reason, Selected};
use registry::FetchError;
use snapshotter::{LazyError, LazyImages, LazyLayer, WantedLayer};
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::decisions::DecisionReport;
use super::images::{ImageRecord, LoadedImage};
use super::{BeingMounted, Daemon, Looked, Scope, Wanted};
use crate::config::{Config, Eager};
use crate::failure::{Exit, exit_of, in_full};
use crate::policies::Policies;
use crate::protocol::{Access, MountRequest, MountTuning};

/// The lazy images of containerd.
pub(super) struct ContainerdImages {
    daemon: Arc<Daemon>,
    runtime: Handle,
    access: Access,
    /// How long a pull waits for the registry to say whether there is an index.
    patience: Duration,
    /// What becomes of selected images that are not lazy.
    eager: Eager,
    policies: Arc<Policies>,
    platform: Platform,
    /// What was found of an image, by its manifest.
    findings: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<Option<Finding>>>>>,
    /// Images that containerd was told are lazy, until they are mounted.
    ahead: Mutex<Vec<Ahead>>,
    /// What gets them ready.
    tasks: Mutex<JoinSet<()>>,
    /// One mount on a folder at a time.
    mounting: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
}

/// Whether an image can be lazy.
#[derive(Debug, Clone)]
struct Finding {
    image: Result<Arc<Found>, Doubt>,
    /// When it was found out: what was in the way may have gone.
    at: Instant,
}

/// An image that can be lazy.
#[derive(Debug)]
struct Found {
    layers: Vec<Digest>,
    diff_ids: Vec<Digest>,
    /// Where its index came from.
    index: String,
    /// Why it is lazy.
    reason: Reason,
}

/// Why containerd has to fetch an image.
#[derive(Debug, Clone)]
struct Doubt {
    reason: Reason,
    detail: String,
}

/// An image at which one has looked.
#[derive(Debug)]
struct Sighted {
    origin: Origin,
    found: FoundManifest,
    looked: Looked,
    kept: Arc<BeingMounted>,
}

/// An image that is got ready before it is mounted.
#[derive(Debug)]
struct Ahead {
    since: Instant,
    image: Arc<BeingMounted>,
}

impl fmt::Debug for ContainerdImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContainerdImages").field("policies", &self.policies).finish_non_exhaustive()
    }
}

impl ContainerdImages {
    pub(super) fn new(
        (daemon, runtime): (Arc<Daemon>, Handle),
        config: &Config,
        policies: Arc<Policies>,
    ) -> Self {
        Self {
            daemon,
            runtime,
            access: config.access(),
            patience: config.index_patience(),
            eager: config.containerd.eager,
            policies,
            platform: Platform::host(),
            findings: Mutex::default(),
            ahead: Mutex::default(),
            tasks: Mutex::default(),
            mounting: Mutex::default(),
        }
    }

    /// What a layer is, if its image is lazy, and the image.
    fn decide(
        &self,
        reference: &Reference,
        wanted: &WantedLayer<'_>,
        selected: &Selected<'_>,
    ) -> Result<(LazyLayer, Arc<Found>), Doubt> {
        if selected.mode == Mode::Eager && self.eager == Eager::Unpack {
            return Err(Doubt::new(Reason::Eager, String::new()));
        }
        let elsewhere = |detail: &str| Doubt::new(Reason::OtherLayer, detail.to_owned());
        let manifest: Digest = wanted.manifest.parse().map_err(|err| Doubt {
            reason: Reason::Unsupported,
            detail: format!("its manifest is `{}`: {err}", wanted.manifest.escape_debug()),
        })?;
        let name = ImageName::Registry(reference.with_digest(manifest));
        let image = self.runtime.block_on(self.find_image(&name, manifest, selected))?;
        let below = usize::try_from(wanted.below).unwrap_or(usize::MAX);
        let layer = image.layers.get(below).ok_or_else(|| elsewhere("it has fewer layers"))?;
        let diff_ids = image.diff_ids.get(..=below).unwrap_or_default();
        if layer.to_string() != wanted.layer {
            return Err(elsewhere(&format!("{} does not stand on {below} others", wanted.layer)));
        }
        if chain_id(diff_ids).is_none_or(|chain| chain.to_string() != wanted.chain) {
            return Err(elsewhere(&format!("{} comes to another chain id", wanted.layer)));
        }
        let layer = LazyLayer {
            image: name.to_string(),
            pulled_as: reference.to_string(),
            layer: wanted.layer.to_owned(),
            chain: wanted.chain.to_owned(),
            layers: wanted.below + 1,
            is_whole: below + 1 == image.layers.len(),
        };
        Ok((layer, image))
    }

    /// The image with this manifest, if it can be lazy. The first to ask waits for the registry, the others
    /// for him.
    async fn find_image(
        &self,
        name: &ImageName,
        manifest: Digest,
        selected: &Selected<'_>,
    ) -> Result<Arc<Found>, Doubt> {
        let finding = {
            let mut findings = self.findings.lock();
            findings.retain(|_, finding| {
                finding
                    .try_lock()
                    .map_or(true, |finding| finding.as_ref().is_some_and(Finding::holds))
            });
            Arc::clone(findings.entry(manifest).or_default())
        };
        let mut finding = finding.lock().await;
        if let Some(finding) = finding.as_ref().filter(|finding| finding.holds()) {
            return finding.image.clone();
        }
        let image = self.find_out(name, selected).await.map(Arc::new);
        if image.is_err() {
            // Layers may have been begun.
            self.daemon.reap();
        }
        *finding = Some(Finding { image: image.clone(), at: Instant::now() });
        image
    }

    /// Whether an image can be lazy; if so, it is got ready from now on.
    async fn find_out(&self, name: &ImageName, selected: &Selected<'_>) -> Result<Found, Doubt> {
        let looked = tokio::time::timeout(self.patience, self.look(name, selected)).await;
        let late = |_late| {
            let detail = format!("asking for its index took more than {:?}", self.patience);
            Err(Doubt::new(Reason::RegistrySlow, detail))
        };
        let ahead = looked.unwrap_or_else(late)?;
        let looked = &ahead.looked;
        let reason = match &looked.indexes.outcome {
            _ if selected.mode == Mode::Eager => Reason::Eager,
            _ if looked.indexes.layers.iter().any(Option::is_some) => Reason::Indexed,
            IndexOutcome::Absent => Reason::NoIndex,
            IndexOutcome::Stored | IndexOutcome::Remote => Reason::BadIndex,
            IndexOutcome::Failed(err) => reason_of(err),
        };
        let layers = looked.image.layers.iter().map(|layer| layer.digest).collect();
        let diff_ids = looked.image.config.rootfs.diff_ids.clone();
        let index = looked.indexes.reason.clone();
        match (reason, self.eager) {
            (Reason::Indexed, _) => {
                let name = name.to_string();
                let tell = move |prepared| {
                    if let Err(err) = prepared {
                        let error = in_full(&err);
                        tracing::warn!(
                            image = name,
                            error,
                            "the image could not be got ready before it is mounted"
                        );
                    }
                };
                let prepare = self.prepare_ahead(ahead, selected.behaviour).map(tell);
                let mut tasks = self.tasks.lock();
                while tasks.try_join_next().is_some() {}
                tasks.spawn_on(prepare, &self.runtime);
                Ok(Found { layers, diff_ids, index, reason })
            }
            (Reason::NoIndex | Reason::BadIndex | Reason::Eager, Eager::Stream) => {
                let index = self.stream(ahead, selected.behaviour).await?;
                Ok(Found { layers, diff_ids, index, reason: Reason::Streamed })
            }
            _ => Err(Doubt::new(reason, index)),
        }
    }

    /// Finds an image and its indexes; those of one that is to be fetched whole only on this machine. What
    /// there is, is in the store then.
    async fn look(&self, name: &ImageName, selected: &Selected<'_>) -> Result<Sighted, Doubt> {
        let origin = Origin::open(name, &self.daemon.client(&self.access));
        let origin = origin.map_err(|err| Doubt::of(&err.into()))?;
        let resolved = self.daemon.resolve(&origin, &self.platform).await;
        let found = resolved.map_err(|err| Doubt::of(&err))?.found;
        let kept = self.daemon.keep(&found);
        let scope = match selected.mode {
            Mode::Lazy => Scope::Everywhere,
            Mode::Eager => Scope::Stored,
        };
        let how = self.wanted(selected.behaviour);
        let looked = self.daemon.look(&origin, (&found, &self.platform), scope, how).await;
        let looked = looked.map_err(|err| Doubt::of(&err))?;
        Ok(Sighted { origin, found, looked, kept })
    }

    /// How containerd wants an image, of which it says too late what it runs.
    fn wanted(&self, behaviour: Behaviour) -> Wanted<'_> {
        Wanted { access: &self.access, tuning: tuning_of(behaviour), command: &[] }
    }

    /// Fetches a whole image while containerd waits. Returns what there was of an index.
    async fn stream(&self, ahead: Sighted, behaviour: Behaviour) -> Result<String, Doubt> {
        let (begin, image) = (Instant::now(), ahead.origin.name().to_string());
        let bytes = ahead.looked.image.bytes();
        tracing::info!(image, bytes, "the image is fetched whole");
        let loaded = self.prepare_ahead(ahead, behaviour).await.map_err(|err| Doubt::of(&err))?;
        tracing::info!(image, bytes, took = ?begin.elapsed(), "the image was fetched whole");
        Ok(loaded.record.index.clone())
    }

    /// Gets an image ready that is about to be mounted, with what was just found of it.
    fn prepare_ahead(
        &self,
        Sighted { origin, found, looked, kept }: Sighted,
        behaviour: Behaviour,
    ) -> impl Future<Output = Result<Arc<LoadedImage>>> + Send + 'static {
        let mut ahead = self.ahead.lock();
        ahead.retain(|image| image.since.elapsed() < KEPT_AHEAD);
        ahead.push(Ahead { since: Instant::now(), image: kept });
        let (daemon, access) = (Arc::clone(&self.daemon), self.access.clone());
        let platform = self.platform.clone();
        let tuning = tuning_of(behaviour);
        let prepare = async move {
            let how = Wanted { access: &access, tuning, command: &[] };
            let prepared = daemon.prepare(&origin, (found, &platform), how, Some(looked), QUIETLY);
            let image = Box::pin(prepared).await?;
            daemon.prefetch_program(&image, how);
            Ok(image)
        };
        prepare.with_current_context()
    }

    fn mount_image(&self, layer: &LazyLayer, dir: &Path) -> Result<()> {
        if self.is_mounted(dir) {
            return Ok(());
        }
        let policies = self.policies.current();
        let selected = layer.pulled_as.parse::<Reference>().ok();
        let selected = selected.and_then(|image| policies.select(&image, &self.platform).ok());
        let behaviour = selected.map_or_else(Behaviour::default, |selected| selected.behaviour);
        let request = MountRequest {
            image: layer.image.clone(),
            dir: dir.to_owned(),
            backend: super::backend(behaviour.backend),
            platform: None,
            access: self.access.clone(),
            tuning: tuning_of(behaviour),
            command: Vec::new(),
        };
        let part = (!layer.is_whole).then_some(layer);
        self.runtime.block_on(self.daemon.mount_for_containerd(&request, part))?;
        let manifest = request.image.parse::<ImageName>()?.digest();
        self.ahead.lock().retain(|ahead| Some(ahead.image.manifest) != manifest);
        Ok(())
    }
}

impl LazyImages for ContainerdImages {
    fn find(&self, wanted: &WantedLayer<'_>) -> Option<LazyLayer> {
        let ImageName::Registry(reference) = wanted.image.parse().ok()? else { return None };
        let pull = self.daemon.traces.pull(wanted.image, wanted.manifest);
        let policies = self.policies.current();
        let selected = policies.select(&reference, &self.platform);
        let policy = selected.as_ref().map_or_else(|(_, policy)| *policy, |it| Some(it.policy));
        let decided = match &selected {
            Ok(selected) => self.decide(&reference, wanted, selected),
            Err((reason, _)) => Err(Doubt::new(*reason, String::new())),
        };
        let (reason, detail) = match &decided {
            Ok((_, image)) => (image.reason, image.index.clone()),
            Err(Doubt { reason, detail }) => (*reason, detail.clone()),
        };
        let decision = DecisionReport {
            policy: policy.map(str::to_owned),
            ..DecisionReport::new(&reference.to_string(), wanted.manifest, reason, detail)
        };
        if let Some(pull) = pull {
            pull.decided(&decision);
        }
        self.daemon.decisions.lock().add(decision);
        decided.ok().map(|(layer, _)| layer)
    }

    fn is_mounted(&self, dir: &Path) -> bool {
        self.daemon.front_ends.serves(dir)
    }

    fn mount(&self, layer: &LazyLayer, dir: &Path) -> Result<(), LazyError> {
        let turn = Arc::clone(self.mounting.lock().entry(dir.to_owned()).or_default());
        let _turn = turn.lock();
        Ok(self.mount_image(layer, dir)?)
    }

    fn disk_usage(&self, layer: &LazyLayer) -> u64 {
        let stored =
            layer.layer.parse().ok().and_then(|digest| self.daemon.store.stored(&digest).ok());
        stored.flatten().and_then(|layer| layer.allocated().ok()).unwrap_or_default()
    }

    fn forget(&self, layer: &LazyLayer) {
        if let Ok(digest) = layer.layer.parse() {
            self.daemon.unwanted.lock().insert(digest);
            self.daemon.pressure.notify_one();
        }
    }

    fn unmount(&self, dir: &Path) -> Result<(), LazyError> {
        self.mounting.lock().remove(dir);
        if self.daemon.front_ends.list().iter().any(|mount| mount.record.dir == dir) {
            self.daemon.umount(dir, false)?;
        }
        Ok(())
    }
}

impl Finding {
    /// Whether it need not be found out again.
    fn holds(&self) -> bool {
        let most = if self.image.is_ok() { KEPT_AHEAD } else { ASK_AGAIN };
        self.at.elapsed() < most
    }
}

impl Doubt {
    const fn new(reason: Reason, detail: String) -> Self {
        Self { reason, detail }
    }

    fn of(err: &anyhow::Error) -> Self {
        let origin = err.chain().find_map(|cause| cause.downcast_ref::<OriginError>());
        let reason = match (origin, exit_of(err)) {
            (Some(origin), _) => reason_of(origin),
            (None, Exit::Corrupt) => Reason::BadIndex,
            (None, _) => Reason::Local,
        };
        Self::new(reason, in_full(err))
    }
}

/// What it means for an image that this is in the way.
fn reason_of(err: &OriginError) -> Reason {
    match err {
        OriginError::Registry { source: FetchError::Unauthorized { .. }, .. } => {
            Reason::Unauthorized
        }
        OriginError::Registry { source: FetchError::WrongDigest { .. }, .. }
        | OriginError::WrongDigest { .. } => Reason::BadIndex,
        OriginError::Registry { .. } => Reason::RegistryUnavailable,
        OriginError::Local { .. } => Reason::Local,
        OriginError::NotAnImage { .. } | OriginError::WrongPlatform { .. } => Reason::Unsupported,
    }
}

const fn tuning_of(behaviour: Behaviour) -> MountTuning {
    let Behaviour { completion, deadline, cache_class, backend: _ } = behaviour;
    MountTuning { completion, deadline, cache_class }
}

impl Daemon {
    /// Mounts an image for containerd: all of it, or the layers up to `part`.
    async fn mount_for_containerd(
        &self,
        request: &MountRequest,
        part: Option<&LazyLayer>,
    ) -> Result<()> {
        let Some(part) = part else { return self.mount(request, QUIETLY).await.map(drop) };
        let mount = self.mount_part(request, part);
        let mounted = Box::pin(self.traces.mount(&request.image, mount)).await;
        // Layers may have been begun.
        mounted.inspect_err(|_failed| self.reap())
    }

    async fn mount_part(&self, request: &MountRequest, part: &LazyLayer) -> Result<()> {
        let name = request.image.parse()?;
        let origin = Origin::open(&name, &self.client(&request.access))?;
        let platform = Platform::host();
        let found = self.resolve(&origin, &platform).await?.found;
        let _kept = self.keep(&found);
        let how = Wanted::from(request);
        let prepared = self.prepare(&origin, (found, &platform), how, None, QUIETLY);
        let whole = Box::pin(prepared).await?;
        let loaded = self.load_part(&origin, &whole.record, part)?;
        let to_mount = loaded.to_mount(&self.root);
        let record = self.front_ends.mount(&to_mount, &request.dir, request.backend)?;
        self.traces.mounted(&loaded, record.backend);
        self.make_room_for(&loaded);
        self.complete(&loaded);
        Ok(())
    }

    /// The lower layers of an image, as an image of their own, whose manifest nobody but us has.
    fn load_part(
        &self,
        origin: &Origin,
        whole: &ImageRecord,
        part: &LazyLayer,
    ) -> Result<Arc<LoadedImage>> {
        let chain: Digest = part.chain.parse().context("reading a chain id")?;
        if let Some(known) = self.images.lock().get(&chain) {
            return Ok(Arc::clone(known));
        }
        let count = usize::try_from(part.layers)?;
        let mut record = whole.clone();
        record.manifest.layers.truncate(count);
        record.config.rootfs.diff_ids.truncate(count);
        record.descriptor = Descriptor::new(&record.descriptor.media_type, chain, 0);
        ensure!(chain_id(&record.config.rootfs.diff_ids) == Some(chain), "the image has changed");
        record.save(&self.root).context("writing down the image")?;
        let image = record.image()?;
        let indexes = super::indexes_of(&image, |layer| self.indexes.load(layer))?;
        self.assemble(record, &image, origin, (indexes, Vec::new()), false)
    }
}

/// What the layers up to the last of these come to, as containerd names it.
fn chain_id(diff_ids: &[Digest]) -> Option<Digest> {
    let (first, rest) = diff_ids.split_first()?;
    Some(rest.iter().fold(*first, |chain, next| Digest::of(format!("{chain} {next}").as_bytes())))
}

/// Nobody watches.
const QUIETLY: super::Progress<'static> = &|_, _, _| {};

/// For so long an image stays what it was found to be, if that is not lazy.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// For so long an image is lazy without another look, and keeps its place if it is not mounted after all.
const KEPT_AHEAD: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_id_is_what_the_image_specification_says() {
        let [a, b, c] = ["a", "b", "c"].map(|text| Digest::of(text.as_bytes()));
        assert_eq!(chain_id(&[a]), Some(a));
        let two = Digest::of(format!("{a} {b}").as_bytes());
        assert_eq!(chain_id(&[a, b]), Some(two));
        assert_eq!(chain_id(&[a, b, c]), Some(Digest::of(format!("{two} {c}").as_bytes())));
        assert_eq!(chain_id(&[]), None);
    }
}

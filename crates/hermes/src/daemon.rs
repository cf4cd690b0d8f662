//! The process behind the mounts of one root folder.

mod cache_requests;
mod credentials;
mod decisions;
mod follow;
mod images;
mod lazy;
mod metrics;
mod names;
mod page_cache;
mod receive;
mod report;
mod room;
mod server;
mod service;
mod source;
mod start;
mod traces;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use artifacts::{
    FoundIndexes, FoundManifest, Image, ImageLayer, IndexStore, Origin, StoreIndexError,
    StoredIndex, StoredWindows, find_indexes, stored_indexes,
};
use cache::OpenLayerError;
use fill::{Durations, Engine, EngineOptions, Layer, LayerSpec, Order, Source};
use mounts::{Backend, FrontEnds, MountState, Record};
use oci::{Digest, ImageConfig, Platform};
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use policy::{BackendChoice, Completion};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use self::credentials::NodeCredentials;
use self::decisions::Decisions;
use self::images::{ImageRecord, LoadedImage, Start, shape_of};
use self::receive::Receiving;
use self::room::RoomState;
use self::source::Blob;
use self::traces::Traces;
use crate::args::{DaemonTuning, Rule};
use crate::at_once::at_once;
use crate::failure::in_full;
use crate::index_commands::tree_of;
use crate::policies::Policies;
use crate::program_files::{Asked, Command, Reach};
use crate::protocol::{Access, MountRequest, MountTuning};

pub(crate) use self::decisions::DecisionReport;
pub(crate) use self::report::{ExplainReport, MountReport, ProcessReport, StatusReport};
pub(crate) use self::room::Shortage;
pub(crate) use self::start::run;

/// Everything that serves the mounts of a root folder.
struct Daemon {
    root: PathBuf,
    engine: Engine,
    store: Arc<cache::Store>,
    indexes: IndexStore,
    front_ends: FrontEnds,
    keeper: Mutex<Arc<keeper::Client>>,
    clients: Mutex<HashMap<Access, registry::Client>>,
    /// For clients whose access says so.
    credentials: Arc<NodeCredentials>,
    layers: Mutex<HashMap<Digest, Arc<Layer>>>,
    images: Mutex<HashMap<Digest, Arc<LoadedImage>>>,
    being_mounted: Mutex<Vec<Weak<BeingMounted>>>,
    room: Mutex<RoomState>,
    /// Layers of images that containerd has removed: they are not kept unless something else uses them.
    unwanted: Mutex<HashSet<Digest>>,
    /// Rung when there may be too little room.
    pressure: Arc<Notify>,
    /// How long spans stay that were used, if others can go.
    grace: Duration,
    /// What is not fetched before it is read.
    without: Vec<Rule>,
    /// What containerd was told of its images.
    decisions: Mutex<Decisions>,
    /// Which of them are lazy; unset if containerd is not served.
    policies: OnceLock<Arc<Policies>>,
    /// Whether the kubelet has asked for images although nobody has said where containerd is.
    kubelet_asks: Arc<AtomicBool>,
    /// containerd's, if it is served. They know this daemon.
    snapshots: OnceLock<Weak<snapshotter::Snapshots>>,
    /// How long mounts took.
    mount_times: Mutex<Durations>,
    page_cache: page_cache::Fills,
    /// Indexes that were found to lie.
    revoked: Arc<AtomicU64>,
    traces: Arc<Traces>,
    /// One image is made ready at a time, so that two mounts of it share it.
    preparing: tokio::sync::Mutex<()>,
    receiving: Receiving,
}

/// An image that no mount uses yet.
#[derive(Debug)]
struct BeingMounted {
    manifest: Digest,
    layers: Vec<Digest>,
}

/// What an image is, and what there is of its indexes.
#[derive(Debug)]
struct Looked {
    image: Image,
    indexes: FoundIndexes,
}

/// How an image is wanted.
#[derive(Debug, Clone, Copy)]
struct Wanted<'a> {
    access: &'a Access,
    tuning: MountTuning,
    /// What will be run; empty for the image's own.
    command: &'a [String],
}

impl<'a> From<&'a MountRequest> for Wanted<'a> {
    fn from(request: &'a MountRequest) -> Self {
        Self { access: &request.access, tuning: request.tuning, command: &request.command }
    }
}

impl Wanted<'_> {
    /// What will be run of an image, and whether that is its own command.
    fn runs(&self, config: &ImageConfig) -> (Command, bool) {
        let own = Command::of(config);
        let arguments = match self.command {
            // Only what is read is to be fetched.
            [] if self.tuning.completion == Completion::Never => Vec::new(),
            [] => own.arguments.clone(),
            command => command.to_vec(),
        };
        let is_own = arguments == own.arguments;
        (Command { arguments, ..own }, is_own)
    }
}

/// Where indexes are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// On this machine, and where the image lies.
    Everywhere,
    /// On this machine.
    Stored,
}

/// Tells somebody how far a mount has come: what, how much of it, of how much.
type Progress<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

impl Daemon {
    fn new(
        root: &Path,
        (front_ends, keeper, credentials): (FrontEnds, Arc<keeper::Client>, NodeCredentials),
        (tuning, traces, reads): (&DaemonTuning, Traces, follow::Reads),
        runtime: &Handle,
    ) -> Result<Self> {
        let boot_id =
            fs::read_to_string("/proc/sys/kernel/random/boot_id").context("reading the boot id")?;
        let options =
            cache::StoreOptions { quota: tuning.quota, boot_id: boot_id.trim().to_owned() };
        let grace = tuning.eviction_grace.unwrap_or(GRACE);
        let store =
            cache::Store::open(&root.join("cache"), options).context("opening the cache")?;
        let store = store.with_grace(grace);
        if tuning.quota.is_some() && store.supports_holes() != cache::HoleSupport::Full {
            tracing::warn!(root = %root.display(), holes = ?store.supports_holes(), "this file system gives no holes back: the quota is kept by removing whole unused layers only");
        }
        let pressure = Arc::new(Notify::new());
        let (on_quota, on_full) = (Arc::clone(&pressure), Arc::clone(&pressure));
        let indexes = IndexStore::open(&root.join("index"))?;
        let (store_of_indexes, revoked) = (indexes.clone(), Arc::new(AtomicU64::new(0)));
        let (n_revoked, traces) = (Arc::clone(&revoked), Arc::new(traces));
        let told = Arc::clone(&traces);
        let follows = !tuning.without.contains(&Rule::Program);
        let tell = move |event| match event {
            fill::Event::Sealed { layer } => {
                told.sealed(&layer);
                if let Err(err) = store_of_indexes.make_durable(&layer) {
                    tracing::warn!(%layer, error = %err, "index may be lost with the machine's power");
                }
            }
            fill::Event::NoRoom => on_full.notify_one(),
            fill::Event::Waited { read, error } => {
                told.waited(&read, error.as_deref());
                if follows && error.is_none() {
                    reads.waited(&read);
                }
            }
            fill::Event::Revoked { layer, index, why } => {
                told.revoked(&layer, &why);
                n_revoked.fetch_add(1, Ordering::Relaxed);
                if let Err(err) = store_of_indexes.revoke(&layer, &index, &why) {
                    tracing::error!(%layer, error = %err, "index cannot be revoked for good");
                }
            }
        };
        let rules = room::rules_within(tuning.quota, &tuning.without);
        let engine_options = EngineOptions { rules, ..EngineOptions::default() };
        let engine = Engine::start(engine_options, runtime, Box::new(tell));
        let engine = engine.context("starting the engine")?;
        let brake = engine.brake();
        store.on_quota(Box::new(move || {
            brake.hold();
            on_quota.notify_one();
        }));
        Ok(Self {
            root: root.to_owned(),
            engine,
            store: Arc::new(store),
            indexes,
            front_ends,
            keeper: Mutex::new(keeper),
            clients: Mutex::default(),
            credentials: Arc::new(credentials),
            layers: Mutex::default(),
            images: Mutex::default(),
            being_mounted: Mutex::default(),
            room: Mutex::default(),
            unwanted: Mutex::default(),
            pressure,
            grace,
            without: tuning.without.clone(),
            decisions: Mutex::default(),
            policies: OnceLock::new(),
            kubelet_asks: Arc::default(),
            snapshots: OnceLock::new(),
            mount_times: Mutex::default(),
            page_cache: page_cache::Fills::default(),
            revoked,
            traces,
            preparing: tokio::sync::Mutex::default(),
            receiving: Receiving::default(),
        })
    }

    /// Takes over every mount of a predecessor. No registry is asked.
    fn adopt_all(&self) -> Result<()> {
        let records = self.front_ends.records().context("reading the records of mounts")?;
        let mounted = sys::mount::mountinfo().context("reading what is mounted")?;
        for record in &records {
            if self.front_ends.was_abandoned(record, &mounted) {
                self.condemn(&record.layers);
            }
        }
        self.load_ahead(&records);
        for record in records {
            let (id, dir) = (record.id.clone(), record.dir.clone());
            let adopted = self.load(&record.manifest).and_then(|image| {
                let state = self.front_ends.adopt(record, &image.to_mount(&self.root), &mounted)?;
                Ok((state, image))
            });
            match adopted {
                Ok((MountState::Gone, _)) => {}
                Ok((state, _)) => {
                    tracing::info!(dir = %dir.display(), ?state, "mount taken over");
                }
                Err(err) => {
                    let error = in_full(&err);
                    tracing::error!(id, dir = %dir.display(), error, "mount cannot be taken over; its readers wait");
                }
            }
        }
        let images: Vec<Arc<LoadedImage>> = self.images.lock().values().cloned().collect();
        images.iter().for_each(|image| self.complete(image));
        Ok(())
    }

    /// Loads the images of mounts with all processors: readers wait meanwhile. What cannot be loaded, whoever
    /// takes the mount over meets again.
    fn load_ahead(&self, records: &[Record]) {
        let manifests: BTreeSet<Digest> = records.iter().map(|record| record.manifest).collect();
        let manifests: Vec<Digest> = manifests.into_iter().collect();
        let n_threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        at_once(&manifests, n_threads, |manifest| {
            if let Err(err) = self.load(manifest) {
                tracing::debug!(%manifest, error = in_full(&err), "image not loaded");
            }
        });
    }

    /// Makes sure that nobody gets zeros from the unfinished layers of an abandoned mount, and that
    /// new mounts start with files of their own.
    fn condemn(&self, layers: &[Digest]) {
        for digest in layers {
            let layer = match self.store.stored(digest) {
                Ok(Some(layer)) if layer.is_sealed() => continue,
                Ok(layer) => layer,
                Err(err) => {
                    tracing::error!(layer = %digest, error = %err, "layer of an abandoned mount cannot be opened");
                    continue;
                }
            };
            let data = match &layer {
                Some(layer) => layer.data().try_clone(),
                // It was abandoned before, and lies aside.
                None => {
                    File::open(self.root.join("cache/quarantine").join(digest.hex()).join("data"))
                }
            };
            let condemned = data.map_err(anyhow::Error::from);
            let condemned =
                condemned.and_then(|data| Ok(self.front_ends.condemn(digest, &data)?));
            if let Err(err) = condemned {
                let error = in_full(&err);
                tracing::error!(layer = %digest, error, "layer of an abandoned mount cannot be closed off");
            }
            if layer.is_some()
                && let Err(err) = self.store.quarantine(digest, "daemon and keeper died together")
            {
                tracing::error!(layer = %digest, error = %err, "layer cannot be put aside");
            }
        }
    }

    /// An image that was mounted before, from what is written down of it.
    fn load(&self, manifest: &Digest) -> Result<Arc<LoadedImage>> {
        if let Some(image) = self.images.lock().get(manifest) {
            return Ok(Arc::clone(image));
        }
        let record = ImageRecord::load(&self.root, manifest)?;
        let image = record.image()?;
        let origin = Origin::open(&record.image_name()?, &self.client(&record.access))?;
        let load = |layer: &Digest| self.indexes.load_without_toc(layer);
        let indexes = indexes_of(&image, load)?;
        self.assemble(record, &image, &origin, (indexes, Vec::new()), true)
    }

    /// Puts an image's layers into the engine.
    fn assemble(
        &self,
        record: ImageRecord,
        image: &Image,
        origin: &Origin,
        (indexes, start): (Vec<StoredIndex>, Vec<(usize, Range<u64>)>),
        is_adopted: bool,
    ) -> Result<Arc<LoadedImage>> {
        let tree = Arc::new(tree_of(&indexes));
        if !is_adopted {
            // What cannot be mounted is refused before anything is done for it.
            tree.get()?;
        }
        let mut layers = Vec::new();
        for (layer, index) in image.layers.iter().zip(indexes) {
            layers.push(self.engine_layer(
                layer,
                index,
                (origin, record.tuning.deadline),
                is_adopted,
            )?);
        }
        let start = Start::of(start, &layers);
        let manifest = record.descriptor.digest;
        let is_completed = AtomicBool::new(record.tuning.completion == Completion::Now);
        let loaded = Arc::new(LoadedImage {
            record,
            tree,
            layers,
            is_completed,
            start,
            asked: Asked::default(),
        });
        self.images.lock().insert(manifest, Arc::clone(&loaded));
        Ok(loaded)
    }

    /// Opens what the cache has of a layer, and says whether its file was held: then it may be watched, and
    /// only through the descriptor that was opened before does nobody wait for himself.
    fn cached_layer(
        &self,
        layer: &Digest,
        index: &StoredIndex,
        is_adopted: bool,
    ) -> Result<(Arc<cache::Layer>, bool)> {
        let open = |held| self.store.layer(layer, shape_of(index), held);
        let Some(held) = self.front_ends.held_layer(layer) else { return Ok((open(None)?, false)) };
        let same = held.try_clone()?;
        match open(Some(held)) {
            // A daemon died in the middle of a mount, and the cache has given up that file since.
            Err(OpenLayerError::ForeignDescriptor) if !is_adopted => {
                self.front_ends.let_go_of_layer(layer, same.as_fd());
                Ok((open(None)?, false))
            }
            opened => Ok((opened?, true)),
        }
    }

    fn engine_layer(
        &self,
        layer: &ImageLayer,
        index: StoredIndex,
        (origin, deadline): (&Origin, Duration),
        is_adopted: bool,
    ) -> Result<Arc<Layer>> {
        let mut layers = self.layers.lock();
        if let Some(known) = layers.get(&layer.digest) {
            return Ok(Arc::clone(known));
        }
        let (cached, was_held) = self.cached_layer(&layer.digest, &index, is_adopted)?;
        if let Some(why) = cached.discarded() {
            tracing::warn!(layer = %layer.digest, %why, "cached bytes of a layer are not used");
        }
        if !was_held && cached.proven().is_none() {
            // Nobody knows what happened to it while it lay there.
            cached.doubt();
        }
        let order =
            if index.streamed { Order::Stream { blob_bytes: layer.size } } else { Order::Any };
        let blob = |digest| Arc::new(Blob { origin: origin.clone(), digest }) as Arc<dyn Source>;
        let (windows, windows_source) = match index.windows {
            Some(StoredWindows { file, blob: windows }) => (file, Some(blob(windows.digest))),
            None => (index.file, None),
        };
        let spec = LayerSpec {
            digest: layer.digest,
            order,
            diff_id: layer.diff_id,
            spans: Arc::new(index.ztoc.spans),
            toc: index.toc,
            windows,
            windows_source,
            cache: cached,
            source: blob(layer.digest),
            deadline,
        };
        let added = self.engine.add(spec);
        layers.insert(layer.digest, Arc::clone(&added));
        Ok(added)
    }

    /// Mounts an image; the answer is what `status` says of the mount. On a full disk it makes room first.
    async fn mount(&self, request: &MountRequest, progress: Progress<'_>) -> Result<MountReport> {
        let mount = self.mount_with_room(request, progress);
        Box::pin(self.traces.mount(&request.image, mount)).await
    }

    async fn mount_with_room(
        &self,
        request: &MountRequest,
        progress: Progress<'_>,
    ) -> Result<MountReport> {
        let mut mounted = self.try_mount(request, progress).await;
        // A layer without an index may need any amount, and nobody can say how much.
        for bytes in [8 << 20, 128 << 20, 2 << 30] {
            if !mounted.as_ref().is_err_and(is_no_room) || !self.find_room(bytes).await? {
                break;
            }
            mounted = self.try_mount(request, progress).await;
        }
        mounted.map_err(|err| {
            // Layers may have been begun.
            self.reap();
            match is_no_room(&err) {
                true => err.context(format!(
                    "the disk of {} is full, and nothing there can be given up; make room and mount again",
                    self.root.display()
                )),
                false => err,
            }
        })
    }

    async fn try_mount(
        &self,
        request: &MountRequest,
        progress: Progress<'_>,
    ) -> Result<MountReport> {
        let begin = Instant::now();
        let name = request.image.parse()?;
        let origin = Origin::open(&name, &self.client(&request.access))?;
        progress("resolving", 0, 0);
        let platform = platform(request.platform.as_deref())?;
        let names::Resolved { found, warning } = self.resolve(&origin, &platform).await?;
        let resolved = begin.elapsed();
        let _kept = self.keep(&found);
        let how = Wanted::from(request);
        let prepared = self.prepare(&origin, (found, &platform), how, None, progress);
        let loaded = Box::pin(prepared).await?;
        if request.tuning.completion == Completion::Now {
            loaded.record.keep_completing(&self.root).context("writing down the image")?;
            loaded.is_completed.store(true, Ordering::Relaxed);
        }
        let prepared = begin.elapsed();
        self.prefetch_program(&loaded, how);
        let (dir, backend) = (request.dir.clone(), request.backend);
        let to_mount = loaded.to_mount(&self.root);
        let record = self.front_ends.mount(&to_mount, &dir, backend)?;
        let mounted = begin.elapsed();
        self.fill_page_cache(&loaded, &record, how);
        self.traces.mounted(&loaded, record.backend);
        self.mount_times.lock().add(mounted);
        tracing::info!(image = %request.image, ?resolved, ?prepared, ?mounted, "image mounted");
        self.make_room_for(&loaded);
        self.complete(&loaded);
        let warnings = warning.into_iter().chain(loaded.other_deadline(request.tuning)).collect();
        let mounted = mounts::Mounted { record, state: MountState::Served };
        Ok(MountReport { warnings, ..report::of_mount(&mounted, Some(&loaded)) })
    }

    /// Finds out what the name of `origin` means. Meanwhile connections are opened for what comes next.
    async fn resolve(&self, origin: &Origin, platform: &Platform) -> Result<names::Resolved> {
        let resolving = self.traces.within("resolve", Vec::new, async {
            let mut resolving = std::pin::pin!(names::resolve(&self.root, origin, platform));
            tokio::select! {
                biased;
                resolved = &mut resolving => resolved,
                // While the registry thinks about the first question.
                () = origin.warm_up() => resolving.await,
            }
        });
        Box::pin(resolving).await
    }

    /// What an image is, and what there is of its indexes. What its start needs of a layer is fetched from
    /// the moment on at which that layer's index is there; whoever looks keeps the image, see
    /// [`keep`](Self::keep).
    async fn look(
        &self,
        origin: &Origin,
        (found, platform): (&FoundManifest, &Platform),
        scope: Scope,
        how: Wanted<'_>,
    ) -> Result<Looked> {
        let configured = OnceLock::new();
        let start = Mutex::new(Start::before_the_mount());
        let came = |place: usize, index: &StoredIndex, ranges: &[Range<u64>]| {
            // Without it nobody knows yet what a layer has to come to.
            let Some(image) = configured.get() else { return };
            self.begin((origin, image, how), (place, index), (ranges, &mut start.lock()));
        };
        let indexes = async {
            match scope {
                Scope::Everywhere => {
                    let manifest = (&found.descriptor, &found.manifest);
                    find_indexes(origin, manifest, &self.indexes, &came).await
                }
                Scope::Stored => stored_indexes(&found.manifest, &self.indexes),
            }
        };
        let image = async {
            let image = origin.configure(found.clone(), platform).await?;
            anyhow::Ok(configured.get_or_init(|| image).clone())
        };
        let looking = self.traces.within("find-index", Vec::new, async {
            let (image, indexes) = tokio::join!(image, indexes);
            let looked = Looked { image: image?, indexes: indexes? };
            traces::note(KeyValue::new(traces::INDEX, looked.indexes.reason.clone()));
            anyhow::Ok(looked)
        });
        Box::pin(looking).await
    }

    /// Starts to fetch what the start of an image needs of one of its layers, before the rest of it is known.
    fn begin(
        &self,
        (origin, image, how): (&Origin, &Image, Wanted<'_>),
        (place, index): (usize, &StoredIndex),
        (ranges, start): (&[Range<u64>], &mut Start),
    ) {
        let Some(layer) = image.layers.get(place) else { return };
        let is_fetched = !self.without.contains(&Rule::Program) && how.runs(&image.config).1;
        if ranges.is_empty() || !is_fetched {
            return;
        }
        let index = index.try_clone().map_err(anyhow::Error::from);
        let deadline = how.tuning.deadline;
        match index.and_then(|index| self.engine_layer(layer, index, (origin, deadline), false)) {
            Ok(layer) => ranges.iter().for_each(|range| layer.prefetch(start.take(&layer, range))),
            // Whoever loads the image meets it again.
            Err(err) => tracing::debug!(layer = %layer.digest, error = in_full(&err), "not begun"),
        }
    }

    /// Loads an image. Layers without an index are received first. `looked` is what a look at it has shown,
    /// if that was just done.
    async fn prepare(
        &self,
        origin: &Origin,
        (manifest, platform): (FoundManifest, &Platform),
        how: Wanted<'_>,
        looked: Option<Looked>,
        progress: Progress<'_>,
    ) -> Result<Arc<LoadedImage>> {
        let preparing = self.get_ready(origin, (manifest, platform), how, looked, progress);
        Box::pin(self.traces.within("prepare", Vec::new, preparing)).await
    }

    async fn get_ready(
        &self,
        origin: &Origin,
        (manifest, platform): (FoundManifest, &Platform),
        how: Wanted<'_>,
        mut looked: Option<Looked>,
        progress: Progress<'_>,
    ) -> Result<Arc<LoadedImage>> {
        let mut reason = None;
        // Open until the engine has them, so that they are known to be proven.
        let mut received = Vec::new();
        loop {
            let one_at_a_time = self.preparing.lock().await;
            if let Some(known) = self.images.lock().get(&manifest.descriptor.digest) {
                return Ok(Arc::clone(known));
            }
            let Looked { image, indexes } = match looked.take() {
                Some(looked) => looked,
                None => self.look(origin, (&manifest, platform), Scope::Everywhere, how).await?,
            };
            let reason = reason.get_or_insert(indexes.reason);
            let layers = image.layers.iter().zip(&indexes.layers);
            let without: Vec<&ImageLayer> =
                layers.filter_map(|(layer, index)| index.is_none().then_some(layer)).collect();
            if without.is_empty() {
                let record = ImageRecord::new(&image, how.access, how.tuning, reason);
                record.save(&self.root).context("writing down the image")?;
                let start = indexes.start;
                let indexes = indexes.layers.into_iter().flatten().collect();
                return self.assemble(record, &image, origin, (indexes, start), false);
            }
            // It may take minutes, and other images need not wait for it.
            drop(one_at_a_time);
            let (count, all) = (without.len(), image.layers.len());
            reason.push_str(&format!("; {count} of {all} layers were read whole before the mount"));
            received.extend(self.receive(origin, without, progress).await?);
        }
    }

    fn umount(&self, dir: &Path, lazy: bool) -> Result<()> {
        let how = if lazy { sys::mount::Unmount::Detach } else { sys::mount::Unmount::Now };
        self.page_cache.end(dir);
        self.front_ends.unmount(dir, how)?;
        self.reap();
        Ok(())
    }

    /// Puts away what runs have left that were killed.
    fn clear_abandoned_runs(&self) {
        let unmount = |dir: &Path| {
            if let Err(err) = self.umount(dir, true) {
                let error = in_full(&err);
                tracing::warn!(dir = %dir.display(), error, "image of a killed run stays mounted");
            }
        };
        if let Err(err) = crate::run::clear_abandoned(&self.root, &unmount) {
            let error = in_full(&err);
            tracing::warn!(error, "folders of killed runs stay behind");
        }
    }

    /// Lets nobody take an image away, or its layers, for as long as the answer lives: no mount uses it
    /// yet.
    fn keep(&self, found: &FoundManifest) -> Arc<BeingMounted> {
        let manifest = found.descriptor.digest;
        let layers = found.manifest.layers.iter().map(|layer| layer.digest).collect();
        let kept = Arc::new(BeingMounted { manifest, layers });
        self.being_mounted.lock().push(Arc::downgrade(&kept));
        kept
    }

    fn being_mounted(&self) -> Vec<Arc<BeingMounted>> {
        let mut kept = self.being_mounted.lock();
        kept.retain(|image| image.strong_count() > 0);
        kept.iter().filter_map(Weak::upgrade).collect()
    }

    /// Lets go of mounts that nobody uses any more, and of images that no mount uses.
    fn reap(&self) {
        self.front_ends.reap();
        let (mut images, mut layers) = (self.images.lock(), self.layers.lock());
        // In this order: an image that is mounted meanwhile is in one of both.
        let (kept, mounts) = (self.being_mounted(), self.front_ends.list());
        images.retain(|manifest, _| {
            mounts.iter().any(|mount| mount.record.manifest == *manifest)
                || kept.iter().any(|image| image.manifest == *manifest)
        });
        let used = |digest: &Digest| {
            mounts.iter().any(|mount| mount.record.layers.contains(digest))
                || kept.iter().any(|image| image.layers.contains(digest))
        };
        let before = layers.len();
        layers.retain(|digest, layer| {
            let keep = used(digest);
            if !keep {
                self.engine.remove(layer);
            }
            keep
        });
        let has_shrunk = layers.len() < before;
        drop((layers, images));
        if has_shrunk {
            self.room_has_changed();
        }
    }

    fn client(&self, access: &Access) -> registry::Client {
        let mut clients = self.clients.lock();
        let make = || match access.kubelet {
            true => {
                let docker = crate::registries::docker(access);
                let credentials = Arc::new(self.credentials.with(docker));
                crate::registries::client_with(access, credentials)
            }
            false => crate::registries::client(access),
        };
        clients.entry(access.clone()).or_insert_with(make).clone()
    }

    /// Makes what is in memory durable, and says goodbye.
    fn stop(&self) {
        for layer in self.layers.lock().values() {
            if let Err(err) = layer.flush() {
                tracing::warn!(layer = %layer.digest(), error = %err, "layer is checked at the next start");
            }
        }
        let keeper = self.keeper.lock();
        if let Err(err) = keeper.goodbye() {
            tracing::warn!(error = %err, "the keeper was not told that the daemon ends");
        }
    }

    /// Whether the keeper is needed when this daemon has gone.
    fn is_needed(&self) -> bool {
        self.front_ends.is_needed()
    }

    /// Starts to read what the start of a new mount needs. Only through EROFS over files: the other mounts are
    /// served by this process, which could wait for itself as it ends.
    fn fill_page_cache(&self, image: &Arc<LoadedImage>, mount: &Record, how: Wanted<'_>) {
        let is_off =
            self.without.iter().any(|rule| [Rule::Program, Rule::PageCache].contains(rule));
        let is_own = how.runs(&image.record.config).1;
        // What is whole comes without us.
        let is_needed = is_own && !image.start.is_empty() && !image.is_sealed();
        if is_off || !is_needed || mount.backend != Backend::Erofs {
            return;
        }
        if let Err(error) = self.page_cache.begin(image, &mount.dir) {
            tracing::warn!(dir = %mount.dir.display(), %error, "what the start needs is not read ahead of it");
        }
    }

    /// Starts to fetch what the program of an image that is about to be mounted needs first.
    fn prefetch_program(&self, image: &Arc<LoadedImage>, how: Wanted<'_>) {
        if self.without.contains(&Rule::Program) {
            return;
        }
        let (command, is_own) = how.runs(&image.record.config);
        // What the program needs first is looked for in any case: an older index may say less than that.
        let reach = if is_own && image.prefetch_start() { Reach::Program } else { Reach::Scripts };
        let image = Arc::clone(image);
        tokio::task::spawn_blocking(move || image.prefetch_files(&command, reach));
    }
}

/// How long a span stays after a use, if others can go, and readers are believed to be on the way whom
/// nobody sees.
const GRACE: Duration = Duration::from_mins(1);

/// The indexes of an image's layers, all of which were in the store.
fn indexes_of(
    image: &Image,
    load: impl Fn(&Digest) -> Result<Option<StoredIndex>, StoreIndexError>,
) -> Result<Vec<StoredIndex>> {
    let load = |layer: &ImageLayer| {
        let stored = load(&layer.digest)?;
        stored.with_context(|| format!("the index of layer {} is gone", layer.digest))
    };
    image.layers.iter().map(load).collect()
}

fn is_no_room(err: &anyhow::Error) -> bool {
    cache::is_no_room(err.as_ref())
}

/// The platform that was asked for, or this machine's.
pub(crate) fn platform(text: Option<&str>) -> Result<Platform> {
    Ok(text.map(str::parse).transpose()?.unwrap_or_else(Platform::host))
}

/// A back end as the command line names it.
pub(crate) fn backend(choice: BackendChoice) -> Option<Backend> {
    match choice {
        BackendChoice::Auto => None,
        BackendChoice::Erofs => Some(Backend::Erofs),
        BackendChoice::ErofsLoop => Some(Backend::ErofsLoop),
        BackendChoice::Fuse => Some(Backend::Fuse),
    }
}

//! All mounts of one daemon, and what serves them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use causes::in_full;
use fill::Layer;
use fuse::{Access, Connection, MountOptions, Negotiated, Session, SessionOptions, TreeFs};
use oci::Digest;
use parking_lot::Mutex;
use sys::fanotify::FileId;
use sys::journal::Orphan;
use sys::loop_device::LoopDevice;
use sys::mount::{MountEntry, Unmount, mountinfo};
use tree::LaterTree;

use crate::bytes::ImageLayers;
use crate::error::{BackendError, MountImageError, UnmountImageError};
use crate::holding::Holding;
use crate::precontent::PreContent;
use crate::probe::Probe;
use crate::record::{Backend, Looped, Record, Records};
use crate::served::{self, SERVED, Served};

mod evict;

/// An image that is ready to be mounted.
#[derive(Debug, Clone)]
pub struct ImageToMount {
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Its files. Who takes a mount over does not ask for them before somebody reads.
    pub tree: Arc<LaterTree>,
    /// Its layers, the lowest first.
    pub layers: Vec<Arc<Layer>>,
    /// A file for its EROFS metadata; written if it is not there.
    pub metadata: PathBuf,
}

/// What is known of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountState {
    /// It is served.
    Served,
    /// Its daemon and its keeper died together: the kernel let its readers go unserved for a while,
    /// so what they have read since may be wrong. Reads of missing bytes fail now.
    Lost,
    /// It is not mounted anywhere in sight, but somebody still uses it: it was detached, or lives in
    /// another mount namespace.
    Detached,
    /// Nobody uses it any more.
    Gone,
}

/// A mount and its state.
#[derive(Debug, Clone)]
pub struct Mounted {
    /// What was written down.
    pub record: Record,
    /// What is known.
    pub state: MountState,
}

/// All mounts.
#[derive(Debug)]
pub struct FrontEnds {
    root: PathBuf,
    records: Records,
    holding: Arc<Holding>,
    precontent: Option<PreContent>,
    served: Mutex<Option<Served>>,
    mounts: Mutex<BTreeMap<String, Mount>>,
    probe: Mutex<Option<Arc<Probe>>>,
    /// Whether a predecessor's pre-content group was found.
    resumed: bool,
}

#[derive(Debug)]
struct Mount {
    record: Record,
    state: MountState,
    layers: Vec<Arc<Layer>>,
    session: Option<Session>,
}

impl FrontEnds {
    /// Starts with what `holding` has of a predecessor. Orphans are reads that it had taken and not
    /// answered; they go to [`listen`](Self::listen) once all its mounts are
    /// [adopted](Self::adopt).
    ///
    /// # Errors
    /// When the root folder cannot be used. A back end that does not work is no error.
    pub fn start(root: &Path, holding: Arc<Holding>) -> io::Result<(Self, Vec<Orphan>)> {
        let held = holding.get(GROUP).zip(holding.get(JOURNAL));
        let resumed = held.is_some();
        let precontent = match held {
            Some(((_, group), (_, journal))) => PreContent::resume(group, journal),
            None => PreContent::new(),
        };
        let (precontent, orphans) = match precontent {
            Ok(precontent) => {
                let orphans = precontent.orphans();
                if !resumed {
                    holding.put(GROUP, &[], precontent.group_fd())?;
                    holding.put(JOURNAL, &[], precontent.journal_fd())?;
                }
                (Ok(precontent), orphans)
            }
            Err(err) => (Err(err), Vec::new()),
        };
        let records = Records::open(root)?;
        clear_probe(&root.join(PROBE))?;
        let served = Served::resume(&root.join(SERVED), &holding);
        let front_ends = Self {
            root: root.to_owned(),
            records,
            holding,
            precontent: precontent
                .inspect_err(|err| tracing::info!(error = %in_full(err), "no pre-content events"))
                .ok(),
            served: Mutex::new(served),
            mounts: Mutex::default(),
            probe: Mutex::default(),
            resumed,
        };
        Ok((front_ends, orphans))
    }

    /// What works here; tried at the first call, and again after one for which the disk was full.
    #[must_use]
    pub fn probe(&self) -> Arc<Probe> {
        let mut known = self.probe.lock();
        if let Some(known) = &*known {
            return Arc::clone(known);
        }
        let probe = Arc::new(Probe::run(&self.root.join(PROBE)));
        if !probe.found_no_room() {
            *known = Some(Arc::clone(&probe));
        }
        probe
    }

    /// The mounts that a predecessor wrote down.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn records(&self) -> io::Result<Vec<Record>> {
        self.records.read()
    }

    /// Serves a predecessor's mount again. `mounted` is what the kernel says is mounted, which takes it long
    /// where much is.
    ///
    /// # Errors
    /// When its back end cannot go on; its readers wait then.
    pub fn adopt(
        &self,
        record: Record,
        image: &ImageToMount,
        mounted: &[MountEntry],
    ) -> Result<MountState, BackendError> {
        let point = find(&record, mounted);
        let whole = image.layers.iter().all(|layer| layer.is_sealed());
        let state = match (point, record.backend) {
            (None, _) if !self.is_alive(&record, image) => MountState::Gone,
            (Some(_), Backend::Erofs | Backend::ErofsLoop) if whole => MountState::Served,
            (_, Backend::Erofs) if !self.resumed => MountState::Lost,
            (_, Backend::ErofsLoop) if self.holding.get(SERVED).is_none() => MountState::Lost,
            (_, Backend::Fuse) if self.holding.get(&session_name(&record)).is_none() => {
                MountState::Lost
            }
            (None, _) => MountState::Detached,
            (Some(_), _) => MountState::Served,
        };
        let mut session = None;
        match state {
            MountState::Gone => {
                // As each is after the machine was started again.
                tracing::info!(dir = %record.dir.display(), "mount is gone");
                self.holding.remove(&session_name(&record));
                self.records.forget(&record);
                return Ok(state);
            }
            MountState::Lost => tracing::error!(
                dir = %record.dir.display(),
                "daemon and keeper of this mount died together: what was read from it since is not to be trusted; restart its programs and mount it again"
            ),
            MountState::Served | MountState::Detached => {
                session = self.serve_again(&record, image)?;
            }
        }
        let id = record.id.clone();
        let layers = image.layers.clone();
        self.mounts.lock().insert(id.clone(), Mount { record, state, layers, session });
        self.write_detached(&id);
        Ok(state)
    }

    fn serve_again(
        &self,
        record: &Record,
        image: &ImageToMount,
    ) -> Result<Option<Session>, BackendError> {
        match record.backend {
            Backend::Erofs => {
                let precontent = self.precontent.as_ref().ok_or(BackendError::NoEvents)?;
                for layer in &image.layers {
                    // The keeper may have been lost with a daemon; a marked file cannot be opened later.
                    self.hold_layer(layer)?;
                    precontent.arm(layer)?;
                    precontent.mounted(layer);
                }
                Ok(None)
            }
            Backend::ErofsLoop => {
                for (layer, device) in image.layers.iter().zip(&record.devices) {
                    self.with_served(|served| served.adopt(layer, device))?;
                }
                Ok(None)
            }
            Backend::Fuse => {
                let Some((note, fd)) = self.holding.get(&session_name(record)) else {
                    return Ok(None);
                };
                let connection = Connection::from_fd(fd)?;
                let options =
                    SessionOptions { threads: THREADS, negotiated: Negotiated::from_bytes(&note) };
                Ok(Some(Session::start(connection, tree_fs(image), &options)?))
            }
        }
    }

    /// Whether a mount was left without anybody to serve it: its daemon and its keeper died together,
    /// and the kernel still has it. (After a reboot it has not.)
    #[must_use]
    pub fn was_abandoned(&self, record: &Record, mounted: &[MountEntry]) -> bool {
        if record.backend != Backend::Erofs || self.resumed {
            return false;
        }
        let alive =
            record.bdi.as_deref().is_some_and(|name| sys::mount::Bdi::named(name).is_some());
        alive || find(record, mounted).is_some()
    }

    /// Whether anything is left that must outlive this daemon.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        let condemned = |name: &String| name.starts_with(CONDEMNED);
        !self.mounts.lock().is_empty() || self.holding.names().iter().any(condemned)
    }

    /// Lets every further read of `data` fail: it belongs to an abandoned mount, whose readers may
    /// have been given zeros for what was missing. Lasts until the next boot.
    ///
    /// # Errors
    /// When the file cannot be marked.
    pub fn condemn(&self, layer: &Digest, data: &File) -> Result<(), BackendError> {
        let Some(precontent) = &self.precontent else { return Ok(()) };
        precontent.condemn(data.as_fd())?;
        Ok(self.holding.put(&format!("{CONDEMNED}{}", layer.hex()), &[], data.as_fd())?)
    }

    /// Answers the reads that a predecessor had taken, and begins to serve.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn listen(&self, orphans: Vec<Orphan>) -> Result<(), BackendError> {
        let mut served = self.served.lock();
        if let Some(served) = served.as_mut() {
            served.begin()?;
            let mounts = self.mounts.lock();
            let looped = mounts.values().filter(|mount| mount.record.backend == Backend::ErofsLoop);
            for layer in looped.flat_map(|mount| &mount.layers) {
                served.mounted(layer);
            }
        }
        // A predecessor may have died between the end of its last mount and this.
        if let Some(idle) = served.take_if(|served| served.is_idle()) {
            idle.unmount(&self.holding);
        }
        drop(served);
        match &self.precontent {
            Some(precontent) => Ok(precontent.listen(orphans)?),
            None => Ok(()),
        }
    }

    /// Mounts `image` on `dir` through `wanted`, or through the best back end that works.
    ///
    /// # Errors
    /// [`MountImageError`]; nothing stays behind then.
    pub fn mount(
        &self,
        image: &ImageToMount,
        dir: &Path,
        wanted: Option<Backend>,
    ) -> Result<Record, MountImageError> {
        let dir = prepare(dir)?;
        if self
            .mounts
            .lock()
            .values()
            .any(|mount| mount.record.dir == dir && mount.state != MountState::Detached)
        {
            return Err(MountImageError::InUse(dir));
        }
        let probe = self.probe();
        if probe.found_no_room() {
            let source = io::Error::from(io::ErrorKind::StorageFull);
            let source = BackendError::io("trying back ends in", &self.root.join(PROBE), source);
            return Err(MountImageError::Failed { dir, source });
        }
        let candidates: Vec<Backend> = match wanted {
            Some(backend) => match probe.why_not(backend) {
                Some(why) => {
                    return Err(MountImageError::Unavailable { backend, why: why.to_owned() });
                }
                None => vec![backend],
            },
            None => probe.working().collect(),
        };
        let mut failure = BackendError::None(probe.reasons());
        for backend in candidates {
            let mut record = Record {
                id: record_id(),
                manifest: image.manifest,
                dir: dir.clone(),
                backend,
                layers: image.layers.iter().map(|layer| *layer.digest()).collect(),
                devices: Vec::new(),
                metadata: None,
                bdi: None,
                is_detached: false,
            };
            match self.mount_through(&mut record, image) {
                Ok(session) => {
                    let written = self.records.write(&record);
                    let state = match &written {
                        Ok(()) => MountState::Served,
                        Err(_) => MountState::Detached,
                    };
                    let (id, layers) = (record.id.clone(), image.layers.clone());
                    let mount = Mount { record: record.clone(), state, layers, session };
                    self.mounts.lock().insert(id, mount);
                    if written.is_err() {
                        // A successor would not know of it.
                        unmount_quietly(&record.dir);
                        self.reap();
                    }
                    return written.map(|()| record);
                }
                Err(err) => {
                    tracing::warn!(%backend, dir = %dir.display(), error = %in_full(&err), "back end cannot mount");
                    failure = err;
                }
            }
        }
        Err(MountImageError::Failed { dir, source: failure })
    }

    fn mount_through(
        &self,
        record: &mut Record,
        image: &ImageToMount,
    ) -> Result<Option<Session>, BackendError> {
        match record.backend {
            Backend::Erofs => self.mount_erofs(record, image).map(|()| None),
            Backend::ErofsLoop => self.mount_erofs_loop(record, image).map(|()| None),
            Backend::Fuse => self.mount_fuse(record, image).map(Some),
        }
    }

    fn mount_erofs(&self, record: &mut Record, image: &ImageToMount) -> Result<(), BackendError> {
        let precontent = self.precontent.as_ref().ok_or(BackendError::NoEvents)?;
        if self.share(record)? {
            for layer in &image.layers {
                precontent.arm(layer)?;
                precontent.mounted(layer);
            }
            return Ok(());
        }
        write_metadata(image)?;
        let mut armed = Vec::new();
        let mounted = image
            .layers
            .iter()
            .try_for_each(|layer| {
                self.hold_layer(layer)?;
                precontent.arm(layer)?;
                armed.push(layer);
                Ok(())
            })
            .and_then(|()| {
                let data = |layer: &Arc<Layer>| {
                    format!("/proc/self/fd/{}", layer.data().as_raw_fd()).into()
                };
                let devices: Vec<PathBuf> = image.layers.iter().map(data).collect();
                mount_and_name(&image.metadata, &devices, &record.dir)
            });
        match mounted {
            Ok(bdi) => record.bdi = Some(bdi),
            Err(err) => {
                armed.into_iter().for_each(|layer| precontent.disarm(layer));
                return Err(err);
            }
        }
        for layer in &image.layers {
            precontent.mounted(layer);
        }
        Ok(())
    }

    /// The descriptor of a layer's file that the keeper holds, if it does: the file is watched, and was opened
    /// before. That is so of the layers of all mounts through `erofs`, and of those of a mount in the middle of
    /// which a daemon has died, whether or not it wrote down that there is one.
    #[must_use]
    pub fn held_layer(&self, layer: &Digest) -> Option<OwnedFd> {
        self.holding.get(&layer_name(layer)).map(|(_, fd)| fd)
    }

    /// Lets go of what [`held_layer`](Self::held_layer) gives, if it turned out not to be the layer's file.
    pub fn let_go_of_layer(&self, layer: &Digest, held: BorrowedFd<'_>) {
        self.precontent.iter().for_each(|precontent| precontent.forget(held));
        self.holding.remove(&layer_name(layer));
    }

    /// Leaves the descriptor of a layer's file with the keeper. It was opened before the mark.
    fn hold_layer(&self, layer: &Layer) -> io::Result<()> {
        self.holding.put(&layer_name(layer.digest()), &[], layer.data().as_fd())
    }

    fn mount_erofs_loop(
        &self,
        record: &mut Record,
        image: &ImageToMount,
    ) -> Result<(), BackendError> {
        let mut devices = Vec::new();
        let attached = image.layers.iter().try_for_each(|layer| {
            devices.push(self.with_served(|served| served.attach(layer))?);
            Ok(())
        });
        let mounted = attached.and_then(|()| {
            if self.share(record)? {
                return Ok(());
            }
            write_metadata(image)?;
            let file = File::open(&image.metadata)?;
            let FileId { dev, ino } = FileId::of(file.as_fd())?;
            let metadata =
                LoopDevice::attach(file.as_fd(), served::options(file.metadata()?.len()))?;
            sys::mount::mount_erofs(metadata.path(), &devices, &record.dir)?;
            record.metadata = Some(Looped { device: metadata.path().to_owned(), dev, ino });
            metadata.into_persistent();
            Ok(())
        });
        if mounted.is_err() {
            for layer in image.layers.iter().take(devices.len()) {
                self.release(layer);
            }
            return mounted;
        }
        record.devices = devices;
        for layer in &image.layers {
            self.with_served(|served| {
                served.mounted(layer);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn mount_fuse(&self, record: &Record, image: &ImageToMount) -> Result<Session, BackendError> {
        let connection =
            Connection::mount(&record.dir, &fuse_options("hermes", Access::Everybody))?;
        let options = SessionOptions { threads: THREADS, negotiated: None };
        let session = Session::start(connection, tree_fs(image), &options);
        let session = session.inspect_err(|_| unmount_quietly(&record.dir))?;
        let note = session.negotiated().to_bytes();
        let held = self.holding.put(&session_name(record), &note, session.connection().as_fd());
        held.inspect_err(|_| unmount_quietly(&record.dir))?;
        raise_read_ahead(&record.dir);
        Ok(session)
    }

    /// Shows a mount of the same image and back end at this folder too, so that both share one page
    /// cache.
    fn share(&self, record: &mut Record) -> Result<bool, BackendError> {
        let same = {
            let mounts = self.mounts.lock();
            let same = mounts.values().find(|mount| {
                mount.state == MountState::Served
                    && mount.record.manifest == record.manifest
                    && mount.record.backend == record.backend
                    && mount.record.layers == record.layers
            });
            same.map(|mount| mount.record.clone())
        };
        let Some(same) = same else { return Ok(false) };
        if find(&same, &mountinfo()?).is_none() {
            return Ok(false);
        }
        sys::mount::bind_read_only(&same.dir, &record.dir)?;
        (record.bdi, record.metadata) = (same.bdi, same.metadata);
        Ok(true)
    }

    /// Unmounts what is on `dir`.
    ///
    /// # Errors
    /// [`UnmountImageError`]; the mount is as before then.
    pub fn unmount(&self, dir: &Path, how: Unmount) -> Result<Record, UnmountImageError> {
        let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let id = {
            let mounts = self.mounts.lock();
            let found = mounts
                .values()
                .find(|mount| mount.record.dir == dir && mount.state != MountState::Detached);
            found
                .map(|mount| mount.record.id.clone())
                .ok_or_else(|| UnmountImageError::NotMounted(dir.clone()))?
        };
        match sys::mount::unmount(&dir, how) {
            Ok(()) => {}
            // Somebody else has unmounted it: what is left is to forget it.
            Err(err) if err.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {}
            Err(err) if err.kind() == io::ErrorKind::ResourceBusy => {
                let pids = crate::users::of(&dir);
                return Err(UnmountImageError::Busy { dir, pids });
            }
            Err(source) => return Err(UnmountImageError::Io { dir, source }),
        }
        let mut mounts = self.mounts.lock();
        let Some(mount) = mounts.get_mut(&id) else {
            return Err(UnmountImageError::NotMounted(dir));
        };
        let record = mount.record.clone();
        if mount.state == MountState::Served {
            mount.state = MountState::Detached;
        } else if mount.state == MountState::Lost {
            mounts.remove(&id);
            self.records.forget(&record);
        }
        drop(mounts);
        self.reap();
        self.write_detached(&id);
        Ok(record)
    }

    /// Writes down that a mount is detached, if it is still there and is: a successor cannot tell from the
    /// mount table once another mount lies on its folder.
    fn write_detached(&self, id: &str) {
        let mut mounts = self.mounts.lock();
        let Some(mount) = mounts.get_mut(id) else { return };
        if mount.state != MountState::Detached || mount.record.is_detached {
            return;
        }
        mount.record.is_detached = true;
        if let Err(error) = self.records.write(&mount.record) {
            tracing::warn!(id, error = %in_full(&error), "not written down that a mount is detached");
        }
    }

    /// Lets go of what nobody uses any more.
    ///
    /// A detached mount is served for as long as the kernel has it: its readers must neither fail nor
    /// be let past us.
    pub fn reap(&self) {
        let mut mounts = self.mounts.lock();
        let dead: Vec<String> = mounts
            .iter()
            .filter(|(_, mount)| {
                mount.state == MountState::Detached && !self.is_used(mount, &mounts)
            })
            .map(|(id, _)| id.clone())
            .collect();
        let dead: Vec<Mount> = dead.iter().filter_map(|id| mounts.remove(id)).collect();
        // Whoever finds a mount gone finds it gone on the disk too: its layers may be removed now.
        dead.iter().for_each(|mount| self.records.forget(&mount.record));
        drop(mounts);
        for mount in dead {
            self.clean_up(mount);
        }
    }

    /// Whether a detached mount waits for the kernel to let go of it: [`reap`](Self::reap) is to be
    /// tried again.
    #[must_use]
    pub fn has_detached(&self) -> bool {
        self.mounts.lock().values().any(|mount| mount.state == MountState::Detached)
    }

    /// Whether a detached mount is still read by somebody whom no other mount stands for.
    fn is_used(&self, mount: &Mount, all: &BTreeMap<String, Mount>) -> bool {
        // Shown at another folder too; not another file system of the same image.
        let elsewhere = |other: &Mount| {
            let (theirs, ours) = (&other.record, &mount.record);
            other.state == MountState::Served
                && theirs.backend == ours.backend
                && theirs.manifest == ours.manifest
                && (theirs.bdi.is_some() || theirs.metadata.is_some())
                && theirs.bdi == ours.bdi
                && theirs.metadata == ours.metadata
        };
        match mount.record.backend {
            Backend::Erofs | Backend::ErofsLoop if all.values().any(elsewhere) => false,
            Backend::Erofs | Backend::ErofsLoop => self.kernel_has(&mount.record, &mount.layers),
            Backend::Fuse => mount.session.as_ref().is_some_and(|session| !session.is_unmounted()),
        }
    }

    fn is_alive(&self, record: &Record, image: &ImageToMount) -> bool {
        match record.backend {
            Backend::Erofs | Backend::ErofsLoop => self.kernel_has(record, &image.layers),
            Backend::Fuse => self.holding.get(&session_name(record)).is_some_and(|(_, fd)| {
                Connection::from_fd(fd).and_then(|held| held.is_connected()).unwrap_or(false)
            }),
        }
    }

    /// Whether the kernel still has the EROFS of a mount, wherever it is visible.
    fn kernel_has(&self, record: &Record, layers: &[Arc<Layer>]) -> bool {
        match record.backend {
            Backend::Erofs => match &record.bdi {
                Some(name) => sys::mount::Bdi::named(name).is_some(),
                // Several were mounted at the same moment, and which is ours is not known.
                None => !layers.iter().all(|layer| layer.is_sealed()),
            },
            Backend::ErofsLoop => record.metadata.as_ref().is_some_and(|looped| {
                let below = LoopDevice::open(&looped.device).ok();
                let below = below.and_then(|device| device.status().ok());
                below.is_some_and(|below| below.file == FileId { dev: looped.dev, ino: looped.ino })
            }),
            Backend::Fuse => false,
        }
    }

    fn clean_up(&self, mount: Mount) {
        let Mount { record, layers, session, .. } = mount;
        for layer in &layers {
            match record.backend {
                Backend::Erofs => {
                    self.precontent.iter().for_each(|precontent| precontent.disarm(layer));
                }
                Backend::ErofsLoop => self.release(layer),
                Backend::Fuse => {}
            }
        }
        for layer in &layers {
            let used = |mount: &Mount| mount.record.layers.contains(layer.digest());
            if !self.mounts.lock().values().any(used) {
                self.holding.remove(&layer_name(layer.digest()));
            }
        }
        drop(session);
        self.holding.remove(&session_name(&record));
    }

    /// One erofs-loop mount less uses `layer`.
    fn release(&self, layer: &Layer) {
        let mut served = self.served.lock();
        if let Some(served) = served.as_ref() {
            served.release(layer);
        }
        if let Some(idle) = served.take_if(|served| served.is_idle()) {
            idle.unmount(&self.holding);
        }
    }

    fn with_served<T>(
        &self,
        act: impl FnOnce(&Served) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let mut served = self.served.lock();
        let running = match served.take() {
            Some(running) => running,
            None => Served::mount(&self.root.join(SERVED), &self.holding)?,
        };
        act(served.insert(running))
    }

    /// Whether a mount on `dir` is served.
    #[must_use]
    pub fn serves(&self, dir: &Path) -> bool {
        let is_meant = |mount: &Mount| mount.record.dir == dir && mount.state == MountState::Served;
        self.mounts.lock().values().any(is_meant)
    }

    /// All mounts, in the order of their folders.
    #[must_use]
    pub fn list(&self) -> Vec<Mounted> {
        let mounts = self.mounts.lock();
        let mut list: Vec<Mounted> = mounts
            .values()
            .map(|mount| Mounted { record: mount.record.clone(), state: mount.state })
            .collect();
        list.sort_by(|a, b| a.record.dir.cmp(&b.record.dir));
        list
    }

    /// Stops serving and leaves everything to a successor.
    pub fn stop(self) {
        drop(self);
    }
}

/// Where the kernel shows a mount, if it still does.
fn find<'m>(record: &Record, mounted: &'m [MountEntry]) -> Option<&'m Path> {
    if record.is_detached {
        return None;
    }
    let fstype = match record.backend {
        Backend::Erofs | Backend::ErofsLoop => "erofs",
        Backend::Fuse => "fuse",
    };
    let found = mounted.iter().rfind(|entry| entry.point == record.dir);
    found.filter(|entry| entry.fstype.starts_with(fstype)).map(|entry| &*entry.point)
}

/// Removes what a predecessor left that was killed while it tried the back ends.
fn clear_probe(dir: &Path) -> io::Result<()> {
    let inside = mountinfo()?.into_iter().rev().filter(|entry| entry.point.starts_with(dir));
    for entry in inside {
        unmount_quietly(&entry.point);
    }
    match fs::remove_dir_all(dir) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

/// The folder to mount on: made if need be, without links in its path.
fn prepare(dir: &Path) -> Result<PathBuf, MountImageError> {
    let failed = |source| MountImageError::Dir { dir: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(failed)?;
    fs::canonicalize(dir).map_err(failed)
}

fn write_metadata(image: &ImageToMount) -> Result<(), BackendError> {
    let devices: Vec<erofs::Device> = image
        .layers
        .iter()
        .map(|layer| erofs::Device { tag: layer.digest().hex(), bytes: layer.bytes() })
        .collect();
    let mut bytes = Vec::new();
    erofs::write_image(image.tree.get()?, &devices, &mut bytes)?;
    let path = &image.metadata;
    let failed = |source| BackendError::io("writing", path, source);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
    }
    // A new file each time: the old one may still be mounted.
    sys::files::replace(path, &bytes).map_err(failed)
}

/// Mounts an EROFS, and returns the name by which the kernel shows whether anybody uses it.
///
/// Without the name nobody could say when its files may be left unguarded.
fn mount_and_name(image: &Path, devices: &[PathBuf], dir: &Path) -> Result<String, BackendError> {
    for _ in 0..NAMING_ATTEMPTS {
        if let Some(bdi) = sys::mount::mount_erofs(image, devices, dir)?.bdi {
            return Ok(bdi.name().to_owned());
        }
        // Another one was mounted at the same moment.
        unmount_quietly(dir);
    }
    Err(BackendError::Nameless)
}

fn tree_fs(image: &ImageToMount) -> Arc<dyn fuse::Filesystem> {
    let layers = Arc::new(ImageLayers(image.layers.clone()));
    Arc::new(TreeFs::new(Arc::clone(&image.tree), layers))
}

fn unmount_quietly(dir: &Path) {
    if let Err(err) = sys::mount::unmount(dir, Unmount::Detach) {
        tracing::warn!(dir = %dir.display(), error = %err, "half-made mount stays");
    }
}

/// A name that no other mount has, and that sorts by age.
fn record_id() -> String {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    format!("{:016x}", since.as_nanos())
}

/// What the keeper calls the descriptor by which a layer's file is written.
///
/// Whoever opens a marked file by its name gets a descriptor whose own accesses raise events, and
/// would wait for itself: a daemon goes on with its predecessor's.
fn layer_name(layer: &Digest) -> String {
    format!("layer/{}", layer.hex())
}

fn session_name(record: &Record) -> String {
    format!("fuse/{}", record.id)
}

pub(crate) fn fuse_options(fsname: &str, access: Access) -> MountOptions {
    MountOptions {
        fsname: fsname.to_owned(),
        subtype: Some("hermes".to_owned()),
        access,
        default_permissions: true,
        max_read: None,
    }
}

/// A larger window than the kernel's own saves round trips through us. Where `/sys` cannot be
/// written to, reads are as right without.
pub(crate) fn raise_read_ahead(dir: &Path) {
    let raised = fuse::bdi_of(dir).map(|bdi| bdi.set_read_ahead_kb(READ_AHEAD_KIB));
    tracing::debug!(dir = %dir.display(), ?raised, "read-ahead of a FUSE mount");
}

/// How often an EROFS is mounted before it is given up that its name is found.
const NAMING_ATTEMPTS: usize = 20;
const CONDEMNED: &str = "condemned/";
const GROUP: &str = "fanotify";
const JOURNAL: &str = "journal";
const PROBE: &str = "probe";
const THREADS: usize = 2;
const READ_AHEAD_KIB: u32 = 512;

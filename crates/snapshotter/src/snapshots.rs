//! The snapshots of one folder: what is known of them and what is written in them, kept in step.

use std::collections::{BTreeMap, HashSet};
use std::fs::DirBuilder;
use std::io;
use std::iter;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use crate::folders::{self, Spare};
use crate::ids::{IdMapping, Owners};
use crate::lazy::{LazyImages, LazyLayer, TARGET, WantedLayer};
use crate::mapped::Mapped;
use crate::mounts::{self, Mount};
use crate::store::{
    Below, Info, Kind, KnownUsage, Lineage, OpenStoreError, SnapshotId, Store, StoreError, Update,
    Usage,
};

/// The snapshots of one folder. Calls may wait for the disk.
#[derive(Debug)]
pub struct Snapshots {
    dir: PathBuf,
    store: Arc<Store>,
    overlay_options: Vec<String>,
    mapped: Arc<Mapped>,
    spare: Arc<Spare>,
    images: Option<Arc<dyn LazyImages>>,
    chores: mpsc::Sender<Chore>,
}

/// What a call may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Nothing but the disk: else it fails with [`StoreError::Waits`], and nothing has happened.
    Disk,
    /// Registries and mounts of images too.
    Images,
}

/// What can be done while nobody waits.
enum Chore {
    /// Find out what a committed snapshot takes.
    Measure(SnapshotId),
    /// Give up what is kept of a layer, if no snapshot has it.
    Forget(LazyLayer),
    /// Mount a lazy image, for which a container is likely to come next.
    Mount(SnapshotId, LazyLayer),
    /// Make the folders of the next snapshot.
    Spare,
}

/// The snapshots of a folder cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store.
    #[error(transparent)]
    Store(#[from] OpenStoreError),
    /// overlayfs' options have no way to write it.
    #[error("{} cannot hold snapshots: overlayfs takes no path with `{character}` in it", path.display())]
    Path {
        /// The folder.
        path: PathBuf,
        /// What it has.
        character: char,
    },
    /// The folder or a thread.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// What is known of snapshots cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("looking at the snapshots of containerd")]
pub struct ReadStoreError(#[source] StoreError);

impl Snapshots {
    /// Opens the snapshots in `dir`, which is made if need be. `images` says what needs no unpacking. What
    /// removed snapshots have left is put away meanwhile.
    ///
    /// # Errors
    /// When the store is lost, damaged or of a later version, and when the folder cannot be used.
    pub fn open(dir: &Path, images: Option<Arc<dyn LazyImages>>) -> Result<Self, OpenError> {
        let io = |what: String| move |source| OpenError::Io { what, source };
        let path = dir.to_string_lossy();
        if let Some(character) = path.chars().find(|c| [':', ',', '\\'].contains(c)) {
            return Err(OpenError::Path { path: dir.to_owned(), character });
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io(format!("making {}", dir.display())))?;
        let store = Arc::new(Store::open(dir)?);
        let (chores, to_do) = mpsc::channel();
        let overlay_options = mounts::overlay_options();
        let mapped = Arc::new(Mapped::new(dir));
        let dir = dir.to_owned();
        let spare = Arc::default();
        let snapshots = Self { dir, store, overlay_options, mapped, spare, images, chores };
        let (dir, store) = (snapshots.dir.clone(), Arc::clone(&snapshots.store));
        let spare = Arc::clone(&snapshots.spare);
        let (images, mapped) = (snapshots.images.clone(), Arc::clone(&snapshots.mapped));
        let work = move || {
            clean_up(&dir, &store, &mapped, images.as_deref());
            for chore in iter::once(Chore::Spare).chain(to_do) {
                match chore {
                    Chore::Measure(id) => measure_committed(&dir, &store, id),
                    Chore::Forget(layer) => forget(&store, images.as_deref(), &layer),
                    Chore::Mount(id, layer) => mount_ahead(&dir, images.as_deref(), id, &layer),
                    Chore::Spare => make_spare(&dir, &spare),
                }
            }
        };
        let thread = std::thread::Builder::new().name("snapshots".to_owned()).spawn(work);
        thread.map_err(io("starting a thread".to_owned()))?;
        Ok(snapshots)
    }

    /// Makes a snapshot that is written, or one that is read. One that containerd would unpack a layer into
    /// is not made if the layer needs no unpacking: then there is what it wants to make of it, which it is
    /// told by [`StoreError::Exists`].
    pub(crate) fn create(
        &self,
        kind: Kind,
        (key, parent): (&str, &str),
        labels: &BTreeMap<String, String>,
        patience: Patience,
    ) -> Result<Mount, StoreError> {
        if let (Kind::Active, Some(images)) = (kind, &self.images) {
            self.find_lazy(images.as_ref(), parent, labels, patience)?;
        }
        // The folder is to look like its parent's.
        let below = self.store.below(parent)?;
        self.mount_lazy(&below, patience)?;
        let owners = self.owners(&below, labels)?;
        let make = |lineage: &Lineage| {
            folders::make((&self.dir, &self.spare), lineage, owners.ids())?;
            // What a transaction that did not end has left has the same number.
            self.mapped.hide(lineage.id)?;
            self.show(lineage, &owners)
        };
        let lineage = self.store.create(kind, (key, parent), labels, make)?;
        // If the thread is gone, the next snapshot makes its own.
        self.chores.send(Chore::Spare).unwrap_or_default();
        Ok(self.mount_of(&lineage, &owners))
    }

    fn mount_of(&self, lineage: &Lineage, owners: &Owners) -> Mount {
        mounts::of((&self.dir, &self.mapped), lineage, owners, &self.overlay_options)
    }

    /// Whose what is below a snapshot is to be, by the snapshot's labels.
    fn owners(
        &self,
        below: &Below,
        labels: &BTreeMap<String, String>,
    ) -> Result<Owners, StoreError> {
        let Some(ids) = IdMapping::of(labels)? else { return Ok(Owners::Same) };
        if let Some(parent) = below.parents.first() {
            let owner = folders::owner(&self.dir, *parent).map_err(StoreError::Folder)?;
            // containerd has given it another owner file by file, as it does unless told of `remap-ids`, and
            // says the same in its labels.
            if owner == ids.root() {
                return Ok(Owners::Same);
            }
        }
        // Of images that are mounted in the folder of snapshots, containerd shows one by itself; together with
        // unpacked layers it shows none before 2.3, and says nothing.
        let is_mixed = below.lazy.is_some() && below.parents.len() > 1;
        Ok(if is_mixed { Owners::ByUs(ids) } else { Owners::ByContainerd(ids) })
    }

    /// Sees to it that a snapshot can be mounted that sees what is below it by our own mounts.
    fn show(&self, lineage: &Lineage, owners: &Owners) -> io::Result<()> {
        match owners {
            Owners::ByUs(ids) => self.mapped.show(lineage.id, &lineage.below.parents, ids),
            Owners::Same | Owners::ByContainerd(_) => Ok(()),
        }
    }

    /// Fails with [`StoreError::Exists`] if what containerd wants to unpack is there, or needs no unpacking.
    fn find_lazy(
        &self,
        images: &dyn LazyImages,
        parent: &str,
        labels: &BTreeMap<String, String>,
        patience: Patience,
    ) -> Result<(), StoreError> {
        let Some(target) = labels.get(TARGET) else { return Ok(()) };
        match self.store.stat(target) {
            Ok(_) => return Err(StoreError::Exists(target.clone())),
            Err(StoreError::Missing(_)) => {}
            Err(err) => return Err(err),
        }
        let Some(wanted) = WantedLayer::new(labels, self.store.height(parent)?) else {
            return Ok(());
        };
        if patience == Patience::Disk {
            return Err(StoreError::Waits);
        }
        let Some(layer) = images.find(&wanted) else { return Ok(()) };
        let make = |id| folders::make_mount_point(&self.dir, id);
        let id = self.store.create_lazy((target, parent), labels, &layer, make)?;
        tracing::info!(image = layer.image, layer = wanted.layer, "a layer needs no unpacking");
        if layer.is_whole {
            // If the thread is gone, the first container mounts it.
            self.chores.send(Chore::Mount(id, layer)).unwrap_or_default();
        }
        Err(StoreError::Exists(target.clone()))
    }

    /// Sees to it that the lazy image below a snapshot is mounted.
    fn mount_lazy(&self, below: &Below, patience: Patience) -> Result<(), StoreError> {
        let (Some(id), Some(layer)) = (below.parents.last(), &below.lazy) else { return Ok(()) };
        let failed = |source| StoreError::Mount { image: layer.image.clone(), source };
        let images =
            self.images.as_ref().ok_or_else(|| failed("lazy images are switched off".into()))?;
        let dir = folders::content(&self.dir, *id);
        match patience {
            Patience::Disk if images.is_mounted(&dir) => Ok(()),
            Patience::Disk => Err(StoreError::Waits),
            Patience::Images => images.mount(layer, &dir).map_err(failed),
        }
    }

    /// How a snapshot is mounted that was prepared or viewed.
    pub(crate) fn mounts(&self, key: &str, patience: Patience) -> Result<Mount, StoreError> {
        let lineage = self.store.lineage(key)?;
        if lineage.kind == Kind::Committed {
            return Err(StoreError::NoMounts { key: key.to_owned() });
        }
        // After a restart of the machine it is not.
        self.mount_lazy(&lineage.below, patience)?;
        let owners = self.owners(&lineage.below, &self.store.stat(key)?.labels)?;
        self.show(&lineage, &owners).map_err(StoreError::Folder)?;
        Ok(self.mount_of(&lineage, &owners))
    }

    /// Commits a snapshot. containerd waits for this within a write transaction of its own, so what it takes
    /// of the disk is found out later.
    pub(crate) fn commit(
        &self,
        key: &str,
        names: (&str, &str),
        labels: &BTreeMap<String, String>,
    ) -> Result<(), StoreError> {
        let settle = |id| folders::settle(&self.dir, id);
        let id = self.store.commit(key, names, labels, settle)?;
        // If its thread is gone, it is measured when somebody asks.
        self.chores.send(Chore::Measure(id)).unwrap_or_default();
        Ok(())
    }

    /// Forgets a snapshot; its folder goes with the next [`clean_up`](Self::clean_up).
    pub(crate) fn remove(&self, key: &str) -> Result<(), StoreError> {
        let (id, lazy) = self.store.remove(key)?;
        unmount(&self.dir, &self.mapped, self.images.as_deref(), id);
        if let Some(layer) = lazy {
            // If the thread is gone, room is made when it is needed.
            self.chores.send(Chore::Forget(layer)).unwrap_or_default();
        }
        Ok(())
    }

    pub(crate) fn stat(&self, key: &str) -> Result<Info, StoreError> {
        self.store.stat(key)
    }

    pub(crate) fn update(&self, key: &str, update: Update) -> Result<Info, StoreError> {
        self.store.update(key, update)
    }

    pub(crate) fn list(&self) -> Result<Vec<Info>, StoreError> {
        self.store.list()
    }

    /// What a snapshot takes of the disk.
    pub(crate) fn usage(&self, key: &str) -> Result<Usage, StoreError> {
        let KnownUsage { id, kind, usage, lazy } = self.store.usage(key)?;
        if let (Some(layer), Some(images)) = (&lazy, &self.images) {
            // It grows and shrinks while it is used.
            return Ok(Usage { bytes: images.disk_usage(layer), inodes: 1 });
        }
        if let Some(usage) = usage {
            return Ok(usage);
        }
        let usage = folders::usage(&self.dir, id).map_err(StoreError::Folder)?;
        if kind == Kind::Committed {
            self.store.set_usage(id, usage)?;
        }
        Ok(usage)
    }

    /// The folder that a lazy image is mounted on, if a snapshot stands on one that is written in `upper`.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn image_below(&self, upper: &Path) -> Result<Option<PathBuf>, ReadStoreError> {
        let Some(id) = folders::written_in(&self.dir, upper) else { return Ok(None) };
        let below = self.store.below_id(id).map_err(ReadStoreError)?;
        let lowest = below.parents.last().filter(|_| below.lazy.is_some());
        Ok(lowest.map(|id| folders::content(&self.dir, *id)))
    }

    /// Removes the folders that belong to no snapshot.
    pub(crate) fn clean_up(&self) {
        clean_up(&self.dir, &self.store, &self.mapped, self.images.as_deref());
    }
}

fn measure_committed(dir: &Path, store: &Store, id: SnapshotId) {
    let measured = folders::usage(dir, id).map_err(StoreError::Folder);
    if let Err(err) = measured.and_then(|usage| store.set_usage(id, usage)) {
        tracing::debug!(id = id.0, error = %err, "snapshot is measured when somebody asks");
    }
}

fn make_spare(dir: &Path, spare: &Spare) {
    if let Err(error) = spare.make(dir) {
        tracing::debug!(%error, "the next snapshot makes its folders itself");
    }
}

fn forget(store: &Store, images: Option<&dyn LazyImages>, layer: &LazyLayer) {
    match (store.has_layer(&layer.layer), images) {
        (Ok(false), Some(images)) => images.forget(layer),
        (Ok(_), _) => {}
        (Err(error), _) => {
            tracing::warn!(layer = layer.layer, %error, "a layer stays until its room is needed");
        }
    }
}

fn mount_ahead(dir: &Path, images: Option<&dyn LazyImages>, id: SnapshotId, layer: &LazyLayer) {
    let mounted = images.map(|images| images.mount(layer, &folders::content(dir, id)));
    if let Some(Err(error)) = mounted {
        let image = &layer.image;
        tracing::warn!(image, error = %causes::in_full(error.as_ref()), "the first container will mount the image");
    }
}

/// Unmounts what is mounted for a snapshot that is none any more.
fn unmount(dir: &Path, mapped: &Mapped, images: Option<&dyn LazyImages>, id: SnapshotId) {
    if let Err(error) = mapped.hide(id) {
        tracing::warn!(id = id.0, %error, "what a removed snapshot was shown stays mounted");
    }
    let unmounted = images.map(|images| images.unmount(&folders::content(dir, id)));
    if let Some(Err(error)) = unmounted {
        let error = causes::in_full(error.as_ref());
        tracing::warn!(id = id.0, error, "the image of a removed snapshot stays mounted");
    }
}

fn clean_up(dir: &Path, store: &Store, mapped: &Mapped, images: Option<&dyn LazyImages>) {
    let orphans = store.with_ids(|known: &HashSet<SnapshotId>| {
        let is_unknown = |id: &SnapshotId| !known.contains(id);
        let shown = mapped.all()?.into_iter().filter(is_unknown);
        shown.for_each(|id| unmount(dir, mapped, images, id));
        let unknown = folders::all(dir)?.into_iter().filter(is_unknown);
        // Out of the way at once: the number of one whose transaction did not end is given out again.
        let put_away = |id| {
            unmount(dir, mapped, images, id);
            folders::put_away(dir, id)
        };
        unknown.map(put_away).collect::<io::Result<Vec<_>>>()
    });
    let removed = match orphans {
        Ok(Ok(_)) => folders::remove_put_away(dir),
        Ok(Err(err)) => Err(err),
        Err(error) => return tracing::warn!(%error, "removed snapshots stay on the disk"),
    };
    match removed {
        Ok(0) => {}
        Ok(folders) => tracing::debug!(folders, "folders of removed snapshots are gone"),
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "removed snapshots stay on the disk");
        }
    }
}

#[cfg(test)]
mod tests;

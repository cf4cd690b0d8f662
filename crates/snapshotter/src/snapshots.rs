//! The snapshots of one folder: what is known of them and what is written in them, kept in step.

use std::collections::{BTreeMap, HashSet};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use crate::folders;
use crate::mounts::{self, Mount};
use crate::store::{Info, Kind, OpenStoreError, SnapshotId, Store, StoreError, Update, Usage};

/// The snapshots of one folder. Calls may wait for the disk.
#[derive(Debug)]
pub struct Snapshots {
    dir: PathBuf,
    store: Arc<Store>,
    overlay_options: Vec<String>,
    /// Committed snapshots that are to be measured.
    measure: mpsc::Sender<SnapshotId>,
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

impl Snapshots {
    /// Opens the snapshots in `dir`, which is made if need be. What removed ones have left is put away
    /// meanwhile.
    ///
    /// # Errors
    /// When the store is lost, damaged or of a later version, and when the folder cannot be used.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
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
        let (measure, measured) = mpsc::channel();
        let (of_thread, dir_of_thread) = (Arc::clone(&store), dir.to_owned());
        let work = move || {
            clean_up(&dir_of_thread, &of_thread);
            for id in measured {
                measure_committed(&dir_of_thread, &of_thread, id);
            }
        };
        let thread = std::thread::Builder::new().name("snapshots".to_owned()).spawn(work);
        thread.map_err(io("starting a thread".to_owned()))?;
        let overlay_options = mounts::overlay_options();
        Ok(Self { dir: dir.to_owned(), store, overlay_options, measure })
    }

    /// Makes a snapshot that is written, or one that is read.
    pub(crate) fn create(
        &self,
        kind: Kind,
        names: (&str, &str),
        labels: &BTreeMap<String, String>,
    ) -> Result<Mount, StoreError> {
        let make = |lineage: &_| folders::make(&self.dir, lineage);
        let lineage = self.store.create(kind, names, labels, make)?;
        Ok(mounts::of(&self.dir, &lineage, &self.overlay_options))
    }

    /// How a snapshot is mounted that was prepared or viewed.
    pub(crate) fn mounts(&self, key: &str) -> Result<Mount, StoreError> {
        let lineage = self.store.lineage(key)?;
        if lineage.kind == Kind::Committed {
            return Err(StoreError::NoMounts { key: key.to_owned() });
        }
        Ok(mounts::of(&self.dir, &lineage, &self.overlay_options))
    }

    /// Commits a snapshot. containerd waits for this within a write transaction of its own, so what it takes
    /// of the disk is found out later.
    pub(crate) fn commit(
        &self,
        key: &str,
        names: (&str, &str),
        labels: &BTreeMap<String, String>,
    ) -> Result<(), StoreError> {
        let id = self.store.commit(key, names, labels)?;
        // If its thread is gone, it is measured when somebody asks.
        self.measure.send(id).unwrap_or_default();
        Ok(())
    }

    /// Forgets a snapshot; its folder goes with the next [`clean_up`](Self::clean_up).
    pub(crate) fn remove(&self, key: &str) -> Result<(), StoreError> {
        self.store.remove(key).map(drop)
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
        let (id, kind, known) = self.store.usage(key)?;
        if let Some(usage) = known {
            return Ok(usage);
        }
        let usage = folders::usage(&self.dir, id).map_err(StoreError::Folder)?;
        if kind == Kind::Committed {
            self.store.set_usage(id, usage)?;
        }
        Ok(usage)
    }

    /// Removes the folders that belong to no snapshot.
    pub(crate) fn clean_up(&self) {
        clean_up(&self.dir, &self.store);
    }
}

fn measure_committed(dir: &Path, store: &Store, id: SnapshotId) {
    let measured = folders::usage(dir, id).map_err(StoreError::Folder);
    if let Err(err) = measured.and_then(|usage| store.set_usage(id, usage)) {
        tracing::debug!(id = id.0, error = %err, "snapshot is measured when somebody asks");
    }
}

fn clean_up(dir: &Path, store: &Store) {
    let orphans = store.with_ids(|known: &HashSet<SnapshotId>| {
        let unknown = folders::all(dir)?.into_iter().filter(|id| !known.contains(id));
        // Out of the way at once: the number of one whose transaction did not end is given out again.
        unknown.map(|id| folders::put_away(dir, id)).collect::<io::Result<Vec<_>>>()
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

//! Layers that are shown to one user namespace, each as a mount of our own.
//!
//! They do not lie in the folder of snapshots: containerd may show all that is mounted there to another user
//! namespace, and what is shown so cannot be shown so again.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use sys::mount::{Unmount, bind_mapped, location, unmount};

use crate::folders::content;
use crate::ids::IdMapping;
use crate::store::SnapshotId;

/// The folders where snapshots see what is below them with the ids of a user namespace.
#[derive(Debug)]
pub(crate) struct Mapped {
    /// The folder of snapshots.
    dir: PathBuf,
    /// That of these mounts.
    mounts: PathBuf,
    /// One looks and mounts at a time.
    turn: Mutex<()>,
}

impl Mapped {
    /// Beside the folder of snapshots.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), mounts: dir.with_file_name("mapped"), turn: Mutex::default() }
    }

    /// Where a snapshot finds its parents, the nearest first.
    pub(crate) fn places(&self, id: SnapshotId, parents: usize) -> Vec<PathBuf> {
        let folder = self.folder(id);
        (0..parents).map(|number| folder.join(number.to_string())).collect()
    }

    /// Shows a snapshot its parents, unless that has been done.
    pub(crate) fn show(
        &self,
        id: SnapshotId,
        parents: &[SnapshotId],
        ids: &IdMapping,
    ) -> io::Result<()> {
        let _turn = self.turn.lock();
        let mut namespace = None;
        for (parent, place) in parents.iter().zip(self.places(id, parents.len())) {
            let source = content(&self.dir, *parent);
            DirBuilder::new().recursive(true).mode(0o700).create(&place)?;
            let (above, shown) = (location(&self.folder(id))?, location(&place)?);
            if shown.mount_id != above.mount_id {
                if shown.device == location(&source)?.device {
                    continue;
                }
                // A lazy image was mounted anew, and nobody serves the old mount.
                unmount(&place, Unmount::Detach)?;
            }
            let namespace = match &namespace {
                Some(namespace) => namespace,
                None => namespace.insert(ids.namespace()?),
            };
            bind_mapped(&source, &place, namespace.as_fd())?;
        }
        Ok(())
    }

    /// Takes away what a snapshot was shown.
    pub(crate) fn hide(&self, id: SnapshotId) -> io::Result<()> {
        let _turn = self.turn.lock();
        let folder = self.folder(id);
        let places = match fs::read_dir(&folder) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
            places => places?,
        };
        for place in places {
            let place = place?.path();
            match unmount(&place, Unmount::Detach) {
                // Nothing was mounted.
                Err(err) if err.kind() == io::ErrorKind::InvalidInput => {}
                unmounted => unmounted?,
            }
            // Not what is in it: that may be a layer.
            fs::remove_dir(place)?;
        }
        fs::remove_dir(folder)
    }

    /// The snapshots that were shown something.
    pub(crate) fn all(&self) -> io::Result<Vec<SnapshotId>> {
        match crate::folders::all(&self.mounts) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            all => all,
        }
    }

    fn folder(&self, id: SnapshotId) -> PathBuf {
        self.mounts.join(id.0.to_string())
    }
}

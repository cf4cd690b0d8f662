//! Taking layers out: for good, or aside.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Weak;

use oci::Digest;

use super::list::{allocated, layer_folders};
use super::{INCOMING, QUARANTINE, Store, TRASH, make_folder};
use crate::disk::{self, Name};

/// A layer could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Somebody has it open.
    #[error("layer {layer} is in use")]
    InUse {
        /// The layer.
        layer: Digest,
    },
    /// The disk failed.
    #[error("removing a layer from the cache")]
    Io(#[from] io::Error),
}

/// A layer could not be put into quarantine.
#[derive(Debug, thiserror::Error)]
#[error("putting layer {layer} into quarantine")]
pub struct QuarantineError {
    /// The layer.
    pub layer: Digest,
    /// Why.
    pub source: io::Error,
}

/// What [`Store::prune`] removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How many layers.
    pub layers: u32,
    /// How many bytes of the disk they took up, with those in quarantine.
    pub bytes: u64,
}

impl Store {
    /// Removes a layer that nobody has open, and says how many bytes that freed; 0 if the store does
    /// not have it.
    ///
    /// # Errors
    ///
    /// The layer is open, or the disk failed.
    pub fn remove(&self, digest: &Digest) -> Result<u64, RemoveError> {
        // Nobody opens it until it is gone.
        let mut open = self.open.lock();
        if open.get(digest).is_some_and(|layer| layer.strong_count() > 0) {
            return Err(RemoveError::InUse { layer: *digest });
        }
        let path = self.folder(digest);
        let freed = allocated(&path)?;
        let moved = self.throw_away(&path)?;
        open.remove(digest);
        drop(open);
        if let Some(trash) = moved {
            fs::remove_dir_all(trash)?;
        }
        Ok(freed)
    }

    /// Takes a layer that turned out wrong out of the store and keeps it aside with the reason. The
    /// next [`layer`](Self::layer) starts an empty one. Of each layer the last is kept, until
    /// [`prune`](Self::prune).
    ///
    /// The layer may be open; what has it open has to stop using it, and it can no longer be sealed.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn quarantine(&self, digest: &Digest, reason: &str) -> Result<(), QuarantineError> {
        let failed = |source| QuarantineError { layer: *digest, source };
        let mut open = self.open.lock();
        if let Some(layer) = open.remove(digest).as_ref().and_then(Weak::upgrade) {
            layer.detach();
        }
        let aside = self.root.join(QUARANTINE).join(digest.hex());
        let earlier = self.throw_away(&aside).map_err(failed)?;
        match fs::rename(self.folder(digest), &aside) {
            Ok(()) => fs::write(aside.join("reason"), format!("{reason}\n")).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        drop(open);
        earlier.map_or(Ok(()), |earlier| fs::remove_dir_all(earlier).map_err(failed))
    }

    /// Removes the layers that nobody has open and that need not be kept, and the quarantine.
    ///
    /// # Errors
    ///
    /// The disk failed; some may have been removed.
    pub fn prune(&self, keep: &dyn Fn(&Digest) -> bool) -> Result<Pruned, RemoveError> {
        let mut pruned = Pruned::default();
        let layers = layer_folders(&self.root)?.into_iter().map(|(digest, _)| digest);
        for digest in layers.filter(|digest| !keep(digest)) {
            match self.remove(&digest) {
                Ok(bytes) => {
                    pruned.layers += 1;
                    pruned.bytes += bytes;
                }
                Err(RemoveError::InUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        for entry in fs::read_dir(self.root.join(QUARANTINE))? {
            let path = entry?.path();
            pruned.bytes += allocated(&path)?;
            if let Some(trash) = self.throw_away(&path)? {
                fs::remove_dir_all(trash)?;
            }
        }
        Ok(pruned)
    }

    /// Clears away what a crash left: half-made and half-received layers, and the trash.
    pub(super) fn clear_away(&self) -> io::Result<()> {
        for (_, path) in layer_folders(&self.root)? {
            let folder = disk::open_folder(&path)?;
            let has = |name| disk::open(&folder, name).map(|file| file.is_some());
            if !has(Name::Map)? && !has(Name::Sealed)? {
                self.throw_away(&path)?;
                continue;
            }
            disk::unlink(&folder, Name::MapTmp)?;
            disk::unlink(&folder, Name::SealedTmp)?;
        }
        for folder in [INCOMING, TRASH] {
            let folder = self.root.join(folder);
            fs::remove_dir_all(&folder)?;
            make_folder(&folder)?;
        }
        Ok(())
    }

    /// Moves a folder into the trash, so that it is there whole or not at all, and says where to.
    pub(super) fn throw_away(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let Some(name) = path.file_name() else { return Ok(None) };
        let trash = self.root.join(TRASH).join(name);
        match fs::remove_dir_all(&trash) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match fs::rename(path, &trash) {
            Ok(()) => Ok(Some(trash)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

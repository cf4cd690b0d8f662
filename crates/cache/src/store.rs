//! The store: all layers under one folder, their room on the disk, and who has to go.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use oci::Digest;
use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::disk;
use crate::layer::{
    Clock, GRACE, Layer, LayerShape, Opening, Shared, read_map, read_marker, ticks,
};
use crate::map::{BootTag, is_shape};

mod holes;
mod incoming;
mod list;
mod remove;
mod room;

pub use holes::HoleSupport;
pub use incoming::{Incoming, KeepError};
pub use list::{ListError, StoredLayer, list};
pub use remove::{Pruned, QuarantineError, RemoveError};
pub(crate) use room::Allowance;
pub use room::UsageError;

/// How a store behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// How many bytes the store may take up on the disk; without it there is no limit.
    pub quota: Option<u64>,
    /// Names this boot of the machine, as `/proc/sys/kernel/random/boot_id` does.
    pub boot_id: String,
}

/// A store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    /// Another process has it open; two would contradict each other.
    #[error("another process uses the layer cache in {}", root.display())]
    InUse {
        /// The folder of the store.
        root: PathBuf,
    },
    /// The folder cannot be used.
    #[error("opening the layer cache in {}", root.display())]
    Io {
        /// The folder of the store.
        root: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A layer could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenLayerError {
    /// The bounds of the spans contradict themselves: the index is wrong.
    #[error("the index gives the layer impossible spans")]
    BadShape,
    /// The layer was proven to be shorter: the index is wrong.
    #[error("the index gives the layer {given} bytes, but {proven} were proven")]
    ContradictsSeal {
        /// How long the layer is.
        proven: u64,
        /// How long the index says it is.
        given: u64,
    },
    /// The layer is open under another index; close it first.
    #[error("the layer is in use with index {index}")]
    InUse {
        /// The index that it is in use with.
        index: Digest,
    },
    /// The descriptor that was handed over is not of the layer's data, or that has another length than
    /// the index says. Whatever is mounted on it has to be unmounted.
    #[error("the descriptor kept for the layer belongs to another file or has another length")]
    ForeignDescriptor,
    /// The disk is full.
    #[error("no room on the disk to start a layer")]
    NoSpace(#[source] io::Error),
    /// The disk failed.
    #[error("opening a layer of the cache")]
    Io(#[source] io::Error),
}

impl From<io::Error> for OpenLayerError {
    fn from(error: io::Error) -> Self {
        if disk::is_full(&error) { Self::NoSpace(error) } else { Self::Io(error) }
    }
}

type OpenLayers = HashMap<Digest, Weak<Layer>>;

/// All layers under one folder.
///
/// One process has it open at a time. Everything in it is readable by its owner only.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    holes: HoleSupport,
    shared: Arc<Shared>,
    open: Mutex<OpenLayers>,
    /// Held for its lock.
    _lock: File,
}

pub(crate) const LAYERS: &str = "layers";
const INCOMING: &str = "incoming";
const QUARANTINE: &str = "quarantine";
const TRASH: &str = "trash";
const LOCK: &str = "lock";

impl Store {
    /// Opens the store in `root`, making what is missing, and clears away what a crash left half-made.
    ///
    /// # Errors
    ///
    /// Another process has it open, or the disk failed.
    pub fn open(root: &Path, options: StoreOptions) -> Result<Self, OpenStoreError> {
        let failed = |source| OpenStoreError::Io { root: root.to_owned(), source };
        make_folder(root).map_err(failed)?;
        for folder in [LAYERS, INCOMING, QUARANTINE, TRASH] {
            make_folder(&root.join(folder)).map_err(failed)?;
        }
        let lock = lock(root)?;
        let StoreOptions { quota, boot_id } = options;
        let shared = Shared {
            boot: BootTag::of(&boot_id),
            clock: Clock::new(),
            grace: AtomicU32::new(ticks(GRACE)),
            allowance: Allowance::new(quota),
        };
        let store = Self {
            root: root.to_owned(),
            holes: holes::probe(root).map_err(failed)?,
            shared: Arc::new(shared),
            open: Mutex::default(),
            _lock: lock,
        };
        store.clear_away().map_err(failed)?;
        Ok(store)
    }

    /// Sets for how long nothing is given up of a layer that [unknown
    /// readers](Layer::unknown_reader) may be about to read; a minute if never set.
    ///
    /// It must be longer than any reader takes from the permission to read until it has read.
    #[must_use]
    pub fn with_grace(self, grace: Duration) -> Self {
        self.shared.grace.store(ticks(grace), Ordering::Relaxed);
        self
    }

    /// Whether the file system of the store gives punched blocks back. Where it does not, spans become
    /// missing when evicted, but only whole layers free room.
    #[must_use]
    pub const fn supports_holes(&self) -> HoleSupport {
        self.holes
    }

    /// Opens a layer, or starts an empty one.
    ///
    /// What is on disk is used if it was made for the same index and is sound; otherwise
    /// [`Layer::discarded`] says why not. A sealed layer is used with any index that gives it the same
    /// length. While a layer is open, the same one is returned.
    ///
    /// `data` is a descriptor of the layer's `data` file that outlived an earlier process. It must be
    /// given where the file is watched, because one opened by name would deadlock.
    ///
    /// # Errors
    ///
    /// The index is wrong, the descriptor is of another file, or the disk failed.
    pub fn layer(
        &self,
        digest: &Digest,
        shape: LayerShape,
        data: Option<OwnedFd>,
    ) -> Result<Arc<Layer>, OpenLayerError> {
        if !is_shape(shape.bytes, &shape.spans) {
            return Err(OpenLayerError::BadShape);
        }
        let mut open = self.open.lock();
        if let Some(layer) = open.get(digest).and_then(Weak::upgrade) {
            if *layer.shape() != shape {
                return Err(OpenLayerError::InUse { index: layer.shape().index });
            }
            return Ok(layer);
        }
        let path = self.folder(digest);
        make_folder(&path)?;
        let opening = Opening {
            digest: *digest,
            shape,
            folder: disk::open_folder(&path)?,
            data: data.map(File::from),
            proven: None,
            shared: Arc::clone(&self.shared),
        };
        opened(&mut open, opening)
    }

    /// Opens a layer as it lies on disk, without its index. `None` if the store does not have it.
    ///
    /// It is for looking at what nobody uses: verifying, evicting.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn stored(&self, digest: &Digest) -> Result<Option<Arc<Layer>>, OpenLayerError> {
        if let Some(layer) = self.open.lock().get(digest).and_then(Weak::upgrade) {
            return Ok(Some(layer));
        }
        let folder = match disk::open_folder(&self.folder(digest)) {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let sealed = read_marker(&folder, digest)?.ok().flatten();
        let map = read_map(&folder)?.and_then(|(_, map)| map.ok());
        let shape = match (map, sealed) {
            (Some(map), sealed)
                if sealed.as_ref().is_none_or(|sealed| sealed.bytes == map.bytes) =>
            {
                LayerShape { bytes: map.bytes, spans: map.starts, index: map.index }
            }
            (_, Some(sealed)) => {
                let spans = if sealed.bytes == 0 { Vec::new() } else { vec![0] };
                LayerShape { bytes: sealed.bytes, spans, index: sealed.index }
            }
            (_, None) => return Ok(None),
        };
        self.layer(digest, shape, None).map(Some)
    }

    fn folder(&self, digest: &Digest) -> PathBuf {
        self.root.join(LAYERS).join(digest.hex())
    }

    fn is_open(&self, digest: &Digest) -> bool {
        self.open.lock().get(digest).is_some_and(|layer| layer.strong_count() > 0)
    }
}

/// Opens a layer, and notes that it is open.
fn opened(open: &mut OpenLayers, opening: Opening) -> Result<Arc<Layer>, OpenLayerError> {
    let layer = Arc::new(opening.open()?);
    open.retain(|_, layer| layer.strong_count() > 0);
    open.insert(*layer.digest(), Arc::downgrade(&layer));
    Ok(layer)
}

fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn lock(root: &Path) -> Result<File, OpenStoreError> {
    let failed = |source| OpenStoreError::Io { root: root.to_owned(), source };
    let path = root.join(LOCK);
    let file =
        File::options().create(true).truncate(false).write(true).open(path).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(OpenStoreError::InUse { root: root.to_owned() }),
        Err(errno) => Err(failed(errno.into())),
    }
}

#[cfg(test)]
mod tests;

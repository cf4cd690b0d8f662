//! Layers that need no unpacking: who knows them, and what containerd says of a layer before it fetches it.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Knows which images need no unpacking, and mounts them. Calls may block, but for
/// [`is_mounted`](Self::is_mounted).
pub trait LazyImages: Send + Sync + fmt::Debug {
    /// What a layer is that containerd is about to fetch and unpack; nothing if it should, which is the
    /// answer to any doubt.
    fn find(&self, wanted: &WantedLayer<'_>) -> Option<LazyLayer>;

    /// Whether an image is mounted on `dir`, and served.
    fn is_mounted(&self, dir: &Path) -> bool;

    /// Mounts the layers up to this one on `dir`, unless that has been done.
    ///
    /// # Errors
    /// When the image cannot be had now.
    fn mount(&self, layer: &LazyLayer, dir: &Path) -> Result<(), LazyError>;

    /// What a layer takes of the disk now, in bytes.
    fn disk_usage(&self, layer: &LazyLayer) -> u64;

    /// No snapshot has this layer any more: what is kept of it is not needed for containerd.
    fn forget(&self, layer: &LazyLayer);

    /// Unmounts what [`mount`](Self::mount) mounted on `dir`, if anything.
    ///
    /// # Errors
    /// When it is in use.
    fn unmount(&self, dir: &Path) -> Result<(), LazyError>;
}

/// Why a lazy image is not mounted.
pub type LazyError = Box<dyn Error + Send + Sync>;

/// A layer, as containerd's labels describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedLayer<'a> {
    /// The image's reference, as it is pulled.
    pub image: &'a str,
    /// Digest of the image's manifest.
    pub manifest: &'a str,
    /// Digest of the layer.
    pub layer: &'a str,
    /// The chain id of the layer and all below it.
    pub chain: &'a str,
    /// How many layers are below it.
    pub below: u32,
}

/// A layer of an image that is mounted instead of unpacked: all that is needed to mount it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyLayer {
    /// The image's reference, with the digest of its manifest.
    pub image: String,
    /// The image's reference as it was pulled.
    pub pulled_as: String,
    /// Digest of the layer.
    pub layer: String,
    /// The chain id of the layer and all below it.
    pub chain: String,
    /// How many layers there are up to this one, itself included.
    pub layers: u32,
    /// Whether that is all of the image.
    pub is_whole: bool,
}

impl<'a> WantedLayer<'a> {
    /// Reads containerd's labels; nothing if they are not all there.
    pub(crate) fn new(labels: &'a BTreeMap<String, String>, below: u32) -> Option<Self> {
        let label = |key: &str| labels.get(key).map(String::as_str);
        Some(Self {
            image: label("containerd.io/snapshot/cri.image-ref")?,
            manifest: label("containerd.io/snapshot/cri.manifest-digest")?,
            layer: label("containerd.io/snapshot/cri.layer-digest")?,
            chain: label(TARGET)?,
            below,
        })
    }
}

/// The label that names what a snapshot is to be committed as.
pub(crate) const TARGET: &str = "containerd.io/snapshot.ref";

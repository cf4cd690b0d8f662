//! Images that the daemon knows: what is written down of them, and what is loaded of them.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};

use anyhow::{Context, Result};
use artifacts::{Image, ImageName, StoredIndex};
use cache::LayerShape;
use fill::{Layer, Reader};
use mounts::ImageToMount;
use oci::{Descriptor, Digest, ImageConfig, Manifest};
use policy::Completion;
use serde::{Deserialize, Serialize};
use tree::{LaterTree, Tree};

use crate::program_files::{Asked, Command, Layers, ProgramFiles, Reach};
use crate::protocol::{Access, MountTuning};

/// What is written down of an image, so that it needs no registry after a restart.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) name: String,
    pub(super) access: Access,
    pub(super) descriptor: Descriptor,
    pub(super) manifest: Manifest,
    pub(super) config: ImageConfig,
    /// Where its index came from, for `hermes explain`.
    pub(super) index: String,
    pub(super) tuning: MountTuning,
}

/// An image whose layers are in the engine.
#[derive(Debug)]
pub(super) struct LoadedImage {
    pub(super) record: ImageRecord,
    pub(super) tree: Arc<LaterTree>,
    pub(super) layers: Vec<Arc<Layer>>,
    /// Whether all of it is fetched, as far as there is room.
    pub(super) is_completed: AtomicBool,
    /// What is fetched because the index says that the start of the image's own command needs it: the place of a
    /// layer, and a range of its tar in bytes.
    pub(super) start: Vec<(usize, Range<u64>)>,
    /// What was asked for of its programs and their libraries.
    pub(super) asked: Asked,
}

impl ImageRecord {
    pub(super) fn new(image: &Image, access: &Access, tuning: MountTuning, index: &str) -> Self {
        Self {
            name: image.name.clone(),
            access: access.clone(),
            descriptor: image.descriptor.clone(),
            manifest: image.manifest.clone(),
            config: image.config.clone(),
            index: index.to_owned(),
            tuning,
        }
    }

    pub(super) fn image(&self) -> Result<Image> {
        let parts = (self.descriptor.clone(), self.manifest.clone(), self.config.clone());
        Ok(Image::from_parts(self.name.clone(), parts.0, parts.1, parts.2)?)
    }

    pub(super) fn image_name(&self) -> Result<ImageName> {
        Ok(self.name.parse()?)
    }

    /// Reads what is written down of the image with this manifest.
    pub(super) fn load(root: &Path, manifest: &Digest) -> Result<Self> {
        let path = folder(root, manifest).join(RECORD);
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
    }

    /// All that are written down. A damaged one is for whoever mounts that image.
    pub(super) fn all(root: &Path) -> io::Result<Vec<Self>> {
        let folders = match fs::read_dir(root.join(IMAGES)) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            folders => folders?,
        };
        let mut records = Vec::new();
        for folder in folders {
            let bytes = fs::read(folder?.path().join(RECORD)).unwrap_or_default();
            records.extend(serde_json::from_slice::<Self>(&bytes));
        }
        Ok(records)
    }

    /// Removes all that is written down of it.
    pub(super) fn remove(&self, root: &Path) -> io::Result<()> {
        fs::remove_dir_all(folder(root, &self.descriptor.digest))
    }

    pub(super) fn save(&self, root: &Path) -> io::Result<()> {
        replace(&folder(root, &self.descriptor.digest).join(RECORD), self)
    }

    /// Writes down that the daemons to come fetch all of the image, unless that is written already.
    pub(super) fn keep_completing(&self, root: &Path) -> io::Result<()> {
        if self.tuning.completion == Completion::Now {
            return Ok(());
        }
        let tuning = MountTuning { completion: Completion::Now, ..self.tuning };
        Self { tuning, ..self.clone() }.save(root)
    }
}

impl LoadedImage {
    pub(super) fn to_mount(&self, root: &Path) -> ImageToMount {
        let manifest = self.record.descriptor.digest;
        ImageToMount {
            manifest,
            tree: Arc::clone(&self.tree),
            layers: self.layers.clone(),
            metadata: folder(root, &manifest).join("metadata.erofs"),
        }
    }

    /// Starts to fetch what the index says of the start of the image's own command; returns whether it says
    /// anything.
    pub(super) fn prefetch_start(&self) -> bool {
        for (layer, range) in &self.start {
            self.layers[*layer].prefetch(range.clone());
        }
        !self.start.is_empty()
    }

    /// Asks for the files that `command` needs. Blocks until all of them are known.
    pub(super) fn prefetch_files(&self, command: &Command, reach: Reach) {
        // Whoever mounts it has it already.
        let Ok(tree) = self.tree.get() else { return };
        let files = self.files_of(tree, command).find(reach);
        tracing::debug!(image = self.record.name, files, "program's files asked for");
    }

    /// Asks for what loading a library needs, if that is what lies at byte `at` of a layer, and its beginning
    /// is there. Blocks until all of it is known.
    pub(super) fn follow(&self, layer: u32, at: u64) {
        let Ok(tree) = self.tree.get() else { return };
        let Some(node) = tree.file_at(layer, at) else { return };
        let tree::NodeKind::File(file) = &tree.node(node).kind else { return };
        let holder = self.layers.get(layer as usize);
        if !holder.is_some_and(|layer| layer.has(file.offset..file.offset.saturating_add(HEADERS)))
        {
            return;
        }
        let files = self.files_of(tree, &Command::of(&self.record.config)).follow(node);
        if files > 0 {
            let file = tree.path_of(node);
            let file = String::from_utf8_lossy(&file);
            tracing::debug!(image = self.record.name, %file, files, "library's files asked for");
        }
    }

    fn files_of<'a>(&'a self, tree: &'a Tree, command: &'a Command) -> ProgramFiles<'a> {
        ProgramFiles { tree, layers: self, command, asked: &self.asked }
    }

    /// What to say to whoever mounts it with another deadline than it is served with: a deadline belongs
    /// to the layers, which all mounts share.
    pub(super) fn other_deadline(&self, wanted: MountTuning) -> Option<String> {
        let deadline = self.record.tuning.deadline;
        (deadline != wanted.deadline).then(|| {
            format!(
                "reads of this image fail after {} s, as its first mount wanted, not after {} s",
                deadline.as_secs(),
                wanted.deadline.as_secs()
            )
        })
    }

    pub(super) fn bytes_total(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes()).sum()
    }

    pub(super) fn bytes_present(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes_present()).sum()
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.layers.iter().all(|layer| layer.is_sealed())
    }
}

/// What an index says of the start of an image's own command is fetched up to a limit.
#[derive(Debug)]
pub(super) struct Start {
    bytes_left: u64,
}

impl Start {
    /// While the index is still coming, which everything waits for.
    pub(super) const fn before_the_mount() -> Self {
        Self { bytes_left: MOST_BEFORE_THE_MOUNT }
    }

    /// What is fetched of `ranges` of an image's layers, which may lie outside, from the moment on at which it is
    /// mounted.
    pub(super) fn of(
        ranges: Vec<(usize, Range<u64>)>,
        layers: &[Arc<Layer>],
    ) -> Vec<(usize, Range<u64>)> {
        let mut start = Self { bytes_left: MOST_START };
        let take = |(place, range): (usize, Range<u64>)| {
            let range = start.take(layers.get(place)?, &range);
            (!range.is_empty()).then_some((place, range))
        };
        ranges.into_iter().filter_map(take).collect()
    }

    /// What is fetched of `range` of a layer, which may lie outside.
    pub(super) fn take(&mut self, layer: &Layer, range: &Range<u64>) -> Range<u64> {
        let end = range.end.min(layer.bytes()).min(range.start.saturating_add(self.bytes_left));
        self.bytes_left -= end.saturating_sub(range.start);
        range.start..end
    }
}

impl Layers for LoadedImage {
    fn want(&self, layer: u32, range: Range<u64>) {
        if let Some(layer) = self.layers.get(layer as usize) {
            layer.prefetch(range);
        }
    }

    fn read_exact_at(&self, layer: u32, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let layer = self.layers.get(layer as usize).ok_or(io::ErrorKind::NotFound)?;
        let (tell, told) = mpsc::sync_channel(1);
        // Nobody is left to be told only if this thread is gone.
        let then = Box::new(move |result| tell.send(result).unwrap_or_default());
        layer.request(at..at + buffer.len() as u64, Reader::OURSELVES, then);
        told.recv().map_err(io::Error::other)?.map_err(io::Error::other)?;
        layer.data().read_exact_at(buffer, at)
    }
}

/// How the index of a layer divides it.
pub(super) fn shape_of(index: &StoredIndex) -> LayerShape {
    let spans = &index.ztoc.spans;
    LayerShape {
        bytes: spans.uncompressed_size(),
        spans: spans.ids().map(|span| spans.uncompressed_range(span).start).collect(),
        index: index.digest,
    }
}

/// Writes `value` to a file that is either the old one or the new one, also after a crash.
pub(super) fn replace(path: &Path, value: &impl Serialize) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    sys::files::replace_durably(path, &serde_json::to_vec(value)?)
}

fn folder(root: &Path, manifest: &Digest) -> PathBuf {
    root.join(IMAGES).join(manifest.hex())
}

/// Where the headers of a library are, in bytes.
const HEADERS: u64 = 4096;

const IMAGES: &str = "images";

const RECORD: &str = "image.json";

/// Bytes of the tars that are asked for before the mount: the program and its libraries.
const MOST_BEFORE_THE_MOUNT: u64 = 8 << 20;

/// More bytes of the tars are not fetched because an index says that the start needs them.
const MOST_START: u64 = 256 << 20;

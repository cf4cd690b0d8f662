//! containerd's lazy images: which they are, and how their layers are mounted.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use artifacts::{Image, ImageName, Origin, find_indexes};
use mounts::MountState;
use oci::{Descriptor, Digest, Platform};
use parking_lot::Mutex;
use snapshotter::{LazyError, LazyImages, LazyLayer, WantedLayer};
use tokio::runtime::Handle;

use super::Daemon;
use super::images::{ImageRecord, LoadedImage};
use crate::failure::in_full;
use crate::pattern::Pattern;
use crate::protocol::{Access, MountRequest, MountTuning};

/// The lazy images of containerd.
pub(super) struct ContainerdImages {
    daemon: Arc<Daemon>,
    runtime: Handle,
    access: Access,
    /// Which images may be lazy.
    patterns: Vec<Pattern>,
    /// What was decided of an image, by its manifest.
    decisions: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<Option<Decision>>>>>,
    /// One mount on a folder at a time.
    mounting: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
}

/// Whether an image is lazy.
#[derive(Debug, Clone)]
struct Decision {
    /// Set if it is.
    image: Option<Arc<Image>>,
    /// When it was decided: what was in the way may have gone.
    at: Instant,
}

impl fmt::Debug for ContainerdImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContainerdImages").field("patterns", &self.patterns).finish_non_exhaustive()
    }
}

impl ContainerdImages {
    pub(super) fn new(
        daemon: Arc<Daemon>,
        runtime: Handle,
        access: Access,
        patterns: Vec<Pattern>,
    ) -> Self {
        let (decisions, mounting) = (Mutex::default(), Mutex::default());
        Self { daemon, runtime, access, patterns, decisions, mounting }
    }

    /// The image with this manifest, if it is lazy. The first to ask waits for the registry, the others
    /// for him.
    async fn decide(&self, name: &ImageName, manifest: Digest) -> Option<Arc<Image>> {
        let decision = Arc::clone(self.decisions.lock().entry(manifest).or_default());
        let mut decision = decision.lock().await;
        if let Some(Decision { image, at }) = &*decision
            && (image.is_some() || at.elapsed() < ASK_AGAIN)
        {
            return image.clone();
        }
        let found = tokio::time::timeout(PATIENCE, self.look_for_index(name)).await;
        let found = found.unwrap_or_else(|_late| bail!("that took more than {PATIENCE:?}"));
        let image = match found {
            Ok(image) => Some(Arc::new(image)),
            Err(err) => {
                let why = in_full(&err);
                tracing::info!(image = %name, why, "containerd unpacks the image: it is not lazy");
                None
            }
        };
        *decision = Some(Decision { image: image.clone(), at: Instant::now() });
        image
    }

    /// Fails if no layer of the image has an index. What there is, is in the store then.
    async fn look_for_index(&self, name: &ImageName) -> Result<Image> {
        let origin = Origin::open(name, &self.daemon.client(&self.access))?;
        let platform = Platform::host();
        let found = super::names::resolve(&self.daemon.root, &origin, &platform).await?.found;
        let (image, indexes) = tokio::join!(
            origin.configure(found.clone(), &platform),
            find_indexes(&origin, (&found.descriptor, &found.manifest), &self.daemon.indexes),
        );
        let indexes = indexes?;
        ensure!(indexes.layers.iter().any(Option::is_some), "{}", indexes.reason);
        Ok(image?)
    }

    fn mount_image(&self, layer: &LazyLayer, dir: &Path) -> Result<()> {
        let mounted = self.daemon.front_ends.list();
        if mounted.iter().any(|mount| mount.record.dir == dir && mount.state == MountState::Served)
        {
            return Ok(());
        }
        let request = MountRequest {
            image: layer.image.clone(),
            dir: dir.to_owned(),
            backend: None,
            platform: None,
            access: self.access.clone(),
            tuning: MountTuning::default(),
            command: Vec::new(),
        };
        let quietly = |_: &str, _: u64, _: u64| {};
        let part = (!layer.is_whole).then_some(layer);
        self.runtime.block_on(self.daemon.mount_for_containerd(&request, part, &quietly))
    }
}

impl LazyImages for ContainerdImages {
    fn find(&self, wanted: &WantedLayer<'_>) -> Option<LazyLayer> {
        let ImageName::Registry(reference) = wanted.image.parse().ok()? else { return None };
        let shown = reference.to_string();
        if !self.patterns.iter().any(|pattern| pattern.matches(&shown)) {
            return None;
        }
        let manifest: Digest = wanted.manifest.parse().ok()?;
        let name = ImageName::Registry(reference.with_digest(manifest));
        let image = self.runtime.block_on(self.decide(&name, manifest))?;
        let below = usize::try_from(wanted.below).ok()?;
        let layer = image.layers.get(below)?;
        let diff_ids = image.config.rootfs.diff_ids.get(..=below)?;
        if layer.digest.to_string() != wanted.layer
            || chain_id(diff_ids)?.to_string() != wanted.chain
        {
            tracing::warn!(image = %name, layer = wanted.layer, "containerd unpacks a layer: it stands elsewhere in the image");
            return None;
        }
        Some(LazyLayer {
            image: name.to_string(),
            chain: wanted.chain.to_owned(),
            layers: wanted.below + 1,
            is_whole: below + 1 == image.layers.len(),
        })
    }

    fn mount(&self, layer: &LazyLayer, dir: &Path) -> Result<(), LazyError> {
        let turn = Arc::clone(self.mounting.lock().entry(dir.to_owned()).or_default());
        let _turn = turn.lock();
        Ok(self.mount_image(layer, dir)?)
    }

    fn unmount(&self, dir: &Path) -> Result<(), LazyError> {
        self.mounting.lock().remove(dir);
        if self.daemon.front_ends.list().iter().any(|mount| mount.record.dir == dir) {
            self.daemon.umount(dir, false)?;
        }
        Ok(())
    }
}

impl Daemon {
    /// Mounts an image for containerd: all of it, or the layers up to `part`.
    async fn mount_for_containerd(
        &self,
        request: &MountRequest,
        part: Option<&LazyLayer>,
        progress: super::Progress<'_>,
    ) -> Result<()> {
        let Some(part) = part else { return self.mount(request, progress).await.map(drop) };
        let name = request.image.parse()?;
        let origin = Origin::open(&name, &self.client(&request.access))?;
        let platform = Platform::host();
        let found = super::names::resolve(&self.root, &origin, &platform).await?.found;
        let _kept = self.keep(&found);
        let whole = self.prepare(&origin, found, &platform, request, progress).await?;
        let loaded = self.load_part(&origin, &whole.record, part)?;
        let to_mount = loaded.to_mount(&self.root);
        self.front_ends.mount(&to_mount, &request.dir, request.backend)?;
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
        let mut indexes = Vec::new();
        for layer in &image.layers {
            let stored = self.indexes.load(&layer.digest)?;
            indexes.push(stored.with_context(|| format!("the index of {} is gone", layer.digest))?);
        }
        self.assemble(record, &image, origin, (indexes, Vec::new()), None)
    }
}

/// What the layers up to the last of these come to, as containerd names it.
fn chain_id(diff_ids: &[Digest]) -> Option<Digest> {
    let (first, rest) = diff_ids.split_first()?;
    Some(rest.iter().fold(*first, |chain, next| Digest::of(format!("{chain} {next}").as_bytes())))
}

/// How long a pull waits for the registry to say whether there is an index.
const PATIENCE: Duration = Duration::from_secs(10);

/// For so long an image stays what it was found to be, if that is not lazy.
const ASK_AGAIN: Duration = Duration::from_secs(60);

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

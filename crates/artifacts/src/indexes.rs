//! The index of an image: looked for here, then where the image lies.

use futures_util::StreamExt;
use futures_util::stream;
use oci::soci::{self, SociIndex, Version, ZtocEntry};
use oci::{Descriptor, Digest, Manifest};

use crate::index_store::{IndexOrigin, IndexStore, StoreIndexError, StoredIndex};
use crate::local::MAX_DOCUMENT;
use crate::origin::{Image, ImageLayer, Origin, OriginError};
use crate::streams::{self, FindStreamsError};

/// What there is for each layer of an image, in the order of its layers.
#[derive(Debug)]
pub struct FoundIndexes {
    /// The index of each layer, or none.
    pub layers: Vec<Option<StoredIndex>>,
    /// In a sentence for the user: where they came from, or why there are none.
    pub reason: String,
}

/// Finds an index for each layer of the image with this manifest: in the store, then by the manifest's annotation, then among the
/// referrers. What is found remotely is stored.
///
/// An image without an index, or with one that cannot be had or used, is no error: the reason says
/// what was met.
///
/// # Errors
/// When the store itself fails.
pub async fn find_indexes(
    origin: &Origin,
    (descriptor, manifest): (&Descriptor, &Manifest),
    store: &IndexStore,
) -> Result<FoundIndexes, StoreIndexError> {
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for layer in &manifest.layers {
        layers.push(store.load(&layer.digest)?);
    }
    if layers.iter().all(Option::is_some) {
        return Ok(FoundIndexes {
            layers,
            reason: "an index of every layer is on this machine".to_owned(),
        });
    }
    let mut reason = match remote_index(origin, descriptor, manifest).await {
        Ok(Some((index, from))) => {
            fetch_ztocs(origin, manifest, store, (&index, from), &mut layers).await?
        }
        Ok(None) => "no index in the registry: neither annotation nor referrer".to_owned(),
        Err(err) => format!("the registry's index cannot be used: {}", in_full(&err)),
    };
    match streams::find(origin, (descriptor, manifest), store, &mut layers).await {
        Ok(0) => {}
        Ok(count) => reason.push_str(&format!("; {count} of its zstd layers have one of Hermes")),
        Err(FindStreamsError::Store(err @ StoreIndexError::Io { .. })) => return Err(err),
        Err(err) => {
            let why = in_full(&err);
            reason.push_str(&format!("; that of zstd layers cannot be used: {why}"));
        }
    }
    Ok(FoundIndexes { layers, reason })
}

/// The index that the image's place has for it, and how it was found.
async fn remote_index(
    origin: &Origin,
    descriptor: &Descriptor,
    manifest: &Manifest,
) -> Result<Option<(SociIndex, IndexOrigin)>, OriginError> {
    if let Some(digest) = soci::index_of(manifest) {
        let descriptor = Descriptor::new(oci::media_type::OCI_MANIFEST, digest, 0);
        match read_index(origin, &descriptor).await {
            Ok(index) => return Ok(Some((index, IndexOrigin::Annotation))),
            // The image was copied without its index; a referrer may be there all the same.
            Err(err) => {
                tracing::debug!(image = %origin.name(), error = %err, "annotated index is gone");
            }
        }
    }
    let subject = &descriptor.digest;
    let found = origin.referrers(subject, Version::V1.artifact_type()).await?;
    match found.first() {
        Some(first) => Ok(Some((read_index(origin, first).await?, IndexOrigin::Referrer))),
        None => Ok(None),
    }
}

async fn read_index(origin: &Origin, descriptor: &Descriptor) -> Result<SociIndex, OriginError> {
    let bytes = origin.document(descriptor).await?;
    SociIndex::from_bytes(&bytes).map_err(|err| OriginError::NotAnImage {
        image: format!("index {} of {}", descriptor.digest, origin.name()),
        why: err.to_string(),
    })
}

/// Fetches the zTOCs that are missing, several at a time, and says how it went.
async fn fetch_ztocs(
    origin: &Origin,
    manifest: &Manifest,
    store: &IndexStore,
    (index, from): (&SociIndex, IndexOrigin),
    layers: &mut [Option<StoredIndex>],
) -> Result<String, StoreIndexError> {
    let mut wanted = Vec::new();
    for (place, layer) in manifest.layers.iter().enumerate() {
        let missing = layers.get(place).is_some_and(Option::is_none);
        if let (true, Some(ztoc)) = (missing, index.ztoc_for_layer(&layer.digest)) {
            wanted.push(fetch_ztoc(origin.clone(), place, ztoc.clone()));
        }
    }
    let mut trouble = None;
    let mut answers = stream::iter(wanted).buffer_unordered(ZTOCS_AT_A_TIME);
    while let Some((place, answer)) = answers.next().await {
        let Some(layer) = manifest.layers.get(place) else { continue };
        let stored = match answer {
            Ok(bytes) => store.save(&layer.digest, layer.size, &bytes, from),
            Err(err) => {
                trouble = Some(in_full(&err));
                continue;
            }
        };
        match (stored, layers.get_mut(place)) {
            (Ok(stored), Some(slot)) => *slot = Some(stored),
            (Err(err @ StoreIndexError::Unusable { .. }), _) => trouble = Some(err.to_string()),
            (Err(err), _) => return Err(err),
            (Ok(_), None) => {}
        }
    }
    let have = layers.iter().flatten().count();
    Ok(match trouble {
        None => format!("index from {from}; {have} of {} layers have one", layers.len()),
        Some(why) => format!("index from {from}, in part: {why}"),
    })
}

async fn fetch_ztoc(
    origin: Origin,
    place: usize,
    ztoc: Descriptor,
) -> (usize, Result<bytes::Bytes, OriginError>) {
    (place, origin.blob(&ztoc.digest, ztoc.size.min(MAX_ZTOC)).await)
}

/// An index cannot be pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushIndexError {
    /// No layer has an index.
    #[error("no layer of {0} has an index on this machine; run `hermes index build` first")]
    Nothing(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreIndexError),
    /// The image's place refused it.
    #[error("pushing the index")]
    Push(#[from] OriginError),
}

/// What was pushed of an image's indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushedIndexes {
    /// The SOCI index of the layers that can be entered anywhere.
    pub soci: Option<Descriptor>,
    /// Hermes' own artifact with the indexes of zstd layers.
    pub streams: Option<Descriptor>,
}

/// Pushes the indexes that this machine has for `image` to where the image lies: as a SOCI v1 index
/// that refers to it, and those of zstd layers as an artifact that SOCI's tools pass over.
///
/// # Errors
/// [`PushIndexError`].
pub async fn push_indexes(
    origin: &Origin,
    image: &Image,
    store: &IndexStore,
) -> Result<PushedIndexes, PushIndexError> {
    let streams = streams::push(origin, image, store).await?;
    let mut entries = Vec::new();
    for layer in &image.layers {
        let Some(stored) = store.load(&layer.digest)?.filter(|stored| !stored.streamed) else {
            continue;
        };
        let blob = store.blob(&layer.digest)?;
        entries.push(entry(layer, &stored, &blob));
        origin.push_blob(&stored.digest, blob.into()).await?;
    }
    if entries.is_empty() {
        return match streams {
            Some(_) => Ok(PushedIndexes { soci: None, streams }),
            None => Err(PushIndexError::Nothing(image.name.clone())),
        };
    }
    let index = SociIndex::v1(&image.descriptor, entries);
    origin.push_blob(&Digest::of(soci::CONFIG_BYTES), soci::CONFIG_BYTES.into()).await?;
    let descriptor = index.descriptor();
    origin.push_manifest(&descriptor, index.to_bytes().into()).await?;
    Ok(PushedIndexes { soci: Some(descriptor), streams })
}

fn entry(layer: &ImageLayer, stored: &StoredIndex, blob: &[u8]) -> ZtocEntry {
    ZtocEntry {
        digest: stored.digest,
        size: blob.len() as u64,
        layer_digest: layer.digest,
        layer_media_type: layer.media_type.clone(),
        span_size: stored.ztoc.spans.span_size(),
        disable_xattrs: false,
    }
}

/// An error and all its causes, in one line.
fn in_full(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        text.push_str(": ");
        text.push_str(&err.to_string());
        cause = err.source();
    }
    text
}

const _: () = assert!(MAX_DOCUMENT < MAX_ZTOC);

/// A zTOC of an image layer of 100 GB, with room to spare.
pub(crate) const MAX_ZTOC: u64 = 2 << 30;

const ZTOCS_AT_A_TIME: usize = 8;

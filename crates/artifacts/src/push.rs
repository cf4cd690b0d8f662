//! Indexes of this machine, pushed to where their image lies: beside the image, or in a copy of it that
//! names them.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use oci::soci::{
    self, Conversion, SociIndex, ZtocEntry, convert_index, convert_manifest, wrap_manifest,
};
use oci::span_index::{SpanIndex, SpanIndexEntry};
use oci::{Descriptor, Digest, ManifestOrIndex, media_type, parse_manifest};

use crate::index_store::{IndexInParts, IndexStore, StoreIndexError, StoredIndex};
use crate::indexes::{FetchWindowsError, have_windows};
use crate::origin::{FoundAs, Image, ImageLayer, Origin, OriginError};

/// An index cannot be pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushIndexError {
    /// No layer has an index.
    #[error("no layer of {0} has an index on this machine; run `hermes index build` first")]
    Nothing(String),
    /// SOCI has no index for any of the layers.
    #[error("all layers of {0} with an index are zstd, which SOCI cannot index")]
    NothingForSoci(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreIndexError),
    /// What the store lacks could not be fetched.
    #[error(transparent)]
    Windows(#[from] FetchWindowsError),
    /// There is no memory.
    #[error("compressing the index")]
    Compress(#[source] io::Error),
    /// The image's place refused it.
    #[error("pushing the index")]
    Push(#[from] OriginError),
}

/// What of each layer's tar, in bytes, the image's own command needs to start, the first first.
pub type StartRanges = HashMap<Digest, Vec<Range<u64>>>;

/// What was pushed of an image's indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushedIndexes {
    /// The SOCI index of the layers that can be entered anywhere.
    pub soci: Option<Descriptor>,
    /// Hermes' own, of all layers.
    pub own: Descriptor,
}

/// Pushes the indexes that this machine has for `image` to where the image lies: as a SOCI v1 index that
/// refers to it, and as Hermes' own beside that, which SOCI's tools pass over and which says `start`, too.
///
/// # Errors
/// [`PushIndexError`].
pub async fn push_indexes(
    origin: &Origin,
    image: &Image,
    store: &IndexStore,
    start: &StartRanges,
) -> Result<PushedIndexes, PushIndexError> {
    let Ztocs { soci, own } = push_ztocs(origin, image, store, start).await?;
    let own = push_own_index(origin, &image.descriptor, own).await?;
    if soci.is_empty() {
        return Ok(PushedIndexes { soci: None, own });
    }
    let index = SociIndex::v1(&image.descriptor, soci);
    let soci = Some(push_soci_index(origin, FoundAs::Referrer, &index).await?);
    Ok(PushedIndexes { soci, own })
}

/// What a conversion has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertedImage {
    /// The indexes: one of SOCI v2, always.
    pub indexes: PushedIndexes,
    /// The manifest that names it.
    pub manifest: Descriptor,
    /// What the tag means: an index of images.
    pub root: Descriptor,
}

/// Pushes the indexes that this machine has for `image` as a SOCI v2 index, and a manifest of the image
/// that names it, under `tag`; as `soci convert` does. Images for other platforms stay as they are
/// beside it. The image itself is not changed.
///
/// # Errors
/// [`PushIndexError`].
pub async fn push_converted(
    origin: &Origin,
    image: &Image,
    (store, start): (&IndexStore, &StartRanges),
    tag: &str,
) -> Result<ConvertedImage, PushIndexError> {
    let (root, bytes) = origin.root().await?;
    let unusable = |why: &dyn std::fmt::Display| PushIndexError::Push(origin.not_an_image(why));
    let parsed = parse_manifest(Some(&root.media_type), &bytes).map_err(|err| unusable(&err))?;
    let Ztocs { soci, own } = push_ztocs(origin, image, store, start).await?;
    if soci.is_empty() {
        return Err(PushIndexError::NothingForSoci(image.name.clone()));
    }
    let index = SociIndex::v2(soci);
    let soci_index = push_soci_index(origin, FoundAs::Part, &index).await?;
    let converted = convert_manifest(&image.manifest, &soci_index.digest);
    let manifest = converted.descriptor.clone();
    origin.push_manifest(FoundAs::Part, &manifest, converted.bytes.into()).await?;
    let own = push_own_index(origin, &manifest, own).await?;
    let indexes = PushedIndexes { soci: Some(soci_index.clone()), own };
    let original = image.descriptor.digest;
    let conversion = Conversion { original, manifest: converted.descriptor, soci_index };
    let outer = match parsed {
        ManifestOrIndex::Manifest(_) => wrap_manifest(&image.config.platform(), &conversion),
        ManifestOrIndex::Index(images) => {
            if !images.manifests.iter().any(|entry| entry.digest == original) {
                return Err(unusable(&"it was replaced meanwhile; try again"));
            }
            convert_index(&images, &[conversion])
        }
    };
    let bytes = outer.to_bytes();
    let root = Descriptor::of(media_type::OCI_INDEX, &bytes);
    origin.push_manifest(FoundAs::Tag(tag), &root, bytes.into()).await?;
    Ok(ConvertedImage { indexes, manifest, root })
}

/// The zTOCs of an image's layers, described for the indexes that name them.
#[derive(Debug, Default)]
struct Ztocs {
    soci: Vec<ZtocEntry>,
    own: Vec<SpanIndexEntry>,
}

/// Pushes what the store has of the layers of `image`; it is not nothing.
async fn push_ztocs(
    origin: &Origin,
    image: &Image,
    store: &IndexStore,
    start: &StartRanges,
) -> Result<Ztocs, PushIndexError> {
    let mut pushed = Ztocs::default();
    for layer in &image.layers {
        let Some(stored) = store.load(&layer.digest)? else { continue };
        have_windows(origin, &stored).await?;
        pushed.own.push(push_own(origin, layer, &stored, (store, start)).await?);
        if !stored.streamed {
            pushed.soci.push(push_soci(origin, layer, store).await?);
        }
    }
    if pushed.own.is_empty() {
        return Err(PushIndexError::Nothing(image.name.clone()));
    }
    Ok(pushed)
}

async fn push_soci_index(
    origin: &Origin,
    found: FoundAs<'_>,
    index: &SociIndex,
) -> Result<Descriptor, PushIndexError> {
    origin.push_blob(&Digest::of(soci::CONFIG_BYTES), soci::CONFIG_BYTES.into()).await?;
    let descriptor = index.descriptor();
    origin.push_manifest(found, &descriptor, index.to_bytes().into()).await?;
    Ok(descriptor)
}

async fn push_own_index(
    origin: &Origin,
    subject: &Descriptor,
    ztocs: Vec<SpanIndexEntry>,
) -> Result<Descriptor, PushIndexError> {
    origin.push_blob(&Digest::of(soci::CONFIG_BYTES), soci::CONFIG_BYTES.into()).await?;
    let index = SpanIndex::new(subject, ztocs);
    let descriptor = index.descriptor();
    origin.push_manifest(FoundAs::Referrer, &descriptor, index.to_bytes().into()).await?;
    Ok(descriptor)
}

async fn push_own(
    origin: &Origin,
    layer: &ImageLayer,
    stored: &StoredIndex,
    (store, start): (&IndexStore, &StartRanges),
) -> Result<SpanIndexEntry, PushIndexError> {
    let IndexInParts { document, windows } = store.in_parts(&layer.digest)?;
    let frame = zstd::encode_all(document.as_slice(), LEVEL).map_err(PushIndexError::Compress)?;
    let entry = SpanIndexEntry {
        layer: layer.digest,
        digest: Digest::of(&frame),
        size: frame.len() as u64,
        plain_size: document.len() as u64,
        streamed: stored.streamed,
        windows: windows.as_ref().map(|(blob, _)| *blob),
        start: start.get(&layer.digest).cloned().unwrap_or_default(),
    };
    origin.push_blob(&entry.digest, frame.into()).await?;
    if let Some((blob, bytes)) = windows {
        origin.push_blob(&blob.digest, bytes.into()).await?;
    }
    Ok(entry)
}

async fn push_soci(
    origin: &Origin,
    layer: &ImageLayer,
    store: &IndexStore,
) -> Result<ZtocEntry, PushIndexError> {
    let (blob, span_size) = store.soci_blob(&layer.digest)?;
    let entry = ZtocEntry {
        digest: Digest::of(&blob),
        size: blob.len() as u64,
        layer_digest: layer.digest,
        layer_media_type: layer.media_type.clone(),
        span_size,
        disable_xattrs: false,
    };
    origin.push_blob(&entry.digest, blob.into()).await?;
    Ok(entry)
}

/// How hard zTOCs are compressed: they are built once and fetched by every node.
const LEVEL: i32 = 9;

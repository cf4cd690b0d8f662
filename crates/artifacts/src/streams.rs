//! Indexes of layers that are read in order, beside the image that they are of.
//!
//! They are zTOCs of tars, which SOCI's format has no place for, so they are an artifact of our own:
//! a manifest that refers to the image's and has one blob for each such layer. SOCI's tools look for
//! another type and pass it over.

use std::collections::BTreeMap;

use bytes::Bytes;
use oci::media_type::{OCI_EMPTY, OCI_MANIFEST};
use oci::{Descriptor, Digest, LayerCompression, Manifest, ManifestOrIndex, parse_manifest};

use crate::index_store::{IndexOrigin, IndexStore, StoreIndexError, StoredIndex};
use crate::indexes::{MAX_ZTOC, PushIndexError};
use crate::origin::{Image, Origin, OriginError};

/// The type of the artifact.
const ARTIFACT_TYPE: &str = "application/vnd.hermes.streams.v1+json";
/// The type of a zTOC in it.
const ZTOC_TYPE: &str = "application/vnd.hermes.stream.v1.ztoc";
/// On a zTOC in it: the digest of its layer.
const LAYER_DIGEST: &str = "dev.hermes.layer-digest";

const NO_CONFIG: &[u8] = b"{}";

/// Fetches what `layers` miss: indexes of those that are streams. Says how many it found.
pub(crate) async fn find(
    origin: &Origin,
    (subject, manifest): (&Descriptor, &Manifest),
    store: &IndexStore,
    layers: &mut [Option<StoredIndex>],
) -> Result<usize, FindStreamsError> {
    let wanted: Vec<(&Descriptor, &mut Option<StoredIndex>)> = manifest
        .layers
        .iter()
        .zip(layers)
        .filter(|(layer, index)| index.is_none() && is_stream(layer))
        .collect();
    if wanted.is_empty() {
        return Ok(0);
    }
    let found = origin.referrers(&subject.digest, ARTIFACT_TYPE).await?;
    let Some(found) = found.first() else { return Ok(0) };
    let published = entries(origin, found).await?;
    let mut count = 0;
    for (layer, index) in wanted {
        let Some(ztoc) = published.get(&layer.digest.to_string()) else { continue };
        let bytes = origin.blob(&ztoc.digest, ztoc.size.min(MAX_ZTOC)).await?;
        *index = Some(store.save_streamed(&layer.digest, &bytes, IndexOrigin::Referrer)?);
        count += 1;
    }
    Ok(count)
}

/// What was published cannot be had, or not be stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FindStreamsError {
    /// The place of the image does not give it.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// It is no index, or the store fails.
    #[error(transparent)]
    Store(#[from] StoreIndexError),
}

fn is_stream(layer: &Descriptor) -> bool {
    LayerCompression::from_media_type(&layer.media_type) == Ok(LayerCompression::Zstd)
}

/// The zTOCs that an artifact names, by their layers' digests.
async fn entries(
    origin: &Origin,
    artifact: &Descriptor,
) -> Result<BTreeMap<String, Descriptor>, OriginError> {
    let bytes = origin.document(artifact).await?;
    let unusable = |why: String| OriginError::NotAnImage {
        image: format!("artifact {} of {}", artifact.digest, origin.name()),
        why,
    };
    let parsed = parse_manifest(Some(OCI_MANIFEST), &bytes);
    let ManifestOrIndex::Manifest(manifest) = parsed.map_err(|err| unusable(err.to_string()))?
    else {
        return Err(unusable("it is an index of images".to_owned()));
    };
    let ztocs = manifest.layers.into_iter().filter(|entry| entry.media_type == ZTOC_TYPE);
    let named = ztocs.filter_map(|ztoc| Some((ztoc.annotations.get(LAYER_DIGEST)?.clone(), ztoc)));
    Ok(named.collect())
}

/// Pushes the indexes that the store has of streams of `image`; `None` if there is none.
pub(crate) async fn push(
    origin: &Origin,
    image: &Image,
    store: &IndexStore,
) -> Result<Option<Descriptor>, PushIndexError> {
    let mut ztocs = Vec::new();
    for layer in &image.layers {
        let stored = store.load(&layer.digest)?.filter(|stored| stored.streamed);
        let Some(stored) = stored else { continue };
        let blob = store.blob(&layer.digest)?;
        let mut ztoc = Descriptor::new(ZTOC_TYPE, stored.digest, blob.len() as u64);
        ztoc.annotations.insert(LAYER_DIGEST.to_owned(), layer.digest.to_string());
        origin.push_blob(&stored.digest, blob.into()).await?;
        ztocs.push(ztoc);
    }
    if ztocs.is_empty() {
        return Ok(None);
    }
    let image = &image.descriptor;
    let artifact = Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        artifact_type: Some(ARTIFACT_TYPE.to_owned()),
        config: Descriptor::of(OCI_EMPTY, NO_CONFIG),
        layers: ztocs,
        subject: Some(Descriptor::new(&image.media_type, image.digest, image.size)),
        annotations: BTreeMap::new(),
    };
    origin.push_blob(&Digest::of(NO_CONFIG), Bytes::from_static(NO_CONFIG)).await?;
    let bytes = artifact.to_bytes();
    let mut descriptor = Descriptor::of(OCI_MANIFEST, &bytes);
    descriptor.artifact_type = Some(ARTIFACT_TYPE.to_owned());
    origin.push_manifest(&descriptor, bytes.into()).await?;
    Ok(Some(descriptor))
}

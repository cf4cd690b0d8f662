//! Image manifests and indexes, of OCI and of Docker.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::go_json::{self, empty_as_none, null_as_default};
use crate::media_type::{
    DOCKER_MANIFEST, DOCKER_MANIFEST_LIST, DOCKER_SCHEMA1, OCI_INDEX, OCI_MANIFEST, essence,
};
use crate::{Descriptor, Platform, soci};

/// An image manifest: one image for one platform, or an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// What the document says that it is; older OCI manifests do not say.
    #[serde(default, deserialize_with = "empty_as_none", skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The kind of artifact, if it is one.
    #[serde(default, deserialize_with = "empty_as_none", skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub layers: Vec<Descriptor>,
    /// The manifest that this artifact is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free metadata.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// An image index (Docker: manifest list): the images of several platforms, or a list of referrers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// What the document says that it is; older OCI indexes do not say.
    #[serde(default, deserialize_with = "empty_as_none", skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The kind of artifact, if it is one.
    #[serde(default, deserialize_with = "empty_as_none", skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The manifests, in the writer's order of preference.
    #[serde(default, deserialize_with = "null_as_default")]
    pub manifests: Vec<Descriptor>,
    /// The manifest that this artifact is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free metadata.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// What a tag can point at.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment, one at a time")]
pub enum ManifestOrIndex {
    /// One image.
    Manifest(Manifest),
    /// A choice of images.
    Index(Index),
}

/// Bytes that are neither a manifest nor an index that Hermes can use.
#[derive(Debug, thiserror::Error)]
pub enum ParseManifestError {
    /// Docker's format of before 2016: without sizes, DiffIDs or a content digest.
    #[error(
        "the manifest is of Docker's schema 1, which has no layer sizes; push the image again with \
         any current tool to convert it"
    )]
    Schema1,
    /// Something else, such as a Helm chart of another media type.
    #[error("`{}` is not the media type of an image manifest or index", .0.escape_debug())]
    UnknownMediaType(String),
    /// The registry says one thing, the document another.
    #[error("the document says that it is `{}`, the registry that it is `{}`",
        document.escape_debug(), registry.escape_debug())]
    MediaTypeMismatch {
        /// The type in the document.
        document: String,
        /// The type in the registry's answer.
        registry: String,
    },
    /// Both `layers` and `manifests`: readers would disagree on what the digest stands for.
    #[error("the document is both a manifest and an index")]
    Ambiguous,
    /// `schemaVersion` is neither 1 nor 2.
    #[error("the manifest is of the unknown schema version {0}")]
    UnknownSchemaVersion(u32),
    /// The bytes are not JSON of the expected shape.
    #[error("the document is not a well-formed image manifest or index")]
    Malformed(#[source] serde_json::Error),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Manifest,
    Index,
}

/// Enough of a document to tell what it is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    #[serde(default, deserialize_with = "null_as_default")]
    schema_version: u32,
    #[serde(default, deserialize_with = "empty_as_none")]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    layers: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    config: Option<serde::de::IgnoredAny>,
}

/// Reads a manifest or index.
///
/// `media_type` is what the registry or a descriptor said; without it, and where it says nothing
/// (`application/json`), the document decides.
///
/// # Errors
/// See [`ParseManifestError`]; no bytes make it panic.
pub fn parse_manifest(
    media_type: Option<&str>,
    bytes: &[u8],
) -> Result<ManifestOrIndex, ParseManifestError> {
    use ParseManifestError as E;
    let outer = media_type.map(essence).filter(|outer| !GENERIC_TYPES.contains(outer));
    if outer.is_some_and(|outer| DOCKER_SCHEMA1.contains(&outer)) {
        return Err(E::Schema1);
    }
    let probe: Probe = serde_json::from_slice(bytes).map_err(E::Malformed)?;
    let kind = probe.kind(outer)?;
    match probe.schema_version {
        2 => {}
        1 => return Err(E::Schema1),
        other => return Err(E::UnknownSchemaVersion(other)),
    }
    match kind {
        Kind::Manifest => serde_json::from_slice(bytes).map(ManifestOrIndex::Manifest),
        Kind::Index => serde_json::from_slice(bytes).map(ManifestOrIndex::Index),
    }
    .map_err(E::Malformed)
}

impl Probe {
    fn kind(&self, outer: Option<&str>) -> Result<Kind, ParseManifestError> {
        use ParseManifestError as E;
        if self.manifests.is_some() && (self.layers.is_some() || self.config.is_some()) {
            return Err(E::Ambiguous);
        }
        let inner = self.media_type.as_deref();
        if let (Some(inner), Some(outer)) = (inner, outer)
            && inner != outer
        {
            return Err(E::MediaTypeMismatch { document: short(inner), registry: short(outer) });
        }
        match inner.or(outer) {
            Some(OCI_MANIFEST | DOCKER_MANIFEST) => Ok(Kind::Manifest),
            Some(OCI_INDEX | DOCKER_MANIFEST_LIST) => Ok(Kind::Index),
            Some(schema1) if DOCKER_SCHEMA1.contains(&schema1) => Err(E::Schema1),
            Some(other) => Err(E::UnknownMediaType(short(other))),
            None if self.manifests.is_some() => Ok(Kind::Index),
            None => Ok(Kind::Manifest),
        }
    }
}

fn short(media_type: &str) -> String {
    media_type.chars().take(200).collect()
}

impl Manifest {
    /// The document, as Go's tools write it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        go_json::to_bytes(self)
    }

    /// The kind of artifact by the OCI rule: `artifactType`, else the configuration's media type.
    #[must_use]
    pub fn effective_artifact_type(&self) -> &str {
        self.artifact_type.as_deref().unwrap_or(&self.config.media_type)
    }

    /// The sum of the layers' compressed sizes in bytes.
    #[must_use]
    pub fn layers_size(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }
}

impl Index {
    /// An index of `manifests` and nothing else.
    #[must_use]
    pub fn new(manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(OCI_INDEX.to_owned()),
            artifact_type: None,
            manifests,
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// The document, as Go's tools write it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        go_json::to_bytes(self)
    }

    /// The images in the index: what is left without SOCI indexes, attestations and artifacts.
    pub fn images(&self) -> impl Iterator<Item = &Descriptor> {
        self.manifests.iter().filter(|entry| {
            !is_attestation(entry)
                && !soci::is_soci_index(entry)
                && matches!(
                    essence(&entry.media_type),
                    OCI_MANIFEST | DOCKER_MANIFEST | OCI_INDEX | DOCKER_MANIFEST_LIST
                )
        })
    }

    /// The image that runs best on `machine`; the first of equals.
    ///
    /// An entry that names no platform is taken only if no other fits.
    #[must_use]
    pub fn image_for(&self, machine: &Platform) -> Option<&Descriptor> {
        self.images()
            .filter_map(|entry| {
                let rank = match &entry.platform {
                    Some(platform) => platform.rank_on(machine)?,
                    None => u32::MAX,
                };
                Some((rank, entry))
            })
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, entry)| entry)
    }
}

/// Whether an index entry is BuildKit's attestation for another entry.
#[must_use]
pub(crate) fn is_attestation(entry: &Descriptor) -> bool {
    entry.annotations.get(soci::DOCKER_REFERENCE_TYPE).is_some_and(|t| t == "attestation-manifest")
}

/// What registries answer when they do not know.
const GENERIC_TYPES: [&str; 5] =
    ["", "application/json", "text/plain", "text/html", "application/octet-stream"];

#[cfg(test)]
mod tests;

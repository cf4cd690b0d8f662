//! SOCI indexes of version 1 and 2, and the conversion of an image to version 2.
//!
//! A SOCI index is an OCI manifest whose layers are zTOCs. The format is that of
//! awslabs/soci-snapshotter; what is written here is byte-identical to what its tools write.

use std::collections::BTreeMap;

use crate::media_type::{OCI_MANIFEST, OCTET_STREAM, essence};
use crate::{Descriptor, Digest, Manifest, ManifestOrIndex, ParseManifestError, parse_manifest};

mod convert;

pub use convert::{Conversion, ConvertedManifest, convert_index, convert_manifest, wrap_manifest};

/// The configuration media type, and so the artifact type, of a version 1 index.
pub const ARTIFACT_TYPE_V1: &str = "application/vnd.amazon.soci.index.v1+json";
/// The configuration media type, and so the artifact type, of a version 2 index.
pub const ARTIFACT_TYPE_V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// The media type of a zTOC in an index.
pub const ZTOC_TYPE: &str = OCTET_STREAM;
/// The media type of a prefetch document in an index.
pub const PREFETCH_TYPE: &str = "application/vnd.amazon.soci.prefetch.v1+json";

/// On the index: the tool that built it.
pub const BUILD_TOOL_IDENTIFIER: &str = "com.amazon.soci.build-tool-identifier";
/// On a zTOC descriptor: the media type of its layer.
pub const LAYER_MEDIA_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
/// On zTOC and prefetch descriptors: the digest of their layer.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// On a zTOC descriptor: the requested span size in decimal bytes.
pub const SPAN_SIZE: &str = "com.amazon.soci.span-size";
/// On a zTOC descriptor: `true` if the layer has no extended attributes and no opaque directory.
pub const DISABLE_XATTRS: &str = "com.amazon.soci.disable-xattrs";
/// On a version 2 index's descriptor in the OCI index: its image manifest.
pub const IMAGE_MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";
/// On a converted image manifest and its descriptor: its version 2 index.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";

/// On BuildKit's attestation entries: what the entry is.
pub const DOCKER_REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// On BuildKit's attestation entries: the image manifest that it attests.
pub const DOCKER_REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";

/// What SOCI's own tool calls itself. Written by Hermes too, so that both give the same digest for
/// the same image.
pub const DEFAULT_BUILD_TOOL: &str = "AWS SOCI CLI v0.2";

/// The configuration blob of every index. It must be in the repository before the index is pushed.
pub const CONFIG_BYTES: &[u8] = b"{}";

/// How an index is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// By the referrers of the image manifest, its subject.
    V1,
    /// By an annotation of the image manifest.
    V2,
}

impl Version {
    /// The artifact type of an index of this version.
    #[must_use]
    pub const fn artifact_type(self) -> &'static str {
        match self {
            Self::V1 => ARTIFACT_TYPE_V1,
            Self::V2 => ARTIFACT_TYPE_V2,
        }
    }

    /// The version that an artifact type stands for.
    #[must_use]
    pub fn from_artifact_type(artifact_type: &str) -> Option<Self> {
        match artifact_type {
            ARTIFACT_TYPE_V1 => Some(Self::V1),
            ARTIFACT_TYPE_V2 => Some(Self::V2),
            _ => None,
        }
    }
}

/// A SOCI index: the zTOCs of an image's layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SociIndex {
    /// Decided by the configuration's media type alone.
    pub version: Version,
    /// zTOC descriptors in the order of the image's layers, then prefetch descriptors.
    pub layers: Vec<Descriptor>,
    /// The image manifest, in version 1.
    pub subject: Option<Descriptor>,
    /// Free metadata; the build tool.
    pub annotations: BTreeMap<String, String>,
}

/// A zTOC and the layer that it indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZtocEntry {
    /// The zTOC blob's digest.
    pub digest: Digest,
    /// The zTOC blob's size in bytes.
    pub size: u64,
    /// The layer's digest.
    pub layer_digest: Digest,
    /// The layer's media type.
    pub layer_media_type: String,
    /// The span size in bytes that was asked for.
    pub span_size: u64,
    /// Set only if the builder looked for extended attributes and found none.
    pub disable_xattrs: bool,
}

/// Bytes that are not a SOCI index.
#[derive(Debug, thiserror::Error)]
pub enum ParseSociIndexError {
    /// Not even a manifest.
    #[error("the SOCI index is not a manifest")]
    Manifest(#[from] ParseManifestError),
    /// A manifest of something else.
    #[error("`{}` is not the configuration type of a SOCI index", .0.escape_debug())]
    NotSoci(String),
}

impl SociIndex {
    /// An index that is found as a referrer of `subject`, the image manifest.
    #[must_use]
    pub fn v1(subject: &Descriptor, ztocs: impl IntoIterator<Item = ZtocEntry>) -> Self {
        let subject = Descriptor::new(&subject.media_type, subject.digest, subject.size);
        Self { version: Version::V1, subject: Some(subject), ..Self::v2(ztocs) }
    }

    /// An index that is found by an annotation of the image manifest.
    #[must_use]
    pub fn v2(ztocs: impl IntoIterator<Item = ZtocEntry>) -> Self {
        let build_tool = (BUILD_TOOL_IDENTIFIER.to_owned(), DEFAULT_BUILD_TOOL.to_owned());
        Self {
            version: Version::V2,
            layers: ztocs.into_iter().map(ZtocEntry::into_descriptor).collect(),
            subject: None,
            annotations: BTreeMap::from([build_tool]),
        }
    }

    /// Reads an index.
    ///
    /// # Errors
    /// The bytes are not a manifest, or not one of a SOCI index.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParseSociIndexError> {
        match parse_manifest(Some(OCI_MANIFEST), bytes)? {
            ManifestOrIndex::Manifest(manifest) => Self::from_manifest(manifest),
            ManifestOrIndex::Index(_) => Err(ParseSociIndexError::NotSoci("an index".to_owned())),
        }
    }

    fn from_manifest(manifest: Manifest) -> Result<Self, ParseSociIndexError> {
        let config_type = manifest.config.media_type;
        let Some(version) = Version::from_artifact_type(&config_type) else {
            let config_type = config_type.chars().take(200).collect();
            return Err(ParseSociIndexError::NotSoci(config_type));
        };
        let Manifest { layers, subject, annotations, .. } = manifest;
        Ok(Self { version, layers, subject, annotations })
    }

    /// The document, byte-identical to what SOCI's Go tools write.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(OCI_MANIFEST.to_owned()),
            // Go's tools drop it when they re-encode, and then miss the digest.
            artifact_type: None,
            config: self.config(),
            layers: self.layers.clone(),
            subject: self.subject.clone(),
            annotations: self.annotations.clone(),
        };
        manifest.to_bytes()
    }

    /// Describes the document, with its artifact type.
    #[must_use]
    pub fn descriptor(&self) -> Descriptor {
        Descriptor {
            artifact_type: Some(self.version.artifact_type().to_owned()),
            ..Descriptor::of(OCI_MANIFEST, &self.to_bytes())
        }
    }

    /// Describes the configuration blob, [`CONFIG_BYTES`].
    #[must_use]
    pub fn config(&self) -> Descriptor {
        Descriptor::of(self.version.artifact_type(), CONFIG_BYTES)
    }

    /// The zTOC of a layer; `None` for a layer that was too small to be indexed.
    #[must_use]
    pub fn ztoc_for_layer(&self, layer: &Digest) -> Option<&Descriptor> {
        self.entry(ZTOC_TYPE, layer)
    }

    /// The prefetch document of a layer.
    #[must_use]
    pub fn prefetch_for_layer(&self, layer: &Digest) -> Option<&Descriptor> {
        self.entry(PREFETCH_TYPE, layer)
    }

    fn entry(&self, media_type: &str, layer: &Digest) -> Option<&Descriptor> {
        let layer = layer.to_string();
        self.layers.iter().find(|entry| {
            essence(&entry.media_type) == media_type
                && entry.annotations.get(LAYER_DIGEST) == Some(&layer)
        })
    }
}

impl ZtocEntry {
    /// The entry's descriptor, with the annotations that SOCI's readers join by.
    #[must_use]
    pub fn into_descriptor(self) -> Descriptor {
        let mut descriptor = Descriptor::new(ZTOC_TYPE, self.digest, self.size);
        descriptor.annotations = BTreeMap::from([
            (LAYER_DIGEST.to_owned(), self.layer_digest.to_string()),
            (LAYER_MEDIA_TYPE.to_owned(), self.layer_media_type),
            (SPAN_SIZE.to_owned(), self.span_size.to_string()),
        ]);
        if self.disable_xattrs {
            descriptor.annotations.insert(DISABLE_XATTRS.to_owned(), "true".to_owned());
        }
        descriptor
    }
}

/// Whether an entry of an index, or a referrer, is a SOCI index by its artifact type.
#[must_use]
pub fn is_soci_index(descriptor: &Descriptor) -> bool {
    soci_version(descriptor).is_some()
}

/// The version of the SOCI index that a descriptor names.
#[must_use]
pub fn soci_version(descriptor: &Descriptor) -> Option<Version> {
    if essence(&descriptor.media_type) != OCI_MANIFEST {
        return None;
    }
    Version::from_artifact_type(descriptor.artifact_type.as_deref()?)
}

/// The version 2 index that a converted image manifest names.
///
/// `None` too if the annotation is not a digest: SOCI then treats the image as having no index.
#[must_use]
pub fn index_of(manifest: &Manifest) -> Option<Digest> {
    manifest.annotations.get(INDEX_DIGEST)?.parse().ok()
}

/// Whether a zTOC's layer needs no extended attributes, read as Go's `ParseBool` reads it.
#[must_use]
pub fn xattrs_disabled(ztoc: &Descriptor) -> bool {
    let value = ztoc.annotations.get(DISABLE_XATTRS).map(String::as_str);
    matches!(value, Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
}

#[cfg(test)]
mod tests;

//! The conversion of an image to SOCI version 2: what changes in its manifest and index.
//!
//! Follows what `soci convert` does, except where that loses links: annotations of an index entry
//! are kept, and attestations follow their image to its new digest.

use std::collections::BTreeMap;

use super::{DOCKER_REFERENCE_DIGEST, IMAGE_MANIFEST_DIGEST, INDEX_DIGEST, Version, is_soci_index};
use crate::manifest::is_attestation;
use crate::media_type::{OCI_CONFIG, OCI_INDEX, OCI_MANIFEST};
use crate::{Descriptor, Digest, Index, Manifest, Platform};

/// An image manifest that names its SOCI index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertedManifest {
    /// The new manifest.
    pub bytes: Vec<u8>,
    /// Describes it, without a platform; carries the manifest's annotations.
    pub descriptor: Descriptor,
}

/// One image of an index, before and after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversion {
    /// The image manifest's digest before the conversion.
    pub original: Digest,
    /// The image manifest after it, from [`convert_manifest`].
    pub manifest: Descriptor,
    /// The version 2 index, from [`super::SociIndex::descriptor`].
    pub soci_index: Descriptor,
}

/// Binds `soci_index` to an image manifest, which becomes an OCI manifest if it was Docker's.
///
/// Converting a converted manifest replaces the binding.
#[must_use]
pub fn convert_manifest(manifest: &Manifest, soci_index: &Digest) -> ConvertedManifest {
    let mut converted = manifest.clone();
    converted.media_type = Some(OCI_MANIFEST.to_owned());
    OCI_CONFIG.clone_into(&mut converted.config.media_type);
    converted.annotations.insert(INDEX_DIGEST.to_owned(), soci_index.to_string());
    let bytes = converted.to_bytes();
    let mut descriptor = Descriptor::of(OCI_MANIFEST, &bytes);
    descriptor.annotations = converted.annotations;
    ConvertedManifest { bytes, descriptor }
}

/// The index of a converted image: its images, then the SOCI indexes.
///
/// Entries that no conversion names stay as they are, with the SOCI index that an earlier
/// conversion gave them. An attestation of a converted image names the image's new digest.
#[must_use]
pub fn convert_index(index: &Index, conversions: &[Conversion]) -> Index {
    let replaced: BTreeMap<Digest, &Conversion> =
        conversions.iter().map(|conversion| (conversion.original, conversion)).collect();
    let mut images = Vec::new();
    let mut soci_indexes = Vec::new();
    for entry in &index.manifests {
        if is_soci_index(entry) {
            if !names_any(entry, IMAGE_MANIFEST_DIGEST, &replaced) {
                soci_indexes.push(entry.clone());
            }
        } else if let Some(conversion) = replaced.get(&entry.digest) {
            images.push(converted_entry(entry, &conversion.manifest));
            soci_indexes.push(soci_entry(entry.platform.clone(), conversion));
        } else {
            images.push(following_entry(entry, &replaced));
        }
    }
    images.append(&mut soci_indexes);
    Index { media_type: Some(OCI_INDEX.to_owned()), manifests: images, ..index.clone() }
}

/// The index around a converted image that had none; `platform` is the image configuration's.
#[must_use]
pub fn wrap_manifest(platform: &Platform, conversion: &Conversion) -> Index {
    let image = Descriptor { platform: Some(platform.clone()), ..conversion.manifest.clone() };
    Index::new(vec![image, soci_entry(Some(platform.clone()), conversion)])
}

fn converted_entry(entry: &Descriptor, manifest: &Descriptor) -> Descriptor {
    let mut annotations = entry.annotations.clone();
    annotations.extend(manifest.annotations.clone());
    Descriptor {
        media_type: manifest.media_type.clone(),
        digest: manifest.digest,
        size: manifest.size,
        annotations,
        // Both would be those of the old bytes.
        data: Vec::new(),
        urls: Vec::new(),
        ..entry.clone()
    }
}

fn soci_entry(platform: Option<Platform>, conversion: &Conversion) -> Descriptor {
    let image = (IMAGE_MANIFEST_DIGEST.to_owned(), conversion.manifest.digest.to_string());
    Descriptor {
        platform,
        artifact_type: Some(Version::V2.artifact_type().to_owned()),
        annotations: BTreeMap::from([image]),
        ..Descriptor::new(OCI_MANIFEST, conversion.soci_index.digest, conversion.soci_index.size)
    }
}

fn following_entry(entry: &Descriptor, replaced: &BTreeMap<Digest, &Conversion>) -> Descriptor {
    let mut entry = entry.clone();
    if is_attestation(&entry)
        && let Some(subject) = entry.annotations.get_mut(DOCKER_REFERENCE_DIGEST)
        && let Some(conversion) = subject.parse().ok().and_then(|digest| replaced.get(&digest))
    {
        *subject = conversion.manifest.digest.to_string();
    }
    entry
}

fn names_any(entry: &Descriptor, key: &str, replaced: &BTreeMap<Digest, &Conversion>) -> bool {
    let named = entry.annotations.get(key).and_then(|digest| digest.parse().ok());
    named.is_some_and(|digest: Digest| replaced.contains_key(&digest))
}

//! Hermes' own index of an image: zTOCs with shorter spans than SOCI's, compressed, and those of layers
//! that can only be read in order. It refers to the image as a SOCI index does, and lies beside it.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::media_type::{OCI_MANIFEST, essence};
use crate::soci::CONFIG_BYTES;
use crate::{Descriptor, Digest, Manifest, ManifestOrIndex, ParseManifestError, parse_manifest};

/// The configuration media type, and so the artifact type, of an index.
pub const ARTIFACT_TYPE: &str = "application/vnd.hermes.index.v1+json";
/// The media type of a zTOC in it: one zstd frame.
pub const ZTOC_TYPE: &str = "application/vnd.hermes.ztoc.v1+zstd";
/// The media type of the windows of a zTOC that does not hold them itself: one zstd frame for each, in the
/// order of their spans.
pub const WINDOWS_TYPE: &str = "application/vnd.hermes.windows.v1+zstd";

/// On a descriptor of a zTOC or of windows: the digest of its layer.
const LAYER_DIGEST: &str = "vnd.hermes.layer-digest";
/// On a zTOC descriptor: the size of the zTOC in decimal bytes, once decompressed.
const PLAIN_SIZE: &str = "vnd.hermes.size";
/// On a zTOC descriptor: present if the layer can only be read from its beginning, and the zTOC is that
/// of the tar that it decodes to.
const STREAMED: &str = "vnd.hermes.streamed";
/// On a zTOC descriptor: what of the layer's tar the image's own command needs to start, in the order
/// in which it does, as `start-end` in decimal bytes, the end not included, divided by commas. Absent if
/// that is nothing, or was not known.
const START: &str = "vnd.hermes.start";

/// More ranges for one layer are neither written nor read.
pub const MOST_RANGES: usize = 1024;

/// The zTOCs of an image's layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanIndex {
    entries: Vec<SpanIndexEntry>,
    /// The image manifest.
    subject: Option<Descriptor>,
}

/// A compressed zTOC and the layer that it indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanIndexEntry {
    /// The layer's digest.
    pub layer: Digest,
    /// Digest of the compressed zTOC.
    pub digest: Digest,
    /// Size of the compressed zTOC in bytes.
    pub size: u64,
    /// Size of the zTOC in bytes.
    pub plain_size: u64,
    /// Whether the layer can only be read from its beginning.
    pub streamed: bool,
    /// The windows of the zTOC, if it does not hold them itself.
    pub windows: Option<WindowsBlob>,
    /// What of the layer's tar, in bytes, the image's own command needs to start, the first first. A hint: it
    /// may be wrong, or lie outside the layer.
    pub start: Vec<Range<u64>>,
}

/// A blob with the windows of a zTOC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowsBlob {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// Bytes that are no index of this kind.
#[derive(Debug, thiserror::Error)]
pub enum ParseSpanIndexError {
    /// Not even a manifest.
    #[error("the index is not a manifest")]
    Manifest(#[from] ParseManifestError),
    /// A manifest of something else.
    #[error("`{}` is not the configuration type of a Hermes index", .0.escape_debug())]
    OfAnotherKind(String),
}

impl SpanIndex {
    /// An index of the image with the manifest `subject`.
    #[must_use]
    pub fn new(subject: &Descriptor, entries: Vec<SpanIndexEntry>) -> Self {
        let subject = Descriptor::new(&subject.media_type, subject.digest, subject.size);
        Self { entries, subject: Some(subject) }
    }

    /// Reads an index; entries of other kinds are passed over.
    ///
    /// # Errors
    /// The bytes are not a manifest, or not one of such an index.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParseSpanIndexError> {
        let manifest = match parse_manifest(Some(OCI_MANIFEST), bytes)? {
            ManifestOrIndex::Manifest(manifest) => manifest,
            ManifestOrIndex::Index(_) => {
                return Err(ParseSpanIndexError::OfAnotherKind("an index".to_owned()));
            }
        };
        if manifest.config.media_type != ARTIFACT_TYPE {
            let found = manifest.config.media_type.chars().take(200).collect();
            return Err(ParseSpanIndexError::OfAnotherKind(found));
        }
        let windows = WindowsBlob::all_in(&manifest.layers);
        let entries = manifest.layers.iter().filter_map(SpanIndexEntry::read);
        let entries = entries.map(|entry| {
            let windows = windows.get(&entry.layer).copied();
            SpanIndexEntry { windows, ..entry }
        });
        let entries = entries.collect();
        Ok(Self { entries, subject: manifest.subject })
    }

    /// The document.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(OCI_MANIFEST.to_owned()),
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            config: Descriptor::of(ARTIFACT_TYPE, CONFIG_BYTES),
            layers: self.entries.iter().flat_map(SpanIndexEntry::descriptors).collect(),
            subject: self.subject.clone(),
            annotations: BTreeMap::new(),
        };
        manifest.to_bytes()
    }

    /// Describes the document, with its artifact type.
    #[must_use]
    pub fn descriptor(&self) -> Descriptor {
        Descriptor {
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            ..Descriptor::of(OCI_MANIFEST, &self.to_bytes())
        }
    }

    /// The zTOC of a layer.
    #[must_use]
    pub fn entry(&self, layer: &Digest) -> Option<&SpanIndexEntry> {
        self.entries.iter().find(|entry| entry.layer == *layer)
    }
}

impl SpanIndexEntry {
    fn read(descriptor: &Descriptor) -> Option<Self> {
        let annotation = |key: &str| descriptor.annotations.get(key);
        (essence(&descriptor.media_type) == ZTOC_TYPE).then_some(Self {
            layer: annotation(LAYER_DIGEST)?.parse().ok()?,
            digest: descriptor.digest,
            size: descriptor.size,
            plain_size: annotation(PLAIN_SIZE)?.parse().ok()?,
            streamed: annotation(STREAMED).is_some(),
            windows: None,
            start: annotation(START).map(|text| parse_ranges(text)).unwrap_or_default(),
        })
    }

    /// Of the zTOC, and of its windows where they are apart.
    fn descriptors(&self) -> impl Iterator<Item = Descriptor> {
        let windows = self.windows.as_ref().map(|windows| windows.descriptor(&self.layer));
        std::iter::once(self.descriptor()).chain(windows)
    }

    fn descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(ZTOC_TYPE, self.digest, self.size);
        descriptor.annotations = BTreeMap::from([
            (LAYER_DIGEST.to_owned(), self.layer.to_string()),
            (PLAIN_SIZE.to_owned(), self.plain_size.to_string()),
        ]);
        if self.streamed {
            descriptor.annotations.insert(STREAMED.to_owned(), "true".to_owned());
        }
        let start = self.start.iter().take(MOST_RANGES);
        let start: Vec<_> = start.map(|part| format!("{}-{}", part.start, part.end)).collect();
        if !start.is_empty() {
            descriptor.annotations.insert(START.to_owned(), start.join(","));
        }
        descriptor
    }
}

impl WindowsBlob {
    /// Those among an index's descriptors, by their layers.
    fn all_in(descriptors: &[Descriptor]) -> HashMap<Digest, Self> {
        let windows = |descriptor: &Descriptor| {
            let is_windows = essence(&descriptor.media_type) == WINDOWS_TYPE;
            let layer = descriptor.annotations.get(LAYER_DIGEST).filter(|_| is_windows)?;
            let Descriptor { digest, size, .. } = *descriptor;
            Some((layer.parse().ok()?, Self { digest, size }))
        };
        descriptors.iter().filter_map(windows).collect()
    }

    fn descriptor(&self, layer: &Digest) -> Descriptor {
        let mut descriptor = Descriptor::new(WINDOWS_TYPE, self.digest, self.size);
        descriptor.annotations.insert(LAYER_DIGEST.to_owned(), layer.to_string());
        descriptor
    }
}

/// What can be understood of a list of ranges.
fn parse_ranges(text: &str) -> Vec<Range<u64>> {
    let parse = |part: &str| {
        let (start, end) = part.split_once('-')?;
        let range = start.parse().ok()?..end.parse().ok()?;
        (!range.is_empty()).then_some(range)
    };
    text.split(',').take(MOST_RANGES).filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let subject = Descriptor::of(OCI_MANIFEST, b"an image");
        let entry = |text: &[u8], streamed| SpanIndexEntry {
            layer: Digest::of(text),
            digest: Digest::of(&[text, b"z"].concat()),
            size: 10,
            plain_size: 1000,
            streamed,
            windows: (!streamed).then(|| WindowsBlob { digest: Digest::of(b"windows"), size: 7 }),
            start: if streamed { vec![] } else { vec![512..1024, 4096..1 << 40] },
        };
        let index = SpanIndex::new(&subject, vec![entry(b"a", false), entry(b"b", true)]);
        let read = SpanIndex::from_bytes(&index.to_bytes()).unwrap();
        assert_eq!(read, index);
        assert_eq!(read.entry(&Digest::of(b"b")), Some(&entry(b"b", true)));
        assert_eq!(read.entry(&Digest::of(b"c")), None);
        assert_eq!(index.descriptor().artifact_type.as_deref(), Some(ARTIFACT_TYPE));
    }

    #[test]
    fn of_a_damaged_hint_the_rest_is_taken() {
        let check =
            |text, expected: &[Range<u64>]| assert_eq!(parse_ranges(text), expected, "{text}");
        check("1-2,3-4", &[1..2, 3..4]);
        check("", &[]);
        check("2-1,5-5,x-1,7,-1-2,99999999999999999999-1,3-4,5-6", &[3..4, 5..6]);
        assert_eq!(parse_ranges(&"1-2,".repeat(MOST_RANGES * 2)).len(), MOST_RANGES);
    }

    #[test]
    fn other_documents_are_refused() {
        SpanIndex::from_bytes(b"{}").unwrap_err();
        let soci = crate::soci::SociIndex::v2([]).to_bytes();
        let error = SpanIndex::from_bytes(&soci).unwrap_err();
        assert!(matches!(error, ParseSpanIndexError::OfAnotherKind(_)), "{error}");
    }
}

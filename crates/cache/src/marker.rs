//! The `sealed` marker: the layer was whole and proven when it was written.

use oci::Digest;
use serde::{Deserialize, Serialize};

/// What was proven of a sealed layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    pub(crate) version: u32,
    /// The compressed blob.
    pub layer: Digest,
    /// The index that the bytes were fetched by.
    pub index: Digest,
    /// The digest of the uncompressed bytes.
    pub diff_id: Digest,
    /// How many uncompressed bytes are kept.
    pub bytes: u64,
    /// How many uncompressed bytes the digest covers: also those behind the end of the archive, which
    /// no reader sees and which are not kept.
    pub total_bytes: u64,
    /// crc32c of the bytes that are kept.
    pub crc32c: u32,
}

/// A marker that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MarkerError {
    /// It is not the JSON that this crate writes.
    #[error("the `sealed` marker is damaged")]
    Damaged(#[source] serde_json::Error),
    /// It was written by a later version.
    #[error("the `sealed` marker has version {found}, this program knows 1")]
    Version {
        /// The version found.
        found: u32,
    },
    /// It belongs to another layer.
    #[error("the `sealed` marker belongs to layer {found}")]
    OtherLayer {
        /// The layer it names.
        found: Digest,
    },
}

pub(crate) const VERSION: u32 = 1;

/// The longest marker that is read, in bytes.
pub(crate) const MAX_MARKER_LEN: u64 = 64 << 10;

impl Sealed {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = serde_json::to_vec_pretty(self).expect("digests and numbers are valid JSON");
        out.push(b'\n');
        out
    }

    pub(crate) fn decode(bytes: &[u8], layer: &Digest) -> Result<Self, MarkerError> {
        let marker: Self = serde_json::from_slice(bytes).map_err(MarkerError::Damaged)?;
        if marker.version != VERSION {
            return Err(MarkerError::Version { found: marker.version });
        }
        if marker.layer != *layer {
            return Err(MarkerError::OtherLayer { found: marker.layer });
        }
        Ok(marker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marker(layer: Digest) -> Sealed {
        Sealed {
            version: VERSION,
            layer,
            index: Digest::of(b"index"),
            diff_id: Digest::of(b"tar"),
            bytes: 12,
            total_bytes: 1024,
            crc32c: 7,
        }
    }

    #[test]
    fn a_marker_is_read_as_it_was_written() {
        let layer = Digest::of(b"blob");
        let marker = marker(layer);
        assert_eq!(Sealed::decode(&marker.encode(), &layer).unwrap(), marker);
    }

    #[test]
    fn damaged_later_and_foreign_markers_are_told_apart() {
        let layer = Digest::of(b"blob");
        let mut marker = marker(layer);
        let cut = marker.encode();
        assert!(matches!(Sealed::decode(&cut[..20], &layer), Err(MarkerError::Damaged(_))));
        let other = Sealed::decode(&cut, &Digest::of(b"other"));
        assert!(matches!(other, Err(MarkerError::OtherLayer { found }) if found == layer));
        marker.version = 2;
        let later = Sealed::decode(&marker.encode(), &layer);
        assert!(matches!(later, Err(MarkerError::Version { found: 2 })));
    }
}

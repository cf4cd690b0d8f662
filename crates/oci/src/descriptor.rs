//! Descriptors: how one document names another by digest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::go_json::{base64_bytes, bytes_from_base64, empty_as_none, null_as_default};
use crate::{Digest, Platform};

/// Names a blob or manifest by digest and size.
///
/// The order of the fields is that of Go's image-spec types, which SOCI's digests depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the bytes are; empty where the writer did not say.
    #[serde(default, deserialize_with = "null_as_default")]
    pub media_type: String,
    /// The digest of the bytes.
    pub digest: Digest,
    /// How many bytes they are.
    pub size: u64,
    /// Where else they can be downloaded.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Free metadata.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// The bytes themselves, if the writer embedded them; not checked against the digest here.
    #[serde(
        default,
        serialize_with = "base64_bytes",
        deserialize_with = "bytes_from_base64",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub data: Vec<u8>,
    /// The machines that the image is made for, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// The kind of artifact, in an index or a list of referrers.
    #[serde(default, deserialize_with = "empty_as_none", skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

impl Descriptor {
    /// Describes `bytes`.
    #[must_use]
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        // No slice is longer than u64::MAX.
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Self::new(media_type, Digest::of(bytes), size)
    }

    /// Describes bytes that lie elsewhere.
    #[must_use]
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            data: Vec::new(),
            platform: None,
            artifact_type: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[track_caller]
    fn check(json: &str, rewritten: &str) {
        let descriptor: Descriptor = serde_json::from_str(json).expect(json);
        let bytes = crate::go_json::to_bytes(&descriptor);
        assert_eq!(String::from_utf8(bytes).unwrap(), rewritten);
    }

    #[test]
    fn absent_empty_and_null_are_the_same_and_not_written() {
        let plain = format!(r#"{{"mediaType":"m","digest":"{EMPTY}","size":0}}"#);
        check(&plain, &plain);
        check(
            &format!(
                r#"{{"size":0,"digest":"{EMPTY}","mediaType":"m","urls":null,"annotations":null,
                "data":null,"platform":null,"artifactType":"","future":[1,{{}}]}}"#
            ),
            &plain,
        );
    }

    #[test]
    fn all_fields_are_written_in_gos_order() {
        let full = format!(
            r#"{{"mediaType":"m","digest":"{EMPTY}","size":9007199254740993,"urls":["u"],"annotations":{{"a":"1","b":"2"}},"data":"e30=","platform":{{"architecture":"arm64","os":"linux","os.version":"1","os.features":["f"],"variant":"v8"}},"artifactType":"t"}}"#
        );
        check(&full, &full);
    }

    #[test]
    fn a_bad_digest_size_or_embedded_text_is_an_error() {
        for json in [
            r#"{"mediaType":"m","digest":"sha512:00","size":1}"#.to_owned(),
            format!(r#"{{"mediaType":"m","digest":"{EMPTY}","size":-1}}"#),
            format!(r#"{{"mediaType":"m","digest":"{EMPTY}"}}"#),
            format!(r#"{{"mediaType":"m","digest":"{EMPTY}","size":1,"data":"*"}}"#),
        ] {
            assert!(serde_json::from_str::<Descriptor>(&json).is_err(), "{json}");
        }
    }
}

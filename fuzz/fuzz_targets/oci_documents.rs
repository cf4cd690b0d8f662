#![no_main]
//! Documents of a registry: none makes a parser panic, and a reference reads as it is written.

use libfuzzer_sys::fuzz_target;
use oci::{Digest, ImageConfig, Reference, parse_manifest};

fuzz_target!(|bytes: &[u8]| {
    parse_manifest(None, bytes).ok();
    parse_manifest(Some("application/vnd.oci.image.index.v1+json"), bytes).ok();
    ImageConfig::from_bytes(bytes).ok();
    oci::soci::SociIndex::from_bytes(bytes).ok();
    oci::span_index::SpanIndex::from_bytes(bytes).ok();
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
});

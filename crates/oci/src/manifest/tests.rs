//! Manifests as registries send them, well and badly formed.

use super::*;
use crate::Digest;
use crate::media_type::{DOCKER_CONFIG, DOCKER_LAYER_GZIP};

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn manifest(media_type: &str) -> String {
    format!(
        r#"{{"schemaVersion":2{media_type},
        "config":{{"mediaType":"{DOCKER_CONFIG}","digest":"{DIGEST}","size":1}},
        "layers":[{{"mediaType":"{DOCKER_LAYER_GZIP}","digest":"{DIGEST}","size":2}}]}}"#
    )
}

/// `expected`: `manifest`, `index`, or a part of the error's text.
#[track_caller]
fn check(media_type: Option<&str>, json: &str, expected: &str) {
    let found = match parse_manifest(media_type, json.as_bytes()) {
        Ok(ManifestOrIndex::Manifest(_)) => "manifest".to_owned(),
        Ok(ManifestOrIndex::Index(_)) => "index".to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(found.contains(expected), "expected {expected}, found {found}");
}

#[test]
fn the_kind_comes_from_the_registry_the_document_or_its_shape() {
    check(Some(OCI_MANIFEST), &manifest(""), "manifest");
    check(Some(&format!("{OCI_MANIFEST}; charset=utf-8")), &manifest(""), "manifest");
    check(Some(DOCKER_MANIFEST), &manifest(""), "manifest");
    check(None, &manifest(""), "manifest");
    check(Some("application/json"), &manifest(""), "manifest");
    check(None, &manifest(&format!(r#","mediaType":"{DOCKER_MANIFEST}""#)), "manifest");
    check(None, r#"{"schemaVersion":2,"manifests":[]}"#, "index");
    check(Some(OCI_INDEX), r#"{"schemaVersion":2,"manifests":null}"#, "index");
    check(Some(DOCKER_MANIFEST_LIST), r#"{"schemaVersion":2,"manifests":[]}"#, "index");
    check(None, r#"{"schemaVersion":2,"mediaType":null,"manifests":[]}"#, "index");
}

#[test]
fn what_hermes_cannot_use_is_refused_with_a_reason() {
    let schema1 = r#"{"schemaVersion":1,"name":"a","tag":"b","fsLayers":[],"history":[]}"#;
    check(None, schema1, "schema 1");
    check(Some(DOCKER_SCHEMA1[1]), schema1, "schema 1");
    check(Some("application/vnd.cncf.helm"), &manifest(""), "application/vnd.cncf.helm");
    check(Some(OCI_INDEX), &manifest(&format!(r#","mediaType":"{OCI_MANIFEST}""#)), "registry");
    check(None, r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, "both");
    check(None, r#"{"schemaVersion":2,"manifests":[],"config":{}}"#, "both");
    check(None, r#"{"schemaVersion":3,"manifests":[]}"#, "unknown schema version 3");
    check(Some(OCI_MANIFEST), r#"{"schemaVersion":2}"#, "not a well-formed");
    check(None, "<html>", "not a well-formed");
    check(None, "", "not a well-formed");
    check(None, &"[".repeat(100_000), "not a well-formed");
}

#[test]
fn a_manifest_is_written_as_go_writes_it() {
    let json = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","artifactType":"a","config":{{"mediaType":"c","digest":"{DIGEST}","size":1}},"layers":[],"subject":{{"mediaType":"s","digest":"{DIGEST}","size":3}},"annotations":{{"k":"v"}}}}"#
    );
    let Ok(ManifestOrIndex::Manifest(parsed)) = parse_manifest(None, json.as_bytes()) else {
        panic!("not a manifest");
    };
    assert_eq!(String::from_utf8(parsed.to_bytes()).unwrap(), json);
    assert_eq!(parsed.effective_artifact_type(), "a");
}

#[test]
fn the_image_for_a_machine_is_neither_attestation_nor_soci_index() {
    let entry = |n: u8, platform: Option<Platform>| Descriptor {
        platform,
        ..Descriptor::of(OCI_MANIFEST, &[n])
    };
    let amd64 = Platform::new("linux", "amd64");
    let mut soci = entry(0, Some(amd64.clone()));
    soci.artifact_type = Some(soci::ARTIFACT_TYPE_V2.to_owned());
    let mut attestation = entry(1, Some(amd64.clone()));
    attestation
        .annotations
        .insert(soci::DOCKER_REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned());
    let mut unplaced = entry(2, None);
    unplaced.media_type = DOCKER_MANIFEST.to_owned();
    let index = Index::new(vec![
        soci,
        attestation,
        unplaced,
        entry(3, Some(Platform::new("linux", "arm64"))),
        entry(4, Some(amd64.clone())),
        entry(5, Some(amd64.clone())),
    ]);
    let chosen = |machine: &Platform| index.image_for(machine).map(|image| image.digest);
    assert_eq!(chosen(&amd64), Some(Digest::of(&[4])));
    assert_eq!(chosen(&Platform::new("linux", "arm64")), Some(Digest::of(&[3])));
    assert_eq!(chosen(&Platform::new("linux", "s390x")), Some(Digest::of(&[2])));
}

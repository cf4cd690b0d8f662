//! Storing blobs and manifests.

use std::sync::Arc;

use oci::Digest;
use oci::media_type::OCI_MANIFEST;
use registry::{BlobBody, Client, Credentials, FetchError, Secret, StaticCredentials};
use testkit::registry::{
    Auth, BearerAuth, Credentials as Known, Fault, Options, Registry, Scope, Times,
};

use crate::setup::{content, count, manifest, options, reference, repository, start};

#[tokio::test]
async fn blobs_are_stored_once() {
    let registry = start();
    let repository = repository(&registry);
    for len in [0, 1, 100_000, 3_000_000] {
        let (digest, bytes) = (Digest::of(&content(len)), content(len));
        repository.push_blob(&digest, bytes.clone()).await.unwrap();
        repository.push_blob(&digest, bytes.clone()).await.unwrap();
        let size = u64::try_from(len).unwrap();
        assert_eq!(repository.blob(&digest, size).await.unwrap(), bytes);
    }
    assert_eq!(count(&registry, "PUT", "/blobs/uploads/"), 4);
}

#[tokio::test]
async fn files_are_streamed_and_their_failures_told() {
    let registry = start();
    let repository = repository(&registry);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    std::fs::write(&path, content(1_000_000)).unwrap();
    let body = |size| BlobBody::File { path: path.clone(), size };
    let digest = Digest::of(&content(1_000_000));
    repository.push_blob(&digest, body(1_000_000)).await.unwrap();
    assert!(registry.has_blob(digest));
    let part = Digest::of(&content(1_000_000)[..999]);
    repository.push_blob(&part, body(999)).await.unwrap();

    let other = Digest::of(b"other");
    let error = repository.push_blob(&other, body(1_000_001)).await.unwrap_err();
    assert!(matches!(error, FetchError::File(_)), "{error:?}");
    let missing = BlobBody::File { path: dir.path().join("none"), size: 1 };
    let error = repository.push_blob(&other, missing).await.unwrap_err();
    assert!(matches!(error, FetchError::File(_)), "{error:?}");
}

#[tokio::test]
async fn bytes_of_another_digest_are_refused() {
    let registry = start();
    let error =
        repository(&registry).push_blob(&Digest::of(b"a"), b"b".to_vec()).await.unwrap_err();
    let FetchError::Refused { status: 400, code: Some(code), .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(code, "DIGEST_INVALID");
}

#[tokio::test]
async fn manifests_are_stored_by_tag_and_digest() {
    let registry = start();
    let repository = repository(&registry);
    let bytes = manifest(&registry).to_bytes();
    let digest = Digest::of(&bytes);
    for target in ["v2".to_owned(), digest.to_string()] {
        let stored = repository.push_manifest(&target, OCI_MANIFEST, bytes.clone()).await.unwrap();
        assert_eq!(stored.digest, digest);
        assert_eq!(repository.manifest(&target).await.unwrap().1, bytes);
    }
    let other = Digest::of(b"other").to_string();
    let error = repository.push_manifest(&other, OCI_MANIFEST, bytes).await.unwrap_err();
    assert!(matches!(error, FetchError::WrongDigest { .. }), "{error:?}");
}

#[tokio::test]
async fn a_manifest_without_its_blobs_is_refused() {
    let (registry, elsewhere) = (start(), start());
    let bytes = manifest(&elsewhere).to_bytes();
    let error = repository(&registry).push_manifest("v1", OCI_MANIFEST, bytes).await.unwrap_err();
    assert!(matches!(error, FetchError::NotFound { .. }), "{error:?}");
}

#[tokio::test]
async fn pushes_outlive_what_passes() {
    let registry = start();
    let repository = repository(&registry);
    for (at, fault) in
        [Fault::Status(503), Fault::ResetRequest, Fault::Status(500)].into_iter().enumerate()
    {
        for position in 0..3 {
            let mut pattern = vec![false; 100];
            pattern[position] = true;
            registry.faults().inject(Scope::Everything, Times::Pattern(pattern), fault);
            let bytes = content(300_000 + 10 * at + position);
            let digest = Digest::of(&bytes);
            repository.push_blob(&digest, bytes).await.unwrap();
            assert!(registry.has_blob(digest));
            registry.faults().clear();
        }
    }
}

#[tokio::test]
async fn a_push_gets_the_right_to_push_in_one_token() {
    let known = Known::new("user", "hunter2");
    let auth = Auth::Bearer(BearerAuth { credentials: Some(known), ..BearerAuth::default() });
    let registry = Registry::start(Options { auth, ..Options::default() }).unwrap();
    let password = Secret::new("hunter2");
    let credentials = Credentials::Basic { username: "user".to_owned(), password };
    let mut options = options();
    options.credentials =
        Arc::new(StaticCredentials::new(registry.reference_prefix(), credentials));
    let repository = Client::new(options).repository(&reference(&registry));
    for len in 1..4 {
        repository.push_blob(&Digest::of(&content(len)), content(len)).await.unwrap();
    }
    assert_eq!(count(&registry, "GET", "/token"), 1);
    registry.faults().expire_tokens();
    repository.push_blob(&Digest::of(&content(9)), content(9)).await.unwrap();
}

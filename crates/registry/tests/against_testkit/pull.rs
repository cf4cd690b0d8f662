//! Manifests and whole blobs: retried a little, and never wrong.

use std::time::Duration;

use oci::Digest;
use oci::media_type::OCI_MANIFEST;
use registry::{FetchError, Repository};
use testkit::registry::{Fault, Outage, Registry, Scope, Times};

use crate::setup::{content, count, impatient_repository, in_full, put_image, repository, start};

#[tokio::test]
async fn a_tag_is_resolved_without_downloading_the_manifest() {
    let registry = start();
    let image = put_image(&registry);
    let repository = repository(&registry);
    assert_eq!(repository.resolve("v1").await.unwrap(), image);
    assert_eq!(repository.resolve(&image.digest.to_string()).await.unwrap(), image);
    assert_eq!(count(&registry, "GET", "/manifests/"), 0);
}

#[tokio::test]
async fn a_registry_without_head_is_asked_with_get() {
    let registry = start();
    let image = put_image(&registry);
    registry.faults().fail_next(Scope::Manifests, 1, 405);
    assert_eq!(repository(&registry).resolve("v1").await.unwrap(), image);
}

#[tokio::test]
async fn manifests_come_by_tag_and_by_digest() {
    let registry = start();
    let image = put_image(&registry);
    let repository = repository(&registry);
    for target in ["v1".to_owned(), image.digest.to_string()] {
        let (descriptor, bytes) = repository.manifest(&target).await.unwrap();
        assert_eq!((descriptor.digest, Digest::of(&bytes)), (image.digest, image.digest));
        assert_eq!(descriptor.media_type, OCI_MANIFEST);
    }
}

#[tokio::test]
async fn a_document_says_what_it_is_where_the_registry_does_not() {
    let registry = start();
    let bytes = crate::setup::manifest(&registry).to_bytes();
    registry.put_manifest(crate::setup::REPOSITORY, Some("v1"), "application/json", bytes);
    let repository = repository(&registry);
    assert_eq!(repository.manifest("v1").await.unwrap().0.media_type, OCI_MANIFEST);
    assert_eq!(repository.resolve("v1").await.unwrap().media_type, OCI_MANIFEST);
}

#[tokio::test]
async fn what_is_not_there_is_not_found_at_once() {
    let registry = start();
    let repository = repository(&registry);
    let errors = [
        repository.resolve("none").await.unwrap_err(),
        repository.manifest("none").await.unwrap_err(),
        repository.blob(&Digest::of(b"none"), 10).await.unwrap_err(),
        repository.blob_stream(&Digest::of(b"none"), 0..1).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, FetchError::NotFound { .. }), "{error:?}");
        assert!(!error.is_transient());
    }
    assert_eq!(registry.requests().len(), 4);
}

#[tokio::test]
async fn other_bytes_than_the_digests_are_an_error() {
    let registry = start();
    let image = put_image(&registry);
    let blob = registry.put_blob(content(1000));
    let repository = repository(&registry);
    registry.faults().inject(Scope::Manifests, Times::Always, Fault::FlipBodyByte { offset: 9 });
    registry.faults().flip_byte(blob, 999, Times::Always);
    let errors = [
        repository.manifest("v1").await.unwrap_err(),
        repository.manifest(&image.digest.to_string()).await.unwrap_err(),
        repository.blob(&blob, 1000).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, FetchError::WrongDigest { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_blob_is_not_read_beyond_its_limit() {
    let registry = start();
    let blob = registry.put_blob(content(1000));
    let repository = repository(&registry);
    assert_eq!(repository.blob(&blob, 1000).await.unwrap(), content(1000));
    let error = repository.blob(&blob, 999).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLarge { limit: 999, .. }), "{error:?}");
}

/// Each fault, twice in a row, is outlived by three attempts.
#[tokio::test]
async fn what_passes_is_waited_for() {
    for fault in [
        Fault::TooManyRequests { retry_after: Duration::ZERO },
        Fault::Status(500),
        Fault::Status(502),
        Fault::Status(503),
        Fault::Status(504),
        Fault::Status(408),
        Fault::ResetRequest,
        Fault::Truncate { after: 10 },
        Fault::ResetBody { after: 10 },
        Fault::Stall { after: 10 },
    ] {
        let registry = start();
        put_image(&registry);
        let blob = registry.put_blob(content(5000));
        let repository = patience_for(fault)(&registry);
        registry.faults().inject(Scope::Everything, Times::Next(2), fault);
        assert_eq!(repository.blob(&blob, 5000).await.unwrap(), content(5000), "{fault:?}");
        registry.faults().inject(Scope::Everything, Times::Next(2), fault);
        repository.manifest("v1").await.unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        registry.faults().clear();
    }
}

#[tokio::test]
async fn what_does_not_pass_is_reported_after_a_few_attempts() {
    let registry = start();
    let blob = registry.put_blob(content(5000));
    let always = |fault| registry.faults().inject(Scope::Blobs, Times::Always, fault);
    for (fault, expected) in [
        (Fault::TooManyRequests { retry_after: Duration::ZERO }, "TooManyRequests"),
        (Fault::Status(503), "Unavailable"),
        (Fault::ResetRequest, "Unavailable"),
        (Fault::Truncate { after: 10 }, "Truncated"),
        (Fault::Stall { after: 10 }, "Stalled"),
    ] {
        let repository = patience_for(fault)(&registry);
        let id = always(fault);
        registry.clear_requests();
        let error = repository.blob(&blob, 5000).await.unwrap_err();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
        assert!(error.is_transient());
        assert_eq!(registry.requests().len(), 3, "{fault:?}");
        registry.faults().remove(id);
        assert_eq!(repository.blob(&blob, 5000).await.unwrap(), content(5000));
    }
}

fn patience_for(fault: Fault) -> fn(&Registry) -> Repository {
    if matches!(fault, Fault::Stall { .. }) { impatient_repository } else { repository }
}

#[tokio::test]
async fn a_long_wait_is_left_to_the_caller() {
    let registry = start();
    put_image(&registry);
    let hour = Duration::from_secs(3600);
    registry.faults().too_many_requests(Scope::Everything, 9, hour);
    let error = repository(&registry).resolve("v1").await.unwrap_err();
    assert_eq!(error.retry_after(), Some(hour));
    assert_eq!(registry.requests().len(), 1);
}

#[tokio::test]
async fn a_refusal_is_final_and_carries_the_registrys_code() {
    let registry = start();
    let blob = registry.put_blob(content(10));
    registry.faults().fail_next(Scope::Blobs, 9, 400);
    let error = repository(&registry).blob(&blob, 10).await.unwrap_err();
    let FetchError::Refused { status: 400, code: Some(code), .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(code, "UNKNOWN");
    assert_eq!(registry.requests().len(), 1);
}

#[tokio::test]
async fn a_dead_registry_is_unavailable_and_comes_back() {
    let registry = start();
    put_image(&registry);
    for (outage, stalled) in [(Outage::Refuse, false), (Outage::Silence, true)] {
        // A client without connections: those that exist may still be answered.
        let repository = impatient_repository(&registry);
        registry.faults().cut(outage);
        let error = repository.resolve("v1").await.expect_err(&format!("{outage:?}"));
        assert!(error.is_transient(), "{}", in_full(&error));
        assert_eq!(matches!(error, FetchError::Stalled { .. }), stalled, "{}", in_full(&error));
        registry.faults().restore();
        repository.resolve("v1").await.unwrap();
    }
}

//! What refers to a manifest, with the API and without.

use std::collections::BTreeMap;

use oci::media_type::{OCI_EMPTY, OCI_INDEX, OCI_MANIFEST};
use oci::soci::{ARTIFACT_TYPE_V1, CONFIG_BYTES, SociIndex, ZtocEntry};
use oci::{Descriptor, Digest, Index, Manifest, Reference};
use registry::Repository;
use testkit::registry::Registry;

use crate::setup::{REPOSITORY, count, put_image, repository, start};

fn soci_index(registry: &Registry, subject: &Descriptor, n: u8) -> SociIndex {
    registry.put_blob(CONFIG_BYTES.to_vec());
    let ztoc = ZtocEntry {
        digest: registry.put_blob(vec![n]),
        size: 1,
        layer_digest: Digest::of(b"layer"),
        layer_media_type: "t".to_owned(),
        span_size: 1,
        disable_xattrs: false,
    };
    SociIndex::v1(subject, [ztoc])
}

async fn push(repository: &Repository, index: &SociIndex) -> Digest {
    let target = index.descriptor().digest.to_string();
    repository.push_manifest(&target, OCI_MANIFEST, index.to_bytes()).await.unwrap().digest
}

fn digests(found: &[Descriptor]) -> Vec<Digest> {
    found.iter().map(|entry| entry.digest).collect()
}

/// Another kind of artifact, whose type stands only in its configuration.
fn signature(registry: &Registry, subject: &Descriptor) -> Manifest {
    registry.put_blob(CONFIG_BYTES.to_vec());
    Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::of("application/vnd.example.signature", CONFIG_BYTES),
        layers: Vec::new(),
        subject: Some(subject.clone()),
        annotations: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
    }
}

#[tokio::test]
async fn referrers_are_listed_and_filtered_with_and_without_the_api() {
    for api in [true, false] {
        let registry = start();
        registry.faults().referrers(api);
        let image = put_image(&registry);
        let repository = repository(&registry);
        assert!(repository.referrers(&image.digest, &[]).await.unwrap().is_empty());

        let first = push(&repository, &soci_index(&registry, &image, 1)).await;
        let second = push(&repository, &soci_index(&registry, &image, 2)).await;
        let other = signature(&registry, &image).to_bytes();
        let other = repository.push_manifest("sig", OCI_MANIFEST, other).await.unwrap().digest;

        let mut all = digests(&repository.referrers(&image.digest, &[]).await.unwrap());
        let mut expected = vec![first, second, other];
        all.sort();
        expected.sort();
        assert_eq!(all, expected, "api: {api}");
        let found = repository.referrers(&image.digest, &[ARTIFACT_TYPE_V1]).await.unwrap();
        assert_eq!(found.len(), 2, "api: {api}");
        assert!(found.iter().all(oci::soci::is_soci_index));
        let signatures = repository
            .referrers(&image.digest, &["application/vnd.example.signature"])
            .await
            .unwrap();
        assert_eq!(digests(&signatures), [other]);
        assert_eq!(signatures[0].annotations["k"], "v");

        let tag = format!("sha256-{}", image.digest.hex());
        assert_eq!(repository.resolve(&tag).await.is_ok(), !api);
    }
}

#[tokio::test]
async fn without_the_api_the_order_of_the_tag_is_kept_and_nothing_is_listed_twice() {
    let registry = start();
    registry.faults().referrers(false);
    let image = put_image(&registry);
    let repository = repository(&registry);
    let mut pushed = Vec::new();
    for n in 0..4 {
        pushed.push(push(&repository, &soci_index(&registry, &image, n)).await);
    }
    push(&repository, &soci_index(&registry, &image, 1)).await;
    let found = repository.referrers(&image.digest, &[]).await.unwrap();
    assert_eq!(digests(&found), pushed);
}

#[tokio::test]
async fn writers_of_the_same_tag_do_not_lose_each_others_entries() {
    let registry = start();
    registry.faults().referrers(false);
    let image = put_image(&registry);
    let repository = repository(&registry);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..8 {
        let (repository, index) = (repository.clone(), soci_index(&registry, &image, n));
        tasks.spawn(async move { push(&repository, &index).await });
    }
    let mut pushed = tasks.join_all().await;
    let mut found = digests(&repository.referrers(&image.digest, &[]).await.unwrap());
    pushed.sort();
    found.sort();
    assert_eq!(found, pushed);
}

#[tokio::test]
async fn entries_without_a_type_are_looked_up() {
    let registry = start();
    registry.faults().referrers(false);
    let image = put_image(&registry);
    let index = soci_index(&registry, &image, 1);
    let stored = registry.put_manifest(REPOSITORY, None, OCI_MANIFEST, index.to_bytes());
    let untyped = Descriptor { artifact_type: None, ..index.descriptor() };
    let gone = Descriptor::of(OCI_MANIFEST, b"gone");
    let list = Index::new(vec![gone, untyped]).to_bytes();
    let tag = format!("sha256-{}", image.digest.hex());
    registry.put_manifest(REPOSITORY, Some(&tag), OCI_INDEX, list);
    let repository = repository(&registry);
    let found = repository.referrers(&image.digest, &[ARTIFACT_TYPE_V1]).await.unwrap();
    assert_eq!(digests(&found), [stored]);
    assert!(oci::soci::is_soci_index(&found[0]));
    let found = repository.referrers(&image.digest, &[OCI_EMPTY]).await.unwrap();
    assert!(found.is_empty());
}

#[tokio::test]
async fn a_list_that_is_no_index_is_an_error_and_trouble_is_not_an_empty_list() {
    let registry = start();
    registry.faults().referrers(false);
    let image = put_image(&registry);
    let tag = format!("sha256-{}", image.digest.hex());
    registry.put_manifest(REPOSITORY, Some(&tag), OCI_INDEX, "[]");
    let repository = repository(&registry);
    let error = repository.referrers(&image.digest, &[]).await.unwrap_err();
    assert!(matches!(error, registry::FetchError::Malformed { .. }), "{error:?}");
    registry.faults().cut(testkit::registry::Outage::Refuse);
    let error = repository.referrers(&image.digest, &[]).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
}

#[tokio::test]
async fn an_image_is_pushed_without_touching_any_list() {
    let registry = start();
    registry.faults().referrers(false);
    let image: Reference = crate::setup::reference(&registry);
    let bytes = crate::setup::manifest(&registry).to_bytes();
    let repository = repository(&registry);
    repository.push_manifest(image.tag_or_latest(), OCI_MANIFEST, bytes).await.unwrap();
    assert_eq!(count(&registry, "GET", "/manifests/"), 0);
    assert_eq!(count(&registry, "PUT", "/manifests/"), 1);
}

//! What all tests here begin with.

use std::time::Duration;

use bytes::Bytes;
use oci::media_type::{DOCKER_CONFIG, DOCKER_LAYER_GZIP, OCI_MANIFEST};
use oci::{Descriptor, Digest, Manifest, Reference};
use registry::{BlobStream, Client, ClientOptions, FetchError, Repository, RetryPolicy};
use testkit::registry::{Options, Registry};

pub(crate) const REPOSITORY: &str = "team/app";

/// Options of a client that does not wait long between attempts.
pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        stall_timeout: Duration::from_secs(10),
        retry: RetryPolicy {
            attempts: 3,
            first_delay: Duration::from_millis(1),
            max_delay: Duration::from_secs(2),
        },
        rest: Duration::from_secs(60),
        ..ClientOptions::default()
    }
}

pub(crate) fn start() -> Registry {
    Registry::start(Options::default()).unwrap()
}

pub(crate) fn reference(registry: &Registry) -> Reference {
    format!("{}/{REPOSITORY}:v1", registry.reference_prefix()).parse().unwrap()
}

pub(crate) fn repository(registry: &Registry) -> Repository {
    Client::new(options()).repository(&reference(registry))
}

/// For tests in which nothing more comes: the limit is one that a busy machine hardly reaches
/// otherwise.
pub(crate) fn impatient_repository(registry: &Registry) -> Repository {
    let options = ClientOptions { stall_timeout: STALL, ..options() };
    Client::new(options).repository(&reference(registry))
}

pub(crate) const STALL: Duration = Duration::from_millis(700);

/// Bytes that are no run of the same.
pub(crate) fn content(len: usize) -> Bytes {
    (0..len).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect()
}

/// A manifest of one layer; both its blobs are put into the registry.
pub(crate) fn manifest(registry: &Registry) -> Manifest {
    let (config, layer) = (b"{\"a\":1}".as_slice(), content(100));
    registry.put_blob(config.to_vec());
    registry.put_blob(layer.clone());
    Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::of(DOCKER_CONFIG, config),
        layers: vec![Descriptor::of(DOCKER_LAYER_GZIP, &layer)],
        subject: None,
        annotations: std::collections::BTreeMap::new(),
    }
}

/// Puts a manifest under the tag `v1`.
pub(crate) fn put_image(registry: &Registry) -> Descriptor {
    let bytes = manifest(registry).to_bytes();
    let descriptor = Descriptor::of(OCI_MANIFEST, &bytes);
    registry.put_manifest(REPOSITORY, Some("v1"), OCI_MANIFEST, bytes);
    descriptor
}

/// Everything that a stream gives, and the error that ends it.
pub(crate) async fn drain(stream: &mut BlobStream) -> (Vec<u8>, Option<FetchError>) {
    let mut bytes = Vec::new();
    loop {
        match stream.next().await {
            Ok(Some(chunk)) => {
                assert!(!chunk.is_empty());
                bytes.extend_from_slice(&chunk);
            }
            Ok(None) => return (bytes, None),
            Err(error) => return (bytes, Some(error)),
        }
    }
}

/// A range of a blob that must come whole.
pub(crate) async fn read(
    repository: &Repository,
    blob: &Digest,
    range: std::ops::Range<u64>,
) -> Vec<u8> {
    let mut stream = repository.blob_stream(blob, range).await.unwrap();
    let (bytes, error) = drain(&mut stream).await;
    assert!(error.is_none(), "{error:?}");
    bytes
}

/// How many requests of a method there were for paths with this part.
pub(crate) fn count(registry: &Registry, method: &str, part: &str) -> usize {
    let requests = registry.requests();
    requests.iter().filter(|r| r.method == method && r.path.contains(part)).count()
}

/// An error with all its causes, in both forms: nothing in it may be secret.
pub(crate) fn in_full(error: &FetchError) -> String {
    let mut text = format!("{error:?} {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause} {cause:?}"));
        source = cause.source();
    }
    text
}

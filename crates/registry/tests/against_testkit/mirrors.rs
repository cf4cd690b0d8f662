//! Several servers for one registry: in order, past those that fail, back when they have recovered.

use std::collections::BTreeMap;

use oci::{Digest, Reference};
use registry::{Capability, Client, ClientOptions, FetchError, Host, Repository};
use reqwest::Url;
use testkit::registry::{Auth, Credentials, Fault, Registry, Scope, Times};

use crate::setup::{STALL, content, count, drain, options, put_image, read, start};

/// A mirror and the registry that it mirrors, with the same content.
struct Pair {
    mirror: Registry,
    own: Registry,
    blob: Digest,
}

impl Pair {
    fn new() -> Self {
        let (mirror, own) = (start(), start());
        put_image(&mirror);
        put_image(&own);
        mirror.put_blob(content(5000));
        let blob = own.put_blob(content(5000));
        Self { mirror, own, blob }
    }

    fn host(&self) -> Host {
        host(&self.mirror)
    }

    fn repository_with(&self, options: ClientOptions) -> Repository {
        let hosts = vec![self.host(), host(&self.own)];
        let hosts = BTreeMap::from([("r.example".to_owned(), hosts)]);
        repository(ClientOptions { hosts, ..options })
    }

    fn repository(&self, mirror: Host) -> Repository {
        repository(ClientOptions {
            hosts: BTreeMap::from([("r.example".to_owned(), vec![mirror, host(&self.own)])]),
            ..options()
        })
    }

    /// How many requests went to the mirror and to the registry since the last call.
    fn asked(&self) -> (usize, usize) {
        let asked = (self.mirror.requests().len(), self.own.requests().len());
        self.mirror.clear_requests();
        self.own.clear_requests();
        asked
    }
}

fn host(registry: &Registry) -> Host {
    let base = format!("http://{}/v2", registry.reference_prefix());
    Host::new(Url::parse(&base).unwrap())
}

fn repository(options: ClientOptions) -> Repository {
    let image: Reference = "r.example/team/app:v1".parse().unwrap();
    Client::new(options).repository(&image)
}

#[tokio::test]
async fn the_mirror_is_asked_first() {
    let pair = Pair::new();
    let repository = pair.repository(pair.host());
    repository.resolve("v1").await.unwrap();
    repository.blob(&pair.blob, 5000).await.unwrap();
    assert_eq!(pair.asked(), (2, 0));
}

#[tokio::test]
async fn what_the_mirror_does_not_have_comes_from_the_registry() {
    let pair = Pair::new();
    let repository = pair.repository(pair.host());
    assert!(pair.mirror.delete_blob(pair.blob));
    read(&repository, &pair.blob, 0..10).await;
    read(&repository, &pair.blob, 0..10).await;
    assert_eq!(pair.asked(), (2, 2), "a mirror that lacks a blob is not put aside");
}

/// Each way to fail hands over to the registry at once, and the mirror is asked last from then on.
#[tokio::test]
async fn a_failing_mirror_is_put_aside() {
    for fault in [
        Fault::Status(500),
        Fault::Status(403),
        Fault::Status(418),
        Fault::TooManyRequests { retry_after: std::time::Duration::from_secs(9) },
        Fault::ResetRequest,
        Fault::FlipBodyByte { offset: 7 },
        Fault::Truncate { after: 7 },
        Fault::Stall { after: 7 },
    ] {
        let pair = Pair::new();
        let repository = match fault {
            Fault::Stall { .. } => {
                pair.repository_with(ClientOptions { stall_timeout: STALL, ..options() })
            }
            _ => pair.repository(pair.host()),
        };
        pair.mirror.faults().inject(Scope::Blobs, Times::Always, fault);
        assert_eq!(repository.blob(&pair.blob, 5000).await.unwrap(), content(5000), "{fault:?}");
        assert_eq!(pair.asked(), (1, 1), "{fault:?}");
        repository.blob(&pair.blob, 5000).await.unwrap();
        assert_eq!(pair.asked(), (0, 1), "{fault:?}");
        pair.mirror.faults().clear();
    }
}

#[tokio::test]
async fn a_stream_that_breaks_is_continued_elsewhere_by_the_next_one() {
    let pair = Pair::new();
    let repository = pair.repository(pair.host());
    pair.mirror.faults().inject(Scope::Blobs, Times::Always, Fault::Truncate { after: 100 });
    let mut stream = repository.blob_stream(&pair.blob, 0..5000).await.unwrap();
    let (bytes, error) = drain(&mut stream).await;
    assert!(matches!(error, Some(FetchError::Truncated { .. })), "{error:?}");
    let got = u64::try_from(bytes.len()).unwrap();
    let rest = read(&repository, &pair.blob, got..5000).await;
    assert!([bytes, rest].concat() == content(5000));
    assert_eq!(pair.asked(), (1, 1));
}

#[tokio::test]
async fn a_mirror_that_lies_in_ranges_is_put_aside_by_whoever_noticed() {
    let pair = Pair::new();
    let repository = pair.repository(pair.host());
    pair.mirror.faults().flip_byte(pair.blob, 5, Times::Always);
    let mut stream = repository.blob_stream(&pair.blob, 0..10).await.unwrap();
    let source = stream.source().unwrap();
    let (bytes, _) = drain(&mut stream).await;
    assert_ne!(bytes, content(10));
    source.put_aside(Digest::of(&content(10)), Digest::of(&bytes));
    assert_eq!(read(&repository, &pair.blob, 0..10).await, content(10));
    assert_eq!(pair.asked(), (1, 1));
}

#[tokio::test]
async fn the_mirror_serves_when_the_registry_fails_as_well() {
    let pair = Pair::new();
    let repository = pair.repository(pair.host());
    let cut = |registry: &Registry| {
        registry.faults().inject(Scope::Everything, Times::Always, Fault::ResetRequest);
    };
    cut(&pair.mirror);
    repository.resolve("v1").await.unwrap();
    pair.mirror.faults().clear();
    cut(&pair.own);
    repository.resolve("v1").await.unwrap();
    cut(&pair.mirror);
    let error = repository.resolve("v1").await.unwrap_err();
    assert!(error.is_transient());
    pair.mirror.faults().clear();
    repository.resolve("v1").await.unwrap();
    cut(&pair.mirror);
    pair.own.faults().clear();
    repository.resolve("v1").await.unwrap();
}

#[tokio::test]
async fn a_mirror_that_wants_credentials_of_its_own_is_passed_over() {
    let pair = Pair::new();
    let repository = pair.repository(pair.host());
    pair.mirror.faults().set_auth(Auth::Basic(Credentials::new("user", "hunter2")));
    repository.resolve("v1").await.unwrap();
}

#[tokio::test]
async fn a_mirror_without_the_capability_is_not_asked() {
    let pair = Pair::new();
    let mirror = Host { capabilities: vec![Capability::Pull], ..pair.host() };
    let repository = pair.repository(mirror);
    let image = repository.resolve("v1").await.unwrap();
    repository.referrers(&image.digest, &[]).await.unwrap();
    repository.push_blob(&Digest::of(b"new"), b"new".to_vec()).await.unwrap();
    assert_eq!(pair.asked().0, 0);
    repository.manifest(&image.digest.to_string()).await.unwrap();
    assert_eq!(pair.asked(), (1, 0));
}

#[tokio::test]
async fn a_registry_that_nobody_may_be_asked_for_is_misconfigured() {
    let pair = Pair::new();
    let host = Host { capabilities: vec![Capability::Pull], ..pair.host() };
    let hosts = BTreeMap::from([("r.example".to_owned(), vec![host])]);
    let repository = repository(ClientOptions { hosts, ..options() });
    let error = repository.resolve("v1").await.unwrap_err();
    assert!(matches!(error, FetchError::Misconfigured { .. }), "{error:?}");
}

#[tokio::test]
async fn mirrors_are_found_in_the_hosts_folder() {
    let pair = Pair::new();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("r.example");
    std::fs::create_dir(&folder).unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        pair.own.reference_prefix(),
        pair.mirror.reference_prefix()
    );
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let hosts_dirs = vec![empty.path().to_owned(), dir.path().to_owned()];
    let repository = repository(ClientOptions { hosts_dirs, ..options() });
    repository.resolve("v1").await.unwrap();
    read(&repository, &pair.blob, 0..10).await;
    assert_eq!(count(&pair.own, "HEAD", "/manifests/"), 1);
    assert_eq!(count(&pair.mirror, "GET", "/blobs/"), 1);
}

#[tokio::test]
async fn a_broken_hosts_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("r.example")).unwrap();
    std::fs::write(dir.path().join("r.example/hosts.toml"), "server = 3").unwrap();
    let hosts_dirs = vec![dir.path().to_owned()];
    let error =
        repository(ClientOptions { hosts_dirs, ..options() }).resolve("v1").await.unwrap_err();
    let text = crate::setup::in_full(&error);
    assert!(text.contains("hosts.toml") && text.contains("r.example"), "{text}");
}

//! Registries with certificates of their own.

use std::collections::BTreeMap;
use std::path::Path;

use registry::{Client, FetchError, Host, Repository};
use reqwest::Url;
use testkit::registry::{Options, Registry};

use crate::setup::{content, in_full, options, put_image, read, reference};

fn start() -> Registry {
    Registry::start(Options { tls: true, ..Options::default() }).unwrap()
}

fn repository(registry: &Registry, change: impl FnOnce(&mut Host)) -> Repository {
    let base = format!("https://{}/v2", registry.reference_prefix());
    let mut host = Host::new(Url::parse(&base).unwrap());
    change(&mut host);
    let mut options = options();
    options.hosts = BTreeMap::from([(registry.reference_prefix(), vec![host])]);
    Client::new(options).repository(&reference(registry))
}

fn write_ca(registry: &Registry, dir: &Path) -> std::path::PathBuf {
    let path = dir.join("ca.pem");
    std::fs::write(&path, registry.ca_pem().unwrap()).unwrap();
    path
}

#[tokio::test]
async fn an_authority_that_is_named_is_trusted_also_where_blobs_are_redirected() {
    let registry = start();
    put_image(&registry);
    let blob = registry.put_blob(content(1000));
    let dir = tempfile::tempdir().unwrap();
    let ca = write_ca(&registry, dir.path());
    let repository = repository(&registry, |host| host.ca.push(ca));
    repository.resolve("v1").await.unwrap();
    registry.faults().redirect_blobs(true);
    assert_eq!(read(&repository, &blob, 5..50).await, content(1000)[5..50]);
}

#[tokio::test]
async fn an_unknown_authority_is_not_trusted_unless_that_is_wanted() {
    let registry = start();
    put_image(&registry);
    let error = repository(&registry, |_| {}).resolve("v1").await.unwrap_err();
    assert!(matches!(error, FetchError::Unavailable { .. }), "{}", in_full(&error));
    assert!(in_full(&error).to_lowercase().contains("certificate"), "{}", in_full(&error));
    repository(&registry, |host| host.skip_verify = true).resolve("v1").await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_is_none_is_named() {
    let registry = start();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    for text in [None, Some(""), Some("hunter2")] {
        if let Some(text) = text {
            std::fs::write(&path, text).unwrap();
        }
        let error = repository(&registry, |host| host.ca.push(path.clone()))
            .resolve("v1")
            .await
            .unwrap_err();
        assert!(matches!(error, FetchError::Misconfigured { .. }), "{error:?}");
        let text = in_full(&error);
        assert!(text.contains("ca.pem") && !text.contains("hunter2"), "{text}");
    }
}

/// A registry with TLS on the port must not be reached without, nor the other way round.
#[tokio::test]
async fn the_scheme_is_not_guessed() {
    let registry = start();
    put_image(&registry);
    let repository = Client::new(options()).repository(&reference(&registry));
    repository.resolve("v1").await.unwrap_err();
}

//! Credentials and tokens: enough, no more, and never shown or sent elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use registry::{
    Chain, Client, CredentialSource, Credentials, CredentialsError, DockerConfig, FetchError,
    Repository, Secret, StaticCredentials, Wanted,
};
use testkit::registry::{
    Auth, BearerAuth, Credentials as Known, Fault, Options, Registry, Scope, Times,
};

use crate::setup::{content, count, in_full, options, put_image, read, reference};

const PASSWORD: &str = "hunter2";

fn known() -> Known {
    Known::new("user", PASSWORD)
}

fn bearer() -> BearerAuth {
    BearerAuth { credentials: Some(known()), ..BearerAuth::default() }
}

fn start(auth: Auth) -> Registry {
    Registry::start(Options { auth, ..Options::default() }).unwrap()
}

fn with(registry: &Registry, credentials: impl CredentialSource + 'static) -> Repository {
    let mut options = options();
    options.credentials = Arc::new(credentials);
    Client::new(options).repository(&reference(registry))
}

fn password(registry: &Registry, password: &str) -> StaticCredentials {
    let (username, password) = ("user".to_owned(), Secret::new(password));
    StaticCredentials::new(registry.reference_prefix(), Credentials::Basic { username, password })
}

#[tokio::test]
async fn the_right_password_opens_and_is_sent_unasked_from_then_on() {
    for auth in [Auth::Basic(known()), Auth::Bearer(bearer())] {
        let registry = start(auth.clone());
        let image = put_image(&registry);
        let repository = with(&registry, password(&registry, PASSWORD));
        for _ in 0..5 {
            assert_eq!(repository.resolve("v1").await.unwrap(), image);
        }
        assert_eq!(count(&registry, "HEAD", "/manifests/"), 6, "{auth:?}");
        assert!(count(&registry, "GET", "/token") <= 1);
    }
}

#[tokio::test]
async fn a_wrong_or_missing_password_is_reported_with_a_reason_and_no_secret() {
    for auth in [Auth::Basic(known()), Auth::Bearer(bearer())] {
        let registry = start(auth);
        put_image(&registry);
        let wrong = with(&registry, password(&registry, "hunter3"));
        let none = with(&registry, registry::Anonymous);
        for (repository, reason) in [(wrong, "not accepted"), (none, "no credentials")] {
            let error = repository.resolve("v1").await.unwrap_err();
            assert!(matches!(error, FetchError::Unauthorized { .. }), "{error:?}");
            let text = in_full(&error);
            assert!(text.contains(reason) && !text.contains("hunter"), "{text}");
        }
    }
}

#[tokio::test]
async fn anonymous_tokens_are_fetched_where_the_registry_gives_them() {
    let registry = start(Auth::Bearer(BearerAuth::default()));
    let image = put_image(&registry);
    let repository = with(&registry, registry::Anonymous);
    assert_eq!(repository.resolve("v1").await.unwrap(), image);
    assert_eq!(count(&registry, "GET", "/token"), 1);
}

#[tokio::test]
async fn one_token_serves_all_who_wait_for_it() {
    let registry = start(Auth::Bearer(bearer()));
    let blob = registry.put_blob(content(20_000));
    let repository = with(&registry, password(&registry, PASSWORD));
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..20_u64 {
        let repository = repository.clone();
        tasks.spawn(async move { read(&repository, &blob, at * 1000..(at + 1) * 1000).await });
    }
    tasks.join_all().await;
    assert_eq!(count(&registry, "GET", "/token"), 1);
}

#[tokio::test]
async fn a_token_that_has_expired_is_replaced_in_the_middle_of_the_work() {
    let registry = start(Auth::Bearer(bearer()));
    let blob = registry.put_blob(content(20_000));
    let repository = with(&registry, password(&registry, PASSWORD));
    for at in 0..5 {
        read(&repository, &blob, at * 1000..(at + 1) * 1000).await;
        registry.faults().expire_tokens();
    }
    assert_eq!(count(&registry, "GET", "/token"), 5);

    let once = BearerAuth { uses: Some(1), ..bearer() };
    registry.faults().set_auth(Auth::Bearer(once));
    for at in 0..5 {
        read(&repository, &blob, at * 1000..(at + 1) * 1000).await;
    }
}

#[tokio::test]
async fn a_changed_scheme_is_followed() {
    let registry = start(Auth::Bearer(bearer()));
    put_image(&registry);
    let repository = with(&registry, password(&registry, PASSWORD));
    for auth in [Auth::Bearer(bearer()), Auth::Basic(known()), Auth::None, Auth::Bearer(bearer())] {
        registry.faults().set_auth(auth);
        repository.resolve("v1").await.unwrap();
    }
}

#[tokio::test]
async fn a_token_service_in_trouble_is_waited_for() {
    let registry = start(Auth::Bearer(bearer()));
    put_image(&registry);
    let repository = with(&registry, password(&registry, PASSWORD));
    registry.faults().fail_next(Scope::Token, 2, 503);
    repository.resolve("v1").await.unwrap();
}

#[tokio::test]
async fn an_identity_token_buys_tokens() {
    let registry = start(Auth::Bearer(bearer()));
    put_image(&registry);
    let url = format!("http://{}/token?offline_token=true", registry.reference_prefix());
    let login = reqwest::Client::builder().no_proxy().build().unwrap().get(url);
    let answer = login.basic_auth("user", Some(PASSWORD)).send().await.unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
    let token = answer["refresh_token"].as_str().unwrap();
    let identity = Credentials::IdentityToken(Secret::new(token));
    let source = StaticCredentials::new(registry.reference_prefix(), identity);
    with(&registry, source).resolve("v1").await.unwrap();
    assert_eq!(count(&registry, "POST", "/token"), 1);

    let identity = Credentials::IdentityToken(Secret::new("hunter2"));
    let source = StaticCredentials::new(registry.reference_prefix(), identity);
    let error = with(&registry, source).resolve("v1").await.unwrap_err();
    assert!(
        matches!(error, FetchError::Unauthorized { .. }) && !in_full(&error).contains("hunter")
    );
}

#[tokio::test]
async fn redirects_do_not_see_the_authorization() {
    for auth in [Auth::Basic(known()), Auth::Bearer(bearer())] {
        let registry = start(auth);
        let blob = registry.put_blob(content(1000));
        registry.faults().redirect_blobs(true);
        let repository = with(&registry, password(&registry, PASSWORD));
        read(&repository, &blob, 0..10).await;
        read(&repository, &blob, 10..20).await;
        repository.blob(&blob, 1000).await.unwrap();
        let requests = registry.requests();
        let (cdn, own): (Vec<_>, Vec<_>) =
            requests.iter().partition(|request| request.path.contains("/cdn/"));
        assert_eq!(cdn.len(), 3);
        assert!(cdn.iter().all(|request| !request.authorization));
        assert!(own.iter().any(|request| request.authorization));
    }
}

#[tokio::test]
async fn a_docker_configuration_is_enough() {
    let registry = start(Auth::Bearer(bearer()));
    put_image(&registry);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    // "user:hunter2"
    let auths = format!(
        r#"{{"auths":{{"{}":{{"auth":"dXNlcjpodW50ZXIy"}}}}}}"#,
        registry.reference_prefix()
    );
    std::fs::write(&path, auths).unwrap();
    with(&registry, DockerConfig::new(&path)).resolve("v1").await.unwrap();

    std::fs::write(&path, r#"{"auths":"hunter2"}"#).unwrap();
    let error = with(&registry, DockerConfig::new(&path)).resolve("v1").await.unwrap_err();
    let text = in_full(&error);
    assert!(text.contains("config.json") && !text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn what_is_refused_gives_way_to_the_next_source() {
    for auth in [Auth::Basic(known()), Auth::Bearer(bearer())] {
        let registry = start(auth.clone());
        let image = put_image(&registry);
        let passwords = |passwords: &[&str]| {
            let source = |text: &&str| Arc::new(password(&registry, text)) as _;
            with(&registry, Chain::new(passwords.iter().map(source).collect()))
        };
        let repository = passwords(&["too old", "too short", PASSWORD]);
        for _ in 0..3 {
            assert_eq!(repository.resolve("v1").await.unwrap(), image);
        }
        let basic = matches!(auth, Auth::Basic(_));
        let expected = if basic { (6, 0) } else { (4, 3) };
        let asked = (count(&registry, "HEAD", "/manifests/"), count(&registry, "GET", "/token"));
        assert_eq!(asked, expected, "{auth:?}");

        let error = passwords(&["too old", "too short"]).resolve("v1").await.unwrap_err();
        assert!(in_full(&error).contains("not accepted"), "{error:?}");
    }
}

/// What was good when the mount was made is refused while it lives.
#[tokio::test]
async fn credentials_that_expire_under_a_mount_give_way_too() {
    for bearer_auth in [false, true] {
        let auth = |password: &str| {
            let known = Known::new("user", password);
            match bearer_auth {
                true => Auth::Bearer(BearerAuth { credentials: Some(known), ..bearer() }),
                false => Auth::Basic(known),
            }
        };
        let registry = start(auth("short-lived"));
        let blob = registry.put_blob(content(20_000));
        let sources =
            ["short-lived", PASSWORD].map(|text| Arc::new(password(&registry, text)) as _);
        let repository = with(&registry, Chain::new(sources.into()));
        read(&repository, &blob, 0..1000).await;
        registry.faults().set_auth(auth(PASSWORD));
        registry.faults().expire_tokens();
        read(&repository, &blob, 1000..2000).await;
        read(&repository, &blob, 2000..3000).await;
    }
}

/// Amazon's registry says 403 then.
#[tokio::test]
async fn a_forbidden_password_gives_way_too() {
    let registry = start(Auth::Basic(Known::new("user", "short-lived")));
    put_image(&registry);
    let sources = ["short-lived", PASSWORD].map(|text| Arc::new(password(&registry, text)) as _);
    let repository = with(&registry, Chain::new(sources.into()));
    repository.resolve("v1").await.unwrap();
    registry.faults().set_auth(Auth::Basic(known()));
    registry.faults().fail_next(Scope::Manifests, 1, 403);
    repository.resolve("v1").await.unwrap();
}

/// A token that is given is not always enough for the repository.
#[tokio::test]
async fn a_fresh_token_that_is_refused_gives_way_too() {
    let registry = start(Auth::Bearer(bearer()));
    let image = put_image(&registry);
    let token = Credentials::RegistryToken(Secret::new("no longer good"));
    let refused = StaticCredentials::new(registry.reference_prefix(), token);
    let right = password(&registry, PASSWORD);
    let repository = with(&registry, Chain::new(vec![Arc::new(refused), Arc::new(right)]));
    assert_eq!(repository.resolve("v1").await.unwrap(), image);
}

/// Gives a new password each time, of which the first is too old.
#[derive(Debug)]
struct Renewed {
    asked: AtomicUsize,
}

impl CredentialSource for Renewed {
    fn credentials<'a>(
        &'a self,
        wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>> {
        assert_eq!(wanted.repository, crate::setup::REPOSITORY);
        let first = self.asked.fetch_add(1, Ordering::Relaxed) == 0;
        let password = Secret::new(if first { "too old" } else { PASSWORD });
        let credentials = Credentials::Basic { username: "user".to_owned(), password };
        Box::pin(std::future::ready(Ok(Some(credentials))))
    }
}

#[tokio::test]
async fn credentials_are_asked_for_again_after_a_refusal() {
    let registry = start(Auth::Basic(known()));
    put_image(&registry);
    let repository = with(&registry, Renewed { asked: AtomicUsize::new(0) });
    repository.resolve("v1").await.unwrap();
}

/// Amazon's registry answers 403 to a password that has expired.
#[tokio::test]
async fn a_forbidden_access_is_tried_again_with_a_changed_password_only() {
    let registry = start(Auth::Basic(Known::new("user", "too old")));
    put_image(&registry);
    let repository = with(&registry, Renewed { asked: AtomicUsize::new(0) });
    repository.resolve("v1").await.unwrap();
    registry.faults().set_auth(Auth::Basic(known()));
    registry.faults().fail_next(Scope::Manifests, 1, 403);
    repository.resolve("v1").await.unwrap();
    registry.faults().inject(Scope::Manifests, Times::Always, Fault::Status(403));
    registry.clear_requests();
    repository.resolve("v1").await.unwrap_err();
    assert_eq!(registry.requests().len(), 1);
}

#[tokio::test]
async fn what_a_server_asks_for_is_known_in_its_other_repositories() {
    for auth in [Auth::Basic(known()), Auth::Bearer(bearer())] {
        let registry = start(auth);
        let blob = registry.put_blob(content(10));
        let mut options = options();
        options.credentials = Arc::new(password(&registry, PASSWORD));
        let client = Client::new(options);
        for (name, requests) in [("a", 2), ("b", 1), ("c/d", 1)] {
            let image = format!("{}/{name}", registry.reference_prefix()).parse().unwrap();
            registry.clear_requests();
            client.repository(&image).blob(&blob, 10).await.unwrap();
            assert_eq!(count(&registry, "GET", "/blobs/"), requests, "{name}");
        }
    }
}

#[tokio::test]
async fn users_do_not_share_tokens() {
    let registry = start(Auth::Bearer(bearer()));
    put_image(&registry);
    let mut options = options();
    options.credentials = Arc::new(password(&registry, PASSWORD));
    let client = Client::new(options);
    client.repository(&reference(&registry)).resolve("v1").await.unwrap();
    let nobody = client.with_credentials(Arc::new(registry::Anonymous));
    nobody.repository(&reference(&registry)).resolve("v1").await.unwrap_err();
}

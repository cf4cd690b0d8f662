//! Configurations as `docker login`, `kubectl create secret` and people write them.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn basic(username: &str, password: &str) -> Credentials {
    Credentials::Basic { username: username.to_owned(), password: Secret::new(password) }
}

/// Asks for what no server has refused.
fn wanted<'a>(server: &'a str, repository: &'a str) -> Wanted<'a> {
    Wanted { server, registry: server, repository, refused: &[] }
}

/// Looks up `asked`, a server and a repository after a blank, in a file with the text `json`.
async fn find(json: &str, asked: &str) -> Result<Option<Credentials>, CredentialsError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, json).unwrap();
    let (server, repository) = asked.split_once(' ').unwrap_or((asked, "a/b"));
    DockerConfig::new(path).credentials(wanted(server, repository)).await
}

#[track_caller]
fn check(
    found: Result<Option<Credentials>, CredentialsError>,
    expected: impl Into<Option<Credentials>>,
) {
    assert_eq!(found.unwrap(), expected.into());
}

#[tokio::test]
async fn all_forms_of_an_entry_are_read() {
    // "u:p:w"
    check(find(r#"{"auths":{"r.io":{"auth":"dTpwOnc="}}}"#, "r.io").await, Some(basic("u", "p:w")));
    check(find(r#"{"auths":{"r.io":{"auth":"dTpwOnc"}}}"#, "r.io").await, Some(basic("u", "p:w")));
    let json = r#"{"auths":{"r.io":{"username":"u","password":"p"}}}"#;
    check(find(json, "r.io").await, Some(basic("u", "p")));
    let json = r#"{"auths":{"r.io":{"auth":"dTpwOnc=","identitytoken":"t"}}}"#;
    check(find(json, "r.io").await, Some(Credentials::IdentityToken(Secret::new("t"))));
    let json = r#"{"auths":{"r.io":{"registrytoken":"t"}}}"#;
    check(find(json, "r.io").await, Some(Credentials::RegistryToken(Secret::new("t"))));
    check(find(r#"{"auths":{"r.io":{}}}"#, "r.io").await, None);
    check(find(r#"{"psFormat":"x"}"#, "r.io").await, None);
}

#[tokio::test]
async fn a_missing_file_means_anonymous() {
    let dir = tempfile::tempdir().unwrap();
    let config = DockerConfig::new(dir.path().join("none.json"));
    check(config.credentials(wanted("r.io", "a")).await, None);
}

#[tokio::test]
async fn docker_hub_has_many_names() {
    for key in
        ["https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io"]
    {
        let json = format!(r#"{{"auths":{{"{key}":{{"auth":"dTpwOnc="}}}}}}"#);
        check(find(&json, "docker.io library/a").await, Some(basic("u", "p:w")));
    }
}

#[test]
fn keys_fit_by_host_wildcard_and_path() {
    for (key, asked, expected) in [
        ("r.io", "r.io a/b", Some(0)),
        ("https://r.io/v2/", "r.io a/b", Some(0)),
        ("r.io:5000", "r.io:5000 a", Some(0)),
        ("r.io", "r.io:5000 a", None),
        ("r.io/a", "r.io a/b", Some(1)),
        ("r.io/a/b/", "r.io a/b", Some(3)),
        ("r.io/a", "r.io ab", None),
        ("*.r.io", "x.r.io a", Some(0)),
        ("*.r.io", "r.io a", None),
        ("*.r.io", "y.x.r.io a", None),
        ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com a", Some(0)),
        ("eu-*-1.x*y*z.io", "eu-west-1.xaybz.io a", Some(0)),
        ("eu-*-1.io", "eu-west-2.io a", None),
        ("*", "r.io a", None),
        ("a*a.io", "a.io x", None),
    ] {
        let (server, repository) = asked.split_once(' ').unwrap();
        assert_eq!(match_len(key, server, repository), expected, "{key} for {asked}");
    }
}

#[tokio::test]
async fn the_longest_path_wins() {
    let json =
        r#"{"auths":{"r.io":{"auth":"YTox"},"r.io/a/b":{"auth":"YToz"},"r.io/a":{"auth":"YToy"}}}"#;
    check(find(json, "r.io a/b/c").await, Some(basic("a", "3")));
    check(find(json, "r.io a/c").await, Some(basic("a", "2")));
    check(find(json, "r.io x").await, Some(basic("a", "1")));
}

#[tokio::test]
async fn malformed_files_are_refused_without_showing_secrets() {
    for json in [
        "{\"auths\":{\n\"r.io\":{\"auth\":\"dTpwOnc=\",\"password\":{\"hunter2\":1}}}}",
        r#"{"auths":"hunter2"}"#,
        r#"{"auths":{"r.io":{"auth":"hunter2!"}}}"#,
        r#"{"auths":{"r.io":{"auth":"dQ=="}}}"#,
        "",
    ] {
        let error = find(json, "r.io").await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("config.json") && !shown.contains("hunter2"), "{shown}");
    }
}

/// A helper's program; its path stands for its name, which only tests can do.
struct Helper {
    dir: tempfile::TempDir,
}

impl Helper {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("helper");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    async fn run(&self, server: &str) -> Result<Option<Credentials>, HelperProblem> {
        let path = self.dir.path().join("helper");
        // Another test's fork may still hold the script open for writing.
        loop {
            match run_helper(path.to_str().unwrap(), server, Duration::from_secs(60)).await {
                Err(HelperProblem::Run(error))
                    if error.kind() == io::ErrorKind::ExecutableFileBusy =>
                {
                    tokio::task::yield_now().await;
                }
                done => return done,
            }
        }
    }
}

#[tokio::test]
async fn helpers_are_asked_by_name() {
    let helper = Helper::new(
        r#"read -r server || true
        [ "$1" = get ] && echo "{\"ServerURL\":\"$server\",\"Username\":\"$server\",\"Secret\":\"s\"}""#,
    );
    assert_eq!(helper.run("r.io").await.unwrap(), Some(basic("r.io", "s")));
    assert_eq!(helper.run("docker.io").await.unwrap(), Some(basic(DOCKER_HUB_KEY, "s")));
    let token = Helper::new(r#"echo '{"Username":"<token>","Secret":"t"}'"#);
    let expected = Credentials::IdentityToken(Secret::new("t"));
    assert_eq!(token.run("r.io").await.unwrap(), Some(expected));
}

#[tokio::test]
async fn helpers_may_know_nothing_or_fail() {
    let none = Helper::new("echo credentials not found in native keychain; exit 1");
    assert_eq!(none.run("r.io").await.unwrap(), None);
    for (script, reason) in [
        ("echo hunter2; exit 3", "status 3"),
        ("echo hunter2", "malformed"),
        ("echo '{\"Username\":\"hunter2\"}'", "malformed"),
        ("kill -9 $$", "killed"),
    ] {
        let error = Helper::new(script).run("r.io").await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(error.to_string().contains(reason) && !shown.contains("hunter2"), "{shown}");
    }
}

#[tokio::test]
async fn a_helper_that_hangs_or_is_missing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, r#"{"credHelpers":{"r.io":"hermes-test-none"},"credsStore":"../x"}"#)
        .unwrap();
    let config = DockerConfig::new(&path).with_helper_time_limit(Duration::ZERO);
    let error = config.credentials(wanted("r.io", "a")).await.unwrap_err().to_string();
    assert!(error.contains("docker-credential-hermes-test-none"), "{error}");
    let error = config.credentials(wanted("other.io", "a")).await.unwrap_err().to_string();
    assert!(error.contains("not that of a program"), "{error}");

    let hanging = Helper::new("while :; do :; done");
    let run = tokio::time::timeout(Duration::from_millis(50), hanging.run("r.io"));
    run.await.unwrap_err();
}

//! What a kubelet may send, and what is kept of it.

use super::*;

fn basic(username: &str, password: &str) -> Credentials {
    Credentials::Basic { username: username.to_owned(), password: Secret::new(password) }
}

fn given(password: &str) -> Given {
    Given { server: None, credentials: basic("u", password) }
}

fn image(name: &str) -> Reference {
    name.parse().unwrap()
}

async fn find(from: &GivenCredentials, at: (&str, &str, &str), refused: &[Credentials]) -> String {
    let (server, registry, repository) = at;
    let wanted = Wanted { server, registry, repository, refused };
    match from.credentials(wanted).await.unwrap() {
        Some(Credentials::Basic { password, .. }) => password.expose().to_owned(),
        Some(other) => format!("{other:?}"),
        None => String::new(),
    }
}

#[test]
fn a_pulls_credentials_are_read_as_containerd_reads_them() {
    let auth = |username: &str, password: &str, token: &str, auth: &str| PullAuth {
        username: username.to_owned(),
        password: Secret::new(password),
        identity_token: Secret::new(token),
        auth: Secret::new(auth),
        server_address: String::new(),
    };
    let check = |auth: &PullAuth, expected: Option<Credentials>| {
        let read = auth.given().unwrap().map(|given| given.credentials);
        assert_eq!(read, expected, "{auth:?}");
    };
    check(&auth("", "", "", ""), None);
    check(&auth("", "ignored", "", ""), None);
    check(&auth("u", "p", "t", "dTpwOnc="), Some(basic("u", "p")));
    check(&auth("u", "", "t", ""), Some(basic("u", "")));
    let identity = Credentials::IdentityToken(Secret::new("t"));
    check(&auth("", "p", "t", "dTpwOnc="), Some(identity));
    // "u:p:w"
    check(&auth("", "", "", "dTpwOnc="), Some(basic("u", "p:w")));
    // "u:p\0"
    check(&auth("", "", "", "dTpwAA=="), Some(basic("u", "p")));
    for malformed in ["%", "dXNlcg==", "dTpwOnc"] {
        assert_eq!(auth("", "", "", malformed).given(), Err(MalformedPullAuth));
    }
}

#[tokio::test]
async fn a_server_address_keeps_others_from_seeing_them() {
    let check = async |address: &str, server: &str, expected: bool| {
        let auth = PullAuth {
            username: "u".to_owned(),
            password: Secret::new("p"),
            server_address: address.to_owned(),
            ..PullAuth::default()
        };
        let known = GivenCredentials::new();
        assert!(known.remember(&image("r.io/a"), &auth.given().unwrap().unwrap()));
        let found = find(&known, (server, "r.io", "a"), &[]).await;
        assert_eq!(found == "p", expected, "{address} {server}");
    };
    check("", "r.io", true).await;
    check("", "mirror.io", true).await;
    check("r.io", "r.io", true).await;
    check("https://r.io/v2/", "r.io", true).await;
    check("https://r.io:443", "r.io", false).await;
    check("r.io", "mirror.io", false).await;
    check("https://user@r.io", "r.io", true).await;
    check("https://index.docker.io/v1/", "docker.io", true).await;
    check("registry-1.docker.io", "docker.io", true).await;
    check("https://evil.io/r.io", "r.io", false).await;
}

#[tokio::test]
async fn the_newest_of_a_repository_comes_first_and_the_others_after_it() {
    let known = GivenCredentials::new();
    for password in ["1", "2", "3", "2"] {
        assert!(known.remember(&image("r.io/a:tag"), &given(password)));
    }
    assert!(!known.remember(&image("r.io/a:other"), &given("2")));
    let at = ("r.io", "r.io", "a");
    for (n_refused, expected) in [(0, "2"), (1, "3"), (2, "1"), (3, "")] {
        let refused: Vec<_> = ["2", "3", "1"].map(|p| basic("u", p)).into();
        assert_eq!(find(&known, at, &refused[..n_refused]).await, expected);
    }
    assert_eq!(find(&known, ("r.io", "r.io", "b"), &[]).await, "");
    assert!(known.forget(&image("r.io/a"), &given("2")));
    assert!(!known.forget(&image("r.io/a"), &given("2")));
    assert!(!known.forget(&image("r.io/b"), &given("1")));
    assert_eq!(find(&known, at, &[]).await, "3");
    for password in ["4", "5", "6", "7"] {
        known.remember(&image("r.io/a"), &given(password));
    }
    assert_eq!(known.repositories.lock()[0].given.len(), MOST_FOR_ONE);
}

#[tokio::test]
async fn docker_hub_has_one_name() {
    let known = GivenCredentials::new();
    known.remember(&image("nginx"), &given("p"));
    let at = ("docker.io", "docker.io", "library/nginx");
    assert_eq!(find(&known, at, &[]).await, "p");
}

#[tokio::test]
async fn the_repository_pulled_longest_ago_goes_first() {
    let known = GivenCredentials::bounded(3, 100);
    for name in ["a", "b", "c", "a", "d"] {
        known.remember(&image(&format!("r.io/{name}")), &given("p"));
    }
    let names = |known: &GivenCredentials| -> Vec<String> {
        known.repositories.lock().iter().map(|known| known.repository.clone()).collect()
    };
    assert_eq!(names(&known), ["d", "a", "c"]);
    // Four bytes of the name, one of the repository's, one of the user's.
    known.remember(&image("r.io/e"), &given(&"p".repeat(100 - 7 - 7)));
    assert_eq!(names(&known), ["e", "d"]);
    assert!(!known.remember(&image("r.io/f"), &given(&"p".repeat(MOST_GIVEN_BYTES))));
}

#[test]
fn another_process_can_go_on_with_them() {
    let known = GivenCredentials::new();
    known.remember(&image("r.io/a"), &given("1"));
    known.remember(&image("r.io/a"), &given("2"));
    let token = |token| Credentials::IdentityToken(Secret::new(token));
    let identity = Given { server: Some("r.io".to_owned()), credentials: token("t") };
    known.remember(&image("r.io/b"), &identity);
    let next = GivenCredentials::new();
    next.restore(&known.expose()).unwrap();
    let all = |known: &GivenCredentials| -> Vec<_> {
        let known = known.repositories.lock();
        known.iter().map(|known| (known.repository.clone(), known.given.clone())).collect()
    };
    assert_eq!(all(&next), all(&known));
    assert_eq!(all(&next).len(), 2);
    assert_eq!(next.restore(b"[{\"secret\":\"hunter2\"}]"), Err(MalformedPullAuth));
    known.remember(&image("r.io/a"), &given("hunter2"));
    assert!(!format!("{known:?} {:?}", given("hunter2")).contains("hunter2"), "{known:?}");
}

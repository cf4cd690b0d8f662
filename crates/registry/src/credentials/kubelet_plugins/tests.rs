//! Plugins as scripts of the shell, each of which writes down how often it was run.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::Secret;

struct Node {
    dir: tempfile::TempDir,
    plugins: KubeletPlugins,
}

/// A node with a plugin named `p` for `*.io`, and what more the configuration says of it. The program is the
/// shell, since a script that was just written may be held open by another test's fork.
fn node(script: &str, more: &str) -> Node {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let script = format!("echo run >>{}\n{script}\n", path("count").display());
    fs::write(path("script"), script).unwrap();
    symlink("/bin/sh", path("p")).unwrap();
    let config = format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
         - name: p\n  matchImages: ['*.io', '*.io:5000']\n  defaultCacheDuration: 1h\n  \
         apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [{}, one, two]\n{more}",
        path("script").display()
    );
    fs::write(path("config.yaml"), config).unwrap();
    let plugins = KubeletPlugins::new(path("config.yaml"), dir.path());
    Node { dir, plugins }
}

impl Node {
    fn n_runs(&self) -> usize {
        fs::read_to_string(self.dir.path().join("count")).unwrap_or_default().lines().count()
    }

    async fn ask(
        &self,
        registry: &str,
        repository: &str,
        refused: &[&str],
    ) -> Result<Option<String>, CredentialsError> {
        let refused: Vec<_> = refused.iter().map(|password| basic(password)).collect();
        let wanted = Wanted { server: registry, registry, repository, refused: &refused };
        let found = self.plugins.credentials(wanted).await?;
        Ok(found.map(|found| match found {
            Credentials::Basic { password, .. } => password.expose().to_owned(),
            other => panic!("{other:?}"),
        }))
    }
}

fn basic(password: &str) -> Credentials {
    Credentials::Basic { username: "u".to_owned(), password: Secret::new(password) }
}

/// A script whose password is the number of the run.
fn counting(cache_key: &str, more: &str) -> String {
    format!(
        r#"n=$(wc -l <"$(dirname "$0")/count")
echo '{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
"cacheKeyType":"{cache_key}",{more}"auth":{{"*.io":{{"username":"u","password":"'$n'"}}}}}}'"#
    )
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[tokio::test]
async fn answers_are_kept_as_they_say() {
    for (cache_key, more, expected) in [
        ("Image", "", ["1", "1", "2", "3"]),
        ("Registry", "", ["1", "1", "1", "2"]),
        ("Global", "", ["1", "1", "1", "1"]),
        ("Global", r#""cacheDuration":"0s","#, ["1", "2", "3", "4"]),
        ("Image", r#""cacheDuration":"10h","#, ["1", "1", "2", "3"]),
    ] {
        let node = node(&counting(cache_key, more), "");
        let asked = [("r.io", "a"), ("r.io", "a"), ("r.io", "b"), ("s.io", "a")];
        for ((registry, repository), expected) in asked.into_iter().zip(expected) {
            let found = node.ask(registry, repository, &[]).await.unwrap();
            assert_eq!(found, some(expected), "{cache_key} {more}");
        }
    }
}

#[tokio::test]
async fn without_a_duration_of_its_own_the_default_counts() {
    let node = node(&counting("Global", ""), "");
    let path = node.dir.path().join("config.yaml");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("Duration: 1h", "Duration: 0s")).unwrap();
    for expected in ["1", "2"] {
        assert_eq!(node.ask("r.io", "a", &[]).await.unwrap(), some(expected));
    }
}

#[tokio::test]
async fn a_refused_answer_is_renewed_but_not_with_each_request() {
    let node = node(&counting("Registry", ""), "");
    assert_eq!(node.ask("r.io", "a", &[]).await.unwrap(), some("1"));
    assert_eq!(node.ask("r.io", "a", &["1"]).await.unwrap(), None);
    for cache in node.plugins.caches.lock().values() {
        for cached in cache.try_lock().unwrap().values_mut() {
            cached.made = cached.made.checked_sub(REST).unwrap();
        }
    }
    assert_eq!(node.ask("r.io", "a", &["1"]).await.unwrap(), some("2"));
    assert_eq!(node.ask("r.io", "a", &[]).await.unwrap(), some("2"));
    assert_eq!(node.n_runs(), 2);
}

#[tokio::test]
async fn a_plugin_gets_the_image_its_arguments_and_its_environment() {
    let script = r#"read -r question
case "$question" in *'"image":"r.io:5000/a/b"'*) ;; *) exit 1 ;; esac
case "$question" in *'"kind":"CredentialProviderRequest"'*) ;; *) exit 2 ;; esac
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
"cacheKeyType":"Image","auth":{"r.io:5000":{"username":"u","password":"'$1-$2-$WORD'"}}}'"#;
    let more = "  env:\n  - {name: WORD, value: three}\n";
    let node = node(script, more);
    assert_eq!(node.ask("r.io:5000", "a/b", &[]).await.unwrap(), some("one-two-three"));
}

#[tokio::test]
async fn a_plugin_for_other_images_is_not_run() {
    let node = node("exit 1", "");
    assert_eq!(node.ask("r.example", "a", &[]).await.unwrap(), None);
    assert_eq!(node.n_runs(), 0);
}

#[tokio::test]
async fn whoever_needs_an_answer_that_is_being_made_waits_for_it() {
    let node = node(&counting("Registry", ""), "");
    let names = ["a", "b", "c", "d"];
    let found = futures_util::future::join_all(names.map(|name| node.ask("r.io", name, &[]))).await;
    assert!(found.into_iter().all(|found| found.unwrap() == some("1")));
    assert_eq!(node.n_runs(), 1);
}

#[tokio::test]
async fn trouble_with_a_plugin_is_reported_without_what_it_said() {
    let check = async |script: &str, expected: &str| {
        let mut node = node(script, "");
        node.plugins = node.plugins.with_time_limit(Duration::from_secs(5));
        let error = node.ask("r.io", "a", &[]).await.unwrap_err().to_string();
        assert_eq!(error, format!("running the credential helper `p`: {expected}"));
    };
    check("echo hunter2; echo hunter2 >&2", "its answer is malformed").await;
    check("echo hunter2; exit 3", "it ended with status 3").await;
    check("cat /dev/zero", "its answer does not end").await;
    let node = node("exec sleep 1000", "");
    let plugins = KubeletPlugins::new(node.dir.path().join("config.yaml"), node.dir.path());
    let plugins = plugins.with_time_limit(Duration::from_millis(100));
    let wanted = Wanted { server: "r.io", registry: "r.io", repository: "a", refused: &[] };
    let error = plugins.credentials(wanted).await.unwrap_err().to_string();
    assert!(error.ends_with("it did not answer within 100ms"), "{error}");
}

#[tokio::test]
async fn the_next_plugin_is_asked_when_one_has_nothing() {
    let more = "- name: q\n  matchImages: ['*.io']\n  defaultCacheDuration: 1h\n  \
                apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [-s]\n";
    let node = node("exit 1", more);
    let answer = r#"{"kind":"CredentialProviderResponse","cacheKeyType":"Image",
        "apiVersion":"credentialprovider.kubelet.k8s.io/v1",
        "auth":{"*.io":{"username":"u","password":"other"}}}"#;
    let path = node.dir.path().join("answer");
    fs::write(&path, answer).unwrap();
    symlink("/bin/cat", node.dir.path().join("q")).unwrap();
    let config = node.dir.path().join("config.yaml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("[-s]", &format!("[{}]", path.display()))).unwrap();
    assert_eq!(node.ask("r.io", "a", &[]).await.unwrap(), some("other"));
}

#[tokio::test]
async fn a_configuration_that_is_missing_or_malformed_is_reported() {
    let node = node("exit 1", "");
    let path = node.dir.path().join("config.yaml");
    fs::write(&path, "kind: hunter2\napiVersion: x\n").unwrap();
    let error = node.ask("r.io", "a", &[]).await.unwrap_err();
    assert!(matches!(error, CredentialsError::MalformedPlugins { .. }), "{error:?}");
    assert!(!format!("{error:?}").contains("hunter2"));
    fs::remove_file(&path).unwrap();
    let error = node.ask("r.io", "a", &[]).await.unwrap_err();
    assert!(matches!(error, CredentialsError::Read { .. }), "{error:?}");
}

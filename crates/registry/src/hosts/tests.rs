//! Folders as the containerd documentation shows them, and broken ones.

use super::*;

/// Writes `text` as the hosts file of `folder` and loads `registry`.
fn load_text(folder: &str, text: &str, registry: &str) -> Result<Vec<Host>, LoadHostsError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(folder)).unwrap();
    std::fs::write(dir.path().join(folder).join("hosts.toml"), text).unwrap();
    load(dir.path(), registry)
}

#[track_caller]
fn check(folder: &str, text: &str, registry: &str, bases: &[&str]) -> Vec<Host> {
    let hosts = load_text(folder, text, registry).unwrap();
    let found: Vec<&str> = hosts.iter().map(|host| host.base.as_str()).collect();
    assert_eq!(found, bases);
    hosts
}

const OWN: &str = "server = 'https://own.example'";

#[test]
fn a_registry_without_a_folder_stands_for_itself() {
    for (registry, base) in [
        ("quay.io", "https://quay.io/v2"),
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("registry.example:5000", "https://registry.example:5000/v2"),
    ] {
        check("other.example", OWN, registry, &[base]);
    }
    let plain = own_server("registry.example:5000", true).unwrap();
    assert_eq!(plain.base.as_str(), "http://registry.example:5000/v2");
}

#[test]
fn folders_are_named_as_containerd_names_them() {
    let own = ["https://own.example/v2"];
    check("docker.io", OWN, "docker.io", &own);
    check("_default", OWN, "anything.example", &own);
    check("r.example_5000_", OWN, "r.example:5000", &own);
    check("r.example:5000", OWN, "r.example:5000", &own);
    check("r.example", OWN, "r.example:5000", &["https://r.example:5000/v2"]);
}

#[test]
fn hosts_come_in_the_order_of_the_file_and_the_registry_last() {
    let hosts = check(
        "docker.io",
        r#"
            [host."https://z.example"]
              capabilities = ["pull"]
            [host."http://a.example:8080/proxy/"]
              capabilities = ["pull", "resolve", "referrers"]
              skip_verify = true
            [host."b.example/v2"]
            [host."https://c.example/cache"]
              override_path = true
        "#,
        "docker.io",
        &[
            "https://z.example/v2",
            "http://a.example:8080/proxy/v2",
            "https://b.example/v2",
            "https://c.example/cache",
            "https://registry-1.docker.io/v2",
        ],
    );
    assert_eq!(hosts[3].url("a/blobs/b").as_str(), "https://c.example/cache/a/blobs/b");
    assert_eq!(hosts[0].capabilities, [Capability::Pull]);
    assert_eq!(hosts[1].capabilities, [Capability::Pull, Capability::Resolve]);
    assert_eq!(hosts[2].capabilities.len(), 3);
    assert!(hosts[1].skip_verify && !hosts[0].skip_verify);
    assert!(!hosts[0].serves("docker.io") && hosts[4].serves("docker.io"));
}

#[test]
fn an_api_at_the_root_of_a_server_has_one_slash_before_its_paths() {
    let text = "[host.'https://m.example']\noverride_path = true";
    let bases = ["https://m.example/", "https://r.example/v2"];
    let hosts = check("r.example", text, "r.example", &bases);
    assert_eq!(hosts[0].url("a/blobs/b").as_str(), "https://m.example/a/blobs/b");
}

#[test]
fn certificates_and_headers_are_taken_in_all_their_forms() {
    let text = r#"
        server = "https://r.example"
        ca = "own.pem"
        client = [["/abs/c.cert", "c.key"], ["d.cert", ""]]
        [header]
          x-own = "1"
        [host."https://m.example"]
          ca = ["a.pem", "/abs/b.pem"]
          client = "both.pem"
          [host."https://m.example".header]
            X-Two = ["1", "2"]
            authorization = "Basic hunter2"
        [host."https://n.example"]
          client = ["only.pem"]
    "#;
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("r.example");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
    let hosts = load(dir.path(), "r.example").unwrap();
    let [mirror, another, own] = hosts.as_slice() else { panic!("{hosts:?}") };

    assert_eq!(mirror.ca, [folder.join("a.pem"), PathBuf::from("/abs/b.pem")]);
    assert_eq!(mirror.client.as_ref().unwrap().cert, folder.join("both.pem"));
    assert_eq!(another.client.as_ref().unwrap().cert, folder.join("only.pem"));
    assert_eq!(mirror.headers.len(), 3);
    assert!(!format!("{mirror:?}").contains("hunter2"));
    assert_eq!(own.ca, [folder.join("own.pem")]);
    let client = own.client.as_ref().unwrap();
    assert_eq!(client.cert, PathBuf::from("/abs/c.cert"));
    assert_eq!(client.key, Some(folder.join("c.key")));
    assert_eq!(own.headers[0].0, "x-own");
}

#[test]
fn dockers_certificate_folders_are_read_too() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("r.example");
    std::fs::create_dir(&folder).unwrap();
    for name in ["ca.crt", "b.cert", "b.key", "a.cert", "a.key", "README"] {
        std::fs::write(folder.join(name), "").unwrap();
    }
    let hosts = load(dir.path(), "r.example").unwrap();
    assert_eq!(hosts[0].ca, [folder.join("ca.crt")]);
    let client = hosts[0].client.clone().unwrap();
    assert_eq!((client.cert, client.key), (folder.join("a.cert"), Some(folder.join("a.key"))));
}

#[test]
fn malformed_files_are_refused_without_showing_their_values() {
    for (text, reason) in [
        ("server = [hunter2", "line 1"),
        ("\nserver = 'https://r.example'\nskip_verify = 'hunter2'", "wrong type"),
        ("[host.'https://m.example']\nca = 3", "line 1"),
        ("[host.'ftp://m.example']", "ftp://m.example"),
        ("[host.'https://']", "not the address"),
        ("[host.'https://u:p@m.example']", "not the address"),
        ("[host.'https://m.example']\ncapabilities = ['fly']", "`fly` is not a capability"),
        ("[header]\n'a b' = 'hunter2'", "header `a b`"),
        ("[header]\na = \"hunter2\\n\"", "header `a`"),
    ] {
        let error = load_text("r.example", text, "r.example").unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(reason), "{shown}");
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

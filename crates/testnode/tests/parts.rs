//! The real parts work in a node, without Hermes: what tests of Hermes build on.

#![expect(clippy::unwrap_used, reason = "shared parts of tests, which fail by panicking")]

use testnode::{
    ContainerdVersion, Node, SOCI_SOCKET, SOCI15_SOCKET, busybox_image, check_busybox_output,
    lazy_pull_config, proxy_config,
};

/// SOCI mounts each lazy layer as a FUSE file system of its own.
fn n_lazy_layers(node: &Node) -> usize {
    node.run("cat", &["/proc/1/mountinfo"]).unwrap().matches(" fuse.rawBridge ").count()
}

fn runs_a_container(version: ContainerdVersion) {
    let node = Node::start().unwrap();
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "bb:1").unwrap();
    let containerd = node.containerd(version, "version = 2\n").unwrap();
    containerd.ctr(&["image", "pull", "--plain-http", &image]).unwrap();
    check_busybox_output(&containerd.run("overlayfs", &[&image, "one"]).unwrap());
}

#[test]
fn containerd_1_6_runs_a_container() {
    runs_a_container(ContainerdVersion::V1_6);
}

#[test]
fn containerd_1_7_runs_a_container() {
    runs_a_container(ContainerdVersion::V1_7);
}

#[test]
fn containerd_2_1_runs_a_container() {
    runs_a_container(ContainerdVersion::Packaged);
}

#[test]
fn containerd_2_4_runs_a_container() {
    runs_a_container(ContainerdVersion::Newest);
}

#[test]
fn a_registry_with_tls_wants_its_password() {
    let node = Node::start().unwrap();
    let registry = node.tls_registry(5443).unwrap();
    let ask = |more: &str| {
        let url = format!("https://{}/v2/", registry.host);
        node.bash(&format!("curl -s -o /dev/null -w '%{{http_code}}' {more} {url}")).unwrap()
    };
    assert_eq!(ask(""), "401");
    assert_eq!(ask(&format!("-u {}", registry.user())), "200");
}

#[test]
fn soci_0_4_indexes_an_image_and_runs_it_lazily() {
    let node = Node::start().unwrap();
    let registry = node.tls_registry(5443).unwrap();
    let image = busybox_image(&node, &registry, "bb:1").unwrap();
    let user = registry.user();
    let _soci = node.soci_snapshotter("").unwrap();
    let config = proxy_config("soci", SOCI_SOCKET);
    let containerd = node.containerd(ContainerdVersion::Packaged, &config).unwrap();
    containerd.ctr(&["image", "pull", "--user", &user, &image]).unwrap();
    node.run("soci", &["create", &image]).unwrap();
    node.run("soci", &["push", "--user", &user, &image]).unwrap();
    containerd.ctr(&["image", "rm", "--sync", &image]).unwrap();

    node.run("soci", &["image", "rpull", "--user", &user, &image]).unwrap();
    assert_eq!(n_lazy_layers(&node), 1, "the large layer is mounted, not unpacked");
    check_busybox_output(&containerd.run("soci", &[&image, "one"]).unwrap());
}

#[test]
fn soci_0_15_indexes_and_converts_a_layout() {
    let node = Node::start().unwrap();
    let registry = node.registry(5000).unwrap();
    busybox_image(&node, &registry, "bb:1").unwrap();
    let soci15 = |command: &str, target: &str| -> serde_json::Value {
        let args = [command, "-push", target, "/srv/images:bb"];
        serde_json::from_str(&node.run("/opt/peers/soci15", &args).unwrap()).unwrap()
    };
    let index = soci15("create", "127.0.0.1:5000/bb");
    assert_eq!(index["artifactType"], "application/vnd.amazon.soci.index.v1+json");
    let digest = index["digest"].as_str().unwrap();
    let url = format!("http://127.0.0.1:5000/v2/bb/manifests/{digest}");
    let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
    let pushed = node.run("curl", &["-sf", "-H", accept, &url]).unwrap();
    let pushed: serde_json::Value = serde_json::from_str(&pushed).unwrap();
    assert_eq!(pushed["layers"].as_array().unwrap().len(), 1, "one layer is large enough");

    let converted = soci15("convert", "127.0.0.1:5000/bb:v2");
    assert_eq!(converted["mediaType"], "application/vnd.oci.image.index.v1+json");
}

#[test]
fn soci_0_15_runs_a_converted_image_lazily() {
    let node = Node::start().unwrap();
    let registry = node.registry(5000).unwrap();
    busybox_image(&node, &registry, "bb:1").unwrap();
    let image = format!("{}/bb:v2", registry.host);
    node.run("/opt/peers/soci15", &["convert", "-push", &image, "/srv/images:bb"]).unwrap();
    let _soci = node.soci15_snapshotter("").unwrap();
    let config = lazy_pull_config("soci15", SOCI15_SOCKET);
    let containerd = node.containerd(ContainerdVersion::Newest, &config).unwrap();
    containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "soci15", &image]).unwrap();
    assert_eq!(n_lazy_layers(&node), 1, "the large layer is mounted, not unpacked");
    check_busybox_output(&containerd.run("soci15", &[&image, "one"]).unwrap());
}

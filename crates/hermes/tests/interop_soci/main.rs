//! Indexes between Hermes and AWS's tools, both ways: real tools, real registry, real containerd.
//!
//! `cargo xtask setup` makes what they run in.

#![expect(clippy::unwrap_used, reason = "shared parts of tests, which fail by panicking")]

mod image;

use std::fs;

use serde_json::Value;
use testnode::{
    Containerd, ContainerdVersion, Node, SOCI_SOCKET, SOCI15_SOCKET, lazy_pull_config, proxy_config,
};

use image::{SAMPLES, debian_image, expected_output, hermes, node};

/// What makes SOCI 0.15 look for indexes of version 1.
const VERSION_1: &str = "[pull_modes.soci_v1]\nenable = true\n";

/// SOCI mounts each lazy layer as a FUSE file system of its own.
fn n_lazy_layers(node: &Node) -> usize {
    node.run("cat", &["/proc/1/mountinfo"]).unwrap().matches(" fuse.rawBridge ").count()
}

/// The layers above the 10 MiB below which SOCI's tools leave a layer alone.
const N_LARGE_LAYERS: usize = 2;

fn indexed(report: &Value) -> Vec<(&str, &Value)> {
    let layers = report["layers"].as_array().unwrap().iter();
    let indexed = layers.filter(|layer| layer["index"].is_object());
    indexed.map(|layer| (layer["digest"].as_str().unwrap(), &layer["index"])).collect()
}

/// A zTOC without the version of the tool that made it: everything else must be the same.
#[track_caller]
fn without_tool(mut ztoc: Vec<u8>) -> Vec<u8> {
    let tool = b"AWS SOCI CLI v0.";
    let at = ztoc.windows(tool.len()).rposition(|bytes| bytes == tool).unwrap();
    ztoc[at + tool.len()] = b'X';
    ztoc
}

/// Hermes finds the index that another tool has put beside `image`, agrees with every byte of it, and
/// reads files through it.
#[track_caller]
fn hermes_uses_the_index_of(node: &Node, image: &str, origin: &str) {
    let found = hermes(node, "/var/lib/found", &["show", image]);
    let found = indexed(&found);
    assert_eq!(found.len(), N_LARGE_LAYERS, "{found:?}");
    let built = hermes(node, "/var/lib/built", &["build", "--min-layer-size", "10m", image]);
    let built = indexed(&built);
    assert_eq!(built.len(), N_LARGE_LAYERS, "{built:?}");
    for ((layer, found), (own_layer, built)) in found.iter().zip(&built) {
        assert_eq!(layer, own_layer);
        assert_eq!(found["origin"], origin, "{layer}");
        assert!(
            found["spans"].as_u64().unwrap() > 3 && found["files"].as_u64().unwrap() > 3,
            "{found}"
        );
        let blob = |file: &str| {
            let name = layer.strip_prefix("sha256:").unwrap();
            fs::read(node.path(&format!("/var/lib/{}", file.replace("LAYER", name)))).unwrap()
        };
        let found_blob = without_tool(blob("found/index/LAYER.ztoc"));
        let built_blob = without_tool(blob("built/index/LAYER.soci"));
        assert!(found_blob == built_blob, "the zTOCs of {layer} differ: {found}, {built}");
    }

    // A comparison of checkpoints, span digests and tables of contents with a fresh build.
    let verified = hermes(node, "/var/lib/found", &["verify", image]);
    let identical = verified["layers"].as_array().unwrap().iter();
    assert_eq!(identical.filter(|layer| layer["identical"] == true).count(), N_LARGE_LAYERS);

    for path in SAMPLES {
        let script = format!(
            "hermes --root /var/lib/read index get-file {image} {path} | sha256sum\n\
             sha256sum < \"$(chroot /srv/truth /bin/readlink -f {path} | sed 's|^|/srv/truth|')\"\n"
        );
        let sums = node.bash(&script).unwrap();
        let sums: Vec<&str> = sums.lines().collect();
        assert_eq!(sums[0], sums[1], "{path}");
    }
}

fn containerd_with_soci(node: &Node) -> Containerd {
    node.containerd(ContainerdVersion::Packaged, &proxy_config("soci", SOCI_SOCKET)).unwrap()
}

#[test]
fn soci_0_4_and_hermes_make_the_same_index() {
    let node = node();
    let registry = node.tls_registry(5443).unwrap();
    let image = debian_image(&node, &registry);
    let user = registry.user();
    let containerd = containerd_with_soci(&node);
    containerd.ctr(&["image", "pull", "--user", &user, &image]).unwrap();
    node.run("soci", &["create", &image]).unwrap();
    node.run("soci", &["push", "--user", &user, &image]).unwrap();
    hermes_uses_the_index_of(&node, &image, "referrer");
}

#[test]
fn soci_0_15_and_hermes_make_the_same_index_of_version_1() {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let image = debian_image(&node, &registry);
    let push = "127.0.0.1:5000/app";
    node.run("/opt/peers/soci15", &["create", "-push", push, "/srv/images:app"]).unwrap();
    hermes_uses_the_index_of(&node, &image, "referrer");
}

#[test]
fn soci_0_15_and_hermes_make_the_same_index_of_version_2() {
    let node = node();
    let registry = node.registry(5000).unwrap();
    debian_image(&node, &registry);
    let image = "127.0.0.1:5000/app:v2";
    node.run("/opt/peers/soci15", &["convert", "-push", image, "/srv/images:app"]).unwrap();
    hermes_uses_the_index_of(&node, image, "annotation");
}

/// Builds the indexes of the large layers and pushes them.
fn push_own_index(node: &Node, image: &str) {
    let built = hermes(node, "/var/lib/built", &["build", "--min-layer-size", "10m", image]);
    assert_eq!(indexed(&built).len(), N_LARGE_LAYERS);
    let pushed = hermes(node, "/var/lib/built", &["push", image]);
    assert_eq!(pushed["index"]["artifactType"], "application/vnd.amazon.soci.index.v1+json");
}

#[test]
fn soci_0_4_mounts_lazily_with_an_index_of_hermes() {
    let node = node();
    let registry = node.tls_registry(5443).unwrap();
    let image = debian_image(&node, &registry);
    let user = registry.user();
    push_own_index(&node, &image);

    let _soci = node.soci_snapshotter("").unwrap();
    let containerd = containerd_with_soci(&node);
    node.run("soci", &["image", "rpull", "--user", &user, &image]).unwrap();
    assert_eq!(n_lazy_layers(&node), N_LARGE_LAYERS, "large layers are mounted, not unpacked");
    assert_eq!(containerd.run("soci", &[&image, "one"]).unwrap(), expected_output(&node));
}

/// Runs the image with SOCI 0.15 under containerd 2.4.
#[track_caller]
fn soci15_runs_lazily(node: &Node, image: &str, config: &str) {
    let _soci = node.soci15_snapshotter(config).unwrap();
    let config = lazy_pull_config("soci15", SOCI15_SOCKET);
    let containerd = node.containerd(ContainerdVersion::Newest, &config).unwrap();
    containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "soci15", image]).unwrap();
    assert_eq!(n_lazy_layers(node), N_LARGE_LAYERS, "large layers are mounted, not unpacked");
    assert_eq!(containerd.run("soci15", &[image, "one"]).unwrap(), expected_output(node));
}

#[test]
fn soci_0_15_mounts_lazily_with_an_index_of_hermes() {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let image = debian_image(&node, &registry);
    push_own_index(&node, &image);
    soci15_runs_lazily(&node, &image, VERSION_1);
}

#[test]
fn soci_0_15_mounts_lazily_an_image_converted_with_indexes_of_hermes() {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let original = debian_image(&node, &registry);
    // Reduced windows are all that decoding needs, there too.
    let args = ["build", "--sparse-windows", "--min-layer-size", "10m", &original];
    assert_eq!(indexed(&hermes(&node, "/var/lib/built", &args)).len(), N_LARGE_LAYERS);
    let convert = ["push", "--version", "2", "--tag", "v2", &original];
    hermes(&node, "/var/lib/built", &convert);
    let image = "127.0.0.1:5000/app:v2";
    let shown = hermes(&node, "/var/lib/found", &["show", image]);
    assert_eq!(indexed(&shown).len(), N_LARGE_LAYERS, "{shown}");
    assert!(indexed(&shown).iter().all(|(_, index)| index["origin"] == "hermes"), "{shown}");
    soci15_runs_lazily(&node, image, "");
}

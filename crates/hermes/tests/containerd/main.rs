//! Hermes as the snapshotter of real containerds. `cargo xtask setup` makes what they run in.

#![expect(clippy::unwrap_used, reason = "shared parts of tests, which fail by panicking")]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use testnode::{
    Cache, Containerd, ContainerdVersion, Daemon, Network, Node, NodeOptions, busybox_image,
    proxy_config, wait_until,
};

/// Where containerd finds Hermes in the node.
const SOCKET: &str = "/run/hermes/containerd.sock";

const PATIENCE: Duration = Duration::from_secs(20);

fn node() -> Node {
    let peers = Cache::locate().existing_peers().unwrap();
    let binds = vec![
        (peers, "/opt/peers".to_owned()),
        (PathBuf::from(env!("CARGO_BIN_EXE_hermes")), "/usr/local/bin/hermes".to_owned()),
    ];
    Node::start_with(&NodeOptions { network: Network::Own, binds }).unwrap()
}

fn start(node: &Node) -> Daemon {
    let arguments =
        ["--log", "info,snapshotter=debug", "daemon", "--no-respawn", "--snapshotter", SOCKET];
    let mut daemon = node.spawn("hermes", "hermes", &arguments).unwrap();
    let socket = node.path(SOCKET);
    daemon.wait_ready("its socket", || Ok(UnixStream::connect(&socket).is_ok())).unwrap();
    daemon
}

fn run(containerd: &Containerd, image: &str, name: &str) -> String {
    containerd.ctr(&["run", "--rm", "--snapshotter", "hermes", image, name]).unwrap()
}

/// What the image's program prints.
#[track_caller]
fn check(output: &str) {
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 5, "{output}");
    assert_eq!(
        lines[2], "90433fcbd9e16297e6a7c1dacb1056394743194776e52f78ebf0a44b80b6b14f  /data/numbers",
        "what `seq 1000000 | sha256sum` prints"
    );
    assert_eq!(lines[3..], ["noise", "numbers"], "the whiteout is in force");
}

#[test]
fn containerds_own_tests_of_snapshotters_pass() {
    let node = node();
    // The tests' folders must be where overlayfs takes them.
    let script = "
        mkdir /var/lib/hermes/tests
        export TMPDIR=/var/lib/hermes/tests
        export SNAPSHOTTER='hermes --root $ROOT daemon --snapshotter $SOCKET'
        /opt/peers/snapshotter-suite -test.v -test.parallel 4 -test.timeout 5m 2>&1";
    let output = node.bash(script).unwrap();
    let passed = output.matches("--- PASS: ").count();
    // 21 of containerd's, those of error codes, and the test that holds the 21.
    assert!(passed == 23 && !output.contains("--- SKIP"), "{passed} passed:\n{output}");
}

/// An image is pulled and run, the daemon killed, and what it knew is there.
fn snapshots_outlive_the_daemon(version: ContainerdVersion) {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "bb:1").unwrap();
    let daemon = start(&node);
    let containerd = node.containerd(version, &proxy_config("hermes", SOCKET)).unwrap();
    let mut pull = vec!["image", "pull", "--plain-http", "--snapshotter", "hermes", &image];
    if version >= ContainerdVersion::Packaged {
        // Without an entry in its configuration the Transfer Service unpacks for overlayfs only.
        pull.insert(2, "--local");
    }
    containerd.ctr(&pull).unwrap();
    check(&run(&containerd, &image, "one"));
    daemon.kill().unwrap();
    let daemon = start(&node);
    let list = || containerd.ctr(&["snapshots", "--snapshotter", "hermes", "list"]);
    // Old versions try to connect again only every few seconds.
    wait_until("containerd to find the daemon", PATIENCE, || Ok(list().is_ok())).unwrap();
    check(&run(&containerd, &image, "two"));
    let committed = || list().unwrap().matches("Committed").count();
    assert_eq!(committed(), 3);
    containerd.ctr(&["image", "rm", "--sync", &image]).unwrap();
    assert_eq!(committed(), 0);
    assert!(daemon.stop().unwrap().success());
    let left = node.bash("ls /var/lib/hermes/snapshots").unwrap();
    assert!(left.lines().all(|name| name.starts_with("metadata.db")), "{left}");
}

#[test]
fn snapshots_outlive_the_daemon_on_containerd_1_6() {
    snapshots_outlive_the_daemon(ContainerdVersion::V1_6);
}

#[test]
fn snapshots_outlive_the_daemon_on_containerd_1_7() {
    snapshots_outlive_the_daemon(ContainerdVersion::V1_7);
}

#[test]
fn snapshots_outlive_the_daemon_on_containerd_2_1() {
    snapshots_outlive_the_daemon(ContainerdVersion::Packaged);
}

#[test]
fn snapshots_outlive_the_daemon_on_containerd_2_4() {
    snapshots_outlive_the_daemon(ContainerdVersion::Newest);
}

#[test]
fn a_lost_store_is_a_refusal() {
    let node = node();
    let daemon = start(&node);
    assert!(daemon.stop().unwrap().success());
    node.bash("mkdir /var/lib/hermes/snapshots/7; rm /var/lib/hermes/snapshots/metadata.db*")
        .unwrap();
    let refused =
        node.bash(&format!("hermes daemon --snapshotter {SOCKET} 2>&1 || echo \"code $?\""));
    let refused = refused.unwrap();
    assert!(refused.contains("is gone, but 1 snapshots lie beside it"), "{refused}");
    assert!(refused.contains("code 1"), "{refused}");
}

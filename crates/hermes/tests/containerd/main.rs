//! Hermes as the snapshotter of real containerds. `cargo xtask setup` makes what they run in.

#![expect(clippy::unwrap_used, reason = "shared parts of tests, which fail by panicking")]

mod boot;
mod credentials;
mod eager;
mod faults;
mod images;
mod load;
mod node;
mod seeing;
mod traces;
mod user_namespaces;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use testnode::{
    Containerd, ContainerdVersion, Daemon, NUMBERS_SHA256, Node, Registry, busybox_image,
    check_busybox_output, cri_config, lazy_pull_config, proxy_config, wait_until,
};

/// Where containerd finds Hermes in the node.
const SOCKET: &str = "/run/hermes/containerd.sock";

/// Where Hermes finds its configuration in the node.
const CONFIG: &str = "/etc/hermes/config.toml";

const PATIENCE: Duration = Duration::from_secs(20);

fn node() -> Node {
    let hermes = PathBuf::from(env!("CARGO_BIN_EXE_hermes"));
    Node::start_and_bind(vec![(hermes, "/usr/local/bin/hermes".to_owned())]).unwrap()
}

/// A policy of which this is a part.
fn policy(selector: &str) -> String {
    format!(
        "apiVersion: hermes.cloudpilot.ai/v1alpha1\nkind: HermesPolicy\nmetadata: {{name: lazy}}\n\
         spec:\n  imageSelectors:\n  - {selector}\n"
    )
}

/// Starts a daemon that nobody starts again.
fn start(node: &Node) -> Daemon {
    start_with(node, &["--no-respawn"])
}

fn start_with(node: &Node, more: &[&str]) -> Daemon {
    if !node.path(CONFIG).exists() {
        node.write(CONFIG, "").unwrap();
    }
    node.write("/etc/hermes/policies/lazy.yaml", policy("glob: '127.0.0.1:5000/lazy*'")).unwrap();
    let log = ["--log", "info,snapshotter=debug"];
    let arguments = [&log, ["daemon", "--config", CONFIG].as_slice(), more].concat();
    let mut daemon = node.spawn("hermes", "hermes", &arguments).unwrap();
    let socket = node.path(SOCKET);
    daemon.wait_ready("its socket", || Ok(UnixStream::connect(&socket).is_ok())).unwrap();
    daemon
}

/// An image of three layers that was pulled.
struct Pulled {
    containerd: Containerd,
    image: String,
    /// Where the bytes come from that were not.
    _registry: Registry,
}

/// Pulls an image of three layers as `ctr` does that tells the snapshotter about layers.
fn pull(node: &Node, version: ContainerdVersion, name: &str, with_index: bool) -> Pulled {
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(node, &registry, name).unwrap();
    if with_index {
        push_index(node, &image);
    }
    let containerd = node.containerd(version, &lazy_pull_config("hermes", SOCKET)).unwrap();
    containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "hermes", &image]).unwrap();
    Pulled { containerd, image, _registry: registry }
}

/// What `hermes status` says.
fn status(node: &Node) -> Value {
    serde_json::from_str(&node.run("hermes", &["--output", "json", "status"]).unwrap()).unwrap()
}

fn push_index(node: &Node, image: &str) {
    push_index_built_with(node, image, &[]);
}

fn push_index_built_with(node: &Node, image: &str, options: &[&str]) {
    for command in [&[&["build"][..], options].concat()[..], &["push"]] {
        let builder = ["--root", "/var/lib/hermes/builder", "index"];
        node.run("hermes", &[&builder, command, &[image]].concat()).unwrap();
    }
}

fn snapshots(containerd: &Containerd) -> anyhow::Result<String> {
    containerd.ctr(&["snapshots", "--snapshotter", "hermes", "list"])
}

/// Old versions of containerd try to connect again only every few seconds.
fn until_containerd_is_served(containerd: &Containerd) {
    let is_served = || Ok(snapshots(containerd).is_ok());
    wait_until("containerd to find the daemon", PATIENCE, is_served).unwrap();
}

/// How many blobs containerd has; of an image that was not unpacked manifest and configuration.
fn n_blobs(containerd: &Containerd) -> usize {
    containerd.ctr(&["content", "ls", "--quiet"]).unwrap().lines().count()
}

fn run(containerd: &Containerd, image: &str, name: &str) -> String {
    containerd.run("hermes", &[image, name]).unwrap()
}

#[test]
fn containerds_own_tests_of_snapshotters_pass() {
    let node = node();
    let serve = "printf '[containerd]\\nsocket = \"%s\"\\n' $SOCKET > $ROOT.toml\n\
                 exec hermes --root $ROOT daemon --config $ROOT.toml\n";
    node.write("/srv/serve", serve).unwrap();
    // The tests' folders must be where overlayfs takes them.
    let script = "
        mkdir /var/lib/hermes/tests
        export TMPDIR=/var/lib/hermes/tests
        export SNAPSHOTTER='sh /srv/serve'
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
    check_busybox_output(&run(&containerd, &image, "one"));
    daemon.kill().unwrap();
    let daemon = start(&node);
    until_containerd_is_served(&containerd);
    check_busybox_output(&run(&containerd, &image, "two"));
    let committed = || snapshots(&containerd).unwrap().matches("Committed").count();
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

/// No layer is fetched by containerd, the daemon is killed under a container and between two, and nothing
/// stays behind.
fn images_are_lazy(version: ContainerdVersion) {
    let node = node();
    let daemon = start_with(&node, &[]);
    let Pulled { containerd, image, _registry } = pull(&node, version, "lazy:1", true);
    assert_eq!(n_blobs(&containerd), 2, "{}", daemon.log());
    check_busybox_output(&run(&containerd, &image, "one"));
    let long = ["run", "--detach", "--snapshotter", "hermes", &image, "long", "/bin/sleep", "1000"];
    containerd.ctr(&long).unwrap();
    // The keeper starts the next one.
    daemon.kill().unwrap();
    until_containerd_is_served(&containerd);
    check_busybox_output(&containerd.exec_in("default", "long", &["/app/run"]).unwrap());
    check_busybox_output(&run(&containerd, &image, "two"));
    assert_eq!(snapshots(&containerd).unwrap().matches("Committed").count(), 3);
    // What each takes, in KiB or MiB.
    let usage = containerd.ctr(&["snapshots", "--snapshotter", "hermes", "usage"]).unwrap();
    assert!(usage.contains("MiB"), "{usage}");
    containerd.ctr(&["task", "kill", "--signal", "KILL", "long"]).unwrap();
    containerd.ctr(&["task", "delete", "long"]).unwrap_or_default();
    containerd.ctr(&["container", "delete", "long"]).unwrap();
    containerd.ctr(&["image", "rm", "--sync", &image]).unwrap();
    let list = snapshots(&containerd).unwrap();
    assert_eq!(list.lines().count(), 1, "{list}");
    let are_gone = || Ok(status(&node)["mounts"].as_array().is_some_and(Vec::is_empty));
    wait_until("mounts to go", PATIENCE, are_gone).unwrap();
    let cached = || node.run("hermes", &["--output", "json", "cache", "ls"]);
    wait_until("layers to go", PATIENCE, || Ok(!cached()?.contains("sha256"))).unwrap();
    let known = || Ok(node.path("/var/lib/hermes/images").read_dir()?.next().is_some());
    wait_until("what is known of the image to go", PATIENCE, || known().map(|is| !is)).unwrap();
}

#[test]
fn images_are_lazy_on_containerd_2_1() {
    images_are_lazy(ContainerdVersion::Packaged);
}

#[test]
fn images_are_lazy_on_containerd_2_4() {
    images_are_lazy(ContainerdVersion::Newest);
}

/// The way of clients that pull by themselves and wrap containerd's handlers of images. SOCI's is one; it names the
/// snapshotter.
#[test]
fn a_client_that_wraps_handlers_pulls_lazily() {
    for version in ContainerdVersion::ALL {
        let node = node();
        let daemon = start(&node);
        let registry = node.registry(5000).unwrap();
        let image = busybox_image(&node, &registry, "lazy:1").unwrap();
        push_index(&node, &image);
        let containerd = node.containerd(version, &proxy_config("soci", SOCKET)).unwrap();
        node.run("soci", &["image", "rpull", "--plain-http", &image]).unwrap();
        assert_eq!(n_blobs(&containerd), 2, "{version:?}: {}", daemon.log());
        check_busybox_output(&containerd.run("soci", &[&image, "one"]).unwrap());
        assert_eq!(status(&node)["mounts"].as_array().map(Vec::len), Some(1), "{version:?}");
    }
}

/// A kubelet's way: a Pod whose image is pulled and run through CRI, and one that has it as a volume.
fn pods_are_lazy(version: ContainerdVersion) {
    let node = node();
    let _daemon = start(&node);
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "lazy:1").unwrap();
    push_index(&node, &image);
    // What keeps a Pod's namespaces open; no pattern selects it.
    let sleep =
        "umoci config --image /srv/images:bb --tag pause --config.cmd /bin/sleep --config.cmd 1000";
    node.bash(sleep).unwrap();
    let pause = format!("{}/pause:1", registry.host);
    let copy = ["copy", "--quiet", "--dest-tls-verify=false", "oci:/srv/images:pause"];
    node.run("skopeo", &[copy.as_slice(), &[&format!("docker://{pause}")]].concat()).unwrap();
    let config = cri_config(version, "hermes", SOCKET, &pause);
    let containerd = node.containerd(version, &config).unwrap();
    let cri = |arguments: &[&str]| node.run("/opt/peers/cri", arguments);
    wait_until("CRI", PATIENCE, || Ok(cri(&["pull", &image]).is_ok())).unwrap();
    let blobs = containerd.ctr(&["--namespace", "k8s.io", "content", "ls", "--quiet"]).unwrap();
    assert_eq!(blobs.lines().count(), 2, "{blobs}");
    check_busybox_output(&cri(&["run", &image]).unwrap());
    // Older versions know no image volumes.
    if version >= ContainerdVersion::Packaged {
        let run = ["run", &pause, &image, "/bin/sha256sum", "/volume/data/numbers"];
        let printed = cri(&run).unwrap();
        assert_eq!(printed.trim(), format!("{NUMBERS_SHA256}  /volume/data/numbers"));
    }
    cri(&["rmi", &image]).unwrap();
}

#[test]
fn pods_are_lazy_on_containerd_1_6() {
    pods_are_lazy(ContainerdVersion::V1_6);
}

#[test]
fn pods_are_lazy_on_containerd_1_7() {
    pods_are_lazy(ContainerdVersion::V1_7);
}

#[test]
fn pods_are_lazy_on_containerd_2_1() {
    pods_are_lazy(ContainerdVersion::Packaged);
}

#[test]
fn pods_are_lazy_on_containerd_2_4() {
    pods_are_lazy(ContainerdVersion::Newest);
}

#[test]
fn a_complete_image_starts_after_a_reboot_without_its_registry() {
    let node = node();
    let daemon = start(&node);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    let is_sealed = || Ok(status(&node)["mounts"][0]["sealed"] == true);
    wait_until("the image to be complete", PATIENCE, is_sealed).unwrap();
    // What a reboot takes: both processes, and the mounts.
    let keeper = status(&node)["keeper"]["pid"].to_string();
    daemon.kill().unwrap();
    node.run("kill", &["-KILL", &keeper]).unwrap();
    let unmount =
        "umount --lazy /var/lib/hermes/snapshots/*/fs || true; mount | grep -c erofs || true";
    assert_eq!(node.bash(unmount).unwrap().trim(), "0");
    drop(_registry);
    let _daemon = start(&node);
    until_containerd_is_served(&containerd);
    check_busybox_output(&run(&containerd, &image, "one"));
}

#[test]
fn the_lower_layers_of_a_lazy_image_are_an_image_too() {
    let node = node();
    let _daemon = start(&node);
    let Pulled { containerd, _registry, .. } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    let snapshots = |args: &[&str]| {
        containerd.ctr(&[&["snapshots", "--snapshotter", "hermes"], args].concat()).unwrap()
    };
    let list = snapshots(&["list"]);
    let rows = list.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let rows: Vec<_> = rows.collect();
    // The one in the middle has a parent, and is one.
    let is_parent = |name: &str| rows.iter().any(|row| row.len() == 3 && row[1] == name);
    let middle = rows.iter().find(|row| row.len() == 3 && is_parent(row[0])).unwrap()[0];
    snapshots(&["prepare", "part", middle]);
    let mount = snapshots(&["mounts", "/mnt", "part"]);
    let seen =
        node.bash(&format!("{mount}\nls /mnt /mnt/data; sha256sum < /mnt/data/numbers")).unwrap();
    assert!(seen.contains("removed") && !seen.contains("app"), "{seen}");
    assert!(seen.contains(NUMBERS_SHA256), "{seen}");
    node.run("umount", &["/mnt"]).unwrap();
}

#[test]
fn an_image_that_no_pattern_selects_is_unpacked() {
    let node = node();
    let daemon = start(&node);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "other:1", true);
    assert_eq!(n_blobs(&containerd), 5);
    check_busybox_output(&run(&containerd, &image, "one"));
    assert!(!daemon.log().contains("not lazy"), "nothing is asked about it");
    let explained = node.run("hermes", &["explain", &image]).unwrap();
    assert!(explained.contains("unpacked by containerd, reason no-policy"), "{explained}");
}

#[test]
fn an_image_without_an_index_is_unpacked_and_the_log_says_why() {
    let node = node();
    let daemon = start(&node);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", false);
    assert_eq!(n_blobs(&containerd), 5);
    check_busybox_output(&run(&containerd, &image, "one"));
    assert!(daemon.log().contains("no index in the registry"), "{}", daemon.log());
    let explained = node.run("hermes", &["--output", "json", "explain", &image]).unwrap();
    let decision = &serde_json::from_str::<Value>(&explained).unwrap()["decision"];
    assert_eq!((&decision["reason"], &decision["policy"]), (&"no-index".into(), &"lazy".into()));
    let status = status(&node);
    assert_eq!((&status["decisions"]["no-index"], &status["policies"]), (&1.into(), &1.into()));
}

/// Also of the right way to mount it, and through the id of a container.
#[test]
fn policies_are_in_force_without_a_restart() {
    let node = node();
    let daemon = start(&node);
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "team/app:1").unwrap();
    push_index(&node, &image);
    let containerd =
        node.containerd(ContainerdVersion::Newest, &lazy_pull_config("hermes", SOCKET)).unwrap();
    let explain = |what: &str| node.run("hermes", &["explain", what]);
    let before = explain(&image).unwrap_err().to_string();
    assert!(before.contains("it would not be lazy: no-policy"), "{before}");
    let file = "/etc/hermes/policies/team.yaml";
    let in_force = |count: usize| {
        let status = || node.run("hermes", &["status"]);
        let is_so = || Ok(status()?.contains(&format!("policies in force: {count}")));
        wait_until("policies", PATIENCE, is_so).unwrap();
    };
    let text = policy("prefix: 127.0.0.1:5000/team/").replace("name: lazy", "name: team");
    node.write(file, format!("{text}  backend: fuse\n  completion: never\n")).unwrap();
    in_force(2);
    let before = explain(&image).unwrap_err().to_string();
    assert!(before.contains("policy `team` makes it lazy if it has an index"), "{before}");
    containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "hermes", &image]).unwrap();
    let long = ["run", "--detach", "--snapshotter", "hermes", &image, "long-running-one"];
    containerd.ctr(&[&long[..], &["/bin/sleep", "1000"]].concat()).unwrap();
    for what in [&image, "long-running-one", "long-running"] {
        let explained = explain(what).unwrap();
        let lazy = format!("{image}: lazy, reason indexed, policy team: index from");
        assert!(explained.contains(&lazy), "{explained}");
        assert!(explained.contains("fuse, served"), "{explained}");
        assert!(!explained.contains("complete and proven"), "{explained}");
    }
    assert_eq!(n_blobs(&containerd), 2, "{}", daemon.log());
    // What cannot be understood changes nothing, and is said.
    node.write(file, "spec: [").unwrap();
    let is_said = || Ok(node.run("hermes", &["status"])?.contains("team.yaml"));
    wait_until("the trouble to be said", PATIENCE, is_said).unwrap();
    in_force(2);
    let checked = node.run("hermes", &["config", "check"]).unwrap_err().to_string();
    assert!(checked.contains("team.yaml"), "{checked}");
    node.run("rm", &[file]).unwrap();
    in_force(1);
    assert_eq!(
        node.run("hermes", &["config", "check"]).unwrap(),
        "/etc/hermes/config.toml: fine; policies: 1\n"
    );
}

#[test]
fn a_lost_store_is_a_refusal() {
    let node = node();
    let daemon = start(&node);
    assert!(daemon.stop().unwrap().success());
    node.bash("mkdir /var/lib/hermes/snapshots/7; rm /var/lib/hermes/snapshots/metadata.db*")
        .unwrap();
    let refused = node.bash(&format!("hermes daemon --config {CONFIG} 2>&1 || echo \"code $?\""));
    let refused = refused.unwrap();
    assert!(refused.contains("is gone, but 1 snapshots lie beside it"), "{refused}");
    assert!(refused.contains("code 1"), "{refused}");
}

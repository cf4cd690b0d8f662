//! Images that are fetched whole while containerd waits.

use std::time::Instant;

use testkit::registry::{Link, Options};

use super::*;

/// Fetched whole by Hermes: containerd fetches no layer, and the registry is not needed afterwards.
fn an_image_is_streamed(name: &str, with_index: bool) {
    let node = node();
    node.write(CONFIG, "[containerd]\neager = 'stream'\n").unwrap();
    let eager = policy("glob: '**/eager:*'").replace("name: lazy", "name: eager");
    node.write("/etc/hermes/policies/eager.yaml", format!("{eager}  mode: eager\n")).unwrap();
    let daemon = start(&node);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, name, with_index);
    assert_eq!(n_blobs(&containerd), 2, "{}", daemon.log());
    drop(_registry);
    let explained = node.run("hermes", &["explain", &image]).unwrap();
    assert!(explained.contains(&format!("{image}: lazy, reason streamed")), "{explained}");
    check_busybox_output(&run(&containerd, &image, "one"));
    let status = status(&node);
    assert_eq!(status["mounts"][0]["sealed"], true, "{status}");
}

#[test]
fn an_image_without_an_index_is_streamed_where_the_node_wants_it() {
    an_image_is_streamed("lazy:1", false);
}

#[test]
fn an_eager_image_is_streamed_where_the_node_wants_it() {
    an_image_is_streamed("eager:1", true);
}

/// containerd does it if Hermes cannot.
#[test]
fn an_image_that_cannot_be_streamed_is_unpacked() {
    let node = node();
    node.write(CONFIG, "[containerd]\neager = 'stream'\n").unwrap();
    let daemon = start(&node);
    // Hermes has no room for a layer, containerd has.
    let disk = "mkdir -p /var/lib/hermes/cache
        mount -t tmpfs -o size=64k none /var/lib/hermes/cache";
    node.bash(disk).unwrap();
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", false);
    assert_eq!(n_blobs(&containerd), 5, "{}", daemon.log());
    check_busybox_output(&run(&containerd, &image, "one"));
    let explained = node.run("hermes", &["explain", &image]).unwrap();
    assert!(explained.contains("unpacked by containerd, reason local"), "{explained}");
}

/// A kubelet's pull may be cancelled if nothing comes for a while: containerd is told of nothing while Hermes
/// fetches.
fn a_pull_of_pods_waits_longer_than_for_progress(version: ContainerdVersion) {
    let node = node();
    // 15 MB take three times as long as containerd waits for progress of its own requests.
    let slow = Link::mbit_per_s(10, Duration::from_millis(1));
    let options =
        Options { address: "127.0.0.1:5000".parse().unwrap(), link: slow, ..Options::default() };
    let start_registry = || testkit::registry::Registry::start(options).unwrap();
    let slow = node.in_network(start_registry).unwrap();
    // As the functions want it that push images.
    let open = Registry { host: "127.0.0.1:5000".to_owned(), ..node.registry(5001).unwrap() };
    let image = busybox_image(&node, &open, "lazy:1").unwrap();
    node.write(CONFIG, "[containerd]\neager = 'stream'\n").unwrap();
    let daemon = start(&node);
    let images = match version < ContainerdVersion::Packaged {
        true => "[plugins.\"io.containerd.grpc.v1.cri\"]\n",
        false => "[plugins.\"io.containerd.cri.v1.images\"]\n",
    };
    let impatient = format!("{images}image_pull_progress_timeout = \"4s\"\n");
    let config = cri_config(version, "hermes", SOCKET, &image).replacen(images, &impatient, 1);
    let containerd = node.containerd(version, &config).unwrap();
    let cri = |arguments: &[&str]| node.run("/opt/peers/cri", arguments);
    wait_until("CRI", PATIENCE, || Ok(cri(&["images", "v1"]).is_ok())).unwrap();
    let begin = Instant::now();
    cri(&["pull", &image]).unwrap();
    let took = begin.elapsed();
    assert!(took > Duration::from_secs(9), "{took:?}: nothing had to wait");
    drop(slow);
    let list = ["--namespace", "k8s.io", "content", "ls", "--quiet"];
    let blobs = containerd.ctr(&list).unwrap();
    assert_eq!(blobs.lines().count(), 2, "{blobs}{}", daemon.log());
    check_busybox_output(&containerd.run_in("k8s.io", "hermes", &[&image, "one"]).unwrap());
}

#[test]
fn a_pull_of_pods_waits_longer_than_for_progress_on_containerd_1_7() {
    a_pull_of_pods_waits_longer_than_for_progress(ContainerdVersion::V1_7);
}

#[test]
fn a_pull_of_pods_waits_longer_than_for_progress_on_containerd_2_4() {
    a_pull_of_pods_waits_longer_than_for_progress(ContainerdVersion::Newest);
}

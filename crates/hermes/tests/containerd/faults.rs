//! What is broken on purpose while containerd uses Hermes: its registry, its disk, containerd itself.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use testnode::{
    Containerd, ContainerdVersion, NUMBERS_SHA256, Node, busybox_image, check_busybox_output,
    lazy_pull_config, proxy_config, wait_until,
};

use super::{
    PATIENCE, Pulled, SOCKET, node, policy, pull, run, snapshots, start, status,
    until_containerd_is_served,
};

/// Nothing but what is read is fetched, and who waits for it fails after a while.
pub(super) fn fetch_late(node: &Node, deadline_seconds: u32) {
    let only_what_is_read = format!(
        "{}  completion: never\n  priority: 1\n  readDeadlineSeconds: {deadline_seconds}\n",
        policy("glob: '**/lazy:*'").replace("name: lazy", "name: late")
    );
    node.write("/etc/hermes/policies/late.yaml", only_what_is_read).unwrap();
}

/// Reads what nobody has read before.
pub(super) fn read_numbers(
    containerd: &Containerd,
    image: &str,
    name: &str,
) -> anyhow::Result<String> {
    containerd.run("hermes", &[image, name, "/bin/sha256sum", "/data/numbers"])
}

#[test]
fn a_container_waits_for_a_registry_that_is_cut_off() {
    let node = node();
    fetch_late(&node, 300);
    let _daemon = start(&node);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    // The image is mounted while nobody waits; then it needs the registry for its bytes only.
    wait_until("the mount", PATIENCE, || Ok(status(&node)["mounts"][0]["state"] == "served"))
        .unwrap();
    drop(_registry);
    let (printed, _registry) = std::thread::scope(|scope| {
        let container = scope.spawn(|| read_numbers(&containerd, &image, "one"));
        let waits = || Ok(status(&node)["mounts"][0]["waiting_seconds"].as_f64() > Some(2.0));
        wait_until("a read to wait", PATIENCE, waits).unwrap();
        let top = node.run("hermes", &["top"]).unwrap();
        assert!(top.contains("waits for /"), "{top}");
        let registry = node.registry(5000).unwrap();
        (container.join().unwrap().unwrap(), registry)
    });
    assert!(printed.contains(NUMBERS_SHA256), "{printed}");
}

/// The largest blob that the registry keeps: the layer with the data.
fn data_blob(node: &Node) -> PathBuf {
    let find = "find /var/lib/docker-registry -name data -printf '%s %p\\n' | sort -n | tail -1";
    let found = node.bash(find).unwrap();
    node.path(found.trim().split_once(' ').unwrap().1)
}

/// A container sees an error, never other bytes; when the registry is right again, so is the next one.
#[test]
fn wrong_bytes_of_a_registry_reach_no_container() {
    let node = node();
    fetch_late(&node, 3);
    let daemon = start(&node);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    let blob = data_blob(&node);
    // Most of it is noise that nobody reads here; the numbers are behind it.
    let mut file = std::fs::File::options().read(true).write(true).open(&blob).unwrap();
    let (middle, mut right) = (file.metadata().unwrap().len() - 200_000, vec![0; 100_000]);
    file.seek(SeekFrom::Start(middle)).unwrap();
    file.read_exact(&mut right).unwrap();
    let mut put = |bytes: &[u8]| {
        file.seek(SeekFrom::Start(middle)).unwrap();
        file.write_all(bytes).unwrap();
    };
    put(&right.iter().map(|byte| byte ^ 0x55).collect::<Vec<_>>());
    // What the container wrote last is now and then lost on its way through containerd; how it ended is not.
    let failed = format!("{:#}", read_numbers(&containerd, &image, "one").unwrap_err());
    assert!(failed.contains("exit status: 1") && !failed.contains(NUMBERS_SHA256), "{failed}");
    assert!(daemon.log().contains("read failed"), "{}", daemon.log());
    assert!(daemon.log().contains("sha256"), "{}", daemon.log());
    put(&right);
    let printed = read_numbers(&containerd, &image, "two").unwrap();
    assert!(printed.contains(NUMBERS_SHA256), "{printed}");
}

/// Calls fail while it is full, and nothing else: what was there is there, and the next calls succeed.
#[test]
fn a_full_disk_fails_calls_and_nothing_else() {
    let node = node();
    let small = "mkdir -p /var/lib/hermes/snapshots
        mount -t tmpfs -o size=8m none /var/lib/hermes/snapshots";
    node.bash(small).unwrap();
    let daemon = start(&node);
    let Pulled { containerd, image, _registry } =
        pull(&node, ContainerdVersion::Newest, "lazy:1", true);
    check_busybox_output(&run(&containerd, &image, "one"));
    node.bash("cat /dev/zero > /var/lib/hermes/snapshots/full || true").unwrap();
    // Sooner or later: the store has some room in its files.
    let mut failures = Vec::new();
    for number in 0..200 {
        let name = format!("full-{number}");
        let prepare = ["snapshots", "--snapshotter", "hermes", "prepare", &name];
        failures.extend(containerd.ctr(&prepare).err().map(|err| err.to_string()));
    }
    let said = failures.first().unwrap();
    assert!(said.contains("full") || said.contains("No space"), "{said}");
    let before = snapshots(&containerd).unwrap();
    daemon.kill().unwrap();
    node.run("rm", &["/var/lib/hermes/snapshots/full"]).unwrap();
    let _daemon = start(&node);
    until_containerd_is_served(&containerd);
    assert_eq!(snapshots(&containerd).unwrap(), before);
    check_busybox_output(&run(&containerd, &image, "two"));
}

/// Whenever containerd dies in a pull, the next one succeeds, and nothing of the first stays.
#[test]
fn a_pull_that_containerd_did_not_survive_leaves_nothing() {
    let node = node();
    let daemon = start(&node);
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "other:1").unwrap();
    let start_containerd = || {
        let config = lazy_pull_config("hermes", SOCKET);
        node.containerd(ContainerdVersion::Newest, &config).unwrap()
    };
    let folders = || {
        let names = node.bash("ls /var/lib/hermes/snapshots").unwrap();
        names.lines().filter(|name| name.parse::<u32>().is_ok()).count()
    };
    let pull = ["image", "pull", "--plain-http", "--snapshotter", "hermes", &image];
    for layers in 1..=3 {
        let Containerd { daemon: process, .. } = &start_containerd();
        std::thread::scope(|scope| {
            let pulled = scope.spawn(|| {
                node.command("/opt/peers/ctr").args(pull).output().unwrap();
            });
            let has_come_far = || Ok(folders() >= layers || pulled.is_finished());
            wait_until("layers", PATIENCE, has_come_far).unwrap();
            process.signal("KILL").unwrap();
        });
    }
    let containerd = start_containerd();
    containerd.ctr(&pull).unwrap();
    check_busybox_output(&run(&containerd, &image, "one"));
    // What a dead client was about to unpack is containerd's to forget, after a day.
    for lease in containerd.ctr(&["leases", "list", "--quiet"]).unwrap().split_whitespace() {
        containerd.ctr(&["leases", "delete", lease]).unwrap();
    }
    containerd.ctr(&["image", "rm", "--sync", &image]).unwrap();
    assert_eq!(snapshots(&containerd).unwrap().lines().count(), 1, "{}", daemon.log());
    wait_until("folders to go", PATIENCE, || Ok(folders() == 0)).unwrap();
}

/// containerd comes before Hermes, goes, and comes again.
#[test]
fn hermes_and_containerd_come_in_any_order() {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let image = busybox_image(&node, &registry, "lazy:1").unwrap();
    super::push_index(&node, &image);
    let version = ContainerdVersion::Newest;
    let config = lazy_pull_config("hermes", SOCKET);
    let containerd = node.containerd(version, &config).unwrap();
    let daemon = start(&node);
    until_containerd_is_served(&containerd);
    containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "hermes", &image]).unwrap();
    let long = ["run", "--detach", "--snapshotter", "hermes", &image, "long", "/bin/sleep", "1000"];
    containerd.ctr(&long).unwrap();
    drop(containerd);
    let containerd = node.containerd(version, &config).unwrap();
    check_busybox_output(&containerd.exec_in("default", "long", &["/app/run"]).unwrap());
    drop(daemon);
    drop(containerd);
    let _daemon = start(&node);
    let containerd = node.containerd(version, &proxy_config("hermes", SOCKET)).unwrap();
    check_busybox_output(&run(&containerd, &image, "two"));
}

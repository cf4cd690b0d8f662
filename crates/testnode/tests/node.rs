//! The node itself: what it isolates, and that nothing is left of it.

use std::fs;
use std::process::Command;
use std::time::Duration;

use testnode::{Cache, Network, Node, NodeOptions, packaged, wait_until};

/// The mounts of nodes that the host sees.
fn host_mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    table.lines().filter(|line| line.contains("hermes-node-")).map(str::to_owned).collect()
}

#[test]
fn a_node_is_a_machine_of_its_own() {
    let node = Node::start().unwrap();
    assert_eq!(node.run("hostname", &[]).unwrap(), "node\n");
    assert_eq!(node.run("cat", &["/proc/1/comm"]).unwrap(), "tini\n");
    let links = node.bash("ip -oneline link | wc -l").unwrap();
    assert_eq!(links, "1\n", "only loopback");
    assert_eq!(host_mounts(), Vec::<String>::new(), "mounts of nodes do not show on the host");

    node.write("/etc/made/here", "text").unwrap();
    assert_eq!(node.run("cat", &["/etc/made/here"]).unwrap(), "text");
    let cached = Cache::locate().existing_root().unwrap();
    assert!(!cached.join("etc/made").exists(), "the cached root stays clean");

    let other = Node::start().unwrap();
    assert!(!other.path("/etc/made/here").exists(), "nodes do not see each other's files");
}

#[test]
fn a_dropped_node_leaves_no_process_folder_or_cgroup() {
    let node = Node::start().unwrap();
    let sleeper = node.spawn("sleeper", "sleep", &["1000"]).unwrap();
    node.bash("setsid sleep 1000 > /dev/null 2>&1 & mkdir $(find /sys/fs/cgroup -maxdepth 1 -mindepth 1 -type d | head -1)/inner")
        .unwrap();
    let pid1 = node.pid1();
    let cgroup = fs::read_to_string(format!("/proc/{pid1}/cgroup")).unwrap();
    let name = cgroup.split('/').find(|part| part.starts_with("hermes-node-")).unwrap();
    let name = name.split_whitespace().next().unwrap().to_owned();
    let find = || {
        let found = Command::new("find").args(["/sys/fs/cgroup", "-name", &name]).output().unwrap();
        String::from_utf8(found.stdout).unwrap()
    };
    assert!(find().contains(&name));
    let folder = Cache::locate().nodes().join(&name);
    assert!(folder.is_dir());

    drop(sleeper);
    drop(node);
    assert_eq!(find(), "");
    assert!(!folder.exists());
    assert!(!fs::exists(format!("/proc/{pid1}")).unwrap());
}

#[test]
fn a_daemon_can_be_stopped_killed_and_seen_to_fail() {
    let node = Node::start().unwrap();
    let trap = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut daemon = node.spawn("polite", "bash", &["-c", trap]).unwrap();
    daemon.wait_ready("its word", || Ok(node.log("polite").contains("ready"))).unwrap();
    assert_eq!(daemon.stop().unwrap().code(), Some(3));
    assert_eq!(node.log("polite"), "ready\nbye\n");

    let daemon = node.spawn("sleeper", "sleep", &["1000"]).unwrap();
    let pid = daemon.pid();
    daemon.kill().unwrap();
    assert!(!node.path(&format!("/proc/{pid}")).exists());

    let mut broken = node.spawn("broken", "sh", &["-c", "echo reason; exit 7"]).unwrap();
    let error = broken.wait_ready("a miracle", || Ok(false)).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("reason") && text.contains("exit status: 7"), "{text}");
}

#[test]
fn files_and_folders_of_the_host_can_be_bound_and_copied() {
    let host = tempfile::tempdir().unwrap();
    fs::create_dir(host.path().join("sub")).unwrap();
    fs::write(host.path().join("sub/file"), "1").unwrap();
    let node = Node::start_with(&NodeOptions {
        network: Network::Host,
        binds: vec![
            (host.path().to_owned(), "/bound/folder".to_owned()),
            (host.path().join("sub/file"), "/bound/file".to_owned()),
        ],
    })
    .unwrap();
    node.install(&host.path().join("sub"), "/copied/sub").unwrap();
    fs::write(host.path().join("sub/file"), "2").unwrap();
    let seen = node.run("cat", &["/bound/folder/sub/file", "/bound/file", "/copied/sub/file"]);
    assert_eq!(seen.unwrap(), "221");
}

#[test]
fn a_node_whose_test_process_was_killed_is_cleaned_up_by_the_next() {
    let marker = "hermes-node-orphan";
    let folder = Cache::locate().nodes().join(marker);
    fs::create_dir_all(folder.join("disk")).unwrap();
    let node = Node::start().unwrap();
    wait_until("the orphan to go", Duration::from_secs(10), || Ok(!folder.exists())).unwrap();
    drop(node);
}

#[test]
fn a_failed_command_says_what_it_said() {
    let node = Node::start().unwrap();
    let error = node.bash("echo one; echo two >&2; false; echo three").unwrap_err().to_string();
    assert!(error.contains("one\ntwo\n") && !error.ends_with("three\n"), "{error}");
}

#[test]
fn a_program_of_the_root_runs_on_files_of_the_host() {
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("file"), "content").unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    let mut make = packaged("mkfs.erofs").unwrap();
    make.arg("-b512").arg(image.path()).arg(host.path());
    assert!(make.output().unwrap().status.success());
    let mut check = packaged("fsck.erofs").unwrap();
    let output = check.arg("--extract").arg(image.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let error = packaged("no-such-program").unwrap_err().to_string();
    assert!(error.contains("root.sh"), "{error}");
}

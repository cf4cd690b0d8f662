//! Mounting without rights outside of a user namespace.

use std::fs;
use std::process::Command;

use fuse::{Connection, MountOptions};

use crate::images::{file, tree_fs};
use crate::support::{Mountpoint, When, mount_options, pattern, serve};

/// How the child finds out that it is one: a filter that fits no test.
const CHILD: &str = "in-a-user-namespace";

#[test]
fn a_tree_can_be_mounted_in_a_user_namespace() {
    if std::env::args().any(|argument| argument == CHILD) {
        return mount_and_read();
    }
    let this_test = std::env::current_exe().unwrap();
    let name = "user_namespace::a_tree_can_be_mounted_in_a_user_namespace";
    let child = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(this_test)
        .args(["--exact", name, CHILD])
        .output()
        .expect("needs unshare of util-linux");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
}

fn mount_and_read() {
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&[file("f", 0, 100)], 100, When::Later);
    let options = MountOptions { subtype: None, ..mount_options() };
    let connection = Connection::mount(at.path(), &options).unwrap();
    let _session = serve(connection, fs);
    assert_eq!(fs::read(at.join("f")).unwrap(), pattern(0, 0..100));
    let others = fs::read_to_string("/proc/1/mountinfo").unwrap_or_default();
    assert!(!others.contains(at.path().to_str().unwrap()), "it is this namespace's own");
    let map = fs::read_to_string("/proc/self/uid_map").unwrap();
    assert!(!map.contains("4294967295"), "not the first namespace: {map}");
}

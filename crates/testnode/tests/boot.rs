//! A machine that boots: what it is, what it keeps, and that nothing is left of it.

use std::fs;
use std::time::Duration;

use testnode::{Node, wait_until};

#[test]
fn a_disk_boots_again_and_again() {
    let node = Node::start().unwrap();
    let _registry = node.registry(5000).unwrap();
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let ask = "exec 3<> /dev/tcp/127.0.0.1/5000";
    let machine = node.boot().unwrap();
    assert_eq!(machine.run("cat", &["/proc/1/comm"]).unwrap(), "systemd\n");
    assert_eq!(machine.property("containerd.service", "ActiveState").unwrap(), "active");
    machine.bash(ask).unwrap();
    machine.bash("echo kept > /etc/kept; touch /run/gone /tmp/gone").unwrap();
    // The kernel is the host's.
    machine.bash("echo 1 > /proc/sys/vm/swappiness").unwrap_err();
    machine.bash("mkdir /dev/made").unwrap_err();
    let first = machine.run("cat", &[boot_id]).unwrap();
    assert_ne!(first, fs::read_to_string(boot_id).unwrap());
    machine.power_off().unwrap();

    let machine = node.boot_without_network().unwrap();
    assert_ne!(machine.run("cat", &[boot_id]).unwrap(), first);
    assert_eq!(machine.bash("cat /etc/kept; ls /run/gone /tmp/gone || true").unwrap(), "kept\n");
    machine.bash(ask).unwrap_err();
    machine.bash("ip -oneline link show up dev lo | grep -q .").unwrap();
}

#[test]
fn a_machine_whose_power_fails_leaves_no_process_or_mount() {
    let node = Node::start().unwrap();
    let machine = node.boot().unwrap();
    machine.bash("mount -t tmpfs mine /mnt; setsid sleep 1000 > /dev/null 2>&1 &").unwrap();
    let runs = || Ok(node.run("ps", &["-e", "-o", "comm="])?.contains("sleep"));
    wait_until("a process", Duration::from_secs(20), runs).unwrap();
    drop(machine);
    assert_eq!(node.run("ps", &["-e", "-o", "comm="]).unwrap(), "tini\ncat\nps\n");
    assert!(!node.bash("cat /proc/mounts").unwrap().contains("mine"));
}

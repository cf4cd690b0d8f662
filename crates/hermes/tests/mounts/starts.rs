//! Commands that come while no daemon serves, or not yet.

use rustix::process::{Pid, Signal, kill_process};

use crate::setup::{Setup, check, image, kill};

/// Mounts the image on four folders at once, compares its files there, and unmounts it again.
#[track_caller]
fn mount_four(setup: &Setup, name: &str, contents: &[(String, Vec<u8>)]) {
    std::thread::scope(|scope| {
        let mounted = ["one", "two", "three", "four"].map(|folder| {
            scope.spawn(move || {
                let dir = setup.mount(name, folder, &[]);
                check(&dir, contents);
                setup.ok(&["umount", dir.to_str().unwrap()]);
            })
        });
        for mounted in mounted {
            mounted.join().unwrap();
        }
    });
}

#[test]
fn commands_right_after_the_death_of_the_daemon_find_the_next_one() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "starts", 2, 100_000);
    let dir = setup.mount(&name, "mnt", &["--quota", "1G"]);
    for round in 0..6 {
        let pid = setup.until("a daemon answers", || setup.daemon_pid());
        match round % 2 {
            0 => kill(pid),
            // It may still take connections while it dies.
            _ => kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap(),
        }
        mount_four(&setup, &name, &contents);
        let pid = setup.daemon_pid().unwrap();
        let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(
            arguments.contains("--quota"),
            "it was not the keeper that started it: {arguments}"
        );
    }
    check(&dir, &contents);
}

#[test]
fn commands_while_the_daemon_ends_find_the_next_one() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "ends", 2, 100_000);
    setup.mount(&name, "mnt", &[]);
    for _ in 0..3 {
        let pid = setup.until("a daemon answers", || setup.daemon_pid());
        kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
        mount_four(&setup, &name, &contents);
    }
}

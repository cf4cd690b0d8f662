//! A daemon that is killed at each step of an eviction, or of a mount: just before the system call that makes it.
//!
//! Needs `strace`, which kills it there.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::setup::{Setup, check, forget_pages, image_from};

/// Kills the daemon when it begins a system call for the `when`th time.
struct Trap {
    strace: Child,
}

impl Trap {
    #[track_caller]
    fn set(setup: &Setup, pid: i32, call: &str, when: u32) -> Self {
        let said: PathBuf = setup.path("strace");
        let mut command = Command::new("strace");
        command.args(["-f", "-p", &pid.to_string(), "-o", "/dev/null"]);
        command.args(["-e", &format!("trace={call}")]);
        command.args(["-e", &format!("inject={call}:signal=SIGKILL:when={when}")]);
        command.stdout(Stdio::null()).stderr(File::create(&said).unwrap());
        let trap = Self { strace: command.spawn().unwrap() };
        setup.until("strace is attached", || {
            std::fs::read_to_string(&said).ok()?.contains("attached").then_some(())
        });
        trap
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.strace.kill().ok();
        self.strace.wait().ok();
    }
}

/// Room for one of both images and a little.
const QUOTA: u64 = 14 << 20;

/// Has a sealed layer opened and spans of it given up, again and again, and the daemon killed on the way.
#[track_caller]
fn a_kill_at_any_step_costs_no_byte(backend: &str, steps: &[(&str, u32)]) {
    let setup = Setup::new();
    let (first, old) = image_from(&setup, "first", 0..10, 1 << 20);
    let (second, new) = image_from(&setup, "second", 10..20, 1 << 20);
    for name in [&first, &second] {
        setup.index(name);
    }
    setup.end_daemon();
    let quota = QUOTA.to_string();
    let options = ["--quota", &quota, "--eviction-grace", "200ms", "--backend", backend];
    let dir = setup.mount(&first, "first", &options);
    setup.until_sealed();
    for (call, when) in steps {
        let other =
            setup.mount(&second, "second", &["--completion", "never", "--backend", backend]);
        let pid = setup.daemon_pid().unwrap();
        let trap = Trap::set(&setup, pid, call, *when);
        setup.until(&format!("the daemon dies at {call} {when}"), || {
            check(&other, &new);
            check(&dir, &old);
            forget_pages();
            setup.daemon_pid_if_any().filter(|found| *found != pid)
        });
        drop(trap);
        for _ in 0..2 {
            check(&dir, &old);
            check(&other, &new);
            forget_pages();
        }
        setup.ok(&["umount", other.to_str().unwrap()]);
        // What an eviction began is over, so that the next one begins in the next trap.
        setup.until("the image is whole, and there is room", || {
            let status = setup.status();
            let has_room = status["cache_bytes"].as_u64()? <= QUOTA;
            (has_room && status["mounts"][0]["sealed"] == true).then_some(())
        });
        forget_pages();
        check(&dir, &old);
    }
    let log = setup.log();
    assert!(!log.contains("read failed") && !log.contains("cannot be taken over"), "{log}");
}

#[test]
fn a_kill_at_any_step_of_an_eviction_costs_no_byte_through_erofs() {
    // The mark, the seal, its folder, records and their flush, holes.
    let steps = [
        ("fanotify_mark", 1),
        ("unlinkat", 1),
        ("fsync", 1),
        ("pwrite64", 1),
        ("fdatasync", 1),
        ("fdatasync", 2),
        ("fallocate", 1),
        ("fallocate", 2),
    ];
    a_kill_at_any_step_costs_no_byte("erofs", &steps);
}

#[test]
fn a_kill_at_any_step_of_an_eviction_costs_no_byte_through_erofs_loop() {
    // Its first steps are requests to the loop device, of which some come with the status before.
    let steps = [
        ("ioctl", 1),
        ("ioctl", 2),
        ("ioctl", 3),
        ("unlinkat", 1),
        ("fsync", 1),
        ("fdatasync", 1),
        ("fallocate", 1),
        ("fallocate", 2),
    ];
    a_kill_at_any_step_costs_no_byte("erofs-loop", &steps);
}

#[test]
fn a_kill_at_any_step_of_an_eviction_costs_no_byte_through_fuse() {
    let steps =
        [("unlinkat", 1), ("fsync", 1), ("fdatasync", 1), ("fallocate", 1), ("fallocate", 2)];
    a_kill_at_any_step_costs_no_byte("fuse", &steps);
}

/// Has a daemon killed in the middle of a mount, and another one mount the same image.
#[test]
fn a_kill_at_any_step_of_a_mount_does_not_stand_in_the_way_of_the_next_one() {
    let setup = Setup::new();
    let (name, contents) = image_from(&setup, "again", 0..3, 1 << 20);
    let (other, _) = image_from(&setup, "other", 10..11, 1000);
    setup.index(&name);
    let options = ["--completion", "never", "--backend", "erofs"];
    let kept = setup.mount(&other, "other", &options);
    // The upper layer is watched, then the image is mounted, then that is written down.
    let steps = [("fanotify_mark", 1), ("fsopen", 1), ("move_mount", 1), ("fsync", 1)];
    for (step, (call, when)) in steps.into_iter().enumerate() {
        let (broken, whole) = (format!("broken-{step}"), format!("whole-{step}"));
        // Nothing of it is here: what it is mounted for has to be fetched, and written.
        setup.index(&name);
        let pid = setup.daemon_pid().unwrap();
        let trap = Trap::set(&setup, pid, call, when);
        let dir = setup.path(&broken);
        setup.run(&[&["mount", &name, dir.to_str().unwrap()], &options[..]].concat());
        let died = || setup.daemon_pid_if_any().filter(|found| *found != pid);
        setup.until(&format!("the daemon dies at {call} {when}"), died);
        drop(trap);
        // Nobody may be asked about what he himself does to a file.
        let dir = setup.mount(&name, &whole, &options);
        check(&dir, &contents);
        setup.ok(&["umount", dir.to_str().unwrap()]);
        setup.run(&["umount", setup.path(&broken).to_str().unwrap()]);
    }
    setup.ok(&["umount", kept.to_str().unwrap()]);
    assert!(!setup.log().contains("cannot be checked"), "{}", setup.log());
}

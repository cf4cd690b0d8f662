//! Images mounted by the real binary, from a registry with faults, under daemons that die.
//!
//! Needs root, fanotify pre-content events (Linux 6.14), EROFS, loop devices and FUSE.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails, wherever in it that is"
)]

mod disks;
mod eviction;
mod faults;
mod indexes;
mod libraries;
mod mirrors;
mod names;
mod offline;
mod rot;
mod setup;
mod starts;
mod steps;
mod streams;
mod systemd;
mod windows;

use std::path::PathBuf;
use std::time::Duration;

use testkit::image::{Compression, ImageBuilder, Shape, random_layers};
use testkit::registry::{Auth, Credentials, Fault, Link, Outage, Scope, Times};
use testkit::untar;

use crate::setup::{Setup, check, forget_pages, image, kill};

/// What each file of an image holds.
type Contents = [(String, Vec<u8>)];

const BACKENDS: [&str; 3] = ["erofs", "erofs-loop", "fuse"];

/// What the reference model makes of `tars`.
fn unpacked(setup: &Setup, tars: &[Vec<u8>]) -> PathBuf {
    let dir = setup.path("unpacked");
    std::fs::create_dir(&dir).unwrap();
    untar::untar(&dir, tars).unwrap();
    dir
}

#[track_caller]
fn assert_equal(expected: &std::path::Path, found: &std::path::Path, what: &str) {
    let differences =
        untar::diff(&untar::snapshot(expected).unwrap(), &untar::snapshot(found).unwrap());
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
}

#[test]
fn random_images_equal_a_naive_untar_through_every_back_end() {
    for seed in 1..=4 {
        let setup = Setup::new();
        // Sparse pieces that are not aligned need another back end; the FUSE test below has them.
        let shape = Shape { sparse: false, ..Shape::default() };
        let tars = random_layers(seed, &shape);
        let compressions = [
            Compression::Gzip { level: 6 },
            Compression::Zstd { level: 3 },
            Compression::None,
            Compression::GzipMembers { level: 1, member_size: 30_000 },
        ];
        let mut image = ImageBuilder::new();
        for (tar, compression) in tars.iter().zip(compressions) {
            image = image.layer(tar, compression);
        }
        let name = image.build().push_to(&setup.registry, "random", "1").unwrap().reference;
        let expected = unpacked(&setup, &tars);
        for backend in BACKENDS {
            let dir = setup.mount(&name, backend, &["--backend", backend]);
            assert_equal(&expected, &dir, &format!("seed {seed}, {backend}"));
        }
    }
}

#[test]
fn sparse_files_equal_a_naive_untar_through_the_back_end_that_can() {
    let setup = Setup::new();
    let tars = random_layers(11, &Shape::default());
    let mut image = ImageBuilder::new();
    for tar in &tars {
        image = image.layer(tar, Compression::Gzip { level: 6 });
    }
    let name = image.build().push_to(&setup.registry, "sparse", "1").unwrap().reference;
    let expected = unpacked(&setup, &tars);
    let dir = setup.mount(&name, "mnt", &[]);
    assert_equal(&expected, &dir, "sparse");
}

#[track_caller]
fn killed_daemons_are_not_noticed(backend: &str) {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "killed", 24, 1 << 20);
    setup.index(&name);
    setup.registry.set_link(Link::mbit_per_s(100, Duration::from_millis(2)));
    let dir = setup.mount(&name, "mnt", &["--backend", backend]);
    std::thread::scope(|scope| {
        let readers = [0, 1].map(|number| {
            let (dir, contents) = (&dir, &contents);
            scope.spawn(move || {
                let half = contents.iter().skip(number).step_by(2).cloned();
                check(dir, &half.collect::<Vec<_>>());
            })
        });
        for _ in 0..5 {
            setup.kill_daemon();
        }
        for reader in readers {
            reader.join().unwrap();
        }
    });
    check(&dir, &contents);
}

#[test]
fn killed_daemons_are_not_noticed_through_erofs() {
    killed_daemons_are_not_noticed("erofs");
}

#[test]
fn killed_daemons_are_not_noticed_through_erofs_loop() {
    killed_daemons_are_not_noticed("erofs-loop");
}

#[test]
fn killed_daemons_are_not_noticed_through_fuse() {
    killed_daemons_are_not_noticed("fuse");
}

#[test]
fn a_killed_keeper_is_replaced_and_holds_everything() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "keeper", 16, 1 << 20);
    setup.index(&name);
    setup.registry.set_link(Link::mbit_per_s(100, Duration::from_millis(2)));
    let dir = setup.mount(&name, "mnt", &["--backend", "erofs"]);
    let keeper = setup.keeper_pid().unwrap();
    kill(keeper);
    let another = setup.until("another keeper", || setup.keeper_pid().filter(|pid| *pid != keeper));
    assert_ne!(another, keeper);
    // What the new keeper holds is put to the test by the daemon's death.
    setup.kill_daemon();
    check(&dir, &contents);
}

#[test]
fn an_image_is_completed_once_nobody_waits() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "idle", 8, 1 << 20);
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", &["--completion", "idle"]);
    assert_eq!(setup.status()["mounts"][0]["sealed"], false);
    setup.until_sealed();
    check(&dir, &contents);
    assert!(setup.log().contains("nobody waits"), "{}", setup.log());
}

#[test]
fn a_mount_whose_daemon_and_keeper_died_is_found_and_made_loud() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "both", 8, 1 << 20);
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", &["--backend", "erofs", "--completion", "never"]);
    let (daemon, keeper) = (setup.daemon_pid().unwrap(), setup.keeper_pid().unwrap());
    // The keeper first: the other way round it would start another daemon.
    kill(keeper);
    kill(daemon);
    let other = setup.mount(&name, "other", &[]);
    check(&other, &contents);
    let status = setup.status();
    let lost: Vec<&str> = status["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|mount| mount["dir"] == dir.to_str().unwrap())
        .filter_map(|mount| mount["state"].as_str())
        .collect();
    assert_eq!(lost, ["lost"], "{status}");
    let (path, _) = &contents[0];
    let err = std::fs::read(dir.join(path)).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert!(setup.log().contains("died together"), "{}", setup.log());
}

#[test]
fn a_complete_image_needs_neither_registry_nor_daemon() {
    for backend in ["erofs", "erofs-loop"] {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "complete", 8, 1 << 20);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--backend", backend]);
        setup.until_sealed();
        setup.registry.faults().cut(Outage::Refuse);
        let (daemon, keeper) = (setup.daemon_pid().unwrap(), setup.keeper_pid().unwrap());
        kill(keeper);
        kill(daemon);
        forget_pages();
        check(&dir, &contents);
    }
}

#[test]
fn a_mount_survives_a_stop_and_a_start_of_the_daemon_without_a_registry() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "restart", 8, 1 << 20);
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    let (path, expected) = &contents[3];
    assert!(std::fs::read(dir.join(path)).unwrap() == *expected);
    // A reader goes on before the whole span is there; what counts as present is whole spans.
    setup.until("the span is present", || {
        (setup.status()["mounts"][0]["bytes_present"].as_u64()? > 4 << 20).then_some(())
    });
    setup.registry.faults().cut(Outage::Refuse);
    setup.kill_daemon();
    forget_pages();
    assert!(std::fs::read(dir.join(path)).unwrap() == *expected, "{}", setup.log());
}

#[test]
fn a_read_waits_for_a_registry_that_is_away() {
    for outage in [Outage::Refuse, Outage::Reset] {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "away", 4, 1 << 20);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
        setup.registry.faults().cut(outage);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| check(&dir, &contents));
            setup.until_a_failure();
            setup.registry.faults().restore();
            reader.join().unwrap();
        });
    }
}

#[test]
fn passing_faults_of_a_registry_are_not_noticed() {
    for fault in [
        Fault::Status(503),
        Fault::TooManyRequests { retry_after: Duration::from_secs(1) },
        Fault::ResetRequest,
        Fault::Truncate { after: 1000 },
        Fault::ResetBody { after: 200_000 },
        Fault::FlipBodyByte { offset: 5000 },
        Fault::IgnoreRange,
    ] {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "faults", 4, 1 << 20);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
        setup.registry.faults().inject(Scope::Blobs, Times::Next(2), fault);
        check(&dir, &contents);
    }
}

#[test]
fn bytes_that_stay_wrong_are_an_error_and_never_served() {
    for backend in BACKENDS {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "wrong", 2, 1 << 20);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never", "--backend", backend]);
        let scope = Scope::Blobs;
        let fault = setup.registry.faults().inject(
            scope,
            Times::Always,
            Fault::FlipBodyByte { offset: 5000 },
        );
        let (path, _) = &contents[1];
        let read = std::fs::read(dir.join(path)).map(|bytes| bytes.len());
        let errno = read.as_ref().err().and_then(std::io::Error::raw_os_error);
        let eio = Some(rustix::io::Errno::IO.raw_os_error());
        assert_eq!(errno, eio, "{backend}: {read:?}\n{}", setup.log());
        setup.registry.faults().remove(fault);
        // An error is never remembered for good.
        check(&dir, &contents);
    }
}

#[test]
fn a_read_fails_only_after_its_deadline() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "deadline", 1, 1 << 20);
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", &["--completion", "never", "--deadline", "2s"]);
    setup.registry.faults().cut(Outage::Refuse);
    let begin = std::time::Instant::now();
    let err = std::fs::read(dir.join(&contents[0].0)).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert!(begin.elapsed() >= Duration::from_secs(2));
    setup.registry.faults().restore();
    check(&dir, &contents);
}

#[test]
fn a_second_mount_may_complete_an_image_and_is_told_of_another_deadline() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "tuned", 4, 1 << 20);
    setup.index(&name);
    let lazy = ["--completion", "never", "--deadline", "7s"];
    let dir = setup.mount(&name, "first", &lazy);
    setup.registry.set_link(Link::mbit_per_s(10, Duration::from_millis(2)));
    let output = setup.run(&["mount", &name, setup.path("second").to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("warning: reads of this image fail after 7 s"),
        "{said}"
    );
    // The wish is for the next daemon, too.
    setup.kill_daemon();
    setup.registry.set_link(Link::default());
    setup.until_sealed();
    check(&dir, &contents);
    let same =
        setup.run(&[&["mount", &name, setup.path("third").to_str().unwrap()], &lazy[..]].concat());
    assert!(same.status.success() && !String::from_utf8_lossy(&same.stderr).contains("warning"));
}

#[test]
fn what_cannot_be_mounted_is_refused_in_a_sentence() {
    let setup = Setup::new();
    let (name, _) = image(&setup, "refused", 1, 1000);
    let dir = setup.path("mnt");
    let dir = dir.to_str().unwrap();
    let prefix = setup.registry.reference_prefix();
    setup.fails(3, &["mount", &format!("{prefix}/absent:1"), dir]);
    setup.fails(3, &["--platform", "linux/riscv64", "mount", &name, dir]);
    setup.fails(1, &["mount", "Not An Image", dir]);
    setup.registry.faults().set_auth(Auth::Basic(Credentials::new("user", "password")));
    setup.fails(4, &["mount", &name, dir]);
    setup.registry.faults().set_auth(Auth::None);
    setup.registry.faults().cut(Outage::Refuse);
    let said = setup.fails(1, &["mount", &name, dir]);
    assert!(said.contains(&prefix), "{said}");
    setup.registry.faults().restore();
    setup.fails(1, &["umount", dir]);
    setup.mount(&name, "mnt", &[]);
    setup.fails(1, &["mount", &name, dir]);
}

#[test]
fn a_busy_mount_is_not_unmounted_unless_it_is_detached() {
    for backend in ["erofs", "erofs-loop", "fuse"] {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "busy", 4, 1 << 20);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never", "--backend", backend]);
        let file = std::fs::File::open(dir.join(&contents[2].0)).unwrap();
        let said = setup.fails(5, &["umount", dir.to_str().unwrap()]);
        assert!(said.contains("in use"), "{said}");
        setup.ok(&["umount", "--lazy", dir.to_str().unwrap()]);
        assert_eq!(setup.status()["mounts"][0]["state"], "detached", "{backend}");
        // Whoever still has it open gets the right bytes, also from another daemon.
        setup.kill_daemon();
        let mut found = Vec::new();
        std::io::Read::read_to_end(&mut &file, &mut found).unwrap();
        assert!(found == contents[2].1, "{backend}");
        drop(file);
        setup.until("the detached mount is gone", || {
            setup.status()["mounts"].as_array()?.is_empty().then_some(())
        });
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(setup.path("").to_str().unwrap()), "{backend}: {mounts}");
    }
}

#[test]
fn a_detached_mount_is_not_taken_for_the_one_that_came_after_it() {
    for backend in ["erofs", "erofs-loop", "fuse"] {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "again", 4, 1 << 20);
        setup.index(&name);
        let how = ["--completion", "never", "--backend", backend];
        let dir = setup.mount(&name, "mnt", &how);
        let file = std::fs::File::open(dir.join(&contents[2].0)).unwrap();
        setup.ok(&["umount", "--lazy", dir.to_str().unwrap()]);
        setup.mount(&name, "mnt", &how);
        setup.kill_daemon();
        let states = || {
            let status = setup.status();
            let mounts = status["mounts"].as_array().into_iter().flatten();
            let mut states: Vec<String> = mounts.map(|mount| mount["state"].to_string()).collect();
            states.sort();
            states
        };
        let both = setup.until("mounts that are served again", || {
            Some(states()).filter(|states| !states.is_empty())
        });
        assert_eq!(both, [r#""detached""#, r#""served""#], "{backend}");
        let mut found = Vec::new();
        std::io::Read::read_to_end(&mut &file, &mut found).unwrap();
        assert!(found == contents[2].1, "{backend}");
        check(&dir, &contents);
        drop(file);
        setup.until("the detached mount is gone", || (states().len() == 1).then_some(()));
        setup.ok(&["umount", dir.to_str().unwrap()]);
        setup.mount(&name, "mnt", &how);
    }
}

#[test]
fn a_root_folder_has_one_daemon() {
    let setup = Setup::new();
    let (name, _) = image(&setup, "one", 1, 1000);
    setup.mount(&name, "mnt", &[]);
    let said = setup.fails(1, &["daemon"]);
    assert!(said.contains("another daemon"), "{said}");
}

#[test]
fn a_layer_that_is_not_what_the_manifest_says_is_refused() {
    let setup = Setup::new();
    let (name, _) = image(&setup, "lying", 2, 1 << 20);
    setup.registry.faults().inject(
        Scope::Blobs,
        Times::Always,
        Fault::FlipBodyByte { offset: 700_000 },
    );
    let dir = setup.path("mnt");
    let output = setup.run(&["mount", &name, dir.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(std::fs::read_dir(&dir).map_or(0, Iterator::count) == 0);
}

#[test]
fn a_quota_is_kept_by_removing_what_no_mount_uses() {
    let setup = Setup::new();
    let (first, _) = image(&setup, "first", 4, 1 << 20);
    let (second, contents) = image(&setup, "second", 4, 1 << 20);
    let dir = setup.mount(&first, "first", &["--quota", "6m"]);
    setup.ok(&["umount", dir.to_str().unwrap()]);
    let dir = setup.mount(&second, "second", &[]);
    setup.until_sealed();
    assert!(setup.status()["cache_bytes"].as_u64().unwrap() <= 6 << 20);
    check(&dir, &contents);
}

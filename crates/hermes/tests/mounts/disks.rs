//! Root folders on disks that are full, or that lack something.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::Value;
use testkit::disk::SmallDisk;
use testkit::registry::Link;

use crate::BACKENDS;
use crate::setup::{Setup, check, forget_pages, image_from};

const FULL: &str = "the disk of the layer cache is full";

/// How often the log says that the disk is full. There may be no room for it.
fn complaints(setup: &Setup) -> usize {
    setup.log().matches(FULL).count()
}

fn says_full(status: &Value) -> Option<()> {
    status["room"].as_str()?.contains("disk is full").then_some(())
}

#[track_caller]
fn readers_wait_for_room(backend: &str) {
    let setup = Setup::on(SmallDisk::ext4(96 << 20).unwrap());
    let disk = setup.disk.as_ref().unwrap();
    let (name, contents) = image_from(&setup, "full", 0..16, 1 << 20);
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", &["--backend", backend, "--completion", "never"]);
    check(&dir, &contents[..1]);
    let ballast = disk.fill("ballast").unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| check(&dir, &contents));
        setup.until("the disk is full while a read waits", || {
            let status = setup.status();
            says_full(&status)?;
            (status["mounts"][0]["waiting_reads"].as_u64()? > 0).then_some(())
        });
        let explained = setup.ok(&["explain", dir.to_str().unwrap()]);
        assert!(says_full(&explained).is_some(), "{explained}");
        // A daemon starts on a full disk, and takes over the readers.
        setup.kill_daemon();
        setup.until("the next daemon finds it full", || says_full(&setup.status()));
        assert!(!reader.is_finished());
        std::fs::remove_file(&ballast).unwrap();
        reader.join().unwrap();
    });
    setup.until("there is room", || (setup.status()["room"] == Value::Null).then_some(()));
    assert!(complaints(&setup) <= 2, "one line for each daemon: {}", setup.log());
    assert!(setup.log().contains("there is room again"), "{}", setup.log());
    forget_pages();
    check(&dir, &contents);
    assert!(!setup.log().contains("read failed"), "{}", setup.log());
}

#[test]
fn readers_wait_for_room_through_erofs() {
    readers_wait_for_room("erofs");
}

#[test]
fn readers_wait_for_room_through_erofs_loop() {
    readers_wait_for_room("erofs-loop");
}

#[test]
fn readers_wait_for_room_through_fuse() {
    readers_wait_for_room("fuse");
}

#[test]
fn readers_get_an_error_at_their_deadline_and_never_zeros() {
    for backend in BACKENDS {
        let setup = Setup::on(SmallDisk::ext4(96 << 20).unwrap());
        let (name, contents) = image_from(&setup, "late", 0..16, 1 << 20);
        setup.index(&name);
        let options = ["--backend", backend, "--completion", "never", "--deadline", "2s"];
        let dir = setup.mount(&name, "mnt", &options);
        let ballast = setup.disk.as_ref().unwrap().fill("ballast").unwrap();
        let begin = std::time::Instant::now();
        let file = std::fs::File::open(dir.join(&contents[9].0)).unwrap();
        let mut bytes = vec![1; 4096];
        let err = file.read_at(&mut bytes, 0).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{backend}");
        assert!(begin.elapsed() >= Duration::from_secs(2) && bytes == vec![1; 4096]);
        // The log need not say so: it may be on the same disk.
        assert!(says_full(&setup.status()).is_some(), "{}", setup.status());
        std::fs::remove_file(ballast).unwrap();
        // The error is not remembered, and everything goes on by itself.
        setup.until("there is room", || (setup.status()["room"] == Value::Null).then_some(()));
        check(&dir, &contents);
    }
}

#[test]
fn completion_pauses_on_a_full_disk_and_goes_on() {
    let setup = Setup::on(SmallDisk::ext4(128 << 20).unwrap());
    let (name, contents) = image_from(&setup, "pauses", 0..24, 1 << 20);
    setup.index(&name);
    setup.registry.set_link(Link::mbit_per_s(20, Duration::from_millis(2)));
    let dir = setup.mount(&name, "mnt", &[]);
    let fetched = |status: &Value| status["bytes_fetched"].as_u64().unwrap();
    setup.until("it is under way", || (fetched(&setup.status()) > 4 << 20).then_some(()));
    let ballast = setup.disk.as_ref().unwrap().fill("ballast").unwrap();
    setup.registry.set_link(Link::UNLIMITED);
    setup.until("the disk is full", || says_full(&setup.status()));
    let mut before = u64::MAX;
    setup.until("what was under way has ended", || {
        std::thread::park_timeout(Duration::from_secs(2));
        (fetched(&setup.status()) == std::mem::replace(&mut before, fetched(&setup.status())))
            .then_some(())
    });
    assert!(complaints(&setup) <= 1, "{}", setup.log());
    std::fs::remove_file(ballast).unwrap();
    setup.until_sealed();
    forget_pages();
    check(&dir, &contents);
}

#[test]
fn what_the_disk_has_no_room_for_is_not_completed_until_it_has() {
    let setup = Setup::on(SmallDisk::ext4(128 << 20).unwrap());
    let (name, contents) = image_from(&setup, "waits", 0..24, 1 << 20);
    setup.index(&name);
    let disk = setup.disk.as_ref().unwrap().path();
    let figures = rustix::fs::statvfs(&disk).unwrap();
    let ballast = std::fs::File::create(disk.join("ballast")).unwrap();
    let len = figures.f_bavail * figures.f_frsize - (40 << 20);
    rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, len).unwrap();
    let dir = setup.mount(&name, "mnt", &[]);
    check(&dir, &contents[..1]);
    let explained = setup.ok(&["explain", dir.to_str().unwrap()]);
    assert_eq!(explained["layers"][1]["left_out"], "disk", "{explained}");
    drop(ballast);
    std::fs::remove_file(disk.join("ballast")).unwrap();
    setup.until_sealed();
    check(&dir, &contents);
}

#[test]
fn an_image_larger_than_the_disk_can_be_read() {
    for backend in BACKENDS {
        let setup = Setup::on(SmallDisk::ext4(40 << 20).unwrap());
        let (name, contents) = image_from(&setup, "large", 0..8, 1 << 20);
        // The index alone comes through a smaller image: this one cannot be streamed here.
        let (large, all) = image_from(&setup, "larger", 0..48, 1 << 20);
        setup.ok(&["index", "build", &large]);
        let unused = setup.mount(&name, "unused", &[]);
        check(&unused, &contents);
        setup.ok(&["umount", unused.to_str().unwrap()]);
        let options = ["--backend", backend, "--eviction-grace", "200ms"];
        setup.end_daemon();
        let dir = setup.mount(&large, "mnt", &options);
        for _ in 0..2 {
            forget_pages();
            check(&dir, &all);
        }
        let listed = setup.ok(&["cache", "ls"]);
        assert_eq!(listed["layers"].as_array().unwrap().len(), 2, "the unused one went first");
        assert!(!setup.log().contains("read failed"), "{backend}: {}", setup.log());
        assert!(complaints(&setup) <= 1, "{backend}: {}", setup.log());
    }
}

#[test]
fn an_image_is_not_mounted_on_a_full_disk_and_leaves_nothing() {
    let setup = Setup::on(SmallDisk::ext4(96 << 20).unwrap());
    let disk = setup.disk.as_ref().unwrap();
    let (first, contents) = image_from(&setup, "first", 0..8, 1 << 20);
    let (second, new) = image_from(&setup, "second", 8..16, 1 << 20);
    setup.mount(&first, "first", &[]);
    setup.until_sealed();
    let ballast = disk.fill("ballast").unwrap();
    let dir = setup.path("second");
    let names = || {
        let folders = ["mounts", "images", "index", "cache/layers", "incoming"];
        let names = folders.iter().flat_map(|folder| {
            std::fs::read_dir(setup.in_root(folder)).into_iter().flatten().flatten()
        });
        let mut names: Vec<_> = names.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    for backend in BACKENDS {
        let said = setup.fails(7, &["mount", &second, dir.to_str().unwrap(), "--backend", backend]);
        assert!(said.contains("is full"), "{said}");
    }
    assert_eq!(setup.status()["mounts"].as_array().unwrap().len(), 1);
    assert_eq!(std::fs::read_dir(&dir).map_or(0, Iterator::count), 0);
    check(&setup.path("first"), &contents);
    // A folder that is empty may stay of the attempt.
    let after: Vec<_> = names().into_iter().filter(|name| !before.contains(name)).collect();
    assert!(after.len() <= 3, "{after:?}");
    std::fs::remove_file(&ballast).unwrap();
    setup.mount(&second, "second", &[]);
    check(&dir, &new);
}

#[test]
fn unused_layers_make_room_for_a_mount_on_a_full_disk() {
    let setup = Setup::on(SmallDisk::ext4(96 << 20).unwrap());
    let (first, _) = image_from(&setup, "first", 0..24, 1 << 20);
    let (second, contents) = image_from(&setup, "second", 24..32, 1 << 20);
    let dir = setup.mount(&first, "first", &[]);
    setup.ok(&["umount", dir.to_str().unwrap()]);
    setup.disk.as_ref().unwrap().fill("ballast").unwrap();
    let dir = setup.mount(&second, "second", &[]);
    check(&dir, &contents);
}

#[test]
fn a_root_folder_on_tmpfs_takes_the_best_back_end_that_works_there() {
    let setup = Setup::on(SmallDisk::tmpfs(64 << 20).unwrap());
    let (name, contents) = image_from(&setup, "tmpfs", 0..8, 1 << 20);
    setup.index(&name);
    let options = ["--quota", "6m", "--eviction-grace", "200ms"];
    setup.end_daemon();
    let dir = setup.mount(&name, "mnt", &options);
    let explained = setup.ok(&["explain", dir.to_str().unwrap()]);
    assert_eq!(explained["mount"]["backend"], "erofs-loop", "{explained}");
    let why = explained["unavailable"][0][1].as_str().unwrap();
    assert_eq!(explained["unavailable"][0][0], "erofs");
    assert!(why.contains("not supported"), "{why}");
    let said = setup.fails(1, &["mount", &name, dir.to_str().unwrap(), "--backend", "erofs"]);
    assert!(said.contains("already has an image"), "{said}");
    let other = setup.path("other");
    let said = setup.fails(1, &["mount", &name, other.to_str().unwrap(), "--backend", "erofs"]);
    assert!(said.contains("erofs does not work here"), "{said}");
    for _ in 0..2 {
        forget_pages();
        check(&dir, &contents);
    }
    setup.until("the quota is kept", || {
        (setup.status()["cache_bytes"].as_u64()? <= 6 << 20).then_some(())
    });
}

#[test]
fn a_root_folder_without_holes_keeps_its_quota_by_whole_layers() {
    let setup = Setup::on(SmallDisk::ramfs().unwrap());
    let (first, old) = image_from(&setup, "first", 0..4, 1 << 20);
    let (second, new) = image_from(&setup, "second", 4..8, 1 << 20);
    let dir = setup.mount(&first, "first", &["--quota", "6m", "--eviction-grace", "200ms"]);
    check(&dir, &old);
    assert!(setup.log().contains("gives no holes back"), "{}", setup.log());
    setup.ok(&["umount", dir.to_str().unwrap()]);
    let dir = setup.mount(&second, "second", &[]);
    check(&dir, &new);
    setup.until("the quota is kept", || {
        (setup.status()["cache_bytes"].as_u64()? <= 6 << 20).then_some(())
    });
}

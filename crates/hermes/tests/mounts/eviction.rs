//! A quota that is smaller than what is mounted.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::setup::{SetWhenDropped, Setup, check, forget_pages, image_from};

/// Waits until the cache is within its quota.
#[track_caller]
fn until_within(setup: &Setup, quota: u64) -> Value {
    setup.until("the cache is within its quota", || {
        let status = setup.status();
        (status["cache_bytes"].as_u64()? <= quota).then_some(status)
    })
}

fn mounted<'a>(status: &'a Value, dir: &std::path::Path) -> &'a Value {
    let mounts = status["mounts"].as_array().unwrap().iter();
    mounts.into_iter().find(|mount| mount["dir"] == dir.to_str().unwrap()).unwrap()
}

#[track_caller]
fn a_quota_smaller_than_a_layer_is_enough(backend: &str) {
    let setup = Setup::new();
    let (name, contents) = image_from(&setup, "large", 0..32, 1 << 20);
    setup.index(&name);
    setup.end_daemon();
    let options = ["--quota", "12m", "--eviction-grace", "200ms", "--backend", backend];
    let dir = setup.mount(&name, "mnt", &options);
    for _ in 0..3 {
        forget_pages();
        check(&dir, &contents);
        // What was just used may stay for a moment: else there is nothing to fetch again.
        until_within(&setup, 12 << 20);
    }
    let status = setup.status();
    assert_eq!(status["quota"], 12 << 20);
    assert_eq!(status["room"], Value::Null);
    assert_eq!(mounted(&status, &dir)["sealed"], false);
    let explained = setup.ok(&["explain", dir.to_str().unwrap()]);
    assert_eq!(explained["layers"][1]["left_out"], "quota", "{explained}");
    // What is here now is not completed: nobody reads, nothing comes.
    let fetched = status["bytes_fetched"].as_u64().unwrap();
    assert!(fetched > 40 << 20, "{fetched}");
    assert_eq!(setup.status()["bytes_fetched"].as_u64().unwrap(), fetched);
    assert!(!setup.log().contains("read failed"), "{}", setup.log());
}

#[test]
fn a_quota_smaller_than_a_layer_is_enough_for_erofs() {
    a_quota_smaller_than_a_layer_is_enough("erofs");
}

#[test]
fn a_quota_smaller_than_a_layer_is_enough_for_erofs_loop() {
    a_quota_smaller_than_a_layer_is_enough("erofs-loop");
}

#[test]
fn a_quota_smaller_than_a_layer_is_enough_for_fuse() {
    a_quota_smaller_than_a_layer_is_enough("fuse");
}

#[track_caller]
fn a_sealed_layer_makes_room_and_is_sealed_again(backend: &str) {
    let setup = Setup::new();
    let (first, old) = image_from(&setup, "first", 0..12, 1 << 20);
    let (second, new) = image_from(&setup, "second", 12..24, 1 << 20);
    for name in [&first, &second] {
        setup.index(name);
    }
    setup.end_daemon();
    let options = ["--quota", "16m", "--eviction-grace", "300ms", "--backend", backend];
    let dir = setup.mount(&first, "first", &options);
    setup.until_sealed();
    let other = setup.mount(&second, "second", &["--backend", backend]);
    let given_up = || {
        check(&other, &new);
        forget_pages();
        let status = setup.status();
        let mount = mounted(&status, &dir);
        let is_whole = mount["bytes_present"] == mount["bytes_total"];
        (!is_whole && mount["sealed"] == false).then_some(())
    };
    setup.until("spans of the sealed layer are given up", given_up);
    until_within(&setup, 16 << 20);
    let said = String::from_utf8(setup.run_plain(&["status"]).stdout).unwrap();
    let line = said.lines().find(|line| line.contains(dir.to_str().unwrap())).expect(&said);
    assert!(!line.contains("needs no"), "{said}");

    // It lives on under the same mount, also with another daemon.
    forget_pages();
    check(&dir, &old);
    setup.kill_daemon();
    forget_pages();
    check(&dir, &old);
    setup.ok(&["umount", other.to_str().unwrap()]);
    setup.until_sealed();
    forget_pages();
    check(&dir, &old);
    until_within(&setup, 16 << 20);
    assert!(!setup.log().contains("read failed"), "{}", setup.log());
}

#[test]
fn a_sealed_layer_makes_room_and_is_sealed_again_through_erofs() {
    a_sealed_layer_makes_room_and_is_sealed_again("erofs");
}

#[test]
fn a_sealed_layer_makes_room_and_is_sealed_again_through_erofs_loop() {
    a_sealed_layer_makes_room_and_is_sealed_again("erofs-loop");
}

#[test]
fn a_sealed_layer_makes_room_and_is_sealed_again_through_fuse() {
    a_sealed_layer_makes_room_and_is_sealed_again("fuse");
}

/// Readers compare all bytes of three images in a cache that can hold one of them, while daemons die.
#[test]
fn what_is_retained_goes_last() {
    let setup = Setup::new();
    let (first, old) = image_from(&setup, "first", 0..12, 1 << 20);
    let (second, new) = image_from(&setup, "second", 12..24, 1 << 20);
    let (third, newest) = image_from(&setup, "third", 24..36, 1 << 20);
    for name in [&first, &second, &third] {
        setup.index(name);
    }
    setup.end_daemon();
    let options = ["--quota", "16m", "--eviction-grace", "300ms", "--cache-class", "retained"];
    let retained = setup.mount(&first, "first", &options);
    setup.until_sealed();
    let is_whole = || {
        let status = setup.status();
        let mount = mounted(&status, &retained);
        assert_eq!(mount["bytes_present"], mount["bytes_total"]);
        assert_eq!(mount["sealed"], true);
    };

    // Neither what is read all the time makes it go, nor what nobody uses.
    let standard = setup.mount(&second, "second", &[]);
    let disposable = setup.mount(&third, "third", &["--cache-class", "disposable"]);
    for _ in 0..3 {
        forget_pages();
        check(&standard, &new);
        check(&disposable, &newest);
        until_within(&setup, 16 << 20);
        is_whole();
    }
    setup.ok(&["umount", standard.to_str().unwrap()]);
    setup.ok(&["umount", disposable.to_str().unwrap()]);
    setup.ok(&["umount", retained.to_str().unwrap()]);
    let standard = setup.mount(&second, "second", &[]);
    check(&standard, &new);
    let fetched = until_within(&setup, 16 << 20)["bytes_fetched"].as_u64().unwrap();
    // Its layers were not mounted, and are there all the same.
    let retained = setup.mount(&first, "first", &options[4..]);
    check(&retained, &old);
    assert_eq!(setup.status()["bytes_fetched"].as_u64().unwrap(), fetched);

    // It is no promise: the quota is.
    let another = setup.mount(&third, "third", &options[4..]);
    check(&another, &newest);
    until_within(&setup, 16 << 20);
}

#[track_caller]
fn killed_daemons_and_evictions_cost_no_byte(backend: &str) {
    let setup = Setup::new();
    let images = [("one", 0..10), ("two", 10..20), ("three", 20..30)];
    let images = images.map(|(name, seeds)| image_from(&setup, name, seeds, 1 << 20));
    for (name, _) in &images {
        setup.index(name);
    }
    setup.end_daemon();
    let options = ["--quota", "12m", "--eviction-grace", "500ms", "--backend", backend];
    let dirs: Vec<PathBuf> = images
        .iter()
        .enumerate()
        .map(|(number, (name, _))| setup.mount(name, &format!("mnt{number}"), &options))
        .collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ending = SetWhenDropped(&done);
        for (dir, (_, contents)) in dirs.iter().zip(&images) {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    check(dir, contents);
                    forget_pages();
                }
            });
        }
        for _ in 0..8 {
            setup.kill_daemon();
            // So that each of them lives to evict something.
            let asked = setup.until("something is fetched", || {
                setup.status()["bytes_fetched"].as_u64().filter(|bytes| *bytes > 20 << 20)
            });
            assert!(asked > 0);
        }
    });
    until_within(&setup, 12 << 20);
    forget_pages();
    for (dir, (_, contents)) in dirs.iter().zip(&images) {
        check(dir, contents);
    }
    assert!(!setup.log().contains("read failed"), "{}", setup.log());
}

#[test]
fn killed_daemons_and_evictions_cost_no_byte_through_erofs() {
    killed_daemons_and_evictions_cost_no_byte("erofs");
}

#[test]
fn killed_daemons_and_evictions_cost_no_byte_through_erofs_loop() {
    killed_daemons_and_evictions_cost_no_byte("erofs-loop");
}

#[test]
fn killed_daemons_and_evictions_cost_no_byte_through_fuse() {
    killed_daemons_and_evictions_cost_no_byte("fuse");
}

//! Files of the cache that were damaged behind its back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::BACKENDS;
use crate::setup::{Setup, check, forget_pages, image_from};

/// The folder of the one layer that is larger than a MiB.
fn large_layer(setup: &Setup) -> PathBuf {
    let layers = fs::read_dir(setup.in_root("cache/layers")).unwrap();
    let mut layers = layers.map(|entry| entry.unwrap().path());
    let is_large = |path: &PathBuf| fs::metadata(path.join("data")).unwrap().len() > 1 << 20;
    layers.find(is_large).unwrap()
}

/// Turns the bits of some bytes over, near the middle of the file. Of a layer's data they are bytes of
/// a file, as its middle is a header.
fn flip(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let at = len / 2 + len / 100;
    let mut bytes = [0; 64];
    file.read_exact_at(&mut bytes, at).unwrap();
    file.write_all_at(&bytes.map(|byte| !byte), at).unwrap();
    file.sync_all().unwrap();
}

fn garbage(path: &Path) {
    let len = fs::metadata(path).unwrap().len();
    let garbage: Vec<u8> = (0..len).map(|at| u8::try_from(at * 37 % 251).unwrap()).collect();
    fs::write(path, garbage).unwrap();
}

fn cut(path: &Path) {
    let len = fs::metadata(path).unwrap().len();
    File::options().write(true).open(path).unwrap().set_len(len / 2).unwrap();
}

/// Damages a layer while no daemon runs, and mounts its image again.
#[track_caller]
fn is_right_after(what: &str, options: &[&str], damage: impl Fn(&Setup, &Path)) {
    let setup = Setup::new();
    let (name, contents) = image_from(&setup, "rot", 0..8, 1 << 20);
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", options);
    check(&dir, &contents[2..6]);
    if options.is_empty() {
        setup.until_sealed();
    }
    // A reader goes on before the whole span is there.
    setup.until("what was read is kept", || {
        (setup.status()["mounts"][0]["bytes_present"].as_u64()? > 4 << 20).then_some(())
    });
    setup.ok(&["umount", dir.to_str().unwrap()]);
    setup.end_daemon();
    damage(&setup, &large_layer(&setup));
    forget_pages();
    let dir = setup.mount(&name, "mnt", options);
    check(&dir, &contents);
    assert!(!setup.log().contains("read failed"), "{what}: {}", setup.log());
}

#[test]
fn a_damaged_file_of_an_incomplete_layer_costs_no_byte() {
    let options = ["--completion", "never"];
    is_right_after("data flipped", &options, |_, layer| flip(&layer.join("data")));
    is_right_after("data cut", &options, |_, layer| cut(&layer.join("data")));
    is_right_after("data gone", &options, |_, layer| fs::remove_file(layer.join("data")).unwrap());
    is_right_after("map flipped", &options, |_, layer| flip(&layer.join("map")));
    is_right_after("map cut", &options, |_, layer| cut(&layer.join("map")));
    is_right_after("map garbage", &options, |_, layer| garbage(&layer.join("map")));
    is_right_after("map gone", &options, |_, layer| fs::remove_file(layer.join("map")).unwrap());
}

#[test]
fn a_damaged_file_beside_a_sealed_layer_costs_no_byte() {
    is_right_after("marker garbage", &[], |_, layer| garbage(&layer.join("sealed")));
    is_right_after("marker cut", &[], |_, layer| cut(&layer.join("sealed")));
    is_right_after("map garbage", &[], |_, layer| garbage(&layer.join("map")));
    is_right_after("data cut", &[], |_, layer| cut(&layer.join("data")));
}

#[test]
fn a_damaged_index_is_made_again() {
    let of = |setup: &Setup, layer: &Path, suffix: &str| {
        let name = layer.file_name().unwrap().to_str().unwrap();
        setup.in_root("index").join(format!("{name}.{suffix}"))
    };
    let options = ["--completion", "never"];
    is_right_after("index garbage", &options, |setup, layer| garbage(&of(setup, layer, "ztoc")));
    is_right_after("index flipped", &options, |setup, layer| flip(&of(setup, layer, "ztoc")));
    is_right_after("index cut", &options, |setup, layer| cut(&of(setup, layer, "ztoc")));
    is_right_after("note garbage", &options, |setup, layer| garbage(&of(setup, layer, "json")));
}

#[test]
fn a_damaged_sealed_layer_is_found_and_mended_under_its_mount() {
    for backend in BACKENDS {
        let setup = Setup::new();
        let (name, contents) = image_from(&setup, "sealed", 0..8, 1 << 20);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--backend", backend]);
        setup.until_sealed();
        let before = setup.ok(&["cache", "verify"]);
        assert_eq!(before["damaged"].as_array().unwrap().len(), 0);
        flip(&large_layer(&setup).join("data"));
        let said = setup.fails(6, &["cache", "verify"]);
        assert!(said.contains("fetched again"), "{backend}: {said}");
        setup.until_sealed();
        forget_pages();
        check(&dir, &contents);
        setup.ok(&["cache", "verify"]);
    }
}

#[test]
fn a_damaged_sealed_layer_that_no_mount_uses_is_removed() {
    let setup = Setup::new();
    let (name, contents) = image_from(&setup, "unused", 0..8, 1 << 20);
    let dir = setup.mount(&name, "mnt", &[]);
    setup.ok(&["umount", dir.to_str().unwrap()]);
    flip(&large_layer(&setup).join("data"));
    let said = setup.fails(6, &["cache", "verify"]);
    assert!(said.contains("fetched again"), "{said}");
    setup.ok(&["cache", "verify"]);
    let dir = setup.mount(&name, "mnt", &[]);
    check(&dir, &contents);
}

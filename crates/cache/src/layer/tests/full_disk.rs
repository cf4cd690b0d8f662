//! A disk without room: a small ext4 and a small tmpfs, mounted for the test (needs root).

use std::process::Command;

use super::*;
use crate::store::{HoleSupport, Store, StoreOptions};

/// A small file system; unmounted when dropped, also when the test fails.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn tmpfs(bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"],
            &folder.path().join("disk"),
        );
        Self { folder }
    }

    fn ext4(bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-m", "0", "-O", "^has_journal"], &image);
        let disk = folder.path().join("disk");
        run("mount", &["-o", "loop", image.to_str().unwrap()], &disk);
        Self { folder }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("disk")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.path()).status().ok();
    }
}

/// Runs a tool on a path; the path of a mount is made first.
fn run(tool: &str, args: &[&str], path: &Path) {
    if tool == "mount" {
        std::fs::create_dir(path).unwrap();
    }
    let status = Command::new(tool).args(args).arg(path).status();
    let status = status.unwrap_or_else(|error| panic!("`{tool}` is needed for this test: {error}"));
    assert!(status.success(), "{tool} failed; this test needs root");
}

fn check(disk: &SmallDisk) {
    let span_len: u64 = 1 << 20;
    let spans: Vec<u64> = (0..64).map(|span| span * span_len).collect();
    let shape = LayerShape { bytes: 64 * span_len, spans, index: Digest::of(b"index") };
    let folder = disk.path().join("layer");
    std::fs::create_dir(&folder).unwrap();
    let layer = open_in(&folder, "a", shape.clone()).unwrap();

    let full = (0..64).find_map(|span| fill(&layer, span).err().map(|error| (span, error)));
    let Some((failed, WriteError::NoSpace(_))) = full else { panic!("{full:?}") };
    assert!(failed > 2, "the disk is not that small");
    assert!(!layer.is_present(failed));
    assert_right_where_present(&layer);

    // The room of evicted spans is enough to go on.
    assert_eq!(evict(&layer, &[0, 1]).unwrap().spans, [0, 1]);
    fill(&layer, failed).unwrap();
    assert_right_where_present(&layer);
    layer.mark_clean().unwrap();
    drop(layer);

    let layer = open_in(&folder, "b", shape).unwrap();
    assert!(!layer.is_present(0) && layer.is_present(failed));
    assert!(layer.verify(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn a_full_ext4_is_told_apart_and_survived() {
    check(&SmallDisk::ext4(16 << 20));
}

#[test]
fn a_full_tmpfs_is_told_apart_and_survived() {
    check(&SmallDisk::tmpfs(8 << 20));
}

#[test]
fn a_store_is_opened_and_measured_on_a_full_disk() {
    for disk in [SmallDisk::ext4(16 << 20), SmallDisk::tmpfs(1 << 20)] {
        let root = disk.path().join("store");
        let options = StoreOptions { quota: None, boot_id: "a".to_owned() };
        let store = Store::open(&root, options.clone()).unwrap();
        assert!(store.has_room(512 << 10).unwrap());
        assert!(!store.has_room(64 << 20).unwrap());
        drop(store);
        let ballast = disk.path().join("ballast");
        let mut file = File::create(&ballast).unwrap();
        for piece in [64 << 10, 1] {
            while io::Write::write_all(&mut file, &vec![1; piece]).is_ok() {}
        }
        let store = Store::open(&root, options).unwrap();
        assert_eq!(store.supports_holes(), HoleSupport::Full);
        assert!(!store.has_room(64 << 10).unwrap());
        drop(file);
        std::fs::remove_file(ballast).unwrap();
        assert!(store.has_room(64 << 10).unwrap());
    }
}

#[test]
fn a_layer_that_cannot_be_started_says_so() {
    let disk = SmallDisk::tmpfs(64 << 10);
    std::fs::write(disk.path().join("ballast"), vec![1; 60 << 10]).unwrap();
    let spans: Vec<u64> = (0..4096).map(|span| span * 4096).collect();
    let shape = LayerShape { bytes: 4096 * 4096, spans, index: Digest::of(b"index") };
    let refused = open_in(&disk.path(), "a", shape);
    assert!(matches!(refused, Err(OpenLayerError::NoSpace(_))), "{refused:?}");
}

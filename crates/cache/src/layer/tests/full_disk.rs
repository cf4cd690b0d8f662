//! A disk without room: a small ext4 and a small tmpfs, mounted for the test (needs root).

use testkit::disk::SmallDisk;

use super::*;
use crate::store::{HoleSupport, Store, StoreOptions};

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
    check(&SmallDisk::ext4(16 << 20).unwrap());
}

#[test]
fn a_full_tmpfs_is_told_apart_and_survived() {
    check(&SmallDisk::tmpfs(8 << 20).unwrap());
}

#[test]
fn a_store_is_opened_and_measured_on_a_full_disk() {
    for disk in [SmallDisk::ext4(16 << 20).unwrap(), SmallDisk::tmpfs(1 << 20).unwrap()] {
        let root = disk.path().join("store");
        let options = StoreOptions { quota: None, boot_id: "a".to_owned() };
        let store = Store::open(&root, options.clone()).unwrap();
        assert!(store.has_room(512 << 10).unwrap());
        assert!(!store.has_room(64 << 20).unwrap());
        drop(store);
        let ballast = disk.fill("ballast").unwrap();
        let store = Store::open(&root, options).unwrap();
        assert_eq!(store.supports_holes(), HoleSupport::Full);
        assert!(!store.has_room(64 << 10).unwrap());
        std::fs::remove_file(ballast).unwrap();
        assert!(store.has_room(64 << 10).unwrap());
    }
}

#[test]
fn a_layer_that_cannot_be_started_says_so() {
    let disk = SmallDisk::tmpfs(64 << 10).unwrap();
    std::fs::write(disk.path().join("ballast"), vec![1; 60 << 10]).unwrap();
    let spans: Vec<u64> = (0..4096).map(|span| span * 4096).collect();
    let shape = LayerShape { bytes: 4096 * 4096, spans, index: Digest::of(b"index") };
    let refused = open_in(&disk.path(), "a", shape);
    assert!(matches!(refused, Err(OpenLayerError::NoSpace(_))), "{refused:?}");
}

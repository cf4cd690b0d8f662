//! What an image cannot express.

use tree::{Limits, Tree};
use ztoc::{EntryKind, SparseMap, TocEntry};

use super::{entry, file, large_device, merged, written};
use crate::{Device, WriteError, write_image};

#[track_caller]
fn refused(culprit: TocEntry, expected: WriteError) {
    assert_eq!(written(&merged(&[culprit])), Err(expected));
}

#[test]
fn sparse_pieces_off_the_blocks() {
    for (pieces, logical_size) in [
        (vec![(100, 512)], 1000),
        (vec![(0, 100)], 512),
        (vec![(0, 100), (512, 512)], 1024),
        // Too many chunks: one block in 2^40.
        (vec![(512, 512)], 1 << 40),
    ] {
        let size = pieces.iter().map(|(_, len)| len).sum();
        let sparse = Some(SparseMap { pieces, logical_size });
        refused(
            TocEntry { sparse, ..file("d/s", 512, size) },
            WriteError::UnalignedSparse { path: b"d/s".to_vec() },
        );
    }
}

#[test]
fn chunks_are_limited_over_all_files() {
    let sparse = |name: &str| TocEntry {
        sparse: Some(SparseMap { pieces: vec![(512, 512)], logical_size: 512 << 23 }),
        ..file(name, 512, 512)
    };
    let tree = merged(&[sparse("a"), sparse("b"), sparse("c")]);
    assert_eq!(written(&tree), Err(WriteError::UnalignedSparse { path: b"c".to_vec() }));
}

#[test]
fn files_off_the_blocks() {
    refused(file("f", 513, 1), WriteError::UnalignedFile { path: b"f".to_vec(), offset: 513 });
}

#[test]
fn files_outside_their_layer() {
    let end = large_device().bytes;
    let outside = |end| WriteError::OutsideLayer { path: b"f".to_vec(), layer: 0, end };
    refused(file("f", end - 512, 513), outside(end + 1));
    refused(file("f", 0, 1 << 62), outside(1 << 62));
    written(&merged(&[file("f", end - 512, 512)])).unwrap();
    let error = write_image(&merged(&[file("f", 512, 1)]), &[], &mut Vec::new());
    assert_eq!(error, Err(outside(513)));
}

#[test]
fn attributes_that_are_too_large() {
    let with = |n_values: usize, bytes| {
        let pax = |number| (format!("SCHILY.xattr.user.{number}").into(), vec![0; bytes]);
        TocEntry { pax: (0..n_values).map(pax).collect(), ..entry(EntryKind::File, b"f") }
    };
    let error = WriteError::XattrsTooLarge { path: b"f".to_vec() };
    refused(with(1, 65_536), error.clone());
    refused(with(5, 60_000), error);
    written(&merged(&[with(1, 65_535)])).unwrap();
    written(&merged(&[with(4, 65_000)])).unwrap();
}

#[test]
fn device_numbers() {
    for device in [(4096, 0), (0, 1 << 20)] {
        refused(
            TocEntry { device, ..entry(EntryKind::CharDevice, b"c") },
            WriteError::DeviceNumber { path: b"c".to_vec() },
        );
    }
}

#[test]
fn devices() {
    let tree = Tree::merge(&[], &Limits::default()).unwrap();
    let check = |devices: &[Device], layer| {
        let error = write_image(&tree, devices, &mut Vec::new());
        assert_eq!(error, Err(WriteError::Device { layer }));
    };
    check(&[large_device(), Device { tag: "x".repeat(65), bytes: 1 }], 1);
    check(&[Device { bytes: large_device().bytes + 1, ..large_device() }], 0);
    check(&vec![large_device(); 65_535], 65_534);
}

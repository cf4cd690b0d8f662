//! What cannot be merged, and that it costs little to find out.

use ztoc::{EntryKind, SparseMap, TocEntry};

use super::{directory, entry, file, hard_link, merge, symlink};
use crate::{EntryError, Limits, MergeError, NodeId, Tree};

/// The last entry of the last layer is refused.
#[track_caller]
fn refused(layers: &[&[TocEntry]], expected: EntryError) {
    let culprit = layers.last().unwrap().last().unwrap();
    let error = MergeError::Entry {
        layer: u32::try_from(layers.len() - 1).unwrap(),
        name: culprit.name.clone(),
        source: expected,
    };
    assert_eq!(merge(layers), Err(error));
}

#[test]
fn names() {
    refused(&[&[file("a\0b", 1)]], EntryError::BadName);
    for name in [".wh.", "a/.wh..", ".wh..."] {
        refused(&[&[file(name, 1)]], EntryError::BadName);
    }
    refused(&[&[file(&"x".repeat(256), 1)]], EntryError::NameTooLong);
    refused(&[&[file(&"x/".repeat(2049), 1)]], EntryError::NameTooLong);
}

#[test]
fn paths_through_files() {
    refused(&[&[file("a", 1), file("a/b", 1)]], EntryError::NotADirectory);
    refused(&[&[file("a", 1), symlink("s", "a"), file("s/b", 1)]], EntryError::NotADirectory);
    refused(&[&[file("a", 1), symlink("s", "a/x"), file("s/b", 1)]], EntryError::NotADirectory);
}

#[test]
fn links_that_lead_in_a_circle() {
    refused(&[&[symlink("a", "b"), symlink("b", "a"), file("a/x", 1)]], EntryError::SymlinkLoop);
    refused(&[&[symlink("a", "a/a"), file("a/x", 1)]], EntryError::SymlinkLoop);
    refused(&[&[symlink("a", "a"), hard_link("h", "a/x")]], EntryError::SymlinkLoop);
}

#[test]
fn links_that_grow() {
    let target = "a/".to_owned() + &"y/".repeat(1000);
    refused(&[&[symlink("a", &target), file("a/x", 1)]], EntryError::NameTooLong);
}

#[test]
fn symlink_work_is_bounded_over_all_entries() {
    let limits = Limits { max_symlink_work: 1000, ..Limits::default() };
    let mut entries = vec![symlink("s", &format!("{}d", "./".repeat(50)))];
    entries.extend((0..100).map(|number| file(&format!("s/{number}"), 1)));
    let error = Tree::merge(&[&entries], &limits).unwrap_err();
    assert!(matches!(error, MergeError::Entry { source: EntryError::SymlinkLoop, .. }), "{error}");
}

#[test]
fn symlink_targets() {
    for target in ["", "a\0b", &"x".repeat(4096)] {
        refused(&[&[symlink("s", target)]], EntryError::BadSymlinkTarget);
    }
}

#[test]
fn hard_links() {
    refused(&[&[hard_link("a", "b")]], EntryError::HardLinkTarget);
    refused(&[&[file("a", 1), hard_link("a", "a")]], EntryError::HardLinkTarget);
    refused(&[&[file("a", 1), hard_link("b", "a/c")]], EntryError::HardLinkTarget);
    refused(&[&[file("d/x", 1), hard_link("d", "d/x")]], EntryError::HardLinkTarget);
    refused(&[&[directory("d", 0o755), hard_link("a", "d")]], EntryError::HardLinkToDirectory);
    refused(&[&[directory("d", 0o755)], &[hard_link("a", "d")]], EntryError::HardLinkToDirectory);
    refused(&[&[hard_link("a", "/")]], EntryError::HardLinkToDirectory);
    // A forward reference: the first of the two is refused.
    let error = merge(&[&[hard_link("a", "b"), file("b", 1)]]).unwrap_err();
    assert_eq!(error.to_string(), "cannot merge entry \"a\" of layer 0");
}

#[test]
fn data_places() {
    let at = |offset, size| TocEntry { offset, ..file("f", size) };
    refused(&[&[at(u64::MAX, 2)]], EntryError::BadData);
    refused(&[&[at(0, 1 << 63)]], EntryError::BadData);
    let sparse = |pieces: &[(u64, u64)], size, logical_size| TocEntry {
        sparse: Some(SparseMap { pieces: pieces.to_vec(), logical_size }),
        ..file("f", size)
    };
    for bad in [
        sparse(&[(0, 10)], 9, 100),
        sparse(&[(0, 10), (5, 10)], 20, 100),
        sparse(&[(95, 10)], 10, 100),
        sparse(&[(u64::MAX, 10)], 10, 100),
        sparse(&[], 0, u64::MAX),
    ] {
        refused(&[&[bad]], EntryError::BadData);
    }
}

#[test]
fn attributes() {
    let with = |name: &str, len| TocEntry {
        pax: vec![(format!("SCHILY.xattr.{name}").into(), vec![0; len])],
        ..entry(EntryKind::File, "f")
    };
    refused(&[&[with(&format!("user.{}", "x".repeat(251)), 1)]], EntryError::BadXattr);
    refused(&[&[with("user.a\0", 1)]], EntryError::BadXattr);
    refused(&[&[with("user.a", 65_537)]], EntryError::BadXattr);
    let largest = with(&format!("user.{}", "x".repeat(250)), 65_536);
    assert_eq!(merge(&[&[largest]]).unwrap().node(NodeId(1)).xattrs.len(), 1);
}

#[test]
fn nodes_and_links_are_limited_together() {
    // Two roots, a directory, a file and a link.
    let entries = [file("d/a", 1), hard_link("b", "d/a")];
    let merge = |max_nodes| Tree::merge(&[&entries], &Limits { max_nodes, ..Limits::default() });
    assert_eq!(merge(4), Err(MergeError::TooManyNodes { limit: 4 }));
    assert_eq!(merge(5).unwrap().len(), 3);
}

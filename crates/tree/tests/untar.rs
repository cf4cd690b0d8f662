//! Random layers, merged here and unpacked by testkit's naive untar, look the same: names, kinds,
//! metadata, links, contents. Needs root, as unpacking does.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, wherever in it that is")]

use std::collections::HashMap;

use oci::Digest;
use proptest::prelude::*;
use testkit::image::{Shape, random_layers};
use testkit::untar::{Entry, Kind, Snapshot, diff, snapshot, untar};
use tree::{FileData, NodeId, NodeKind, Tree};
use ztoc::{Limits, TarScanner, TocEntry};

fn merged(tars: &[Vec<u8>]) -> Tree {
    let table = |tar: &Vec<u8>| {
        let mut scanner = TarScanner::new(Limits::default());
        scanner.push(tar).unwrap();
        scanner.finish().unwrap().entries
    };
    let tables: Vec<Vec<TocEntry>> = tars.iter().map(table).collect();
    let tables: Vec<&[TocEntry]> = tables.iter().map(Vec::as_slice).collect();
    Tree::merge(&tables, &tree::Limits::default()).unwrap()
}

fn content(data: &FileData, tars: &[Vec<u8>]) -> Vec<u8> {
    let len = |bytes: u64| usize::try_from(bytes).unwrap();
    let layer = &tars[usize::try_from(data.layer).unwrap()];
    let stored = &layer[len(data.offset)..][..len(data.stored_bytes())];
    let Some(map) = &data.sparse else { return stored.to_vec() };
    let (mut bytes, mut rest) = (vec![0; len(data.size)], stored);
    for &(at, n) in &map.pieces {
        let (piece, after) = rest.split_at(len(n));
        bytes[len(at)..][..len(n)].copy_from_slice(piece);
        rest = after;
    }
    bytes
}

/// What a mount of the tree would show.
fn seen(tree: &Tree, tars: &[Vec<u8>]) -> Snapshot {
    let mut all = Snapshot::new();
    let mut first_paths = HashMap::new();
    let mut waiting = vec![(Vec::new(), Tree::ROOT)];
    while let Some((path, id)) = waiting.pop() {
        let first_path = first_paths.entry(id).or_insert_with(|| path.clone()).clone();
        for (name, child) in tree.children(id).rev() {
            let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
            waiting.push(([&path, slash, name].concat(), child));
        }
        all.insert(path, entry(tree, id, first_path, tars));
    }
    all
}

fn entry(tree: &Tree, id: NodeId, first_path: Vec<u8>, tars: &[Vec<u8>]) -> Entry {
    let node = tree.node(id);
    let kind = match &node.kind {
        NodeKind::Directory(_) => Kind::Directory,
        NodeKind::File(data) => {
            Kind::File { size: data.size, content: Digest::of(&content(data, tars)) }
        }
        NodeKind::Symlink(target) => Kind::Symlink(target.to_vec()),
        NodeKind::CharDevice(major, minor) => Kind::CharDevice(*major, *minor),
        NodeKind::BlockDevice(major, minor) => Kind::BlockDevice(*major, *minor),
        NodeKind::Fifo => Kind::Fifo,
    };
    let xattrs = node.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec()));
    Entry {
        kind,
        mode: u32::from(node.mode),
        uid: node.uid,
        gid: node.gid,
        mtime: (node.mtime.seconds, i64::from(node.mtime.nanos)),
        xattrs: xattrs.collect(),
        links: if node.is_directory() { 0 } else { u64::from(node.links) },
        first_path,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn random_layers_are_merged_as_they_are_unpacked(
        seed: u64,
        layers in 1_usize..7,
        entries in 1_usize..60,
    ) {
        let shape = Shape { layers, entries, max_file_size: 5000, ..Shape::default() };
        let tars = random_layers(seed, &shape);
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        untar(&root, &tars).unwrap();
        let differences = diff(&snapshot(&root).unwrap(), &seen(&merged(&tars), &tars));
        prop_assert!(differences.is_empty(), "{}", differences.join("\n"));
    }
}

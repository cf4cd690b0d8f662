//! Numbers, paths and places.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ztoc::{ReadTocError, Toc, TocEntry};

use super::{directory, file, hard_link, listing, merge, symlink};
use crate::{LaterTree, Limits, MakeTreeError, NodeId, NodeKind, Tree};

fn sample() -> Tree {
    let at = |name, offset, size| TocEntry { offset, ..file(name, size) };
    merge(&[
        &[at("b/x", 512, 100), at("b/y", 1536, 512), at("gone", 3072, 9), symlink("l", "b")],
        &[at("a", 512, 5), at("empty", 1024, 0), hard_link("z", "b/x"), file(".wh.gone", 0)],
    ])
    .unwrap()
}

#[test]
fn numbers_are_preorder_by_name() {
    let tree = sample();
    let paths: Vec<String> =
        tree.iter().map(|(id, _)| tree.path_of(id).escape_ascii().to_string()).collect();
    assert_eq!(paths, ["", "a", "b", "b/x", "b/y", "empty", "l"]);
    assert_eq!(tree.len(), 7);
    assert_eq!(tree.get(NodeId(7)), None);
    assert_eq!(tree, sample());
}

#[test]
fn parents_and_children() {
    let tree = sample();
    assert_eq!(tree.parent(Tree::ROOT), Tree::ROOT);
    assert_eq!(tree.parent(NodeId(4)), NodeId(2));
    assert_eq!(tree.child(NodeId(2), b"y"), Some(NodeId(4)));
    assert_eq!(tree.child(NodeId(1), b"y"), None);
    assert_eq!(tree.children(NodeId(1)).count(), 0);
    let names: Vec<&[u8]> = tree.children(Tree::ROOT).map(|(name, _)| name).collect();
    assert_eq!(names, [b"a".as_slice(), b"b", b"empty", b"l", b"z"]);
    assert_eq!(tree.node(Tree::ROOT).links, 3);
}

#[test]
fn lookup_follows_no_links() {
    let tree = sample();
    assert_eq!(tree.lookup(b""), Some(Tree::ROOT));
    assert_eq!(tree.lookup(b"/b//./x/../x"), Some(NodeId(3)));
    assert_eq!(tree.lookup(b"z"), Some(NodeId(3)));
    assert_eq!(tree.lookup(b"l/x"), None);
    assert!(matches!(tree.node(tree.lookup(b"l").unwrap()).kind, NodeKind::Symlink(_)));
}

#[test]
fn bytes_of_layers_belong_to_files() {
    let tree = sample();
    for (layer, offset, expected) in [
        (0, 0, None),
        (0, 511, None),
        (0, 512, Some(3)),
        (0, 611, Some(3)),
        (0, 612, None),
        (0, 2047, Some(4)),
        (0, 2048, None),
        (0, 3072, None),
        (1, 512, Some(1)),
        (1, 517, None),
        (2, 512, None),
    ] {
        assert_eq!(tree.file_at(layer, offset), expected.map(NodeId), "{layer}:{offset}");
    }
    let order: Vec<u32> = tree.files_in_layer_order().iter().map(|file| file.node.0).collect();
    assert_eq!(order, [3, 4, 1]);
    assert_eq!(tree.layers_used(), [0, 1]);
    assert_eq!(tree.total_file_bytes(), 617);
}

#[test]
fn a_tree_that_is_made_later_is_the_same_and_made_once() {
    let lower = vec![directory("a", 0o755), file("a/one", 1)];
    let upper = vec![file("a/two", 2)];
    let times = Arc::new(AtomicUsize::new(0));
    let later = |entries: &Vec<TocEntry>| {
        let (entries, times) = (entries.clone(), Arc::clone(&times));
        let read = move || {
            times.fetch_add(1, Ordering::Relaxed);
            Toc::from(entries.clone()).entries()
        };
        Arc::new(Toc::later(read))
    };
    let tree = LaterTree::new(vec![later(&lower), later(&upper)], Limits::default());
    assert_eq!(times.load(Ordering::Relaxed), 0);
    for _ in 0..2 {
        assert_eq!(listing(tree.get().unwrap()), listing(&merge(&[&lower, &upper]).unwrap()));
    }
    assert_eq!(times.load(Ordering::Relaxed), 2);
}

#[test]
fn a_tree_that_cannot_be_made_later_is_an_error() {
    let lost = Toc::later(|| Err(ReadTocError::new("lost")));
    let tree = LaterTree::new(vec![Arc::new(lost)], Limits::default());
    assert!(matches!(tree.get(), Err(MakeTreeError::Read(_))));
    let bad = Toc::from(vec![hard_link("a", "nothing")]);
    let tree = LaterTree::new(vec![Arc::new(bad)], Limits::default());
    assert!(matches!(tree.get(), Err(MakeTreeError::Merge(_))));
}

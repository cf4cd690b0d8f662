//! Random layers against a model that is nothing but maps from paths: slow and plain.

use std::collections::BTreeMap;

use proptest::prelude::*;
use ztoc::{EntryKind, TocEntry};

use super::{entry, merge};
use crate::{Node, NodeKind, Tree};

/// What a path has: whose entry (by uid, which is different for each), and of which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    uid: u32,
    is_directory: bool,
}

type Files = BTreeMap<Vec<String>, Seen>;

#[derive(Debug, Default)]
struct Unpacked {
    files: Files,
    /// Directories that are only parents of entries.
    implicit: Vec<Vec<String>>,
    hidden: Vec<Vec<String>>,
    opaque: Vec<Vec<String>>,
}

fn remove_below(files: &mut Files, path: &[String]) {
    files.retain(|other, _| other.len() <= path.len() || !other.starts_with(path));
}

fn remove(files: &mut Files, path: &[String]) {
    remove_below(files, path);
    files.remove(path);
}

fn unpack(entries: &[TocEntry], lower: &Files) -> Option<Unpacked> {
    let mut layer = Unpacked::default();
    for entry in entries {
        let path = split(&entry.name);
        let (base, parents) = path.split_last()?;
        for depth in 1..=parents.len() {
            let parent = &path[..depth];
            match layer.files.get(parent) {
                Some(seen) if seen.is_directory => {}
                Some(_) => return None,
                None => {
                    layer.files.insert(parent.to_vec(), Seen { uid: 0, is_directory: true });
                    layer.implicit.push(parent.to_vec());
                }
            }
        }
        if base == ".wh..wh..opq" {
            layer.opaque.push(parents.to_vec());
            continue;
        }
        if let Some(hidden) = base.strip_prefix(".wh.") {
            layer.hidden.push([parents, &[hidden.to_owned()]].concat());
            continue;
        }
        let is_directory = entry.kind == EntryKind::Directory;
        let there = layer.files.get(&path);
        if !(is_directory && there.is_some_and(|there| there.is_directory)) {
            remove(&mut layer.files, &path);
            // What the directory said went with it, as its marks do in overlayfs' upper folder.
            layer.opaque.retain(|opaque| !opaque.starts_with(&path));
            layer.hidden.retain(|hidden| hidden.len() <= path.len() || !hidden.starts_with(&path));
        }
        layer
            .implicit
            .retain(|implicit| !implicit.starts_with(&path) || implicit.len() > path.len());
        layer.implicit.retain(|implicit| layer.files.contains_key(implicit));
        let mut seen = Seen { uid: entry.uid, is_directory };
        if entry.kind == EntryKind::HardLink {
            let target = split(&entry.linkname);
            seen = *layer.files.get(&target).or_else(|| lower.get(&target))?;
            if seen.is_directory {
                return None;
            }
        }
        layer.files.insert(path, seen);
    }
    Some(layer)
}

fn lay_over(lower: &mut Files, layer: Unpacked) {
    for path in &layer.opaque {
        remove_below(lower, path);
    }
    for path in &layer.hidden {
        remove(lower, path);
    }
    for (path, seen) in layer.files {
        let below = lower.get(&path).copied();
        if seen.is_directory && below.is_some_and(|below| below.is_directory) {
            if !layer.implicit.contains(&path) {
                lower.insert(path, seen);
            }
        } else {
            remove(lower, &path);
            lower.insert(path, seen);
        }
    }
}

fn split(name: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(name).split('/').map(str::to_owned).collect()
}

fn model(layers: &[Vec<TocEntry>]) -> Option<Files> {
    let mut merged = Files::new();
    for entries in layers {
        let layer = unpack(entries, &merged)?;
        lay_over(&mut merged, layer);
    }
    Some(merged)
}

fn files_of(tree: &Tree) -> Files {
    let mut files = Files::new();
    let mut stack = vec![(Vec::new(), Tree::ROOT)];
    while let Some((path, id)) = stack.pop() {
        for (name, child) in tree.children(id) {
            let path = [path.as_slice(), &[String::from_utf8_lossy(name).into_owned()]].concat();
            let Node { uid, ref kind, .. } = *tree.node(child);
            let is_directory = matches!(kind, NodeKind::Directory(_));
            files.insert(path.clone(), Seen { uid, is_directory });
            stack.push((path, child));
        }
    }
    files
}

/// Names that may be parents, and names that are only ever leaves: the model follows no links.
fn a_path() -> impl Strategy<Value = String> {
    let parents = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 0..3);
    let leaf = prop::sample::select(vec![
        "a",
        "b",
        "c",
        "x",
        "y",
        ".wh.a",
        ".wh.b",
        ".wh.x",
        ".wh..wh..opq",
    ]);
    (parents, leaf).prop_map(|(mut path, leaf)| {
        path.push(leaf);
        path.join("/")
    })
}

fn an_entry() -> impl Strategy<Value = TocEntry> {
    let kind = prop_oneof![
        4 => Just(EntryKind::Directory),
        4 => Just(EntryKind::File),
        1 => Just(EntryKind::HardLink),
        1 => Just(EntryKind::Fifo),
    ];
    (kind, a_path(), a_path()).prop_map(|(kind, path, target)| {
        // Files get names that are never parents most of the time: else nearly all layers are refused.
        let is_bare = kind == EntryKind::Directory || path.contains(".wh.");
        let path = if is_bare { path } else { path + "_" };
        TocEntry { linkname: (target + "_").into(), ..entry(kind, &path) }
    })
}

fn an_odd_entry() -> impl Strategy<Value = TocEntry> {
    let kind = prop::sample::select(vec![
        EntryKind::File,
        EntryKind::Directory,
        EntryKind::Symlink,
        EntryKind::HardLink,
    ]);
    (kind, "[a./\\x00w]{0,12}", "[a./]{0,8}")
        .prop_map(|(kind, name, target)| TocEntry { linkname: target.into(), ..entry(kind, &name) })
}

fn some_layers() -> impl Strategy<Value = Vec<Vec<TocEntry>>> {
    prop::collection::vec(prop::collection::vec(an_entry(), 0..12), 0..5).prop_map(|mut layers| {
        let mut uid = 0;
        for entry in layers.iter_mut().flatten() {
            uid += 1;
            entry.uid = uid;
            // Half of them take a parent's name after all.
            if uid % 2 == 0 && entry.name.ends_with(b"_") {
                entry.name.pop();
            }
        }
        layers
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn merges_as_the_model_does(layers in some_layers()) {
        let borrowed: Vec<&[TocEntry]> = layers.iter().map(Vec::as_slice).collect();
        let merged = merge(&borrowed);
        prop_assert_eq!(merged.as_ref().ok().map(files_of), model(&layers));
        if let Ok(tree) = merged {
            check_numbers(&tree)?;
        }
    }

}

proptest! {
    #[test]
    fn takes_any_names(candidates in prop::collection::vec(an_odd_entry(), 0..20)) {
        // Entry by entry, so that one that is refused does not hide the rest.
        let mut kept: Vec<TocEntry> = Vec::new();
        for entry in candidates {
            kept.push(entry);
            match merge(&[&kept]) {
                Ok(tree) => check_numbers(&tree)?,
                Err(_) => {
                    kept.pop();
                }
            }
        }
    }
}

/// Every node is reached from the root, by its path, and has as many links as names.
fn check_numbers(tree: &Tree) -> Result<(), TestCaseError> {
    let mut names = vec![0_u32; tree.len()];
    let mut last_first = None;
    for (id, node) in tree.iter() {
        prop_assert_eq!(tree.lookup(&tree.path_of(id)), Some(id));
        if let Some(last) = last_first {
            prop_assert!(id > last);
        }
        last_first = Some(id);
        for (_, child) in tree.children(id) {
            names[child.index()] += 1;
        }
        if node.is_directory() {
            let subdirectories =
                tree.children(id).filter(|(_, child)| tree.node(*child).is_directory()).count();
            prop_assert_eq!(node.links as usize, 2 + subdirectories);
        }
    }
    for (id, node) in tree.iter().skip(1) {
        let expected = if node.is_directory() { 1 } else { node.links };
        prop_assert_eq!(names[id.index()], expected);
    }
    Ok(())
}

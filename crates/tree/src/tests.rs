//! Merging, by table and against a model that knows only paths.

mod accessors;
mod layers;
mod model;
mod refusals;

use ztoc::{EntryKind, Mtime, TocEntry};

use crate::{Limits, MergeError, NodeKind, Tree};

pub(crate) fn entry(kind: EntryKind, name: &str) -> TocEntry {
    TocEntry {
        offset: 512,
        uid: 1,
        gid: 1,
        mtime: Mtime { seconds: 7, nanos: 8 },
        ..TocEntry::new(name, kind)
    }
}

/// A file; its size tells files of one name apart.
fn file(name: &str, size: u64) -> TocEntry {
    TocEntry { size, ..entry(EntryKind::File, name) }
}

fn directory(name: &str, mode: u32) -> TocEntry {
    TocEntry { mode, ..entry(EntryKind::Directory, name) }
}

fn symlink(name: &str, target: &str) -> TocEntry {
    TocEntry { linkname: target.into(), ..entry(EntryKind::Symlink, name) }
}

fn hard_link(name: &str, target: &str) -> TocEntry {
    TocEntry { linkname: target.into(), ..entry(EntryKind::HardLink, name) }
}

fn merge(layers: &[&[TocEntry]]) -> Result<Tree, MergeError> {
    Tree::merge(layers, &Limits::default())
}

/// One line for each name: path, kind, and what tells it apart.
fn listing(tree: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    let mut stack = vec![(String::new(), Tree::ROOT)];
    while let Some((path, id)) = stack.pop() {
        let node = tree.node(id);
        lines.push(match &node.kind {
            NodeKind::Directory(_) => format!("{path}/ {:o}", node.mode),
            NodeKind::File(data) => format!("{path} {}:{}", data.layer, data.size),
            NodeKind::Symlink(target) => format!("{path} -> {}", target.escape_ascii()),
            NodeKind::CharDevice(major, minor) => format!("{path} c{major},{minor}"),
            NodeKind::BlockDevice(major, minor) => format!("{path} b{major},{minor}"),
            NodeKind::Fifo => format!("{path} fifo"),
        });
        for (name, child) in tree.children(id).rev() {
            stack.push((format!("{path}/{}", name.escape_ascii()), child));
        }
    }
    lines.remove(0);
    lines
}

#[track_caller]
fn check(layers: &[&[TocEntry]], expected: &[&str]) {
    assert_eq!(listing(&merge(layers).unwrap()), expected);
}

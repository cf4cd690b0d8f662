//! Trees to mount.

use std::sync::Arc;

use fuse::TreeFs;
use tree::{Limits, Tree};
use ztoc::{EntryKind, Mtime, SparseMap, TocEntry};

use crate::support::{LayerBytes, Layers, When};

/// An entry without data.
pub(crate) fn entry(name: &str, kind: EntryKind) -> TocEntry {
    let mtime = Mtime { seconds: 1_700_000_000, nanos: 0 };
    TocEntry { mtime, ..TocEntry::new(name, kind) }
}

pub(crate) fn file(name: &str, offset: u64, size: u64) -> TocEntry {
    TocEntry { offset, size, ..entry(name, EntryKind::File) }
}

pub(crate) fn folder(name: &str) -> TocEntry {
    TocEntry { mode: 0o755, ..entry(name, EntryKind::Directory) }
}

pub(crate) fn link(name: &str, kind: EntryKind, target: &str) -> TocEntry {
    TocEntry { linkname: target.as_bytes().to_vec(), ..entry(name, kind) }
}

pub(crate) fn with_xattrs(mut entry: TocEntry, xattrs: &[(&str, &[u8])]) -> TocEntry {
    let record = |(name, value): &(&str, &[u8])| {
        (format!("SCHILY.xattr.{name}").into_bytes(), value.to_vec())
    };
    entry.pax = xattrs.iter().map(record).collect();
    entry.pax.sort();
    entry
}

pub(crate) fn sparse(name: &str, offset: u64, pieces: &[(u64, u64)], size: u64) -> TocEntry {
    TocEntry {
        size: pieces.iter().map(|(_, len)| len).sum(),
        sparse: Some(SparseMap { pieces: pieces.to_vec(), logical_size: size }),
        ..file(name, offset, 0)
    }
}

pub(crate) fn tree(layers: &[&[TocEntry]]) -> Arc<Tree> {
    Arc::new(Tree::merge(layers, &Limits::default()).unwrap())
}

/// Serves a tree of one layer with `len` bytes.
pub(crate) fn tree_fs(entries: &[TocEntry], len: u64, when: When) -> (Arc<TreeFs>, Arc<Layers>) {
    let layers = Layers::new(&[len], when);
    let fs =
        TreeFs::new(Arc::new(tree(&[entries]).into()), Arc::new(LayerBytes(Arc::clone(&layers))));
    (Arc::new(fs), layers)
}

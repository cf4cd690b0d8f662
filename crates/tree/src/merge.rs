//! Laying layers over one another.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
};

use ztoc::{Mtime, TocEntry};

use crate::{
    Node, NodeId, NodeKind, Tree,
    apply::apply_layer,
    error::{EntryError, MergeError},
};

/// How much a merge may cost. Layers are foreign: each limit stops one that would exhaust the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Nodes and hard links made by all layers together, those hidden by higher layers and each
    /// layer's root included.
    pub max_nodes: u32,
    /// Bytes of a path, its slashes included.
    pub max_path_bytes: usize,
    /// Bytes of targets and components of paths visited because a symbolic link was followed, by all
    /// entries together.
    pub max_symlink_work: u64,
}

impl Default for Limits {
    /// Two million nodes, paths of 4,096 bytes, a thousand million bytes and components. The nodes take
    /// 0.6 GiB where most are files.
    fn default() -> Self {
        Self { max_nodes: 2_000_000, max_path_bytes: 4096, max_symlink_work: 1_000_000_000 }
    }
}

impl Tree {
    /// Merges the tables of contents of an image's layers, the lowest first, as containerd's untar
    /// and overlayfs would:
    ///
    /// - Each layer is unpacked by itself. A later entry of a name replaces an earlier one (a
    ///   directory over a directory keeps its children), missing parents are made with mode 0755,
    ///   and a parent that is a symbolic link *of the same layer* is followed within the root.
    /// - `.wh.NAME` hides NAME of the lower layers and `.wh..wh..opq` all lower children of its
    ///   directory, wherever in the layer they stand; they never hide what their own layer brings.
    ///   A character device 0:0 is a whiteout too, as it is for overlayfs.
    /// - A directory over a directory shows the children of both and its own metadata (a parent that
    ///   was not an entry keeps the lower one's); anything else hides what is below it, as does a
    ///   directory over a symbolic link.
    /// - A hard link finds its target in its own layer or else in the lower ones, and shares the
    ///   node; the metadata of the link's own entry is not used.
    ///
    /// Nothing gets out of the root: `..` stops there, in names as in links.
    ///
    /// # Errors
    /// When an entry cannot be part of a tree (the error names it), or `limits` are exceeded.
    pub fn merge(layers: &[&[TocEntry]], limits: &Limits) -> Result<Self, MergeError> {
        let mut arena = Arena::new(*limits);
        let merged = arena.push(empty_directory())?;
        for (layer, entries) in (0_u32..).zip(layers) {
            let upper = arena.push(empty_directory())?;
            let marks = apply_layer(&mut arena, layer, entries, upper, merged)?;
            arena.overlay(merged, upper, marks);
        }
        Ok(arena.into_tree(merged))
    }
}

/// What a layer says of a directory besides its children.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// It is no entry of the layer but only the parent of one, so it has no metadata of its own.
    pub(crate) is_implicit: bool,
    /// It hides all lower children.
    pub(crate) is_opaque: bool,
    /// The lower children that it hides.
    pub(crate) whiteouts: BTreeSet<Box<[u8]>>,
}

/// The marks of one layer's directories; most have none.
pub(crate) type LayerMarks = HashMap<NodeId, Marks>;

/// All nodes of a merge, those of the merged layers and those of the layer that is being applied.
#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) nodes: Vec<Node>,
    pub(crate) limits: Limits,
    /// Nodes and links made so far.
    made: u32,
    /// Of [`Limits::max_symlink_work`], what is left.
    symlink_work: u64,
}

impl Arena {
    fn new(limits: Limits) -> Self {
        Self { nodes: Vec::new(), limits, made: 0, symlink_work: limits.max_symlink_work }
    }

    pub(crate) fn push(&mut self, node: Node) -> Result<NodeId, MergeError> {
        self.count()?;
        let id = u32::try_from(self.nodes.len()).map_err(|_len| self.too_many())?;
        self.nodes.push(node);
        Ok(NodeId(id))
    }

    /// Counts a node or a link against the limit.
    pub(crate) fn count(&mut self) -> Result<(), MergeError> {
        if self.made >= self.limits.max_nodes {
            return Err(self.too_many());
        }
        self.made += 1;
        Ok(())
    }

    fn too_many(&self) -> MergeError {
        MergeError::TooManyNodes { limit: self.limits.max_nodes }
    }

    /// Pays for following a symbolic link.
    pub(crate) fn pay_symlink(&mut self, work: usize) -> Result<(), EntryError> {
        let left = u64::try_from(work).ok().and_then(|work| self.symlink_work.checked_sub(work));
        self.symlink_work = left.ok_or(EntryError::SymlinkLoop)?;
        Ok(())
    }

    pub(crate) fn children(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, NodeId>> {
        match &self.nodes[id.index()].kind {
            NodeKind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// The children of a node that is known to be a directory.
    pub(crate) fn children_mut(&mut self, id: NodeId) -> &mut BTreeMap<Box<[u8]>, NodeId> {
        let NodeKind::Directory(children) = &mut self.nodes[id.index()].kind else {
            unreachable!("callers have seen that it is a directory");
        };
        children
    }

    /// Lays the directory `upper` with all below it over the directory `lower`.
    fn overlay(&mut self, lower: NodeId, upper: NodeId, mut marks: LayerMarks) {
        let mut pairs = vec![(lower, upper)];
        while let Some((lower, upper)) = pairs.pop() {
            let marks = marks.remove(&upper).unwrap_or_default();
            let mut node = mem::replace(&mut self.nodes[upper.index()], empty_directory());
            let NodeKind::Directory(children) = mem::replace(&mut node.kind, NodeKind::Fifo) else {
                unreachable!("only pairs of directories are pushed");
            };
            self.cover(lower, node, &marks);
            for (name, child) in children {
                let below = self.children_mut(lower).get(&name).copied();
                match below.filter(|below| self.are_directories(*below, child)) {
                    Some(below) => pairs.push((below, child)),
                    None => {
                        self.children_mut(lower).insert(name, child);
                    }
                }
            }
        }
    }

    /// Gives the directory `lower` the metadata of `upper` and hides what is hidden.
    fn cover(&mut self, lower: NodeId, upper: Node, marks: &Marks) {
        let mut children = mem::take(self.children_mut(lower));
        if marks.is_opaque {
            children.clear();
        }
        for hidden in &marks.whiteouts {
            children.remove(hidden);
        }
        let below = &mut self.nodes[lower.index()];
        if !marks.is_implicit {
            *below = upper;
        }
        below.kind = NodeKind::Directory(children);
    }

    fn are_directories(&self, one: NodeId, other: NodeId) -> bool {
        self.nodes[one.index()].is_directory() && self.nodes[other.index()].is_directory()
    }
}

/// A directory as it is made when no entry describes it.
pub(crate) fn empty_directory() -> Node {
    Node {
        kind: NodeKind::Directory(BTreeMap::new()),
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Mtime::default(),
        xattrs: Vec::new(),
        links: 0,
    }
}

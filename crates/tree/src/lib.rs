//! Many layers' tables of contents merged into one file tree with overlay semantics.
//!
//! The result is what containerd's untar of each layer and an overlayfs mount of all of them would
//! show. It holds names, metadata and where the bytes lie; it never touches the bytes.
#![forbid(unsafe_code)]

mod apply;
mod error;
mod later;
mod merge;
mod names;
mod number;
mod resolve;
mod xattr;

use std::collections::BTreeMap;

use ztoc::{Mtime, SparseMap};

pub use error::{EntryError, MergeError};
pub use later::{LaterTree, MakeTreeError};
pub use merge::Limits;
pub use resolve::ResolveError;

/// The number of a node in its [`Tree`]; the root is 0. The same layers always give the same
/// numbers, so they may be handed to the kernel and survive a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where the bytes of a regular file lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileData {
    /// The layer, counted from the lowest, 0.
    pub layer: u32,
    /// Offset of the first byte in the uncompressed layer.
    pub offset: u64,
    /// Size of the file in bytes (of a sparse file the logical size).
    pub size: u64,
    /// Of a sparse file, which pieces there are; they follow one another from `offset` on.
    pub sparse: Option<SparseMap>,
}

impl FileData {
    /// How many bytes the layer holds for it: the size, or of a sparse file the sum of its pieces.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        match &self.sparse {
            None => self.size,
            Some(map) => map.pieces.iter().fold(0, |sum, &(_, len)| sum.saturating_add(len)),
        }
    }
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory and its children by name, in bytewise order.
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    /// A regular file.
    File(FileData),
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// An extended attribute: its name with the namespace prefix, and its value.
pub type Xattr = (Box<[u8]>, Box<[u8]>);

/// A file of the merged image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// Permission bits with set-uid, set-gid and sticky: 0o7777 at most.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// Extended attributes (name with its namespace prefix, value), sorted by name.
    pub xattrs: Vec<Xattr>,
    /// How many names it has; of a directory 2 + subdirectories.
    pub links: u32,
}

impl Node {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, NodeKind::Directory(_))
    }
}

/// A regular file's bytes in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoredFile {
    /// The layer, counted from the lowest, 0.
    pub layer: u32,
    /// Offset of its first byte in the uncompressed layer.
    pub offset: u64,
    /// How many bytes the layer holds for it; never 0.
    pub size: u64,
    /// The file.
    pub node: NodeId,
}

/// A merged file tree.
///
/// Nodes are numbered densely in preorder, children in bytewise order of their names; a file with
/// several names has the number of the first of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    nodes: Vec<Node>,
    /// Of each node the directory that holds its first name; the root's is the root.
    parents: Vec<NodeId>,
    /// Of each node its first name; the root's is empty.
    names: names::NameTable,
    /// Ordered by layer and offset.
    stored: Vec<StoredFile>,
}

impl Tree {
    /// The root directory.
    pub const ROOT: NodeId = NodeId(0);

    /// The node of that number.
    ///
    /// # Panics
    /// If this tree has no such node; use [`Tree::get`] for numbers that came from elsewhere.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The node of that number, if there is one.
    #[must_use]
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.index())
    }

    /// How many nodes there are; at least the root.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a tree always has its root")]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// All nodes by ascending number.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        (0_u32..).map(NodeId).zip(&self.nodes)
    }

    /// The children of a directory, in bytewise order of their names; of anything else, none.
    pub fn children(&self, id: NodeId) -> impl DoubleEndedIterator<Item = (&[u8], NodeId)> {
        self.directory(id).into_iter().flatten().map(|(name, child)| (&**name, *child))
    }

    /// The child of that name.
    #[must_use]
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        self.directory(directory)?.get(name).copied()
    }

    /// The directory that holds the (first) name of a node; the root's parent is the root.
    ///
    /// # Panics
    /// If this tree has no such node.
    #[must_use]
    pub fn parent(&self, id: NodeId) -> NodeId {
        self.parents[id.index()]
    }

    /// The node at a path from the root. Symbolic links are not followed; empty components and `.`
    /// are skipped, and `..` goes one name back and stops at the root.
    #[must_use]
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        names::clean(path).iter().try_fold(Self::ROOT, |at, name| self.child(at, name))
    }

    /// The first path of a node, without a leading `/`; the root's is empty.
    ///
    /// # Panics
    /// If this tree has no such node.
    #[must_use]
    pub fn path_of(&self, id: NodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = id;
        while at != Self::ROOT {
            names.push(self.names.get(at));
            at = self.parent(at);
        }
        names.reverse();
        names.join(&b'/')
    }

    /// The layers that hold bytes of a file of this tree, ascending.
    #[must_use]
    pub fn layers_used(&self) -> Vec<u32> {
        let mut layers: Vec<u32> = self.stored.iter().map(|file| file.layer).collect();
        layers.dedup();
        layers
    }

    /// The sum of the sizes of all regular files, each counted once however many names it has.
    #[must_use]
    pub fn total_file_bytes(&self) -> u64 {
        let sizes = self.nodes.iter().filter_map(|node| match &node.kind {
            NodeKind::File(data) => Some(data.size),
            _ => None,
        });
        sizes.fold(0, u64::saturating_add)
    }

    /// All regular files that have bytes, ordered by layer and offset.
    #[must_use]
    pub fn files_in_layer_order(&self) -> &[StoredFile] {
        &self.stored
    }

    /// The file to which a byte of an uncompressed layer belongs: none for headers and padding, and
    /// for files that a higher layer hides.
    #[must_use]
    pub fn file_at(&self, layer: u32, offset: u64) -> Option<NodeId> {
        let after =
            self.stored.partition_point(|file| (file.layer, file.offset) <= (layer, offset));
        let file = self.stored.get(after.checked_sub(1)?)?;
        (file.layer == layer && offset - file.offset < file.size).then_some(file.node)
    }

    fn directory(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, NodeId>> {
        match &self.nodes.get(id.index())?.kind {
            NodeKind::Directory(children) => Some(children),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;

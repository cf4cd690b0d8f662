//! The content of a directory: blocks of entries, ordered by name.

use tree::{NodeId, NodeKind, Tree};

use crate::format::{
    BLOCK_BYTES, DIRENT_BYTES, FILE_TYPE_BLOCK, FILE_TYPE_CHAR, FILE_TYPE_DIRECTORY,
    FILE_TYPE_FIFO, FILE_TYPE_REGULAR, FILE_TYPE_SYMLINK,
};

const BLOCK: usize = 1 << crate::format::BLOCK_BITS;

/// The entries of a directory, `.` and `..` at their places in the order of names: lookups are binary
/// searches over all of them, and `!` is less than `.`.
pub(crate) fn entries(tree: &Tree, id: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
    let dots = [(b".".as_slice(), id), (b"..", tree.parent(id))];
    let mut dots = dots.into_iter().peekable();
    let mut children = tree.children(id).peekable();
    std::iter::from_fn(move || {
        let dot_is_next = match (dots.peek(), children.peek()) {
            (Some((dot, _)), Some((child, _))) => dot < child,
            (dot, _) => dot.is_some(),
        };
        if dot_is_next { dots.next() } else { children.next() }
    })
}

/// Bytes of a directory's content. No entry goes over the end of a block.
pub(crate) fn content_bytes(tree: &Tree, id: NodeId) -> u64 {
    let mut full_blocks = 0;
    let mut used = 0;
    for (name, _) in entries(tree, id) {
        let bytes = DIRENT_BYTES + name.len();
        if used + bytes > BLOCK {
            full_blocks += 1;
            used = 0;
        }
        used += bytes;
    }
    full_blocks * BLOCK_BYTES + u64::try_from(used).expect("at most a block")
}

/// The content of a directory, whose size is [`content_bytes`], in pieces of a block; the last one
/// may be shorter.
pub(crate) fn write_blocks(
    tree: &Tree,
    id: NodeId,
    nid_of: impl Fn(NodeId) -> u64,
    mut write: impl FnMut(&[u8]),
) {
    let mut entries = entries(tree, id).peekable();
    let mut block = Vec::with_capacity(BLOCK);
    let mut held: Vec<(&[u8], NodeId)> = Vec::new();
    while entries.peek().is_some() {
        held.clear();
        let mut used = 0;
        while let Some(entry) =
            entries.next_if(|(name, _)| used + DIRENT_BYTES + name.len() <= BLOCK)
        {
            used += DIRENT_BYTES + entry.0.len();
            held.push(entry);
        }
        block.clear();
        let mut name_offset = held.len() * DIRENT_BYTES;
        for (name, node) in &held {
            block.extend_from_slice(&nid_of(*node).to_le_bytes());
            let offset = u16::try_from(name_offset).expect("within a block");
            block.extend_from_slice(&offset.to_le_bytes());
            block.extend_from_slice(&[file_type(&tree.node(*node).kind), 0]);
            name_offset += name.len();
        }
        for (name, _) in &held {
            block.extend_from_slice(name);
        }
        if entries.peek().is_some() {
            block.resize(BLOCK, 0);
        }
        write(&block);
    }
}

fn file_type(kind: &NodeKind) -> u8 {
    match kind {
        NodeKind::File(_) => FILE_TYPE_REGULAR,
        NodeKind::Directory(_) => FILE_TYPE_DIRECTORY,
        NodeKind::Symlink(_) => FILE_TYPE_SYMLINK,
        NodeKind::CharDevice(..) => FILE_TYPE_CHAR,
        NodeKind::BlockDevice(..) => FILE_TYPE_BLOCK,
        NodeKind::Fifo => FILE_TYPE_FIFO,
    }
}

//! Which byte of the image holds what.
//!
//! Superblock and device table, then the inodes in the order of the nodes, each with its extended
//! attributes and what fits behind it, then whole blocks of directories and long symbolic links.

use tree::{Node, NodeId, NodeKind, Tree};

use crate::{
    Device,
    chunks::ChunkMap,
    directory,
    error::{NodeError, WriteError},
    format::{
        BLOCK_BYTES, CHUNK_INDEX_BYTES, DEVICE_SLOT_BYTES, EXTENDED_INODE_BYTES, INODE_SLOT_BYTES,
        SUPER_BYTES, SUPER_OFFSET,
    },
    xattr,
};

/// Entries of chunk arrays in one image. Only sparse files need more than one or two, and a hostile
/// one could ask for 2^54.
const MAX_CHUNKS: u64 = 1 << 24;

/// The byte where the device table begins.
pub(crate) const DEVICE_TABLE_OFFSET: usize = SUPER_OFFSET + SUPER_BYTES;

/// The place of each node.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Byte where the area of inodes begins.
    inodes_at: u64,
    /// Byte where the area of whole blocks begins.
    blocks_at: u64,
    end: u64,
    places: Vec<Place>,
}

/// Where the parts of one node are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Byte where its inode begins.
    pub(crate) inode_at: u64,
    /// Bytes of its extended attributes, which follow the inode.
    pub(crate) xattr_bytes: u64,
    /// Size of the file.
    pub(crate) size: u64,
    /// Where its content is.
    pub(crate) content: Content,
}

/// Where the content of a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// It has none.
    None,
    /// In the layers; the array of chunks begins at this byte.
    Chunks { array_at: u64 },
    /// In whole blocks, the first of which has this number in the area of blocks.
    Plain { block: u64 },
    /// All but the last part in whole blocks, and that behind the inode.
    Inline { block: u64, tail_at: u64 },
}

impl Layout {
    pub(crate) fn new(tree: &Tree, devices: &[Device]) -> Result<Self, WriteError> {
        let table_end = DEVICE_TABLE_OFFSET + devices.len() * DEVICE_SLOT_BYTES;
        let inodes_at =
            u64::try_from(table_end).expect("memory is smaller").next_multiple_of(BLOCK_BYTES);
        let mut placer = Placer {
            // Not in the first slot: programs take inode number 0 for a deleted file.
            next: inodes_at + INODE_SLOT_BYTES,
            n_blocks: 0,
            chunks_left: MAX_CHUNKS,
        };
        let place =
            |(id, node)| placer.place(tree, id, node, devices).map_err(|error| error.at(tree, id));
        let places: Result<Vec<Place>, WriteError> = tree.iter().map(place).collect();
        let blocks_at = placer.next.next_multiple_of(BLOCK_BYTES);
        let end = blocks_at + placer.n_blocks * BLOCK_BYTES;
        Ok(Self { inodes_at, blocks_at, end, places: places? })
    }

    pub(crate) fn image_bytes(&self) -> u64 {
        self.end
    }

    pub(crate) fn first_inode_block(&self) -> u64 {
        self.inodes_at / BLOCK_BYTES
    }

    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// The address of a block that is numbered in the area of whole blocks.
    pub(crate) fn block_address(&self, block: u64) -> u64 {
        self.blocks_at / BLOCK_BYTES + block
    }

    pub(crate) fn nid_of(&self, node: NodeId) -> u64 {
        let index = usize::try_from(node.0).expect("numbers of nodes in memory");
        self.nid(&self.places[index])
    }

    pub(crate) fn into_nids(self) -> Vec<u64> {
        self.places.iter().map(|place| self.nid(place)).collect()
    }

    fn nid(&self, place: &Place) -> u64 {
        (place.inode_at - self.inodes_at) / INODE_SLOT_BYTES
    }
}

/// Hands out places in the order of the nodes.
struct Placer {
    /// The first free byte, a multiple of an inode slot.
    next: u64,
    /// Whole blocks handed out.
    n_blocks: u64,
    chunks_left: u64,
}

impl Placer {
    fn place(
        &mut self,
        tree: &Tree,
        id: NodeId,
        node: &Node,
        devices: &[Device],
    ) -> Result<Place, NodeError> {
        let xattr_bytes = xattr::body_bytes(node)?;
        let head = EXTENDED_INODE_BYTES + xattr_bytes;
        let (size, inode_at, content, end) = match &node.kind {
            NodeKind::File(data) if data.size > 0 => {
                let n_chunks = ChunkMap::new(data, devices)?.n_chunks;
                self.chunks_left =
                    self.chunks_left.checked_sub(n_chunks).ok_or(NodeError::UnalignedSparse)?;
                let array_at = (self.next + head).next_multiple_of(CHUNK_INDEX_BYTES);
                let end = array_at + n_chunks * CHUNK_INDEX_BYTES;
                (data.size, self.next, Content::Chunks { array_at }, end)
            }
            NodeKind::Directory(_) => {
                let size = directory::content_bytes(tree, id);
                let (inode_at, content, end) = self.place_content(head, size);
                (size, inode_at, content, end)
            }
            NodeKind::Symlink(target) => {
                let size = u64::try_from(target.len()).expect("memory is smaller");
                let (inode_at, content, end) = self.place_content(head, size);
                (size, inode_at, content, end)
            }
            NodeKind::CharDevice(major, minor) | NodeKind::BlockDevice(major, minor) => {
                if *major >= 1 << 12 || *minor >= 1 << 20 {
                    return Err(NodeError::DeviceNumber);
                }
                (0, self.next, Content::None, self.next + head)
            }
            NodeKind::File(_) | NodeKind::Fifo => (0, self.next, Content::None, self.next + head),
        };
        self.next = end.next_multiple_of(INODE_SLOT_BYTES);
        Ok(Place { inode_at, xattr_bytes, size, content })
    }

    /// Places an inode of `head` bytes with its attributes and content of `size` bytes. Returns where
    /// the inode and the content are, and the end of what is behind the inode.
    ///
    /// The tail behind an inode must not go over the end of a block; the inode is moved to make it
    /// fit. Only a tail of nearly a block fits nowhere.
    fn place_content(&mut self, head: u64, size: u64) -> (u64, Content, u64) {
        let block = self.n_blocks;
        self.n_blocks += size / BLOCK_BYTES;
        let tail = size % BLOCK_BYTES;
        let inode_at = self.next;
        if tail == 0 {
            return (inode_at, Content::Plain { block }, inode_at + head);
        }
        let fits = |inode_at: u64| (inode_at + head) % BLOCK_BYTES + tail <= BLOCK_BYTES;
        let to_next_block = BLOCK_BYTES - (inode_at + head) % BLOCK_BYTES;
        let moved = inode_at + to_next_block.next_multiple_of(INODE_SLOT_BYTES);
        let Some(inode_at) = [inode_at, moved].into_iter().find(|at| fits(*at)) else {
            self.n_blocks += 1;
            return (inode_at, Content::Plain { block }, inode_at + head);
        };
        let tail_at = inode_at + head;
        (inode_at, Content::Inline { block, tail_at }, tail_at + tail)
    }
}

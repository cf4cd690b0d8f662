//! The bytes of the image.

use tree::{Node, NodeKind, Tree};

use crate::{
    Device,
    chunks::ChunkMap,
    directory,
    error::WriteError,
    format::{
        BLOCK_BITS, BLOCK_BYTES, DEVICE_SLOT_BYTES, DEVICE_TAG_BYTES, EXTENDED_INODE_BYTES,
        FEATURE_COMPAT_MTIME, FEATURE_COMPAT_SB_CHKSUM, FEATURE_INCOMPAT_CHUNKED_FILE,
        FEATURE_INCOMPAT_DEVICE_TABLE, INODE_EXTENDED, LAYOUT_CHUNK_BASED, LAYOUT_FLAT_INLINE,
        LAYOUT_FLAT_PLAIN, LAYOUT_SHIFT, MAGIC, NULL_ADDRESS, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO,
        S_IFLNK, S_IFREG, SUPER_OFFSET,
    },
    layout::{Content, DEVICE_TABLE_OFFSET, Layout, Place},
    xattr,
};

/// Device numbers have 16 bits and 0 is the image itself; one is kept free, because the kernel masks
/// with the power of two above the count.
const MAX_DEVICES: usize = 65_534;

/// Refuses devices that a slot cannot describe.
pub(crate) fn check_devices(devices: &[Device]) -> Result<(), WriteError> {
    for (layer, device) in devices.iter().enumerate() {
        let blocks = device.bytes.div_ceil(BLOCK_BYTES);
        if layer >= MAX_DEVICES
            || device.tag.len() > DEVICE_TAG_BYTES
            || blocks >= u64::from(NULL_ADDRESS)
        {
            return Err(WriteError::Device { layer });
        }
    }
    Ok(())
}

/// Writes the image that was laid out.
pub(crate) fn write(
    tree: &Tree,
    devices: &[Device],
    layout: &Layout,
    out: &mut Vec<u8>,
) -> Result<(), WriteError> {
    let too_large = WriteError::ImageTooLarge { bytes: layout.image_bytes() };
    let Ok(blocks) = u32::try_from(layout.image_bytes() / BLOCK_BYTES) else {
        return Err(too_large);
    };
    let Ok(bytes) = usize::try_from(layout.image_bytes()) else {
        return Err(too_large);
    };
    out.clear();
    if out.try_reserve_exact(bytes).is_err() {
        return Err(too_large);
    }
    out.resize(bytes, 0);
    let mut image = Image { bytes: out };
    write_device_table(&mut image, devices, blocks);
    for ((id, node), place) in tree.iter().zip(layout.places()) {
        write_inode(&mut image, node, id.0, place, layout, devices);
        match &node.kind {
            NodeKind::Directory(_) => {
                let mut content = image.content(place, layout);
                let nid_of = |id| layout.nid_of(id);
                directory::write_blocks(tree, id, nid_of, |block| content.write(block));
            }
            NodeKind::Symlink(target) => image.content(place, layout).write(target),
            NodeKind::File(_)
            | NodeKind::CharDevice(..)
            | NodeKind::BlockDevice(..)
            | NodeKind::Fifo => {}
        }
    }
    write_superblock(&mut image, tree, devices, layout, blocks);
    Ok(())
}

/// The image in memory. All positions come from the layout, which is as large as the image.
struct Image<'a> {
    bytes: &'a mut [u8],
}

impl Image<'_> {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Where to write the content of a directory or symbolic link.
    fn content<'a>(&'a mut self, place: &Place, layout: &Layout) -> ContentWriter<'a> {
        let (block, tail_at) = match place.content {
            Content::Plain { block } => (block, None),
            Content::Inline { block, tail_at } => (block, Some(position(tail_at))),
            Content::None | Content::Chunks { .. } => (0, None),
        };
        ContentWriter {
            image: self.bytes,
            next: position(layout.block_address(block) * BLOCK_BYTES),
            whole_blocks: place.size / BLOCK_BYTES,
            tail_at,
        }
    }
}

/// Writes content block by block to where the layout put it.
struct ContentWriter<'a> {
    image: &'a mut [u8],
    next: usize,
    whole_blocks: u64,
    tail_at: Option<usize>,
}

impl ContentWriter<'_> {
    fn write(&mut self, content: &[u8]) {
        let block_bytes = 1 << BLOCK_BITS;
        for piece in content.chunks(block_bytes) {
            let at = match self.tail_at {
                Some(tail_at) if self.whole_blocks == 0 => tail_at,
                _ => self.next,
            };
            self.image[at..at + piece.len()].copy_from_slice(piece);
            self.next += block_bytes;
            self.whole_blocks = self.whole_blocks.saturating_sub(1);
        }
    }
}

fn write_device_table(image: &mut Image<'_>, devices: &[Device], image_blocks: u32) {
    // If the mount is not given its devices, the kernel reads them from the image at these addresses:
    // all are past its end.
    let mut unified = image_blocks;
    for (index, device) in devices.iter().enumerate() {
        let at = DEVICE_TABLE_OFFSET + index * DEVICE_SLOT_BYTES;
        let blocks =
            u32::try_from(device.bytes.div_ceil(BLOCK_BYTES)).expect("check_devices has seen it");
        image.put(at, device.tag.as_bytes());
        image.put(at + 64, &blocks.to_le_bytes());
        image.put(at + 68, &unified.to_le_bytes());
        unified = unified.checked_add(blocks).unwrap_or(image_blocks);
    }
}

fn write_inode(
    image: &mut Image<'_>,
    node: &Node,
    number: u32,
    place: &Place,
    layout: &Layout,
    devices: &[Device],
) {
    let chunks = match &node.kind {
        NodeKind::File(data) if data.size > 0 => Some(
            ChunkMap::new(data, devices)
                .unwrap_or_else(|error| unreachable!("the layout has mapped it: {error:?}")),
        ),
        _ => None,
    };
    let union = match (place.content, &chunks, &node.kind) {
        (Content::Plain { block } | Content::Inline { block, .. }, ..) => {
            u32::try_from(layout.block_address(block)).expect("the image has that many blocks")
        }
        (_, Some(chunks), _) => chunks.format(),
        (.., NodeKind::CharDevice(major, minor) | NodeKind::BlockDevice(major, minor)) => {
            (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
        }
        _ => 0,
    };
    let data_layout = match place.content {
        Content::None | Content::Plain { .. } => LAYOUT_FLAT_PLAIN,
        Content::Inline { .. } => LAYOUT_FLAT_INLINE,
        Content::Chunks { .. } => LAYOUT_CHUNK_BASED,
    };
    let format = INODE_EXTENDED | (data_layout << LAYOUT_SHIFT);
    let xattr_count = xattr::count(place.xattr_bytes).expect("the layout has counted them");
    let at = position(place.inode_at);
    image.put(at, &format.to_le_bytes());
    image.put(at + 2, &xattr_count.to_le_bytes());
    image.put(at + 4, &(file_type_bits(&node.kind) | node.mode).to_le_bytes());
    image.put(at + 8, &place.size.to_le_bytes());
    image.put(at + 16, &union.to_le_bytes());
    image.put(at + 20, &number.wrapping_add(1).to_le_bytes());
    image.put(at + 24, &node.uid.to_le_bytes());
    image.put(at + 28, &node.gid.to_le_bytes());
    image.put(at + 32, &node.mtime.seconds.to_le_bytes());
    image.put(at + 40, &node.mtime.nanos.to_le_bytes());
    image.put(at + 44, &node.links.to_le_bytes());
    if !node.xattrs.is_empty() {
        image.put(at + position(EXTENDED_INODE_BYTES), &xattr::body(node));
    }
    if let (Content::Chunks { array_at }, Some(chunks)) = (place.content, chunks) {
        for (entry, (device, address)) in chunks.entries().enumerate() {
            let at = position(array_at) + entry * 8;
            image.put(at + 2, &device.to_le_bytes());
            image.put(at + 4, &address.to_le_bytes());
        }
    }
}

fn write_superblock(
    image: &mut Image<'_>,
    tree: &Tree,
    devices: &[Device],
    layout: &Layout,
    blocks: u32,
) {
    let uuid = uuid_of(image.bytes);
    let at = SUPER_OFFSET;
    let root = u16::try_from(layout.nid_of(Tree::ROOT)).expect("the root is the first inode");
    let inodes = u64::try_from(tree.len()).expect("numbers of nodes have 32 bits");
    let first_inode_block =
        u32::try_from(layout.first_inode_block()).expect("the image has that many blocks");
    let mut incompat = FEATURE_INCOMPAT_CHUNKED_FILE;
    if !devices.is_empty() {
        incompat |= FEATURE_INCOMPAT_DEVICE_TABLE;
        let count = u16::try_from(devices.len()).expect("check_devices has counted them");
        let slot = u16::try_from(DEVICE_TABLE_OFFSET / DEVICE_SLOT_BYTES).expect("it is 9");
        image.put(at + 86, &count.to_le_bytes());
        image.put(at + 88, &slot.to_le_bytes());
    }
    image.put(at, &MAGIC.to_le_bytes());
    image.put(at + 8, &(FEATURE_COMPAT_SB_CHKSUM | FEATURE_COMPAT_MTIME).to_le_bytes());
    image.put(at + 12, &[BLOCK_BITS]);
    image.put(at + 14, &root.to_le_bytes());
    image.put(at + 16, &inodes.to_le_bytes());
    image.put(at + 36, &blocks.to_le_bytes());
    image.put(at + 40, &first_inode_block.to_le_bytes());
    image.put(at + 48, &uuid);
    image.put(at + 80, &incompat.to_le_bytes());
    let checksum = checksum(&image.bytes[at..at + position(BLOCK_BYTES)]);
    image.put(at + 4, &checksum.to_le_bytes());
}

/// CRC-32C as the superblock has it: without the inversion at the end.
pub(crate) fn checksum(covered: &[u8]) -> u32 {
    !crc32c::crc32c(covered)
}

/// An identity that follows from the content, so that images are reproducible and yet overlayfs and
/// `statfs` can tell two of them apart. In the form of a UUID of version 8.
fn uuid_of(image: &[u8]) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (part, into) in image.chunks(image.len().div_ceil(4)).zip(uuid.chunks_exact_mut(4)) {
        into.copy_from_slice(&crc32c::crc32c(part).to_le_bytes());
    }
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    uuid
}

fn file_type_bits(kind: &NodeKind) -> u16 {
    match kind {
        NodeKind::Directory(_) => S_IFDIR,
        NodeKind::File(_) => S_IFREG,
        NodeKind::Symlink(_) => S_IFLNK,
        NodeKind::CharDevice(..) => S_IFCHR,
        NodeKind::BlockDevice(..) => S_IFBLK,
        NodeKind::Fifo => S_IFIFO,
    }
}

/// A position in an image that is in memory.
fn position(at: u64) -> usize {
    usize::try_from(at).expect("the image is in memory")
}

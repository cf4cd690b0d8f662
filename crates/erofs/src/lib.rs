//! A file tree written as an EROFS metadata image; it does not mount.
//!
//! The image has names, attributes and, for each regular file, where its bytes lie in the
//! uncompressed layers, which are the image's extra devices. Blocks have 512 bytes, as tar does, so
//! that a block address can point into an unmodified tar. The layout is that of Linux 5.16; the
//! block size needs 6.4.
//!
//! Format: `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst` of Linux.
#![forbid(unsafe_code)]

mod chunks;
mod directory;
mod error;
mod format;
mod layout;
pub mod reader;
mod write;
mod xattr;

use tree::{NodeId, Tree};

pub use error::WriteError;

/// An uncompressed layer, given to the mount as a `device=`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What the image calls it, 64 bytes at most, for instance the hex digits of its SHA-256.
    pub tag: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// By node number; ascending.
    nids: Vec<u64>,
    /// Size of the image in bytes.
    pub bytes: u64,
}

impl ImageInfo {
    /// The inode number that users of the mounted image see for a node.
    ///
    /// # Panics
    /// If the tree that was written has no such node.
    #[must_use]
    pub fn nid_of(&self, node: NodeId) -> u64 {
        self.nids[usize::try_from(node.0).expect("numbers of nodes in memory")]
    }

    /// The node of an inode number, if it is one of this image's.
    #[must_use]
    pub fn node_of(&self, nid: u64) -> Option<NodeId> {
        let index = self.nids.binary_search(&nid).ok()?;
        u32::try_from(index).ok().map(NodeId)
    }
}

/// Writes `tree` as an EROFS image into `out`, whose former content is lost. Layer n of the tree is
/// `devices[n]`; the mount must be given all of them, in this order.
///
/// The same tree and devices always give the same bytes. Takes time linear in the names, and no more
/// memory than the image and some dozens of bytes for each node.
///
/// # Errors
/// When the tree has something that EROFS cannot express; another way of mounting may.
pub fn write_image(
    tree: &Tree,
    devices: &[Device],
    out: &mut Vec<u8>,
) -> Result<ImageInfo, WriteError> {
    write::check_devices(devices)?;
    let layout = layout::Layout::new(tree, devices)?;
    write::write(tree, devices, &layout, out)?;
    Ok(ImageInfo { bytes: layout.image_bytes(), nids: layout.into_nids() })
}

#[cfg(test)]
mod tests;

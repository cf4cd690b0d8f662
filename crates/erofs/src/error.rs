//! Why a tree could not be written.

use tree::{NodeId, Tree};

/// The tree cannot be an EROFS image over its layers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// A sparse file whose pieces do not begin and end at 512-byte blocks, or that has too many.
    #[error("cannot map sparse file \"{}\" in blocks of 512 bytes", .path.escape_ascii())]
    UnalignedSparse {
        /// The file, without a leading `/`.
        path: Vec<u8>,
    },
    /// A file whose bytes do not begin at a 512-byte block, which no tar has.
    #[error("cannot map file \"{}\" at offset {offset} of its layer in blocks of 512 bytes", .path.escape_ascii())]
    UnalignedFile {
        /// The file, without a leading `/`.
        path: Vec<u8>,
        /// Where its bytes begin.
        offset: u64,
    },
    /// A file whose bytes are not in its layer: the table of contents is not this layer's.
    #[error("cannot map file \"{}\": it ends at {end}, past the end of layer {layer}", .path.escape_ascii())]
    OutsideLayer {
        /// The file, without a leading `/`.
        path: Vec<u8>,
        /// Its layer, counted from the lowest, 0.
        layer: u32,
        /// Where its bytes end.
        end: u64,
    },
    /// The extended attributes of a file are larger than an inode can hold (256 KiB together, 65,535
    /// bytes each).
    #[error("cannot store the extended attributes of \"{}\": they are too large", .path.escape_ascii())]
    XattrsTooLarge {
        /// The file, without a leading `/`.
        path: Vec<u8>,
    },
    /// A device node whose number does not fit Linux' 12 bits of major and 20 of minor.
    #[error("cannot store the device number of \"{}\": it is too large", .path.escape_ascii())]
    DeviceNumber {
        /// The file, without a leading `/`.
        path: Vec<u8>,
    },
    /// A device that the image cannot name or address.
    #[error(
        "cannot use layer {layer} as a device: tags have at most 64 bytes, devices less than 2 TiB, images at most 65,534 of them"
    )]
    Device {
        /// The layer, counted from the lowest, 0.
        layer: usize,
    },
    /// The metadata would be larger than block addresses or this machine's memory reach.
    #[error("cannot write an image of {bytes} bytes: it is too large")]
    ImageTooLarge {
        /// The size in bytes.
        bytes: u64,
    },
}

/// Why one node cannot be written, before its path is known.
#[derive(Debug)]
pub(crate) enum NodeError {
    UnalignedSparse,
    UnalignedFile { offset: u64 },
    OutsideLayer { layer: u32, end: u64 },
    XattrsTooLarge,
    DeviceNumber,
}

impl NodeError {
    /// The error for the user.
    pub(crate) fn at(self, tree: &Tree, node: NodeId) -> WriteError {
        let path = tree.path_of(node);
        match self {
            Self::UnalignedSparse => WriteError::UnalignedSparse { path },
            Self::UnalignedFile { offset } => WriteError::UnalignedFile { path, offset },
            Self::OutsideLayer { layer, end } => WriteError::OutsideLayer { path, layer, end },
            Self::XattrsTooLarge => WriteError::XattrsTooLarge { path },
            Self::DeviceNumber => WriteError::DeviceNumber { path },
        }
    }
}

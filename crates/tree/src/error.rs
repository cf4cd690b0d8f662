//! Why layers could not be merged.

/// The layers could not be merged.
///
/// containerd could not unpack most such layers either; the caller leaves the image to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// An entry cannot be part of a file tree.
    #[error("cannot merge entry \"{}\" of layer {layer}", .name.escape_ascii())]
    Entry {
        /// The layer, counted from the lowest, 0.
        layer: u32,
        /// The entry's name as it stands in the archive.
        name: Vec<u8>,
        /// What is wrong with it.
        source: EntryError,
    },
    /// The layers together make more nodes and links than [`Limits`](crate::Limits) allows.
    #[error("cannot merge layers that make more than {limit} files")]
    TooManyNodes {
        /// The limit.
        limit: u32,
    },
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// A NUL byte, or a whiteout of no name.
    #[error("the name is not a file name")]
    BadName,
    /// The path, or the path after following symbolic links, or one of its names is too long.
    #[error("the name is too long")]
    NameTooLong,
    /// The path leads through something that is neither a directory nor a symbolic link.
    #[error("the path leads through a file that is not a directory")]
    NotADirectory,
    /// Finding the directory means following too many symbolic links.
    #[error("the path leads through too many symbolic links")]
    SymlinkLoop,
    /// A symbolic link with an empty target, a NUL in it, or one longer than a path can be.
    #[error("the target of the symbolic link is not a path")]
    BadSymlinkTarget,
    /// A hard link to a name that is neither in a lower layer nor earlier in this one.
    #[error("the target of the hard link does not exist before it")]
    HardLinkTarget,
    /// A hard link to a directory.
    #[error("the target of the hard link is a directory")]
    HardLinkToDirectory,
    /// The data would end past the largest file offset, or the sparse map is not ascending,
    /// disjoint, within the file and as long as the data.
    #[error("the place of the data makes no sense")]
    BadData,
    /// An extended attribute that no kernel accepts (name over 255 or value over 65,536 bytes, or a
    /// NUL in the name).
    #[error("an extended attribute is larger than attributes can be")]
    BadXattr,
}

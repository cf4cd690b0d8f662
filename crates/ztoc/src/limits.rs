//! How much of a foreign layer or index is taken in before it is refused.

/// Bounds on what a layer or an index may claim.
///
/// The defaults are far above what real images have and below what would hurt a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries in a table of contents.
    pub entries: usize,
    /// Bytes of one tar metadata record: a PAX header, a GNU long name, a sparse map.
    pub record: usize,
    /// Bytes of one name or link target.
    pub name: usize,
    /// Bytes of all names and PAX records of a layer together, as
    /// [`TocEntry::text_bytes`](crate::TocEntry::text_bytes) counts them.
    pub text: u64,
    /// Bytes of a zTOC; the format's offsets end at 2 GiB.
    pub ztoc: u64,
    /// Bytes of a layer after decompression.
    pub uncompressed: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Of 300 bytes each, and as much again in a merged tree: 1.3 GiB were measured. The largest
            // images that are known have some hundred thousand.
            entries: 2_000_000,
            // As Go's archive/tar: what it refuses, no container runtime unpacks.
            record: 1 << 20,
            name: 1 << 16,
            text: 256 << 20,
            ztoc: (1 << 31) - 1,
            uncompressed: 1 << 42,
        }
    }
}

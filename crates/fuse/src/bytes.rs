//! Where the bytes of layers come from.

use std::fs::File;
use std::ops::Range;

use sys::fuse_device::Errno;

/// What is done once bytes of a layer are there, or cannot be had: they lie in the file from the
/// offset on, one after another.
pub type BytesThen = Box<dyn FnOnce(Result<(&File, u64), Errno>) + Send>;

/// Gives bytes of layers, fetching them first if need be.
pub trait Bytes: Send + Sync {
    /// Makes the range of an uncompressed layer present, then calls `then`, at once or later and
    /// from any thread. Must not wait for anything itself.
    ///
    /// `layer` is the number that the [`Tree`](tree::Tree) or the [`LayerFile`](crate::LayerFile)
    /// has for it. `then` dropped uncalled fails the read with `EIO`.
    fn read(&self, layer: u32, range: Range<u64>, then: BytesThen);
}

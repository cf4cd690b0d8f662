//! The reference model: layers unpacked one over the other, as plainly as possible.
//!
//! It follows containerd and overlayfs. Each layer is unpacked by itself into an empty folder, then laid
//! over those below. It shares no code with the crates whose results are compared with it: it has a tar
//! reader of its own and leaves the rest to the kernel.

mod apply;
mod reader;
mod snapshot;
#[cfg(test)]
mod tests;

pub use apply::{UntarError, untar, untar_layer};
pub use reader::TarFault;
pub use snapshot::{Entry, Kind, Snapshot, diff, snapshot};

//! A read-only FUSE server: layers as files, or a whole tree.
//!
//! A [`Session`] can be replaced under a live mount, by another process too: the successor gets the
//! connection's descriptor and the [`Negotiated`] note, and the kernel sends it again what its
//! predecessor did not answer. Reads are answered whenever their bytes are there, from any thread;
//! no thread waits for them.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

mod bytes;
mod dispatch;
mod filesystem;
mod interrupt;
mod layers_fs;
mod negotiate;
mod pool;
mod reply;
mod session;
mod tree_fs;

pub use bytes::{Bytes, BytesThen};
pub use filesystem::{DirEntry, DirSink, DirectReads, Filesystem, Ino, Names, Xattrs};
pub use layers_fs::{AddFileError, LayerFile, LayersFs};
pub use negotiate::Negotiated;
pub use reply::{Piece, ReadReply};
pub use session::{Session, SessionOptions, StartSessionError};
pub use sys::fuse_device::{
    Access, Attr, Connection, Errno, MountFuseError, MountOptions, Statfs, bdi_of,
};
pub use tree_fs::TreeFs;

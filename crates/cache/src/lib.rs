//! Layer files, presence maps, durability, quota and eviction; no network, no threads.
//!
//! A layer is one sparse file, its uncompressed tar, and a map that says which spans of it are
//! there. The same file is the cache, the data device of the mounts and, once whole, the unpacked
//! layer.
//!
//! ```text
//! <root>/lock                      held while a store is open
//! <root>/layers/<sha256 of blob>/  data    the uncompressed layer, holes where bytes are missing
//!                                  map     which spans are present, with a checksum each
//!                                  sealed  written last: the whole layer was proven
//! <root>/incoming/<sha256>/        a layer that is coming whole and in order, and is none yet
//! <root>/quarantine/<sha256>/      a layer that turned out wrong, with the reason
//! <root>/trash/                    on its way out
//! ```
//!
//! # What survives what
//!
//! After SIGKILL everything that was marked present is present: the page cache outlives the process.
//! After a power loss a span counts as present only if [`Layer::mark_clean`] or [`Layer::seal`] had
//! covered it, or if [`Layer::check`] finds its checksum right. No `fsync` lies on the way of a read.
//!
//! # Who may touch the data
//!
//! Where the kernel asks the daemon before each read of `data` (fanotify), a descriptor opened by
//! name would ask too, and wait for itself for ever. All reading, writing and punching therefore
//! goes through the one descriptor that [`Layer::data`] shows, and the file's length is never set
//! once it is right.
#![forbid(unsafe_code)]

mod bits;
mod disk;
mod layer;
mod map;
mod marker;
mod store;

pub use bits::SpanSet;
pub use disk::is_no_room;
pub use layer::{
    CheckError, Discarded, EvictError, Evicted, Layer, LayerShape, Reading, Report, SealError,
    SpanState, SyncError, UnsealError, WriteError,
};
pub use map::{Map, MapError};
pub use marker::{MarkerError, Sealed};
pub use store::{
    HoleSupport, Incoming, KeepError, ListError, OpenLayerError, OpenStoreError, Pruned,
    QuarantineError, RemoveError, Store, StoreOptions, StoredLayer, UsageError, list,
};

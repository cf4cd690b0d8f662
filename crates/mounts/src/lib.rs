//! Makes and finds mounts: EROFS over fanotify, EROFS over loop devices, a FUSE tree; chosen by
//! trying.
//!
//! What a mount needs from user space outlives the daemon: descriptors lie with the keeper
//! ([`Holding`]), and a [`Record`] of each mount on disk. A daemon that starts takes both over
//! before it serves anything.
#![forbid(unsafe_code)]

mod bytes;
mod error;
mod front_ends;
mod holding;
mod precontent;
mod probe;
mod readers;
mod record;
mod served;
mod users;

pub use error::{BackendError, EvictLayerError, MountImageError, UnmountImageError};
pub use front_ends::{FrontEnds, ImageToMount, MountState, Mounted};
pub use holding::Holding;
pub use precontent::{PreContent, PreContentError};
pub use probe::{Probe, try_user_namespaces};
pub use record::{Backend, Looped, Record};

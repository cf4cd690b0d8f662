//! The small process that holds the kernel's descriptors across the daemon's death.
//!
//! A reader that waits for its bytes waits on a descriptor: the fanotify group or `/dev/fuse`. When
//! the last holder of it is gone the kernel gives zeros or errors instead. So a second process, too
//! simple to crash, holds a duplicate of each, together with the descriptors that were opened before
//! the marks, and starts the daemon again when it dies.
//!
//! - [`serve()`] is that process' main loop; [`start`] starts it.
//! - [`Client`] is the daemon's connection to it.
//! - [`SystemdStore`] has systemd hold the same, beside the keeper, for a daemon that is its service.
//!
//! The keeper outlives upgrades of the daemon, so daemons of other versions speak to it: the protocol
//! (in `protocol.rs`) only ever grows.
#![forbid(unsafe_code)]

pub use client::{Client, ClientError, StartError, start};
pub use protocol::{Held, MAX_NAME_LEN, MAX_NOTE_LEN, Refusal};
pub use serve::{KeeperOptions, ServeError, serve};
pub use systemd::{SystemdError, SystemdStore, inherited};

mod client;
mod machine;
mod protocol;
mod respawn;
mod serve;
mod systemd;

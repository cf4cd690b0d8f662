//! Snapshots for containerd: its API, the metadata store, and the folders of what is written.
//!
//! A proxy snapshotter is asked over a unix socket for folders to unpack layers into, and for the mounts of
//! containers. What it answers here is what containerd's own overlayfs snapshotter would; which layers need
//! no unpacking is decided elsewhere.
//!
//! On the same socket the kubelet may be served: what it asks about images is handed on to containerd.
#![forbid(unsafe_code)]

mod api;
mod filter;
mod folders;
mod ids;
mod images;
mod lazy;
mod mapped;
mod mounts;
mod service;
mod snapshots;
mod store;

pub use images::{ImageCalls, Images, PullAuth, PullCredentials};
pub use lazy::{LazyError, LazyImages, LazyLayer, WantedLayer};
pub use service::{ServeError, serve};
pub use snapshots::{OpenError, ReadStoreError, Snapshots};
pub use store::OpenStoreError;

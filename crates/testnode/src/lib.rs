//! A whole containerd node in one folder, for tests against real parts.
//!
//! [`Node::start`] puts an overlay over a cached Debian root and runs it in mount, pid, network, uts,
//! ipc and cgroup namespaces of its own, in about 0.1 s. Inside, a test starts the parts it needs:
//! a containerd of one of four versions, a registry with or without TLS, AWS's SOCI snapshotter, and
//! the program under test; or [`Node::boot`] has systemd boot the node's disk. Dropping the node, or the death of the test process however it comes,
//! ends every process and mount in it.
//!
//! The cached root and the peers built from source are made by `cargo xtask setup`; this crate only
//! knows where they are ([`Cache`]). It needs root. It is not a sandbox.

mod boot;
mod cache;
mod cargo;
mod cgroups;
mod containerd;
mod daemon;
mod image;
mod link;
mod node;
mod registry;
mod soci;
mod wait;

pub use boot::Booted;
pub use cache::Cache;
pub use cargo::cargo;
pub use containerd::{Containerd, ContainerdVersion, cri_config, lazy_pull_config, proxy_config};
pub use daemon::Daemon;
pub use image::{NUMBERS_SHA256, busybox_image, check_busybox_output};
pub use link::{FAR_ADDRESS, Link, LinkShape, NEAR_ADDRESS, Traffic};
pub use node::{Network, Node, NodeOptions, output, packaged};
pub use registry::Registry;
pub use soci::{SOCI_SOCKET, SOCI15_SOCKET};
pub use wait::wait_until;

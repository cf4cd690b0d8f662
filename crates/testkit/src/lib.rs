//! What tests and the demo need: a registry with faults and a shaped link, an image maker, a naive untar.
//!
//! - [`registry`] is an OCI registry on loopback that can be slow, flaky, wrong and down on demand.
//! - [`disk`] has small file systems that can be filled.
//! - [`image`] makes layers and images, well-formed and strange ones, always the same for a seed.
//! - [`untar`] unpacks layers as plainly as possible, and compares trees: what everything else is
//!   measured against. It shares no code with the crates that it checks.
#![forbid(unsafe_code)]

pub mod disk;
pub mod image;
pub mod registry;
pub mod untar;

//! References, descriptors, manifests and SOCI index documents: values only, no I/O.
//!
//! Sizes of documents are bounded by whoever fetched them; nothing here allocates more than a
//! small multiple of the bytes that it was given.
#![forbid(unsafe_code)]

mod config;
mod descriptor;
mod digest;
mod go_json;
mod manifest;
pub mod media_type;
mod platform;
mod reference;
pub mod soci;
pub mod span_index;

pub use config::{ImageConfig, ProcessConfig, RootFs};
pub use descriptor::Descriptor;
pub use digest::{Digest, Hasher, ParseDigestError, WholeHasher};
pub use manifest::{Index, Manifest, ManifestOrIndex, ParseManifestError, parse_manifest};
pub use media_type::{LayerCompression, UnknownLayerTypeError};
pub use platform::{ParsePlatformError, Platform};
pub use reference::{ParseReferenceError, Reference};

//! Layers and images to order, well-formed and strange ones.
//!
//! Everything is deterministic: the same calls make the same bytes, on every machine.

mod build;
mod compress;
mod content;
mod encode;
mod entry;
mod layer;
mod layout;
mod pack;
mod random;

pub use build::{Image, ImageBuilder, ImageLayer, ImageRefs, LayerBlob, push_index};
pub use compress::{Compression, compress, compress_to};
pub use content::{Content, ContentReader, Texture};
pub use entry::{DEFAULT_MTIME, Dialect, SparseContent, SparseFormat, TarEntry, TarKind};
pub use layer::{End, LayerBuilder};
pub use pack::{PackError, PackProgress, PackedLayer, pack_directory};
pub use random::{Shape, random_layers};

#[cfg(test)]
mod tests;

//! One streaming pass over a layer: zTOC, DiffID and sparse windows.
//!
//! `ztoc` indexes what its format knows, gzip and plain tars. Here zstd joins. A frame cannot be entered
//! in its middle, so such a layer is *streamed*: its index is that of the tar that it decodes to, whose
//! spans can be checked one after the other as they are decoded.

mod windows;
mod zstd;

use std::io::{self, Read};

use oci::{Digest, LayerCompression};
use ztoc::{BuiltIndex, Compression, IndexError, Indexer, IndexerOptions, TocEntry, Ztoc};

pub use crate::windows::{
    WindowError, decompress_window, read_frame, read_window, with_windows_apart,
    with_windows_inside,
};
use crate::zstd::ZstdIndexer;
pub use crate::zstd::{ZstdDecoder, ZstdError};

/// What one pass over a layer found.
#[derive(Debug, Clone)]
pub struct LayerIndex {
    /// The sha256 of the whole uncompressed layer: what the image's config calls its DiffID.
    pub diff_id: Digest,
    /// The sha256 of the layer as it came.
    pub layer_digest: Digest,
    /// The size of the layer as it came, in bytes.
    pub layer_size: u64,
    /// The size of the whole uncompressed layer in bytes, padding included.
    pub uncompressed_total: u64,
    /// The index with the table of contents; of a streamed layer, that of its uncompressed tar.
    pub ztoc: Ztoc,
    /// The index as a document.
    pub ztoc_bytes: Vec<u8>,
    /// The index with the other spans, if it was asked for.
    pub also: Option<Vec<u8>>,
    /// Whether the layer can only be read from its beginning.
    pub is_streamed: bool,
}

/// How long the spans of a streamed layer are, in bytes: a reader waits until all of one have come,
/// and they are held in memory until then. A digest for each costs next to nothing.
pub const STREAMED_SPAN: u64 = 1 << 20;

/// A layer that could not be indexed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The layer's bytes could not be had; another attempt may succeed.
    #[error("reading the layer")]
    Read(#[source] io::Error),
    /// It is not what its media type says, or beyond what is taken in.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// It is not zstd, or damaged, or cut short.
    #[error(transparent)]
    Zstd(#[from] ZstdError),
}

/// Reads a whole layer; `sink` gets the uncompressed bytes in order.
///
/// # Errors
/// See [`BuildError`]. `sink` may have got bytes of a layer that turns out to be damaged: only the
/// DiffID tells that they are right.
pub fn build_layer(
    mut reader: impl Read,
    compression: LayerCompression,
    options: IndexerOptions,
    sink: &mut dyn FnMut(&[u8]),
) -> Result<LayerIndex, BuildError> {
    let mut indexer = LayerIndexer::new(compression, options)?;
    let mut piece = vec![0; 128 << 10];
    loop {
        match reader.read(&mut piece) {
            Ok(0) => return indexer.finish(),
            Ok(len) => indexer.push(&piece[..len], sink)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(BuildError::Read(error)),
        }
    }
}

/// Indexes a layer that comes piece by piece; how it is cut changes nothing.
#[derive(Debug)]
pub struct LayerIndexer(Kind);

#[derive(Debug)]
enum Kind {
    /// What zTOCs know.
    Spans(Box<Indexer>),
    Zstd(Box<ZstdIndexer>),
}

impl LayerIndexer {
    /// Starts with no bytes. `compression` counts, not that of the options; spans of a streamed layer are of
    /// at most [`STREAMED_SPAN`] bytes.
    ///
    /// # Errors
    /// [`BuildError::Index`] if the options cannot be used, and without memory.
    pub fn new(compression: LayerCompression, options: IndexerOptions) -> Result<Self, BuildError> {
        let with_spans = |compression| {
            let indexer = Indexer::new(IndexerOptions { compression, ..options.clone() })?;
            Ok(Kind::Spans(Box::new(indexer)))
        };
        let kind = match compression {
            LayerCompression::Gzip => with_spans(Compression::Gzip),
            LayerCompression::None => with_spans(Compression::Uncompressed),
            LayerCompression::Zstd => Ok(Kind::Zstd(Box::new(ZstdIndexer::new(options)?))),
        };
        kind.map(Self)
    }

    /// Takes the next bytes of the layer. `sink` gets all the uncompressed bytes that they complete,
    /// in order, and never bytes of two spans at once.
    ///
    /// # Errors
    /// See [`BuildError`]; the indexer is of no more use then.
    pub fn push(&mut self, bytes: &[u8], sink: &mut dyn FnMut(&[u8])) -> Result<(), BuildError> {
        match &mut self.0 {
            Kind::Spans(indexer) => Ok(indexer.push(bytes, sink)?),
            Kind::Zstd(indexer) => indexer.push(bytes, sink),
        }
    }

    /// The entries of the tar found so far.
    #[must_use]
    pub fn entries(&self) -> &[TocEntry] {
        match &self.0 {
            Kind::Spans(indexer) => indexer.entries(),
            Kind::Zstd(indexer) => indexer.entries(),
        }
    }

    /// Completes the index after the last byte.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn finish(self) -> Result<LayerIndex, BuildError> {
        match self.0 {
            Kind::Spans(indexer) => Ok(indexer.finish()?.into()),
            Kind::Zstd(indexer) => indexer.finish(),
        }
    }
}

impl From<BuiltIndex> for LayerIndex {
    fn from(built: BuiltIndex) -> Self {
        let BuiltIndex {
            ztoc,
            ztoc_bytes,
            also,
            diff_id,
            layer_digest,
            layer_size,
            uncompressed_total,
        } = built;
        Self {
            diff_id,
            layer_digest,
            layer_size,
            uncompressed_total,
            ztoc,
            ztoc_bytes,
            also,
            is_streamed: false,
        }
    }
}

#[cfg(test)]
mod tests;

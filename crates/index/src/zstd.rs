//! zstd layers: decoded as they stream by.

use std::io;

use oci::WholeHasher;
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};
use ztoc::{Compression, Indexer, IndexerOptions, TocEntry};

use crate::{BuildError, LayerIndex, STREAMED_SPAN};

/// The largest window that a frame may ask for: 128 MiB, as the `zstd` tool without `--long`.
const MAX_WINDOW_LOG: u32 = 27;

/// A layer that is not zstd, or damaged, or cut short.
#[derive(Debug, thiserror::Error)]
#[error("the layer is no valid zstd at byte {at}")]
pub struct ZstdError {
    /// Where in the layer.
    pub at: u64,
    /// What the decoder says.
    pub source: io::Error,
}

/// Decodes a zstd blob of any number of frames that comes piece by piece.
///
/// It needs the memory that the frames ask for, 128 MiB at most, and a quarter of a MiB.
pub struct ZstdDecoder {
    decoder: Decoder<'static>,
    between_frames: bool,
    output: Vec<u8>,
    /// How many bytes of the blob were decoded.
    decoded: u64,
}

impl ZstdDecoder {
    /// Starts with no bytes.
    ///
    /// # Errors
    /// Without memory.
    pub fn new() -> Result<Self, ZstdError> {
        let unusable = |source| ZstdError { at: 0, source };
        let mut decoder = Decoder::new().map_err(unusable)?;
        decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).map_err(unusable)?;
        Ok(Self { decoder, between_frames: true, output: vec![0; 256 << 10], decoded: 0 })
    }

    /// Takes the next bytes of the blob. `sink` gets all that they complete, in order.
    ///
    /// # Errors
    /// [`ZstdError`], and what `sink` says; the decoder is of no more use then.
    pub fn push<E: From<ZstdError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut input = InBuffer::around(bytes);
        loop {
            let at = self.decoded;
            let before = input.pos();
            let mut output = OutBuffer::around(self.output.as_mut_slice());
            let hint = self
                .decoder
                .run(&mut input, &mut output)
                .map_err(|source| ZstdError { at, source })?;
            let made = output.pos();
            let consumed = input.pos() - before;
            self.decoded += consumed as u64;
            if consumed == 0 && made == 0 {
                return Ok(());
            }
            // 0 means that a frame ended; the next bytes begin another one.
            self.between_frames = hint == 0;
            if made > 0 {
                sink(&self.output[..made])?;
            }
        }
    }

    /// Checks that the blob ended where a frame did.
    ///
    /// # Errors
    /// It was cut short, or had no byte at all.
    pub fn finish(self) -> Result<(), ZstdError> {
        if self.between_frames && self.decoded > 0 {
            return Ok(());
        }
        Err(ZstdError { at: self.decoded, source: io::ErrorKind::UnexpectedEof.into() })
    }
}

impl std::fmt::Debug for ZstdDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ZstdDecoder").field("decoded", &self.decoded).finish_non_exhaustive()
    }
}

/// Indexes the tar that a layer decodes to.
#[derive(Debug)]
pub(crate) struct ZstdIndexer {
    decoder: ZstdDecoder,
    layer: WholeHasher,
    layer_size: u64,
    tar: Indexer,
}

impl ZstdIndexer {
    pub(crate) fn new(options: IndexerOptions) -> Result<Self, BuildError> {
        let span_size = options.span_size.min(STREAMED_SPAN);
        let compression = Compression::Uncompressed;
        let layer = options.whole_hasher();
        Ok(Self {
            decoder: ZstdDecoder::new()?,
            layer,
            layer_size: 0,
            tar: Indexer::new(IndexerOptions { compression, span_size, ..options })?,
        })
    }

    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<(), BuildError> {
        self.layer.update(bytes);
        self.layer_size += bytes.len() as u64;
        let tar = &mut self.tar;
        self.decoder.push(bytes, &mut |made| Ok(tar.push(made, sink)?))
    }

    pub(crate) fn entries(&self) -> &[TocEntry] {
        self.tar.entries()
    }

    pub(crate) fn finish(self) -> Result<LayerIndex, BuildError> {
        self.decoder.finish()?;
        let tar = self.tar.finish()?;
        Ok(LayerIndex {
            layer_digest: self.layer.finish(),
            layer_size: self.layer_size,
            is_streamed: true,
            ..LayerIndex::from(tar)
        })
    }
}

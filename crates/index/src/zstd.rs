//! zstd layers: decoded as they stream by.

use oci::Hasher;
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};
use ztoc::{IndexError, Limits, TarScanner, TocEntry};

use crate::{BuildError, LayerIndex};

/// The largest window that a frame may ask for: 128 MiB, as the `zstd` tool without `--long`.
const MAX_WINDOW_LOG: u32 = 27;

pub(crate) struct ZstdIndexer {
    decoder: Decoder<'static>,
    between_frames: bool,
    output: Vec<u8>,
    layer: Hasher,
    layer_size: u64,
    /// How many bytes of the layer were decoded.
    decoded: u64,
    diff_id: Hasher,
    tar: TarScanner,
    total: u64,
    limit: u64,
}

impl ZstdIndexer {
    pub(crate) fn new(limits: Limits) -> Result<Self, BuildError> {
        let unusable = |source| BuildError::Zstd { at: 0, source };
        let mut decoder = Decoder::new().map_err(unusable)?;
        decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).map_err(unusable)?;
        Ok(Self {
            decoder,
            between_frames: true,
            output: vec![0; 256 << 10],
            layer: Hasher::new(),
            layer_size: 0,
            decoded: 0,
            diff_id: Hasher::new(),
            tar: TarScanner::new(limits),
            total: 0,
            limit: limits.uncompressed,
        })
    }

    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<(), BuildError> {
        self.layer.update(bytes);
        self.layer_size += bytes.len() as u64;
        let mut input = InBuffer::around(bytes);
        loop {
            let at = self.decoded;
            let before = input.pos();
            let mut output = OutBuffer::around(self.output.as_mut_slice());
            let hint = self
                .decoder
                .run(&mut input, &mut output)
                .map_err(|source| BuildError::Zstd { at, source })?;
            let made = output.pos();
            let consumed = input.pos() - before;
            self.decoded += consumed as u64;
            if consumed == 0 && made == 0 {
                return Ok(());
            }
            // 0 means that a frame ended; the next bytes begin another one.
            self.between_frames = hint == 0;
            self.deliver(made, sink)?;
        }
    }

    pub(crate) fn entries(&self) -> &[TocEntry] {
        self.tar.entries()
    }

    pub(crate) fn finish(self) -> Result<LayerIndex, BuildError> {
        if !self.between_frames || self.layer_size == 0 {
            let source = std::io::ErrorKind::UnexpectedEof.into();
            return Err(BuildError::Zstd { at: self.layer_size, source });
        }
        Ok(LayerIndex {
            diff_id: self.diff_id.finish(),
            layer_digest: self.layer.finish(),
            layer_size: self.layer_size,
            uncompressed_total: self.total,
            toc: self.tar.finish()?.entries,
            ztoc: None,
        })
    }

    fn deliver(&mut self, len: usize, sink: &mut dyn FnMut(&[u8])) -> Result<(), BuildError> {
        let made = &self.output[..len];
        self.total += len as u64;
        if self.total > self.limit {
            return Err(IndexError::TooLarge { limit: self.limit }.into());
        }
        self.diff_id.update(made);
        self.tar.push(made)?;
        sink(made);
        Ok(())
    }
}

impl std::fmt::Debug for ZstdIndexer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ZstdIndexer").field("total", &self.total).finish_non_exhaustive()
    }
}

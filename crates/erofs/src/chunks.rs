//! Where the blocks of a regular file lie, as an array of equal chunks.

use tree::FileData;

use crate::{
    Device,
    error::NodeError,
    format::{
        BLOCK_BITS, BLOCK_BYTES, CHUNK_FORMAT_BLOCK_BITS, CHUNK_FORMAT_INDEXES, NULL_ADDRESS,
    },
};

/// The chunks of one file.
///
/// A chunk is `2^bits` blocks: the largest power of two that lets each chunk be one contiguous run of
/// the layer or one hole, and no more than the file needs. So a file that is not sparse has a single
/// chunk up to 1 TiB.
#[derive(Debug)]
pub(crate) struct ChunkMap {
    bits: u16,
    /// How many chunks there are.
    pub(crate) n_chunks: u64,
    device: u16,
    /// Ascending and disjoint; the rest are holes.
    runs: Vec<Run>,
}

/// Contiguous blocks of a layer that are contiguous blocks of the file.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// First block in the file.
    logical: u64,
    /// First block in the layer.
    physical: u64,
    n_blocks: u64,
}

impl ChunkMap {
    /// Maps a file of at least one byte.
    pub(crate) fn new(data: &FileData, devices: &[Device]) -> Result<Self, NodeError> {
        let layer = data.layer;
        let end = data.offset.saturating_add(data.stored_bytes());
        let device = usize::try_from(layer).ok().and_then(|layer| devices.get(layer));
        if device.is_none_or(|device| end > device.bytes) {
            return Err(NodeError::OutsideLayer { layer, end });
        }
        let runs = runs(data)?;
        let n_blocks = data.size.div_ceil(BLOCK_BYTES);
        let bits = chunk_bits(&runs, n_blocks);
        Ok(Self {
            bits,
            n_chunks: n_blocks.div_ceil(1 << bits),
            device: u16::try_from(layer + 1).expect("as many devices were checked to fit"),
            runs,
        })
    }

    /// The `i_u` field of the inode.
    pub(crate) fn format(&self) -> u32 {
        u32::from(self.bits | CHUNK_FORMAT_INDEXES)
    }

    /// The entries of the array: device number and block address.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (u16, u32)> {
        let mut runs = self.runs.iter().copied().peekable();
        (0..self.n_chunks).map(move |chunk| {
            let block = chunk << self.bits;
            while runs.next_if(|run| run.logical + run.n_blocks <= block).is_some() {}
            match runs.peek().filter(|run| run.logical <= block) {
                Some(run) => {
                    let address = run.physical + (block - run.logical);
                    (self.device, u32::try_from(address).expect("devices are below 2^32 blocks"))
                }
                None => (0, NULL_ADDRESS),
            }
        })
    }
}

/// The runs of a file, neighbours joined.
fn runs(data: &FileData) -> Result<Vec<Run>, NodeError> {
    let Some(map) = &data.sparse else {
        if !data.offset.is_multiple_of(BLOCK_BYTES) {
            return Err(NodeError::UnalignedFile { offset: data.offset });
        }
        let n_blocks = data.size.div_ceil(BLOCK_BYTES);
        return Ok(vec![Run { logical: 0, physical: data.offset >> BLOCK_BITS, n_blocks }]);
    };
    let mut runs = Vec::new();
    let mut stored_at = data.offset;
    let mut pieces = map.pieces.iter().copied().filter(|(_, len)| *len > 0).peekable();
    while let Some((start, mut len)) = pieces.next() {
        while let Some((_, more)) = pieces.next_if(|(next, _)| *next == start + len) {
            len += more;
        }
        let is_whole = len.is_multiple_of(BLOCK_BYTES) || start + len == data.size;
        if !is_whole || !start.is_multiple_of(BLOCK_BYTES) || !stored_at.is_multiple_of(BLOCK_BYTES)
        {
            return Err(NodeError::UnalignedSparse);
        }
        runs.push(Run {
            logical: start >> BLOCK_BITS,
            physical: stored_at >> BLOCK_BITS,
            n_blocks: len.div_ceil(BLOCK_BYTES),
        });
        stored_at += len;
    }
    Ok(runs)
}

/// log2 of the blocks of a chunk.
fn chunk_bits(runs: &[Run], n_blocks: u64) -> u16 {
    let whole_file = n_blocks.next_power_of_two().trailing_zeros();
    let starts = runs.iter().map(|run| run.logical);
    let ends = runs.iter().map(|run| run.logical + run.n_blocks).filter(|end| *end != n_blocks);
    // Of 0 all 64 bits are trailing zeros: a start at 0 allows any chunk.
    let finest = starts.chain(ends).map(u64::trailing_zeros).min().unwrap_or(u64::BITS);
    u16::try_from(whole_file.min(finest)).expect("at most 64").min(CHUNK_FORMAT_BLOCK_BITS)
}

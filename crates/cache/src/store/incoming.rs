//! A layer that comes whole and in order, before anything is known of it but its name.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use oci::Digest;

use super::{INCOMING, OpenLayerError, Store, opened};
use crate::disk::{self, Name};
use crate::layer::{Layer, LayerShape, Opening, Shared, WriteError, crc_of_range};
use crate::map::{Map, Origin, Record, is_shape};

/// A layer that is being received; the store does not have it before [`Store::keep`].
///
/// Dropped before that it leaves nothing behind, and neither does a crash.
#[derive(Debug)]
pub struct Incoming {
    digest: Digest,
    path: PathBuf,
    folder: OwnedFd,
    data: File,
    /// How many bytes have come.
    len: u64,
    pieces: Vec<Piece>,
    is_kept: bool,
    shared: Arc<Shared>,
}

/// What came at once.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Where it ends in the layer.
    end: u64,
    crc: u32,
}

/// A layer that was received cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The layer is open already, and whoever has it open goes on with what it has.
    #[error("layer {layer} is in use")]
    InUse {
        /// The layer.
        layer: Digest,
    },
    /// The bounds of the spans contradict themselves or what came: the index is wrong.
    #[error("the index gives a layer of {received} bytes impossible spans")]
    BadShape {
        /// How many bytes came.
        received: u64,
    },
    /// What was taken in could not be opened.
    #[error("opening a layer that was received")]
    Open(#[source] OpenLayerError),
    /// The disk failed.
    #[error("keeping a layer that was received")]
    Io(#[from] io::Error),
}

impl Store {
    /// Starts a layer of which nothing is known yet but its digest.
    ///
    /// # Errors
    ///
    /// The layer is being received already, or the disk failed.
    pub fn receive(&self, digest: &Digest) -> io::Result<Incoming> {
        let path = self.root.join(INCOMING).join(digest.hex());
        DirBuilder::new().mode(0o700).create(&path)?;
        let folder = disk::open_folder(&path)?;
        let data = disk::open_new(&folder, Name::Data)?;
        let (digest, pieces, shared) = (*digest, Vec::new(), Arc::clone(&self.shared));
        Ok(Incoming { digest, path, folder, data, len: 0, pieces, is_kept: false, shared })
    }

    /// Takes a received layer in: it takes the place of what the store had of the layer, whole or not
    /// at all, and is open.
    ///
    /// The caller has proven all the bytes together. Those behind the end of `shape` are not kept. It does
    /// not wait for the disk: whoever has a program to start need not either. As long as the layer is open
    /// it knows that it was [proven](Layer::proven), so that it can be sealed; after a power loss before
    /// that its spans are in doubt, as others are.
    ///
    /// # Errors
    ///
    /// [`KeepError`]; the store has what it had then.
    pub fn keep(&self, mut incoming: Incoming, shape: LayerShape) -> Result<Arc<Layer>, KeepError> {
        let (received, layer) = (incoming.len, incoming.digest);
        if !is_shape(shape.bytes, &shape.spans) || shape.bytes > received {
            return Err(KeepError::BadShape { received });
        }
        incoming.complete(&shape)?;
        // Nobody opens it meanwhile.
        let mut open = self.open.lock();
        if open.get(&layer).is_some_and(|layer| layer.strong_count() > 0) {
            return Err(KeepError::InUse { layer });
        }
        let path = self.folder(&layer);
        let before = self.throw_away(&path)?;
        fs::rename(&incoming.path, &path)?;
        incoming.is_kept = true;
        let opening = Opening {
            digest: layer,
            shape,
            folder: incoming.folder.try_clone()?,
            data: None,
            proven: Some(received),
            shared: Arc::clone(&self.shared),
        };
        let kept = opened(&mut open, opening).map_err(KeepError::Open)?;
        drop(open);
        before.map_or(Ok(()), fs::remove_dir_all)?;
        Ok(kept)
    }
}

impl Incoming {
    /// Takes the next bytes of the uncompressed layer. Checksums are cheapest where no piece belongs
    /// to two spans.
    ///
    /// # Errors
    ///
    /// [`WriteError::NoSpace`], [`WriteError::Io`]; nothing more can be taken in then.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let more = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.shared.allowance.spend(more);
        disk::write_at(&self.data, Name::Data, bytes, self.len).map_err(WriteError::from_io)?;
        self.len += more;
        self.pieces.push(Piece { end: self.len, crc: crc32c::crc32c(bytes) });
        Ok(())
    }

    /// Makes the folder what that of a whole layer is. No older map can come back in this one's place, and
    /// half of it is none.
    fn complete(&self, shape: &LayerShape) -> io::Result<()> {
        if shape.bytes != self.len {
            disk::set_len(&self.data, Name::Data, shape.bytes)?;
        }
        let records = self.records(shape)?;
        let map = Map { records, ..Map::empty(shape.bytes, shape.index, shape.spans.clone()) };
        let file = disk::open_new(&self.folder, Name::Map)?;
        disk::write_at(&file, Name::Map, &map.encode(), 0)
    }

    /// The checksum of each span: those of its pieces together. A span whose edges are within pieces is
    /// read back.
    fn records(&self, shape: &LayerShape) -> io::Result<Vec<Option<Record>>> {
        let mut pieces = self.pieces.iter().peekable();
        let mut at = 0;
        let mut record = |span| {
            let range = shape.range(span);
            let (mut crc, start) = (0, at);
            while let Some(piece) = pieces.next_if(|piece| piece.end <= range.end) {
                // A piece was in memory, so that a usize holds its length.
                let len = usize::try_from(piece.end - at).unwrap_or(usize::MAX);
                crc = crc32c::crc32c_combine(crc, piece.crc, len);
                at = piece.end;
            }
            if start != range.start || at != range.end {
                crc = crc_of_range(&self.data, range)?;
            }
            Ok(Some(Record { origin: Origin::Boot(self.shared.boot), crc }))
        };
        (0..shape.span_count()).map(&mut record).collect()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.is_kept {
            // What cannot be removed goes when the store is opened again.
            fs::remove_dir_all(&self.path).ok();
        }
    }
}

#[cfg(test)]
mod tests;

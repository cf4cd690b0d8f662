//! Sealing: the layer is whole and proven, and needs neither registry nor map from then on.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use oci::Digest;

use super::{Layer, LayerShape, SyncError};
use crate::disk::{self, Name};
use crate::map::{Map, Origin, Record};
use crate::marker::{Sealed, VERSION};

/// A layer could not be sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// A span is missing or in doubt.
    #[error("span {span} is missing or not checked, so the layer cannot be sealed")]
    Incomplete {
        /// The first such span.
        span: u32,
    },
    /// The proof covers less than the layer.
    #[error("{proven} bytes were proven, but the layer has {bytes}")]
    TooShort {
        /// How many bytes the proof covers.
        proven: u64,
        /// How many the layer has.
        bytes: u64,
    },
    /// The layer was removed from the store while it was open.
    #[error("the layer is no longer in the store")]
    Detached,
    /// The disk failed.
    #[error("flushing a whole layer")]
    Sync(#[from] SyncError),
    /// The disk failed.
    #[error("writing the `sealed` marker")]
    Io(#[from] io::Error),
}

/// A layer could not be unsealed; it stays sealed.
#[derive(Debug, thiserror::Error)]
#[error("unsealing a layer")]
pub struct UnsealError(#[from] io::Error);

impl Layer {
    /// Notes for good that the whole layer is here and that its bytes have the digest `diff_id`.
    ///
    /// The caller has proven that over `total_bytes` bytes: all of [`data`](Self::data), and what follows
    /// the end of the archive without being kept. The bytes reach the disk before the marker does, and
    /// the marker appears whole or not at all.
    ///
    /// # Errors
    ///
    /// A span is missing, the proof covers less than the layer, or the disk failed; the layer is not
    /// sealed then.
    pub fn seal(&self, diff_id: Digest, total_bytes: u64) -> Result<(), SealError> {
        if total_bytes < self.shape.bytes {
            return Err(SealError::TooShort { proven: total_bytes, bytes: self.shape.bytes });
        }
        self.mark_clean()?;
        let mut map = self.map.lock();
        if self.is_detached.load(Ordering::SeqCst) {
            return Err(SealError::Detached);
        }
        if map.sealed.is_some() {
            return Ok(());
        }
        if let Some(span) = self.first_missing(0) {
            return Err(SealError::Incomplete { span });
        }
        let sealed = Sealed {
            version: VERSION,
            layer: self.digest,
            index: self.shape.index,
            diff_id,
            bytes: self.shape.bytes,
            total_bytes,
            crc32c: crc_of_all(&self.shape, &map.records),
        };
        let names = (Name::SealedTmp, Name::Sealed);
        disk::replace(self.folder.as_fd(), names, &sealed.encode())?;
        map.sealed = Some(sealed);
        self.is_sealed.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the layer is sealed.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.is_sealed.load(Ordering::SeqCst)
    }

    /// What was proven when the layer was sealed.
    #[must_use]
    pub fn sealed(&self) -> Option<Sealed> {
        self.map.lock().sealed.clone()
    }

    /// Takes the seal off, so that spans can be evicted. All spans stay present.
    ///
    /// The caller makes sure first that the kernel asks again before it reads the file. Whoever it let
    /// go before that counts as an [unknown reader](Self::unknown_reader). Spans without a record get
    /// theirs now: if the layer was sealed under another index, that reads all of it.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn unseal(&self) -> Result<(), UnsealError> {
        let mut map = self.map.lock();
        if map.sealed.is_none() {
            return Ok(());
        }
        if map.file.is_none() || map.records.contains(&None) {
            let fresh = Map::empty(self.shape.bytes, self.shape.index, self.shape.spans.clone());
            let mut fresh = Map { records: map.records.clone(), ..fresh };
            for (span, record) in (0..).zip(&mut fresh.records) {
                if record.is_none() {
                    *record = Some(Record { origin: Origin::Disk, crc: self.crc_of(span)? });
                }
            }
            let names = (Name::MapTmp, Name::Map);
            let file = disk::replace(self.folder.as_fd(), names, &fresh.encode())?;
            map.file = Some(Arc::new(file));
            map.records = fresh.records;
        }
        disk::unlink(&self.folder, Name::Sealed)?;
        disk::sync_folder(&self.folder)?;
        self.unknown_reader();
        map.sealed = None;
        self.is_sealed.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// The crc32c of a whole layer, from those of its spans.
fn crc_of_all(shape: &LayerShape, records: &[Option<Record>]) -> u32 {
    (0..).zip(records).fold(0, |all, (span, record)| {
        let range = shape.range(span);
        // A usize holds the length of any span: its bytes were in memory when it was made.
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        record.map_or(all, |record| crc32c::crc32c_combine(all, record.crc, len))
    })
}

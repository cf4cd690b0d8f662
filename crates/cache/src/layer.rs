//! One layer: its sparse file, its map, and what may be believed of them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use oci::Digest;
use parking_lot::{Mutex, RwLock};

use crate::bits::{AtomicSpanSet, SpanSet};
use crate::disk::{self, Name};
use crate::map::{self, BootTag, MapError, Origin, Record};
use crate::marker::{MarkerError, Sealed};
use crate::store::Allowance;

mod doubt;
mod evict;
mod open;
mod seal;
mod usage;
mod verify;

pub use doubt::{CheckError, SyncError};
pub(crate) use evict::{BLOCK, whole_blocks};
pub use evict::{EvictError, Evicted};
pub(crate) use open::{Opening, read_map, read_marker};
pub use seal::{SealError, UnsealError};
pub use usage::Reading;
pub(crate) use usage::{Clock, GRACE, ticks};
pub use verify::Report;

/// How an index divides a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerShape {
    /// How long the uncompressed layer is, in bytes.
    pub bytes: u64,
    /// Where each span starts in the uncompressed layer, in bytes: ascending, the first at 0.
    pub spans: Vec<u64>,
    /// The index that says so. What is known of the spans of one index says nothing about another's.
    pub index: Digest,
}

impl LayerShape {
    /// The uncompressed bytes of a span; empty behind the last.
    #[must_use]
    pub fn range(&self, span: u32) -> Range<u64> {
        let Ok(at) = usize::try_from(span) else { return self.bytes..self.bytes };
        let edge = |at| self.spans.get(at).copied().unwrap_or(self.bytes);
        edge(at)..edge(at.saturating_add(1))
    }

    /// How many spans there are.
    #[must_use]
    pub fn span_count(&self) -> u32 {
        u32::try_from(self.spans.len()).unwrap_or(u32::MAX)
    }

    /// The spans that hold the bytes of `range`.
    #[must_use]
    pub fn covering(&self, range: &Range<u64>) -> Range<u32> {
        let end = range.end.min(self.bytes);
        if range.start >= end {
            return 0..0;
        }
        let count_from = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let first = self.spans.partition_point(|start| *start <= range.start).saturating_sub(1);
        count_from(first)..count_from(self.spans.partition_point(|start| *start < end))
    }
}

/// What is known of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanState {
    /// Its bytes are not here.
    Missing,
    /// Its bytes were written before an unclean shutdown; [`Layer::check`] tells.
    Unchecked,
    /// Its bytes are here.
    Present,
}

/// Why what lay on disk of a layer was not used. The layer starts empty then.
#[derive(Debug, thiserror::Error)]
pub enum Discarded {
    /// The map was made for another index.
    #[error("the cached spans belong to another index, {found}")]
    OtherIndex {
        /// That index.
        found: Digest,
    },
    /// The index is the same, but divides the layer otherwise.
    #[error("the cached spans of the same index have other bounds")]
    OtherSpans,
    /// The map is damaged.
    #[error("the presence map cannot be used")]
    Map(#[source] MapError),
    /// The map or marker is there, and the data is not, or has another length.
    #[error("the cached layer's data is missing or has another length")]
    Data,
    /// The marker is damaged; the map says what is present.
    #[error("the layer counts as not sealed")]
    Marker(#[source] MarkerError),
}

/// Bytes or a record could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The disk or the quota of the user is full; after an eviction it may succeed.
    #[error("no room on the disk for the layer cache")]
    NoSpace(#[source] io::Error),
    /// The bytes or the span do not lie within the layer: the index contradicts its own bounds.
    #[error("bytes {} to {} lie outside the layer of {bytes} bytes", range.start, range.end)]
    OutOfBounds {
        /// Where the bytes were to go.
        range: Range<u64>,
        /// How long the layer is.
        bytes: u64,
    },
    /// The disk failed.
    #[error("writing to the layer cache")]
    Io(#[source] io::Error),
}

impl WriteError {
    pub(crate) fn from_io(error: io::Error) -> Self {
        if disk::is_full(&error) { Self::NoSpace(error) } else { Self::Io(error) }
    }
}

/// What all layers of a store share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) boot: BootTag,
    pub(crate) clock: Clock,
    /// How long readers are believed to be on the way that nobody sees, in ticks of the clock.
    pub(crate) grace: AtomicU32,
    pub(crate) allowance: Allowance,
}

/// The map's file and what it says.
#[derive(Debug)]
struct MapState {
    /// `None` while a sealed layer's map belongs to another index, or is gone.
    file: Option<Arc<File>>,
    records: Vec<Option<Record>>,
    sealed: Option<Sealed>,
}

/// One layer of the store.
///
/// # Guarantees
///
/// A span that [`is_present`](Self::is_present) has the bytes that were given with its checksum,
/// unless the disk changed them since; see [`verify`](Self::verify).
///
/// # Assumptions
///
/// The bytes of a span are written before it is marked present, and whoever lets a reader go on
/// because a span is present holds [`reading`](Self::reading) from the look until then. Somebody who
/// reads later, as the kernel does, is known to who calls [`evict`](Self::evict), or was reported by
/// [`unknown_reader`](Self::unknown_reader).
#[derive(Debug)]
pub struct Layer {
    digest: Digest,
    shape: LayerShape,
    discarded: Option<Discarded>,
    shared: Arc<Shared>,
    /// The layer's folder: it may be renamed while the layer is open.
    folder: OwnedFd,
    data: File,
    present: AtomicSpanSet,
    unchecked: AtomicSpanSet,
    present_bytes: AtomicU64,
    unchecked_bytes: AtomicU64,
    /// When each span was used last, on the store's clock.
    used: Vec<AtomicU32>,
    /// When the last use was written down, on the store's clock.
    use_noted: AtomicU32,
    /// Until when readers may be on the way that nobody sees, on the store's clock.
    unknown_until: AtomicU32,
    /// How often spans were given up.
    losses: AtomicU64,
    /// How many bytes of the tar were proven together before the layer was opened.
    proven: Option<u64>,
    is_sealed: AtomicBool,
    is_detached: AtomicBool,
    map: Mutex<MapState>,
    /// Spans that an eviction is about to punch; nobody writes to them.
    leaving: AtomicSpanSet,
    /// Held as long as an eviction lasts.
    evictions: Mutex<()>,
    /// Readers and writers of data share it; an eviction holds it alone while it decides, so that it
    /// punches neither what somebody reads nor what was written afterwards.
    punching: RwLock<()>,
}

impl Layer {
    /// The digest of the compressed layer.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// How the index divides the layer.
    #[must_use]
    pub const fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// Why what lay on disk was not used when the layer was opened, if it was not.
    #[must_use]
    pub const fn discarded(&self) -> Option<&Discarded> {
        self.discarded.as_ref()
    }

    /// The sparse file with the uncompressed bytes.
    ///
    /// It is the only descriptor by which the store touches them. Do not set its length.
    #[must_use]
    pub const fn data(&self) -> &File {
        &self.data
    }

    /// The index that the spans are from.
    #[must_use]
    pub fn index(&self) -> &Digest {
        &self.shape.index
    }

    /// Writes uncompressed bytes. They are not present before their span is marked so.
    ///
    /// # Errors
    ///
    /// [`WriteError::NoSpace`] if there is no room; some of the bytes may have been written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let range = offset..offset.saturating_add(len);
        if range.end > self.shape.bytes {
            return Err(WriteError::OutOfBounds { range, bytes: self.shape.bytes });
        }
        let spans = self.shape.covering(&range);
        let _no_decision = loop {
            let guard = self.punching.read();
            if !spans.clone().any(|span| self.leaving.contains(span)) {
                break guard;
            }
            drop(guard);
            // Until the eviction is over.
            drop(self.evictions.lock());
        };
        for span in spans {
            self.note_use(span);
        }
        // Blocks at both ends may be new.
        self.shared.allowance.spend(len.saturating_add(2 * BLOCK));
        disk::write_at(&self.data, Name::Data, bytes, offset).map_err(WriteError::from_io)
    }

    /// Notes that all bytes of the span have been written, with their crc32c.
    ///
    /// It outlives the process, but not a power loss: then the span is checked before its next use.
    ///
    /// # Errors
    ///
    /// The span does not exist, or its record could not be written; it is not present then.
    pub fn mark_present(&self, span: u32, crc: u32) -> Result<(), WriteError> {
        let range = self.shape.range(span);
        if span >= self.shape.span_count() {
            return Err(WriteError::OutOfBounds { range, bytes: self.shape.bytes });
        }
        let mut map = self.map.lock();
        let record = Record { origin: Origin::Boot(self.shared.boot), crc };
        self.put_record(&mut map, span, record).map_err(WriteError::from_io)?;
        self.note_use(span);
        self.set_state(span, SpanState::Present);
        Ok(())
    }

    /// What is known of the span.
    #[must_use]
    pub fn state(&self, span: u32) -> SpanState {
        if self.present.contains(span) {
            SpanState::Present
        } else if self.unchecked.contains(span) {
            SpanState::Unchecked
        } else {
            SpanState::Missing
        }
    }

    /// Whether the span's bytes are here and not in doubt.
    #[must_use]
    pub fn is_present(&self, span: u32) -> bool {
        self.present.contains(span)
    }

    /// Whether the span was written before an unclean shutdown, so that [`check`](Self::check) must
    /// tell whether its bytes are here. Such a span is not [`is_present`](Self::is_present).
    #[must_use]
    pub fn needs_check(&self, span: u32) -> bool {
        self.state(span) == SpanState::Unchecked
    }

    /// The present spans of this moment, without those in doubt.
    #[must_use]
    pub fn present_spans(&self) -> SpanSet {
        self.present.snapshot()
    }

    /// The first span from `from` on that is missing or in doubt.
    #[must_use]
    pub fn first_missing(&self, from: u32) -> Option<u32> {
        self.present.first_outside(from)
    }

    /// How many uncompressed bytes are present, without those in doubt.
    #[must_use]
    pub fn bytes_present(&self) -> u64 {
        self.present_bytes.load(Ordering::Relaxed)
    }

    /// How many uncompressed bytes are in doubt: written, and to be [checked](Self::check) before use.
    #[must_use]
    pub fn bytes_unchecked(&self) -> u64 {
        self.unchecked_bytes.load(Ordering::Relaxed)
    }

    /// The first span from `from` on whose bytes are not here; those in doubt are.
    #[must_use]
    pub fn first_absent(&self, mut from: u32) -> Option<u32> {
        while let Some(span) = self.present.first_outside(from) {
            if !self.unchecked.contains(span) {
                return Some(span);
            }
            from = span + 1;
        }
        None
    }

    /// How often spans were given up since the layer was opened. A proof over the whole layer during
    /// which the number changed is worth nothing.
    #[must_use]
    pub fn losses(&self) -> u64 {
        self.losses.load(Ordering::SeqCst)
    }

    /// How many bytes of the tar were proven to be the layer's when it was
    /// [received](crate::Store::receive), and still lie there as they came: then it can be
    /// [sealed](Self::seal) without another proof.
    #[must_use]
    pub fn proven(&self) -> Option<u64> {
        self.proven.filter(|_| self.losses() == 0)
    }

    /// How many bytes the layer's data takes up on the disk.
    ///
    /// # Errors
    ///
    /// The file system does not answer.
    pub fn allocated(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.data.metadata()?.blocks().saturating_mul(512))
    }

    pub(crate) fn detach(&self) {
        self.is_detached.store(true, Ordering::SeqCst);
    }

    fn set_state(&self, span: u32, state: SpanState) {
        let range = self.shape.range(span);
        let bytes = range.end - range.start;
        for (set, counter, belongs) in [
            (&self.present, &self.present_bytes, SpanState::Present),
            (&self.unchecked, &self.unchecked_bytes, SpanState::Unchecked),
        ] {
            if state != belongs {
                if set.remove(span) {
                    counter.fetch_sub(bytes, Ordering::Relaxed);
                }
            } else if set.insert(span) {
                counter.fetch_add(bytes, Ordering::Relaxed);
            }
        }
    }

    fn record(&self, span: u32) -> Option<Record> {
        record_of(&self.map.lock(), span)
    }

    fn put_record(&self, map: &mut MapState, span: u32, record: Record) -> io::Result<()> {
        self.write_record(map, span, Some(record))
    }

    fn clear_record(&self, map: &mut MapState, span: u32) -> io::Result<()> {
        self.write_record(map, span, None)
    }

    fn write_record(
        &self,
        map: &mut MapState,
        span: u32,
        record: Option<Record>,
    ) -> io::Result<()> {
        let Some(file) = &map.file else { return Ok(()) };
        let bytes = map::encode_record(&self.shape.index, span, record);
        let offset = map::record_offset(self.shape.spans.len(), span);
        disk::write_at(file, Name::Map, &bytes, offset)?;
        if let Some(place) = usize::try_from(span).ok().and_then(|span| map.records.get_mut(span)) {
            *place = record;
        }
        Ok(())
    }

    fn read_range(&self, range: Range<u64>, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        read_range(&self.data, range, each)
    }
}

/// The crc32c of a part of a data file.
pub(crate) fn crc_of_range(data: &File, range: Range<u64>) -> io::Result<u32> {
    let mut crc = 0;
    read_range(data, range, &mut |bytes| crc = crc32c::crc32c_append(crc, bytes))?;
    Ok(crc)
}

fn read_range(data: &File, range: Range<u64>, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; READ_LEN];
    let mut at = range.start;
    while at < range.end {
        let left = usize::try_from(range.end - at).unwrap_or(READ_LEN).min(READ_LEN);
        let (part, _) = buffer.split_at_mut(left);
        data.read_exact_at(part, at)?;
        each(part);
        at += u64::try_from(left).map_err(io::Error::other)?;
    }
    Ok(())
}

/// How much is read back at once.
const READ_LEN: usize = 1 << 20;

fn record_of(map: &MapState, span: u32) -> Option<Record> {
    *map.records.get(usize::try_from(span).ok()?)?
}

#[cfg(test)]
mod tests;

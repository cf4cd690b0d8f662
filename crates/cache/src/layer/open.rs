//! Opening a layer: what lies on disk, and how much of it may be believed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use oci::Digest;
use parking_lot::{Mutex, RwLock};
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::evict::whole_blocks;
use super::{Discarded, Layer, LayerShape, MapState, Shared, SpanState};
use crate::bits::AtomicSpanSet;
use crate::disk::{self, Name};
use crate::map::{MAX_MAP_LEN, Map, MapError, Origin, Record};
use crate::marker::{MAX_MARKER_LEN, MarkerError, Sealed};
use crate::store::OpenLayerError;

/// A layer about to be opened.
pub(crate) struct Opening {
    pub(crate) digest: Digest,
    pub(crate) shape: LayerShape,
    pub(crate) folder: OwnedFd,
    /// The descriptor that was handed over.
    pub(crate) data: Option<File>,
    /// How many bytes of the tar were proven together, if they have just come.
    pub(crate) proven: Option<u64>,
    pub(crate) shared: Arc<Shared>,
}

/// What is believed of the layer.
struct Believed {
    map: Option<(File, Vec<Option<Record>>)>,
    sealed: Option<Sealed>,
    discarded: Option<Discarded>,
}

impl Opening {
    pub(crate) fn open(mut self) -> Result<Layer, OpenLayerError> {
        let data = match self.data.take() {
            Some(given) if self.is_our_data(&given)? => Some(given),
            Some(_) => return Err(OpenLayerError::ForeignDescriptor),
            None => disk::open(&self.folder, Name::Data)?,
        };
        let len = data.as_ref().map(File::metadata).transpose()?.map(|data| data.len());
        let believed = self.believe(len)?;
        let is_sealed = believed.sealed.is_some();
        let starts_empty = believed.map.is_none() && !is_sealed;
        let map = match believed.map {
            Some((file, records)) => (Some(file), records),
            // Before the data is made or made longer: an old map would vouch for its holes.
            None => {
                let file = starts_empty.then(|| self.start_empty()).transpose()?;
                (file, vec![None; self.shape.spans.len()])
            }
        };
        let data = match data {
            Some(data) => data,
            None => disk::open_new(&self.folder, Name::Data)?,
        };
        // Only when it is wrong: the kernel asks before any change of a watched file's length,
        // whatever descriptor it comes through.
        if len != Some(self.shape.bytes) {
            disk::set_len(&data, Name::Data, self.shape.bytes)?;
        }
        if starts_empty && len.is_some() {
            let all = whole_blocks(&(0..self.shape.bytes), self.shape.bytes);
            if !all.is_empty() {
                disk::punch(&data, all.start, all.end)?;
            }
        }
        Ok(self.assemble(data, map, believed.sealed, believed.discarded))
    }

    /// Whether the descriptor is of the file that lies in the layer's folder, with the right length: the
    /// length of a file that may be watched cannot be changed.
    fn is_our_data(&self, given: &File) -> io::Result<bool> {
        let found = match rustix::fs::statat(
            &self.folder,
            Name::Data.as_str(),
            AtFlags::SYMLINK_NOFOLLOW,
        ) {
            Ok(found) => found,
            Err(Errno::NOENT) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        let given = given.metadata()?;
        Ok(given.dev() == found.st_dev
            && given.ino() == found.st_ino
            && given.len() == self.shape.bytes)
    }

    /// Decides what of the files is used, given the length of the data.
    fn believe(&self, data_len: Option<u64>) -> Result<Believed, OpenLayerError> {
        let mut discarded = None;
        let mut sealed = match read_marker(&self.folder, &self.digest)? {
            Ok(sealed) => sealed,
            Err(error) => {
                discarded = Some(Discarded::Marker(error));
                None
            }
        };
        if sealed.take_if(|sealed| data_len != Some(sealed.bytes)).is_some() {
            self.unlink_marker()?;
            discarded = Some(Discarded::Data);
        }
        if let Some(sealed) = sealed.take_if(|sealed| sealed.bytes != self.shape.bytes) {
            let (proven, given) = (sealed.total_bytes, self.shape.bytes);
            if given > proven {
                return Err(OpenLayerError::ContradictsSeal { proven, given });
            }
            // The indexes differ in how much of what follows the archive they count in.
            self.unlink_marker()?;
            discarded = Some(Discarded::OtherSpans);
        }
        let map = match read_map(&self.folder)? {
            None => None,
            Some((file, map)) => match self.usable(map, data_len) {
                Ok(records) => Some((file, records)),
                Err(_) if sealed.is_some() => None,
                Err(reason) => {
                    discarded = Some(reason);
                    None
                }
            },
        };
        Ok(Believed { map, sealed, discarded })
    }

    fn unlink_marker(&self) -> io::Result<()> {
        disk::unlink(&self.folder, Name::Sealed)?;
        disk::sync_folder(&self.folder)
    }

    fn usable(
        &self,
        map: Result<Map, MapError>,
        data_len: Option<u64>,
    ) -> Result<Vec<Option<Record>>, Discarded> {
        let map = map.map_err(Discarded::Map)?;
        if map.index != self.shape.index {
            return Err(Discarded::OtherIndex { found: map.index });
        }
        if map.starts != self.shape.spans || map.bytes != self.shape.bytes {
            return Err(Discarded::OtherSpans);
        }
        if data_len != Some(map.bytes) {
            return Err(Discarded::Data);
        }
        Ok(map.records)
    }

    /// Puts an empty map in place. It reaches the disk before any byte is punched: an old map that
    /// came back after a power loss would vouch for holes.
    fn start_empty(&self) -> io::Result<File> {
        let map = Map::empty(self.shape.bytes, self.shape.index, self.shape.spans.clone());
        disk::replace(self.folder.as_fd(), (Name::MapTmp, Name::Map), &map.encode())
    }

    fn assemble(
        self,
        data: File,
        (file, records): (Option<File>, Vec<Option<Record>>),
        sealed: Option<Sealed>,
        discarded: Option<Discarded>,
    ) -> Layer {
        let now = self.shared.clock.now();
        let count = self.shape.span_count();
        let layer = Layer {
            digest: self.digest,
            discarded,
            folder: self.folder,
            data,
            present: AtomicSpanSet::new(count),
            unchecked: AtomicSpanSet::new(count),
            present_bytes: AtomicU64::new(0),
            unchecked_bytes: AtomicU64::new(0),
            used: (0..count).map(|_| AtomicU32::new(now)).collect(),
            use_noted: AtomicU32::new(now),
            unknown_until: AtomicU32::new(0),
            losses: AtomicU64::new(0),
            proven: self.proven,
            is_sealed: AtomicBool::new(sealed.is_some()),
            is_detached: AtomicBool::new(false),
            map: Mutex::new(MapState { file: file.map(Arc::new), records: Vec::new(), sealed }),
            leaving: AtomicSpanSet::new(count),
            evictions: Mutex::new(()),
            punching: RwLock::new(()),
            shape: self.shape,
            shared: self.shared,
        };
        let is_sealed = layer.is_sealed();
        for (span, record) in (0..).zip(&records) {
            let state = match record {
                _ if is_sealed => SpanState::Present,
                None => SpanState::Missing,
                Some(Record { origin: Origin::Disk, .. }) => SpanState::Present,
                Some(Record { origin: Origin::Boot(boot), .. }) if *boot == layer.shared.boot => {
                    SpanState::Present
                }
                Some(_) => SpanState::Unchecked,
            };
            layer.set_state(span, state);
        }
        layer.map.lock().records = records;
        // Whom an earlier process let go is not known.
        layer.unknown_reader();
        layer.write_down_use();
        layer
    }
}

/// The map in a layer's folder, if there is one.
pub(crate) fn read_map(folder: impl AsFd) -> io::Result<Option<(File, Result<Map, MapError>)>> {
    let Some(file) = disk::open(folder, Name::Map)? else { return Ok(None) };
    let map = Map::decode(&disk::read(&file, MAX_MAP_LEN)?);
    Ok(Some((file, map)))
}

/// The marker in a layer's folder, if there is one.
pub(crate) fn read_marker(
    folder: impl AsFd,
    layer: &Digest,
) -> io::Result<Result<Option<Sealed>, MarkerError>> {
    let Some(file) = disk::open(folder, Name::Sealed)? else { return Ok(Ok(None)) };
    Ok(Sealed::decode(&disk::read(&file, MAX_MARKER_LEN)?, layer).map(Some))
}

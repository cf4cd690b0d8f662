//! Proof that a whole layer is what the image promises: its DiffID, and its table of contents
//! against the tar.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak, mpsc};
use std::thread;
use std::time::Duration;

use oci::Hasher;
use ztoc::{Entries, Limits, ReadTocError, TarScanner, TocEntry};

use crate::decode;
use crate::engine::Shared;
use crate::layer::Layer;

/// A layer could not be sealed.
#[derive(Debug)]
pub(crate) enum Sealed {
    /// The cache could not be read or written.
    Io(io::Error),
    /// The layer is something else than the image says, or contains something else than its index.
    Differs(String),
    /// What follows the end of the archive is needed, and was read by an earlier daemon.
    TailUnknown,
    /// Spans were given up meanwhile.
    Interrupted,
    /// The engine is being dropped.
    Closing,
}

/// Starts the thread that seals layers, one at a time, when no reader waits.
pub(crate) fn start(layers: mpsc::Receiver<Arc<Layer>>, shared: &Arc<Shared>) -> io::Result<()> {
    let shared = Arc::downgrade(shared);
    thread::Builder::new().name("seal".to_owned()).spawn(move || work(&layers, &shared))?;
    Ok(())
}

fn work(layers: &mpsc::Receiver<Arc<Layer>>, shared: &Weak<Shared>) {
    decode::be_nice();
    while let Ok(layer) = layers.recv() {
        let Some(shared) = shared.upgrade() else { return };
        let result = prove(&layer, &shared);
        shared.seal_done(&layer, result);
    }
}

/// Proves the layer and seals it.
fn prove(layer: &Layer, shared: &Shared) -> Result<(), Sealed> {
    let cache = &layer.spec().cache;
    let losses = cache.losses();
    for span in 0..cache.shape().span_count() {
        if cache.needs_check(span) {
            if !shared.wait_for_quiet(QUIET) {
                return Err(Sealed::Closing);
            }
            cache.check(span).map_err(|err| Sealed::Io(io::Error::other(err)))?;
        }
    }
    if cache.first_missing(0).is_some() {
        return Err(Sealed::Interrupted);
    }
    let proven = cache.proven().map_or_else(|| prove_whole(layer, shared), Ok);
    // Whatever was found, it may have been found in a hole.
    if cache.losses() != losses {
        return Err(Sealed::Interrupted);
    }
    match layer.seal(proven?) {
        Err(cache::SealError::Incomplete { .. }) => Err(Sealed::Interrupted),
        sealed => sealed.map_err(|err| Sealed::Io(io::Error::other(err))),
    }
}

/// Reads the whole layer, and returns the size of its tar.
fn prove_whole(layer: &Layer, shared: &Shared) -> Result<u64, Sealed> {
    let spec = layer.spec();
    let unreadable = |err: ReadTocError| Sealed::Io(io::Error::other(err));
    let mut compared = Compared::with(spec.toc.entries().map_err(unreadable)?);
    let mut hasher = Hasher::new();
    let mut scanner = TarScanner::new(Limits::default());
    let damaged = |err: ztoc::TarError| Sealed::Differs(format!("its tar is damaged: {err}"));
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < layer.bytes() {
        // Nobody waits for a seal: it stands back while somebody waits for bytes.
        if !shared.wait_for_quiet(QUIET) {
            return Err(Sealed::Closing);
        }
        let n = spec.cache.data().read_at(&mut buffer, at).map_err(Sealed::Io)?;
        let piece = buffer.get(..n).unwrap_or_default();
        if piece.is_empty() {
            return Err(Sealed::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        hasher.update(piece);
        scanner.push(piece).map_err(damaged)?;
        compared.go_on(&scanner.take_entries()).map_err(unreadable)?;
        at += n as u64;
    }
    let total = prove_diff_id(layer, hasher)?;
    compared.go_on(&scanner.finish().map_err(damaged)?.entries).map_err(unreadable)?;
    match compared.difference().map_err(unreadable)? {
        Some(why) => Err(Sealed::Differs(why)),
        None => Ok(total),
    }
}

/// Compares the layer with its DiffID and returns the size of the whole tar.
///
/// The DiffID also covers what follows the end of the archive, which no reader can see and the cache
/// does not keep. It is mostly zeros to the next tar record, so those are tried first.
fn prove_diff_id(layer: &Layer, hasher: Hasher) -> Result<u64, Sealed> {
    let expected = layer.spec().diff_id;
    let tail = layer.tail();
    let mut found = hasher.clone();
    found.update(tail.as_deref().unwrap_or_default());
    if found.finish() == expected {
        return Ok(layer.bytes() + tail.map_or(0, |tail| tail.len() as u64));
    }
    if tail.is_some() {
        return Err(Sealed::Differs(format!("its bytes do not have the DiffID {expected}")));
    }
    let mut padded = hasher;
    for blocks in 1..=MOST_PADDING {
        padded.update(&[0; 512]);
        if padded.clone().finish() == expected {
            return Ok(layer.bytes() + blocks * 512);
        }
    }
    Err(Sealed::TailUnknown)
}

/// An index compared with its tar, entry by entry as they are read: all of a large layer's would take tens of
/// megabytes, twice.
struct Compared {
    index: Entries,
    /// How many entries each had so far.
    of_index: usize,
    of_tar: usize,
    /// The name of the first that the index has otherwise than the tar.
    differs: Option<Vec<u8>>,
}

impl Compared {
    fn with(index: Entries) -> Self {
        Self { index, of_index: 0, of_tar: 0, differs: None }
    }

    fn go_on(&mut self, tar: &[TocEntry]) -> Result<(), ReadTocError> {
        for entry in tar {
            self.of_tar += 1;
            let Some(expected) = self.index.next().transpose()? else { continue };
            self.of_index += 1;
            if expected != *entry && self.differs.is_none() {
                self.differs = Some(expected.name);
            }
        }
        Ok(())
    }

    /// What to say of it after the last entry.
    fn difference(mut self) -> Result<Option<String>, ReadTocError> {
        for more in self.index {
            more?;
            self.of_index += 1;
        }
        let (tar, index) = (self.of_tar, self.of_index);
        if tar != index {
            return Ok(Some(format!("its tar has {tar} entries, its index {index}")));
        }
        let differs =
            |name: Vec<u8>| format!("its index and its tar differ at `{}`", name.escape_ascii());
        Ok(self.differs.map(differs))
    }
}

const PIECE: usize = 1 << 20;

/// For how long nobody must have waited.
const QUIET: Duration = Duration::from_secs(1);

/// Zero blocks of 512 bytes that are tried after the end of an archive.
const MOST_PADDING: u64 = 128;

#[cfg(test)]
mod tests {
    use ztoc::{EntryKind, Toc};

    use super::*;

    #[test]
    fn an_index_is_compared_with_its_tar_piece_by_piece() {
        let entries = |names: &[&str]| -> Vec<TocEntry> {
            names.iter().map(|name| TocEntry::new(*name, EntryKind::File)).collect()
        };
        let check = |pieces: &[&[&str]], expected: Option<&str>| {
            let index = Toc::from(entries(&["a", "b", "c"]));
            let mut compared = Compared::with(index.entries().unwrap());
            pieces.iter().for_each(|piece| compared.go_on(&entries(piece)).unwrap());
            assert_eq!(compared.difference().unwrap().as_deref(), expected, "{pieces:?}");
        };
        check(&[&["a"], &[], &["b", "c"]], None);
        check(&[&["a", "b"], &["x"]], Some("its index and its tar differ at `c`"));
        check(&[&["a"], &["x"], &["x"]], Some("its index and its tar differ at `b`"));
        check(&[&["a"], &["b"]], Some("its tar has 2 entries, its index 3"));
        check(&[&["a", "b", "c"], &["c"]], Some("its tar has 4 entries, its index 3"));
        check(&[], Some("its tar has 0 entries, its index 3"));
    }
}

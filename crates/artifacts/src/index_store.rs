//! The indexes that this machine has: one zTOC for each layer, under the layer's digest; and which
//! indexes turned out to lie, under their own.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use index::WindowError;
use oci::span_index::WindowsBlob;
use oci::{Digest, Hasher};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use ztoc::{Compression, Limits, ParseZtocError, ReadTocError, Toc, TocEntries, TocEntry, Ztoc};

/// A folder of zTOCs.
#[derive(Debug, Clone)]
pub struct IndexStore {
    dir: PathBuf,
    /// Held while an index is written: two of one layer must not mix.
    writing: Arc<Mutex<()>>,
}

/// Where an index came from; the more local, the more it is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IndexOrigin {
    /// Built on this machine from the layer itself.
    Built,
    /// Named by the image's manifest (SOCI v2).
    Annotation,
    /// Found as a referrer of the image (SOCI v1).
    Referrer,
    /// Hermes' own, found as a referrer of the image.
    Hermes,
}

impl std::fmt::Display for IndexOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Built => "built here",
            Self::Annotation => "the image's annotation (SOCI v2)",
            Self::Referrer => "a referrer of the image (SOCI v1)",
            Self::Hermes => "a referrer of the image (Hermes)",
        })
    }
}

/// What is noted beside a zTOC.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    ztoc: Digest,
    origin: IndexOrigin,
    /// Whether the layer can only be read from its beginning: the zTOC then describes the
    /// uncompressed tar, and its spans with their digests are none of the blob's.
    streamed: bool,
    /// The blob of a registry that it was in, if that is more than itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blob: Option<Digest>,
    /// The blob with its windows, if these are apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    windows: Option<Digest>,
}

/// A zTOC of the store.
#[derive(Debug)]
pub struct StoredIndex {
    /// The zTOC, without its windows and its table of contents.
    pub ztoc: Ztoc,
    /// The zTOC as a document.
    pub file: File,
    /// Its windows, if they are apart.
    pub windows: Option<StoredWindows>,
    /// Digest of the blob.
    pub digest: Digest,
    /// Where it came from.
    pub origin: IndexOrigin,
    /// Whether the layer can only be read from its beginning.
    pub streamed: bool,
    /// The table of contents, shared.
    pub toc: Arc<Toc>,
    /// Its entries, if they were read when the zTOC was: here for as long as this is.
    entries: Option<Arc<Vec<TocEntry>>>,
}

/// The windows of a zTOC, apart from it.
#[derive(Debug)]
pub struct StoredWindows {
    /// As much of the blob as was fetched, each window at its place. Whoever reads one checks it.
    pub file: File,
    /// The blob.
    pub blob: WindowsBlob,
}

impl StoredWindows {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, blob: self.blob })
    }
}

impl StoredIndex {
    /// The file that windows are read from.
    #[must_use]
    pub fn window_file(&self) -> &File {
        self.windows.as_ref().map_or(&self.file, |windows| &windows.file)
    }

    /// About how many bytes of memory its table of contents takes, if it was read.
    pub(crate) fn toc_bytes(&self) -> u64 {
        self.entries.iter().flat_map(|entries| entries.iter()).map(TocEntry::memory_bytes).sum()
    }

    /// The same index, for another to keep.
    ///
    /// # Errors
    /// When the process has too many files open.
    pub fn try_clone(&self) -> io::Result<Self> {
        let windows = self.windows.as_ref().map(StoredWindows::try_clone).transpose()?;
        Ok(Self {
            ztoc: self.ztoc.clone(),
            file: self.file.try_clone()?,
            windows,
            toc: Arc::clone(&self.toc),
            entries: self.entries.clone(),
            ..*self
        })
    }

    /// One whose table of contents was read with it.
    fn new(mut ztoc: Ztoc, files: Files, note: &Note) -> io::Result<Self> {
        let entries = std::mem::take(&mut ztoc.toc);
        let mut index = Self::without_toc(ztoc, files, note)?;
        index.entries = Some(index.toc.set(entries));
        Ok(index)
    }

    fn without_toc(ztoc: Ztoc, files: Files, note: &Note) -> io::Result<Self> {
        let Files { document: file, windows } = files;
        // The name may stand for another index when it is asked for.
        let (same, digest) = (file.try_clone()?, note.ztoc);
        let toc = Toc::later(move || open_toc(&same, &digest).map_err(ReadTocError::new));
        let blob = note.windows.zip(ztoc.spans.windows_apart());
        let blob = blob.map(|(digest, size)| WindowsBlob { digest, size });
        let windows = windows.zip(blob).map(|(file, blob)| StoredWindows { file, blob });
        let Note { ztoc: digest, origin, streamed, blob: _, windows: _ } = *note;
        let (toc, entries) = (Arc::new(toc), None);
        Ok(Self { ztoc, file, windows, digest, origin, streamed, toc, entries })
    }
}

/// A stored index as Hermes' own has it.
#[derive(Debug)]
pub struct IndexInParts {
    /// The zTOC as a document.
    pub document: Vec<u8>,
    /// Its windows, where they are apart.
    pub windows: Option<(WindowsBlob, Vec<u8>)>,
}

/// What is open of an index.
struct Files {
    document: File,
    /// Where the windows are apart.
    windows: Option<File>,
}

/// An index cannot be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreIndexError {
    /// The disk.
    #[error("index store: {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The tables of contents of an image's layers together.
    #[error(
        "the layers' tables of contents would take more than {limit} bytes of memory; use an image with fewer files, or run this one without Hermes"
    )]
    TooMuch {
        /// The limit.
        limit: u64,
    },
    /// A window of a zTOC cannot be had.
    #[error("the windows of the index of layer {layer}")]
    Windows {
        /// The layer.
        layer: Digest,
        /// Why not.
        source: WindowError,
    },
    /// The bytes are no zTOC of this layer.
    #[error("the index of layer {layer} is unusable: {why}")]
    Unusable {
        /// The layer.
        layer: Digest,
        /// What is wrong.
        why: String,
    },
}

impl IndexStore {
    /// Opens the store in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(dir: &Path) -> Result<Self, StoreIndexError> {
        fs::create_dir_all(dir)
            .map_err(|source| StoreIndexError::Io { path: dir.to_owned(), source })?;
        Ok(Self { dir: dir.to_owned(), writing: Arc::default() })
    }

    /// The index of `layer`, if there is one. One that is damaged is removed.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn load(&self, layer: &Digest) -> Result<Option<StoredIndex>, StoreIndexError> {
        let parse = |bytes: &[u8]| Ztoc::parse(bytes, &Limits::default());
        self.load_by(layer, parse, StoredIndex::new)
    }

    /// The index of `layer` as by [`load`](Self::load). Its bytes are checked now, but its table of contents
    /// is read when somebody asks for it.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn load_without_toc(&self, layer: &Digest) -> Result<Option<StoredIndex>, StoreIndexError> {
        let parse = |bytes: &[u8]| Ztoc::parse_without_toc(bytes, &Limits::default());
        self.load_by(layer, parse, StoredIndex::without_toc)
    }

    fn load_by(
        &self,
        layer: &Digest,
        parse: impl Fn(&[u8]) -> Result<Ztoc, ParseZtocError>,
        make: impl Fn(Ztoc, Files, &Note) -> io::Result<StoredIndex>,
    ) -> Result<Option<StoredIndex>, StoreIndexError> {
        let (path, note) = self.paths(layer);
        let note = match fs::read(&note) {
            Ok(note) => note,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreIndexError::Io { path: note, source }),
        };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreIndexError::Io { path, source }),
        };
        match check(layer, &note, &bytes, parse) {
            Ok((note, ztoc)) => {
                let made = make(ztoc, self.open_files(layer, &note)?, &note);
                Ok(Some(made.map_err(|source| StoreIndexError::Io { path, source })?))
            }
            Err(err) => {
                tracing::warn!(%layer, error = %err, "stored index dropped");
                self.remove(layer)?;
                Ok(None)
            }
        }
    }

    /// Stores the index of `layer`, whose blob has `layer_size` bytes; it replaces an older one.
    ///
    /// # Errors
    /// When the bytes are no zTOC for a layer of this size, or the disk refuses them.
    pub fn save(
        &self,
        layer: &Digest,
        layer_size: u64,
        bytes: &[u8],
        origin: IndexOrigin,
    ) -> Result<StoredIndex, StoreIndexError> {
        self.save_parsed(layer, layer_size, (bytes, parse(layer, bytes)?), None, origin)
    }

    /// As [`save`](Self::save), for a zTOC whose windows are apart, in the blob `windows`.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_without_windows(
        &self,
        layer: &Digest,
        layer_size: u64,
        bytes: &[u8],
        windows: &WindowsBlob,
        origin: IndexOrigin,
    ) -> Result<StoredIndex, StoreIndexError> {
        self.save_parsed(layer, layer_size, (bytes, parse(layer, bytes)?), Some(windows), origin)
    }

    fn save_parsed(
        &self,
        layer: &Digest,
        layer_size: u64,
        (bytes, ztoc): (&[u8], Ztoc),
        windows: Option<&WindowsBlob>,
        origin: IndexOrigin,
    ) -> Result<StoredIndex, StoreIndexError> {
        let unusable = |why: String| StoreIndexError::Unusable { layer: *layer, why };
        if ztoc.compressed_size != layer_size {
            let size = ztoc.compressed_size;
            return Err(unusable(format!(
                "it is made for a blob of {size} bytes, this has {layer_size}"
            )));
        }
        if ztoc.spans.windows_apart() != windows.map(|windows| windows.size) {
            return Err(unusable("its windows are not where they should be".to_owned()));
        }
        let (ztoc_digest, windows) = (Digest::of(bytes), windows.map(|windows| windows.digest));
        let note = Note { ztoc: ztoc_digest, origin, streamed: false, blob: None, windows };
        self.write(layer, bytes, &note, ztoc)
    }

    /// Stores the index of `layer` that was built here. Many windows are put apart: who loads it needs the
    /// memory of few.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_built(
        &self,
        layer: &Digest,
        layer_size: u64,
        bytes: &[u8],
    ) -> Result<StoredIndex, StoreIndexError> {
        let ztoc = parse(layer, bytes)?;
        let is_gzip = ztoc.spans.compression() == Compression::Gzip;
        if !is_gzip || ztoc.spans.len() < MANY_WINDOWS {
            return self.save_parsed(layer, layer_size, (bytes, ztoc), None, IndexOrigin::Built);
        }
        let path = self.windows_path(layer);
        let (document, windows) = sys::files::replace_by(&path, |file| {
            let mut out = Described::new(BufWriter::new(file));
            let document = index::with_windows_apart(&ztoc, bytes, &mut out);
            out.flush()?;
            Ok((document.map_err(io::Error::other)?, out.finish()))
        })
        .map_err(|source| StoreIndexError::Io { path, source })?;
        self.save_without_windows(layer, layer_size, &document, &windows, IndexOrigin::Built)
    }

    /// Stores an index of `layer` that was built here with two cuts of its spans: `bytes` for this
    /// machine, and `soci` for [`soci_blob`](Self::soci_blob).
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_both(
        &self,
        layer: &Digest,
        layer_size: u64,
        bytes: &[u8],
        soci: Vec<u8>,
    ) -> Result<StoredIndex, StoreIndexError> {
        let path = self.soci_path(layer);
        sys::files::replace(&path, &soci).map_err(|source| StoreIndexError::Io { path, source })?;
        drop(soci);
        self.save_built(layer, layer_size, bytes)
    }

    /// Stores what is known of a layer that can only be read from its beginning: `bytes` is a zTOC
    /// of its uncompressed tar.
    ///
    /// # Errors
    /// When the bytes are none, or the disk refuses them.
    pub fn save_streamed(
        &self,
        layer: &Digest,
        bytes: &[u8],
        origin: IndexOrigin,
    ) -> Result<StoredIndex, StoreIndexError> {
        let ztoc_digest = Digest::of(bytes);
        let note = Note { ztoc: ztoc_digest, origin, streamed: true, blob: None, windows: None };
        let ztoc = parse(layer, bytes)?;
        check_streamed(layer, &ztoc)?;
        self.write(layer, bytes, &note, ztoc)
    }

    /// The note is written last: without it the zTOC does not count. A start does not wait for the disk:
    /// the note has the zTOC's digest, and what a loss of power leaves of them is not used.
    fn write(
        &self,
        layer: &Digest,
        bytes: &[u8],
        note: &Note,
        ztoc: Ztoc,
    ) -> Result<StoredIndex, StoreIndexError> {
        let (path, _) = self.paths(layer);
        let _one_at_a_time = self.writing.lock();
        let failed = |source| StoreIndexError::Io { path: path.clone(), source };
        sys::files::replace(&path, bytes).map_err(failed)?;
        if note.windows.is_none() || note.origin != IndexOrigin::Built {
            // Whoever has the windows of another index open keeps them.
            remove_file(&self.windows_path(layer))?;
        }
        self.write_note(layer, note)?;
        StoredIndex::new(ztoc, self.open_files(layer, note)?, note).map_err(failed)
    }

    fn open_files(&self, layer: &Digest, note: &Note) -> Result<Files, StoreIndexError> {
        let (path, _) = self.paths(layer);
        let document = File::open(&path).map_err(|source| StoreIndexError::Io { path, source })?;
        let open = |_windows| {
            let path = self.windows_path(layer);
            let options =
                File::options().read(true).write(true).create(true).truncate(false).open(&path);
            options.map_err(|source| StoreIndexError::Io { path, source })
        };
        let windows = note.windows.map(open).transpose()?;
        Ok(Files { document, windows })
    }

    /// Sees to it that the index of `layer` outlives a loss of power.
    ///
    /// # Errors
    /// When the disk refuses, or there is none.
    pub fn make_durable(&self, layer: &Digest) -> Result<(), StoreIndexError> {
        let (path, note) = self.paths(layer);
        for path in [path, note, self.dir.clone()] {
            let synced = File::open(&path).and_then(|file| file.sync_all());
            synced.map_err(|source| StoreIndexError::Io { path, source })?;
        }
        Ok(())
    }

    fn write_note(&self, layer: &Digest, note: &Note) -> Result<(), StoreIndexError> {
        let (_, path) = self.paths(layer);
        let written = serde_json::to_vec(note).map_err(io::Error::other);
        let written = written.and_then(|note| sys::files::replace(&path, &note));
        written.map_err(|source| StoreIndexError::Io { path, source })
    }

    /// Forgets the index `index` of `layer`, which lied, and remembers that it did: what comes from a
    /// registry with this digest is not taken again.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn revoke(&self, layer: &Digest, index: &Digest, why: &str) -> Result<(), StoreIndexError> {
        let stored = self.note(layer)?.filter(|note| note.ztoc == *index);
        // Another one may have taken its place meanwhile.
        let came_in = stored.as_ref().and_then(|note| note.blob);
        for digest in std::iter::once(*index).chain(came_in) {
            let path = self.revocation_path(&digest);
            sys::files::replace(&path, why.as_bytes())
                .map_err(|source| StoreIndexError::Io { path, source })?;
        }
        if stored.is_some() {
            self.remove(layer)?;
        }
        Ok(())
    }

    /// Notes that the index of `layer` came inside the blob `blob`, which is to be revoked with it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn came_in(&self, layer: &Digest, blob: &Digest) -> Result<(), StoreIndexError> {
        match self.note(layer)? {
            Some(note) => {
                let _one_at_a_time = self.writing.lock();
                self.write_note(layer, &Note { blob: Some(*blob), ..note })
            }
            None => Ok(()),
        }
    }

    /// What is noted of the index of `layer`; nothing if that cannot be understood.
    fn note(&self, layer: &Digest) -> Result<Option<Note>, StoreIndexError> {
        let (_, path) = self.paths(layer);
        match fs::read(&path) {
            Ok(note) => Ok(serde_json::from_slice(&note).ok()),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreIndexError::Io { path, source }),
        }
    }

    /// Why the index with this digest was revoked, if it was.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn revocation(&self, index: &Digest) -> Result<Option<String>, StoreIndexError> {
        let path = self.revocation_path(index);
        match fs::read(&path) {
            Ok(why) => Ok(Some(String::from_utf8_lossy(&why).into_owned())),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreIndexError::Io { path, source }),
        }
    }

    /// Forgets the index of `layer`; that there is none is no error.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, layer: &Digest) -> Result<bool, StoreIndexError> {
        let (path, note) = self.paths(layer);
        let mut removed = false;
        for path in [note, path, self.soci_path(layer), self.windows_path(layer)] {
            removed |= remove_file(&path)?;
        }
        Ok(removed)
    }

    /// The layers that have an index, in the order of their digests.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Digest>, StoreIndexError> {
        let failed = |source| StoreIndexError::Io { path: self.dir.clone(), source };
        let mut layers = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let hex = name.to_str().and_then(|name| name.strip_suffix(".json"));
            layers.extend(hex.and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok()));
        }
        layers.sort();
        Ok(layers)
    }

    /// The zTOC of a layer with the spans that SOCI cuts, and its span size.
    ///
    /// # Errors
    /// As [`whole`](Self::whole).
    pub fn soci_blob(&self, layer: &Digest) -> Result<(Vec<u8>, u64), StoreIndexError> {
        let path = self.soci_path(layer);
        let bytes = match fs::read(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => self.whole(layer)?,
            read => read.map_err(|source| StoreIndexError::Io { path, source })?,
        };
        let parsed = Ztoc::parse(&bytes, &Limits::default());
        let unusable = |why: String| StoreIndexError::Unusable { layer: *layer, why };
        let span_size = parsed.map_err(|err| unusable(err.to_string()))?.spans.span_size();
        Ok((bytes, span_size))
    }

    /// A stored zTOC as a document with its windows inside; those that are apart must all have been fetched.
    ///
    /// # Errors
    /// When it cannot be read or is damaged, and when one of its windows is not there.
    pub fn whole(&self, layer: &Digest) -> Result<Vec<u8>, StoreIndexError> {
        let (path, _) = self.paths(layer);
        let bytes = fs::read(&path).map_err(|source| StoreIndexError::Io { path, source })?;
        let ztoc = parse(layer, &bytes)?;
        if ztoc.spans.windows_apart().is_none() {
            return Ok(bytes);
        }
        let path = self.windows_path(layer);
        let windows = File::open(&path).map_err(|source| StoreIndexError::Io { path, source })?;
        index::with_windows_inside(&ztoc, &windows)
            .map_err(|source| StoreIndexError::Windows { layer: *layer, source })
    }

    /// A stored zTOC, to be pushed.
    ///
    /// # Errors
    /// When it cannot be read, and when not all windows are there.
    pub fn in_parts(&self, layer: &Digest) -> Result<IndexInParts, StoreIndexError> {
        let read = |path: PathBuf| match fs::read(&path) {
            Ok(bytes) => Ok(bytes),
            Err(source) => Err(StoreIndexError::Io { path, source }),
        };
        let document = read(self.paths(layer).0)?;
        let Some(digest) = self.note(layer)?.and_then(|note| note.windows) else {
            return Ok(IndexInParts { document, windows: None });
        };
        let windows = read(self.windows_path(layer))?;
        if Digest::of(&windows) != digest {
            let source = WindowError::Other;
            return Err(StoreIndexError::Windows { layer: *layer, source });
        }
        let blob = WindowsBlob { digest, size: windows.len() as u64 };
        Ok(IndexInParts { document, windows: Some((blob, windows)) })
    }

    fn windows_path(&self, layer: &Digest) -> PathBuf {
        self.dir.join(format!("{}.windows", layer.hex()))
    }

    fn soci_path(&self, layer: &Digest) -> PathBuf {
        self.dir.join(format!("{}.soci", layer.hex()))
    }

    fn revocation_path(&self, index: &Digest) -> PathBuf {
        self.dir.join(format!("{}.revoked", index.hex()))
    }

    fn paths(&self, layer: &Digest) -> (PathBuf, PathBuf) {
        let hex = layer.hex();
        (self.dir.join(format!("{hex}.ztoc")), self.dir.join(format!("{hex}.json")))
    }
}

/// What a note and the zTOC beside it say, if they belong together.
fn check(
    layer: &Digest,
    note: &[u8],
    bytes: &[u8],
    parse: impl Fn(&[u8]) -> Result<Ztoc, ParseZtocError>,
) -> Result<(Note, Ztoc), StoreIndexError> {
    let unusable = |why: String| StoreIndexError::Unusable { layer: *layer, why };
    let note: Note = serde_json::from_slice(note).map_err(|err| unusable(err.to_string()))?;
    if Digest::of(bytes) != note.ztoc {
        return Err(unusable("its bytes have changed".to_owned()));
    }
    let ztoc = parse(bytes).map_err(|err| unusable(err.to_string()))?;
    if note.windows.is_some() != ztoc.spans.windows_apart().is_some() {
        return Err(unusable("its windows are not where they should be".to_owned()));
    }
    if note.streamed {
        check_streamed(layer, &ztoc)?;
    }
    Ok((note, ztoc))
}

/// Reads a zTOC that was whole before, for its table of contents.
fn open_toc(file: &File, digest: &Digest) -> io::Result<ztoc::Entries> {
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    if Digest::of(&bytes) != *digest {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the index has changed"));
    }
    let entries = TocEntries::of(bytes, &Limits::default()).map_err(io::Error::other)?;
    Ok(Box::new(entries.map(|entry| entry.map_err(ReadTocError::new))))
}

/// Windows on their way to a file.
struct Described<W> {
    out: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Described<W> {
    fn new(out: W) -> Self {
        Self { out, hasher: Hasher::new(), size: 0 }
    }

    /// What was written.
    fn finish(self) -> WindowsBlob {
        WindowsBlob { digest: self.hasher.finish(), size: self.size }
    }
}

impl<W: Write> Write for Described<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hasher.update(bytes.get(..n).unwrap_or_default());
        self.size = self.size.saturating_add(n as u64);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Whether there was one.
fn remove_file(path: &Path) -> Result<bool, StoreIndexError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(StoreIndexError::Io { path: path.to_owned(), source }),
    }
}

fn parse(layer: &Digest, bytes: &[u8]) -> Result<Ztoc, StoreIndexError> {
    Ztoc::parse(bytes, &Limits::default())
        .map_err(|err| StoreIndexError::Unusable { layer: *layer, why: err.to_string() })
}

/// Whether a zTOC can be that of a streamed layer's tar.
fn check_streamed(layer: &Digest, ztoc: &Ztoc) -> Result<(), StoreIndexError> {
    let why = if ztoc.spans.compression() != Compression::Uncompressed {
        "it is not that of a tar".to_owned()
    } else if ztoc.spans.span_size() > MAX_STREAMED_SPAN {
        format!("its spans of {} bytes are too long", ztoc.spans.span_size())
    } else {
        return Ok(());
    };
    Err(StoreIndexError::Unusable { layer: *layer, why })
}

/// An index with fewer spans comes as soon as one without their windows, and needs one request.
const MANY_WINDOWS: u32 = 96;

/// The bytes of a streamed layer's span are in memory until its digest is known to be right.
const MAX_STREAMED_SPAN: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use testkit::image::{Compression, LayerBuilder, compress};
    use ztoc::{Indexer, IndexerOptions};

    use super::*;

    /// A store with the index of one layer.
    fn stored(dir: &Path) -> (IndexStore, Digest) {
        let tar = LayerBuilder::new().dir("a").file("a/one", "1").file("a/two", "22").build();
        let blob = compress(&tar, Compression::Gzip { level: 6 });
        let mut indexer = Indexer::new(IndexerOptions::default()).unwrap();
        indexer.push(&blob, &mut |_| {}).unwrap();
        let bytes = indexer.finish().unwrap().ztoc_bytes;
        let (store, layer) = (IndexStore::open(dir).unwrap(), Digest::of(&blob));
        store.save(&layer, blob.len() as u64, &bytes, IndexOrigin::Built).unwrap();
        (store, layer)
    }

    #[test]
    fn a_table_of_contents_may_be_read_later() {
        let dir = tempfile::tempdir().unwrap();
        let (store, layer) = stored(dir.path());
        let whole = store.load(&layer).unwrap().unwrap();
        let later = store.load_without_toc(&layer).unwrap().unwrap();
        assert_eq!((&later.ztoc, later.digest), (&whole.ztoc, whole.digest));
        assert!(whole.toc.get().is_some() && later.toc.get().is_none());
        // Another index may have its name by then.
        store.remove(&layer).unwrap();
        let entries = later.toc.read().unwrap();
        assert_eq!(entries, whole.toc.read().unwrap());
        assert_eq!(later.toc.get().unwrap().len(), 3);
        // Nobody needs it any more, and somebody needs it again.
        let toc = Arc::clone(&whole.toc);
        drop(whole);
        assert!(toc.get().is_none());
        assert_eq!(toc.read().unwrap(), entries);
    }

    #[test]
    fn damage_is_found_whenever_an_index_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (store, layer) = stored(dir.path());
        let later = store.load_without_toc(&layer).unwrap().unwrap();
        let (path, _) = store.paths(&layer);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        for _ in 0..2 {
            let error = causes::in_full(&later.toc.read().unwrap_err());
            assert!(error.contains("the index has changed"), "{error}");
        }
        assert!(store.load_without_toc(&layer).unwrap().is_none());
        assert!(!path.exists(), "a damaged index stays");
    }
}

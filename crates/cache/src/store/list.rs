//! What a store holds, also without opening it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use oci::Digest;

use super::{LAYERS, Store};
use crate::disk;
use crate::layer::{read_map, read_marker};
use crate::marker::Sealed;

/// A layer on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLayer {
    /// The compressed layer.
    pub digest: Digest,
    /// The length of the uncompressed layer in bytes; 0 if nothing on disk says it.
    pub bytes: u64,
    /// How many spans the index has; 0 if nothing on disk says it.
    pub spans: u32,
    /// How many of them have a record, or all if the layer is sealed. After an unclean shutdown some
    /// may turn out missing.
    pub spans_present: u32,
    /// How many bytes the layer's files take up on the disk.
    pub allocated: u64,
    /// What was proven, if the layer is sealed.
    pub sealed: Option<Sealed>,
    /// When it was used last, to about a minute.
    pub last_used: SystemTime,
    /// Whether it is open in this process.
    pub is_open: bool,
}

/// The store could not be listed.
#[derive(Debug, thiserror::Error)]
#[error("listing the layer cache in {}", root.display())]
pub struct ListError {
    root: PathBuf,
    source: io::Error,
}

/// Lists the layers of the store in `root` without opening it, in the order of their digests. Another
/// process may have it open; the answer is then as of some moment.
///
/// # Errors
///
/// The disk failed. A store that does not exist has no layers.
pub fn list(root: &Path) -> Result<Vec<StoredLayer>, ListError> {
    let mut found = Vec::new();
    let failed = |source| ListError { root: root.to_owned(), source };
    for (digest, path) in layer_folders(root).map_err(failed)? {
        match describe(digest, &path) {
            Ok(layer) => found.push(layer),
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    found.sort_by_key(|layer| layer.digest);
    Ok(found)
}

impl Store {
    /// Lists the layers, in the order of their digests.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn list(&self) -> Result<Vec<StoredLayer>, ListError> {
        let mut layers = list(&self.root)?;
        for layer in &mut layers {
            layer.is_open = self.is_open(&layer.digest);
        }
        Ok(layers)
    }
}

/// The folders whose name is a digest; nothing else under `layers` is ours.
pub(super) fn layer_folders(root: &Path) -> io::Result<Vec<(Digest, PathBuf)>> {
    let entries = match fs::read_dir(root.join(LAYERS)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let digest = name.to_str().and_then(|name| format!("sha256:{name}").parse().ok());
        if let Some(digest) = digest {
            folders.push((digest, entry.path()));
        }
    }
    Ok(folders)
}

fn describe(digest: Digest, path: &Path) -> io::Result<StoredLayer> {
    let folder = disk::open_folder(path)?;
    let sealed = read_marker(&folder, &digest)?.ok().flatten();
    let map = read_map(&folder)?.and_then(|(_, map)| map.ok());
    let (bytes, spans, present) = map.map_or((0, 0, 0), |map| {
        (map.bytes, map.starts.len(), map.records.iter().flatten().count())
    });
    let present = if sealed.is_some() { spans } else { present };
    Ok(StoredLayer {
        digest,
        bytes: sealed.as_ref().map_or(bytes, |sealed| sealed.bytes),
        spans: u32::try_from(spans).unwrap_or(u32::MAX),
        spans_present: u32::try_from(present).unwrap_or(u32::MAX),
        allocated: allocated(path)?,
        sealed,
        last_used: fs::metadata(path)?.modified()?,
        is_open: false,
    })
}

/// How many bytes a file or a folder with all it holds takes up; a missing one takes up none.
pub(super) fn allocated(path: &Path) -> io::Result<u64> {
    let none_if_missing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(0),
        _ => Err(error),
    };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) => return none_if_missing(error),
    };
    let mut sum = found.blocks().saturating_mul(512);
    if found.is_dir() {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) => return none_if_missing(error),
        };
        for entry in entries {
            sum = sum.saturating_add(allocated(&entry?.path())?);
        }
    }
    Ok(sum)
}

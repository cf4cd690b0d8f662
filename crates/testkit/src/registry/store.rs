//! Blobs, manifests, tags and unfinished uploads. Blobs belong to the registry, not to a repository.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use oci::{Digest, Hasher};
use parking_lot::Mutex;

/// Where uploaded blobs are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Storage {
    /// In memory.
    #[default]
    Memory,
    /// As files in this folder, named by their digest. It is not read at start: manifests are never
    /// stored, and blobs without manifests are of no use.
    Folder(PathBuf),
}

/// The bytes of a blob.
#[derive(Debug, Clone)]
pub(super) enum Blob {
    Memory(Bytes),
    File { file: Arc<File>, len: u64 },
}

impl Blob {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            Self::File { len, .. } => *len,
        }
    }

    /// Reads exactly `len` bytes at `offset`. Blocks on the disk.
    pub(super) fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => {
                let start = usize::try_from(offset).map_err(io::Error::other)?;
                let end = start.checked_add(len).filter(|&end| end <= bytes.len());
                let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
                Ok(bytes.slice(start..end))
            }
            Self::File { file, .. } => {
                let mut buffer = vec![0; len];
                file.read_exact_at(&mut buffer, offset)?;
                Ok(buffer.into())
            }
        }
    }

    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self, Self::Memory(_))
    }
}

/// A manifest as it was put.
#[derive(Debug, Clone)]
pub(super) struct StoredManifest {
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) bytes: Bytes,
}

/// What a manifest is asked for by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ManifestName {
    Digest(Digest),
    Tag(String),
}

impl ManifestName {
    pub(super) fn parse(text: &str) -> Self {
        text.parse().map_or_else(|_not_a_digest| Self::Tag(text.to_owned()), Self::Digest)
    }
}

/// An upload that could not be finished.
#[derive(Debug, thiserror::Error)]
pub(super) enum FinishUploadError {
    #[error("no such upload")]
    Unknown,
    #[error("the upload is {found}, not {claimed}")]
    Digest { claimed: Digest, found: Digest },
    #[error("keeping the upload")]
    Io(#[from] io::Error),
}

#[derive(Debug, Default)]
pub(super) struct Store {
    storage: Storage,
    contents: Mutex<Contents>,
}

#[derive(Debug, Default)]
struct Contents {
    blobs: HashMap<Digest, Blob>,
    repositories: BTreeMap<String, Repository>,
    uploads: HashMap<u64, Upload>,
    uploads_begun: u64,
}

#[derive(Debug, Default)]
struct Repository {
    manifests: BTreeMap<Digest, StoredManifest>,
    tags: BTreeMap<String, Digest>,
}

/// Received bytes, and their digest so far.
#[derive(Debug)]
struct Upload {
    hasher: Hasher,
    received: u64,
    bytes: UploadBytes,
}

#[derive(Debug)]
enum UploadBytes {
    Memory(Vec<u8>),
    File(tempfile::NamedTempFile),
}

impl Store {
    pub(super) fn new(storage: Storage) -> io::Result<Self> {
        if let Storage::Folder(folder) = &storage {
            std::fs::create_dir_all(folder)?;
        }
        Ok(Self { storage, contents: Mutex::default() })
    }

    pub(super) fn blob(&self, digest: Digest) -> Option<Blob> {
        self.contents.lock().blobs.get(&digest).cloned()
    }

    pub(super) fn put_blob(&self, bytes: Bytes) -> Digest {
        let digest = Digest::of(&bytes);
        self.contents.lock().blobs.insert(digest, Blob::Memory(bytes));
        digest
    }

    pub(super) fn put_blob_file(&self, path: &Path) -> io::Result<Digest> {
        let mut file = File::open(path)?;
        let mut hasher = Hasher::new();
        let mut len = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            len += u64::try_from(n).map_err(io::Error::other)?;
        }
        let digest = hasher.finish();
        self.contents.lock().blobs.insert(digest, Blob::File { file: Arc::new(file), len });
        Ok(digest)
    }

    pub(super) fn delete_blob(&self, digest: Digest) -> bool {
        if let Storage::Folder(folder) = &self.storage {
            // A blob that was put from elsewhere has no file here.
            std::fs::remove_file(folder.join(digest.hex())).ok();
        }
        self.contents.lock().blobs.remove(&digest).is_some()
    }

    pub(super) fn begin_upload(&self) -> io::Result<u64> {
        let bytes = match &self.storage {
            Storage::Memory => UploadBytes::Memory(Vec::new()),
            Storage::Folder(folder) => {
                UploadBytes::File(tempfile::NamedTempFile::with_prefix_in("upload-", folder)?)
            }
        };
        let mut contents = self.contents.lock();
        contents.uploads_begun += 1;
        let id = contents.uploads_begun;
        contents.uploads.insert(id, Upload { hasher: Hasher::new(), received: 0, bytes });
        Ok(id)
    }

    /// How many bytes an upload has.
    pub(super) fn upload_len(&self, id: u64) -> Option<u64> {
        self.contents.lock().uploads.get(&id).map(|upload| upload.received)
    }

    /// Adds bytes and says how many there are now; `None` if there is no such upload.
    pub(super) fn extend_upload(&self, id: u64, bytes: &[u8]) -> io::Result<Option<u64>> {
        // Taken out meanwhile: hashing and writing must not hold up other requests.
        let Some(mut upload) = self.contents.lock().uploads.remove(&id) else { return Ok(None) };
        upload.hasher.update(bytes);
        upload.received += u64::try_from(bytes.len()).map_err(io::Error::other)?;
        match &mut upload.bytes {
            UploadBytes::Memory(received) => received.extend_from_slice(bytes),
            UploadBytes::File(file) => file.write_all(bytes)?,
        }
        let received = upload.received;
        self.contents.lock().uploads.insert(id, upload);
        Ok(Some(received))
    }

    pub(super) fn finish_upload(&self, id: u64, claimed: Digest) -> Result<(), FinishUploadError> {
        let upload = self.contents.lock().uploads.remove(&id);
        let Upload { hasher, received, bytes } = upload.ok_or(FinishUploadError::Unknown)?;
        let found = hasher.finish();
        if found != claimed {
            return Err(FinishUploadError::Digest { claimed, found });
        }
        let blob = match (bytes, &self.storage) {
            (UploadBytes::Memory(received), _) => Blob::Memory(received.into()),
            (UploadBytes::File(temporary), Storage::Folder(folder)) => {
                let path = folder.join(claimed.hex());
                temporary.persist(&path).map_err(|err| err.error)?;
                Blob::File { file: Arc::new(File::open(path)?), len: received }
            }
            (UploadBytes::File(temporary), Storage::Memory) => {
                Blob::File { file: Arc::new(temporary.into_file()), len: received }
            }
        };
        self.contents.lock().blobs.insert(claimed, blob);
        Ok(())
    }

    pub(super) fn abandon_upload(&self, id: u64) -> bool {
        self.contents.lock().uploads.remove(&id).is_some()
    }

    pub(super) fn put_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        bytes: Bytes,
    ) -> Digest {
        let digest = Digest::of(&bytes);
        let manifest = StoredManifest { digest, media_type: media_type.to_owned(), bytes };
        let mut contents = self.contents.lock();
        let repository = contents.repositories.entry(repository.to_owned()).or_default();
        repository.manifests.insert(digest, manifest);
        if let Some(tag) = tag {
            repository.tags.insert(tag.to_owned(), digest);
        }
        digest
    }

    pub(super) fn manifest(&self, repository: &str, name: &ManifestName) -> Option<StoredManifest> {
        let contents = self.contents.lock();
        let repository = contents.repositories.get(repository)?;
        let digest = match name {
            ManifestName::Digest(digest) => digest,
            ManifestName::Tag(tag) => repository.tags.get(tag)?,
        };
        repository.manifests.get(digest).cloned()
    }

    /// Deletes a tag, or a manifest with all its tags. Says whether there was one.
    pub(super) fn delete_manifest(&self, repository: &str, name: &ManifestName) -> bool {
        let mut contents = self.contents.lock();
        let Some(repository) = contents.repositories.get_mut(repository) else { return false };
        match name {
            ManifestName::Tag(tag) => repository.tags.remove(tag).is_some(),
            ManifestName::Digest(digest) => {
                repository.tags.retain(|_tag, tagged| tagged != digest);
                repository.manifests.remove(digest).is_some()
            }
        }
    }

    /// The tags of a repository in order; `None` if there is no such repository.
    pub(super) fn tags(&self, repository: &str) -> Option<Vec<String>> {
        let contents = self.contents.lock();
        Some(contents.repositories.get(repository)?.tags.keys().cloned().collect())
    }

    pub(super) fn manifests(&self, repository: &str) -> Vec<StoredManifest> {
        let contents = self.contents.lock();
        contents
            .repositories
            .get(repository)
            .map(|repository| repository.manifests.values().cloned().collect())
            .unwrap_or_default()
    }
}

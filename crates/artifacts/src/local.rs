//! OCI layouts on disk: a folder, or a tar of one.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use oci::{Descriptor, Digest, Index};

/// An OCI layout.
#[derive(Debug)]
pub(crate) enum Local {
    /// A folder.
    Folder(PathBuf),
    /// A tar file, and where in it each file of the layout lies.
    Archive { file: File, path: PathBuf, members: HashMap<PathBuf, Range<u64>> },
}

/// A layout cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A file of it is missing or unreadable.
    #[error("reading {} of {}", name.display(), layout.display())]
    Io {
        /// The layout.
        layout: PathBuf,
        /// The file within.
        name: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not an OCI layout.
    #[error("{} is not an OCI layout: {why}", layout.display())]
    NotALayout {
        /// The layout.
        layout: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No image of this name in it.
    #[error("{} has no image {}; it has {}", layout.display(), tag.as_deref().unwrap_or("without a tag"), tags.join(", "))]
    NoSuchImage {
        /// The layout.
        layout: PathBuf,
        /// The tag that was asked for.
        tag: Option<String>,
        /// The tags that there are.
        tags: Vec<String>,
    },
    /// A file is larger than such a file may be.
    #[error("{} of {} has {size} bytes, more than the {limit} that are accepted", name.display(), layout.display())]
    TooLarge {
        /// The layout.
        layout: PathBuf,
        /// The file within.
        name: PathBuf,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
}

impl Local {
    pub(crate) fn folder(dir: &Path) -> Self {
        Self::Folder(dir.to_owned())
    }

    /// Opens a tar of a layout and notes where its files lie.
    pub(crate) fn archive(path: &Path) -> Result<Self, LocalError> {
        let failed =
            |source| LocalError::Io { layout: path.to_owned(), name: PathBuf::from("."), source };
        let file = File::open(path).map_err(failed)?;
        let mut members = HashMap::new();
        let mut tar = tar::Archive::new(&file);
        for entry in tar.entries_with_seek().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if members.len() >= MAX_MEMBERS {
                let why = format!("it has more than {MAX_MEMBERS} files");
                return Err(LocalError::NotALayout { layout: path.to_owned(), why });
            }
            if entry.header().entry_type().is_file() {
                let start = entry.raw_file_position();
                let name: PathBuf =
                    entry.path().map_err(failed)?.components().skip_while(is_dot).collect();
                members.insert(name, start..start.saturating_add(entry.size()));
            }
        }
        Ok(Self::Archive { file, path: path.to_owned(), members })
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Archive { path, .. } => path,
        }
    }

    /// The image named `tag`, or the only image there is.
    pub(crate) fn find(&self, tag: Option<&str>) -> Result<Descriptor, LocalError> {
        let index = self.index()?;
        let name_of = |descriptor: &Descriptor| descriptor.annotations.get(REF_NAME).cloned();
        let images: Vec<&Descriptor> =
            index.manifests.iter().filter(|entry| entry.artifact_type.is_none()).collect();
        let found = match (tag, images.as_slice()) {
            (None, [only]) => Some(*only),
            (None, _) => None,
            (Some(tag), all) => {
                all.iter().find(|entry| name_of(entry).as_deref() == Some(tag)).copied()
            }
        };
        found.cloned().ok_or_else(|| LocalError::NoSuchImage {
            layout: self.path().to_owned(),
            tag: tag.map(str::to_owned),
            tags: images
                .iter()
                .map(|entry| name_of(entry).unwrap_or_else(|| "(no tag)".to_owned()))
                .collect(),
        })
    }

    pub(crate) fn index(&self) -> Result<Index, LocalError> {
        let bytes = self.file(Path::new("index.json"), MAX_DOCUMENT)?;
        serde_json::from_slice(&bytes).map_err(|err| LocalError::NotALayout {
            layout: self.path().to_owned(),
            why: format!("index.json: {err}"),
        })
    }

    /// A whole blob of at most `limit` bytes. Its digest is for the caller to check.
    pub(crate) fn blob(&self, digest: &Digest, limit: u64) -> Result<Bytes, LocalError> {
        self.file(&blob_name(digest), limit)
    }

    /// A file that can be read from, and where in it the blob lies.
    pub(crate) fn open_blob(&self, digest: &Digest) -> Result<(File, Range<u64>), LocalError> {
        self.open(&blob_name(digest))
    }

    /// All manifests in the layout whose subject is `subject`.
    pub(crate) fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, LocalError> {
        let mut found = Vec::new();
        for entry in self.index()?.manifests {
            let Ok(bytes) = self.blob(&entry.digest, MAX_DOCUMENT) else { continue };
            let Ok(manifest) = serde_json::from_slice::<oci::Manifest>(&bytes) else { continue };
            if manifest.subject.as_ref().is_some_and(|named| named.digest == *subject) {
                let artifact_type = Some(manifest.effective_artifact_type().to_owned());
                found.push(Descriptor { artifact_type, ..entry });
            }
        }
        Ok(found)
    }

    /// Adds a blob to a folder; an archive is never changed.
    pub(crate) fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), LocalError> {
        self.write(&blob_name(digest), bytes)
    }

    /// Adds an entry to the folder's index, in place of one with the same digest.
    pub(crate) fn put_index_entry(&self, entry: Descriptor) -> Result<(), LocalError> {
        let mut index = self.index()?;
        index.manifests.retain(|old| old.digest != entry.digest);
        index.manifests.push(entry);
        self.write(Path::new("index.json"), &index.to_bytes())
    }

    /// Makes `tag` the name of `entry`, and of no other one.
    pub(crate) fn tag(&self, tag: &str, mut entry: Descriptor) -> Result<(), LocalError> {
        let mut index = self.index()?;
        let named =
            |old: &Descriptor| old.annotations.get(REF_NAME).is_some_and(|name| name == tag);
        index.manifests.retain(|old| !named(old));
        entry.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
        index.manifests.push(entry);
        self.write(Path::new("index.json"), &index.to_bytes())
    }

    fn write(&self, name: &Path, bytes: &[u8]) -> Result<(), LocalError> {
        let failed = |source| LocalError::Io {
            layout: self.path().to_owned(),
            name: name.to_owned(),
            source,
        };
        let Self::Folder(dir) = self else {
            return Err(failed(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "an archive is not changed",
            )));
        };
        let path = dir.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        sys::files::replace(&path, bytes).map_err(failed)
    }

    fn open(&self, name: &Path) -> Result<(File, Range<u64>), LocalError> {
        let failed = |source| LocalError::Io {
            layout: self.path().to_owned(),
            name: name.to_owned(),
            source,
        };
        match self {
            Self::Folder(dir) => {
                let file = File::open(dir.join(name)).map_err(failed)?;
                let len = file.metadata().map_err(failed)?.len();
                Ok((file, 0..len))
            }
            Self::Archive { file, members, .. } => {
                let range = members.get(name).cloned();
                let range = range.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
                Ok((file.try_clone().map_err(failed)?, range))
            }
        }
    }

    fn file(&self, name: &Path, limit: u64) -> Result<Bytes, LocalError> {
        let (file, range) = self.open(name)?;
        let size = range.end - range.start;
        if size > limit {
            let (layout, name) = (self.path().to_owned(), name.to_owned());
            return Err(LocalError::TooLarge { layout, name, size, limit });
        }
        let mut bytes = Vec::new();
        At { file: &file, at: range.start }.take(size).read_to_end(&mut bytes).map_err(
            |source| LocalError::Io {
                layout: self.path().to_owned(),
                name: name.to_owned(),
                source,
            },
        )?;
        Ok(bytes.into())
    }
}

/// Reads on from an offset without moving the file's own.
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

fn blob_name(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

fn is_dot(component: &std::path::Component<'_>) -> bool {
    matches!(component, std::path::Component::CurDir)
}

/// The annotation that tags an image in a layout's index.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Manifests, configurations and indexes are refused above this.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;

const MAX_MEMBERS: usize = 100_000;

//! What is written down of a mount, so that a successor finds it.

use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use oci::Digest;
use serde::{Deserialize, Serialize};

use crate::error::MountImageError;

/// How an image gets into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// EROFS over the layers' sparse files; the kernel asks before it reads them (fanotify).
    Erofs,
    /// EROFS over loop devices, whose files we serve until the layers are sealed.
    ErofsLoop,
    /// A FUSE file system.
    Fuse,
}

impl Backend {
    /// All, the best first.
    pub const ALL: [Self; 3] = [Self::Erofs, Self::ErofsLoop, Self::Fuse];
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Erofs => "erofs",
            Self::ErofsLoop => "erofs-loop",
            Self::Fuse => "fuse",
        })
    }
}

/// A file under a loop device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Looped {
    /// The device.
    pub device: PathBuf,
    /// The number of the file's device.
    pub dev: u64,
    /// The file's inode number.
    pub ino: u64,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Names the mount for as long as it lives.
    pub id: String,
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// Where it is mounted.
    pub dir: PathBuf,
    /// How.
    pub backend: Backend,
    /// The image's layers, the lowest first.
    pub layers: Vec<Digest>,
    /// Of [`Backend::ErofsLoop`], the loop device of each layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<PathBuf>,
    /// Of [`Backend::ErofsLoop`], the loop device of the metadata, which no other mount has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Looped>,
    /// Of [`Backend::Erofs`], the name under which the kernel lists the file system for as long as
    /// anybody uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bdi: Option<String>,
    /// Whether it was unmounted while it was read. What is on its folder then is another mount.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_detached: bool,
}

/// The records of a root folder: one file for each mount.
#[derive(Debug)]
pub(crate) struct Records(PathBuf);

impl Records {
    /// Makes the folder, if need be.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let dir = root.join("mounts");
        fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    /// All that can be read, in the order of their names.
    pub(crate) fn read(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match fs::read(&path).map(|bytes| serde_json::from_slice::<Record>(&bytes)) {
                Ok(Ok(record)) => records.push(record),
                Ok(Err(err)) => {
                    tracing::error!(path = %path.display(), error = %err, "record of a mount is damaged");
                }
                Err(err) => {
                    tracing::error!(path = %path.display(), error = %err, "record of a mount cannot be read");
                }
            }
        }
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(records)
    }

    pub(crate) fn write(&self, record: &Record) -> Result<(), MountImageError> {
        let path = self.path(record);
        let written = serde_json::to_vec(record).map_err(io::Error::from);
        let written = written.and_then(|bytes| sys::files::replace_durably(&path, &bytes));
        written.map_err(|source| MountImageError::Record { path, source })
    }

    pub(crate) fn forget(&self, record: &Record) {
        if let Err(err) = fs::remove_file(self.path(record))
            && err.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(id = record.id, error = %err, "record of a mount stays");
        }
    }

    fn path(&self, record: &Record) -> PathBuf {
        self.0.join(format!("{}.json", record.id))
    }
}

//! What is written down of a mount, so that a successor finds it.

use std::fmt;
use std::path::PathBuf;

use oci::Digest;
use serde::{Deserialize, Serialize};

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
}

//! What the command line and the daemon say to each other: one JSON object a line over a unix
//! socket. A client sends one request; the daemon answers with any number of `Progress` and one of
//! the two others.

use std::path::PathBuf;

use mounts::Backend;
use policy::{CacheClass, Completion};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How an image's registry is reached; kept with the mount, since the daemon needs it for as long
/// as bytes are missing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Access {
    /// Folder with hosts.toml files.
    pub(crate) hosts_dir: PathBuf,
    /// Docker's config.json.
    pub(crate) docker_config: Option<PathBuf>,
    /// Whether the credentials of this node's kubelet count as well.
    #[serde(default)]
    pub(crate) kubelet: bool,
}

/// A request to mount an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MountRequest {
    /// The image, as the user wrote it, with an absolute path where it has one.
    pub(crate) image: String,
    /// Where; absolute.
    pub(crate) dir: PathBuf,
    /// `None` for the best that works.
    pub(crate) backend: Option<Backend>,
    /// `None` for this machine's.
    pub(crate) platform: Option<String>,
    /// How the registry is reached.
    pub(crate) access: Access,
    /// How the mount is served.
    pub(crate) tuning: MountTuning,
    /// What will be run, for what it needs to be fetched ahead of it; empty for the image's own.
    #[serde(default)]
    pub(crate) command: Vec<String>,
}

/// How a mount is served; kept with the image, for the daemons to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountTuning {
    /// When what nobody has read is fetched as well.
    pub(crate) completion: Completion,
    /// How long a read waits before it fails.
    pub(crate) deadline: std::time::Duration,
    /// When its bytes are given up.
    #[serde(default)]
    pub(crate) cache_class: CacheClass,
}

impl Default for MountTuning {
    /// Everything is fetched, and reads wait for five minutes.
    fn default() -> Self {
        Self {
            completion: Completion::Now,
            deadline: std::time::Duration::from_secs(300),
            cache_class: CacheClass::Standard,
        }
    }
}

/// What a client asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Mount an image.
    Mount(MountRequest),
    /// Unmount what is on a folder.
    Umount {
        /// The folder; absolute.
        dir: PathBuf,
        /// Detach it if it is busy.
        lazy: bool,
    },
    /// The daemon, its mounts and their state.
    Status,
    /// Why an image or mount is lazy or not.
    Explain {
        /// An image or a folder.
        what: String,
    },
    /// What Prometheus would get.
    Metrics,
    /// The cached layers.
    CacheList,
    /// Remove layers that no mount uses.
    CachePrune {
        /// Bytes that may stay.
        keep: Option<u64>,
    },
    /// Compare the cached layers with their checksums.
    CacheVerify,
}

/// What the daemon answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// Something takes time.
    Progress {
        /// What is being done.
        what: String,
        /// How much of it is done.
        done: u64,
        /// How much there is; 0 if unknown.
        total: u64,
    },
    /// It is done.
    Done(Value),
    /// It failed.
    Failed {
        /// How the command ends.
        exit: crate::failure::Exit,
        /// The whole story, in a line.
        message: String,
    },
}

//! Why an image could not be mounted.

use std::io;
use std::path::{Path, PathBuf};

use crate::precontent::PreContentError;
use crate::record::Backend;

/// One back end cannot mount.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A file or folder.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Pre-content events.
    #[error(transparent)]
    PreContent(#[from] PreContentError),
    /// The kernel.
    #[error(transparent)]
    Mount(#[from] sys::mount::MountError),
    /// A loop device.
    #[error("attaching a loop device")]
    Loop(#[from] sys::loop_device::AttachError),
    /// FUSE.
    #[error("mounting FUSE")]
    MountFuse(#[from] fuse::MountFuseError),
    /// FUSE.
    #[error("serving FUSE")]
    Session(#[from] fuse::StartSessionError),
    /// A file of the served folder.
    #[error("serving a layer as a file")]
    Serve(#[from] fuse::AddFileError),
    /// The image cannot be written as EROFS metadata.
    #[error("writing the image's metadata")]
    Metadata(#[from] erofs::WriteError),
    /// The image's files are not known any more.
    #[error(transparent)]
    Tree(#[from] tree::MakeTreeError),
    /// There is none that works.
    #[error("no back end works here: {0}")]
    None(String),
    /// The kernel has no pre-content events any more, or never had.
    #[error("pre-content events are not available")]
    NoEvents,
    /// Nobody could say later whether the mount is still used.
    #[error("the kernel does not tell the new mount from others in /sys/class/bdi")]
    Nameless,
    /// A probe read something else than it had written.
    #[error("the kernel read other bytes than were there")]
    WrongBytes,
    /// A probe in a user namespace saw somebody else's files.
    #[error("the kernel shows files of a user namespace's root as somebody else's")]
    WrongOwner,
}

impl BackendError {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { what, path: path.to_owned(), source }
    }
}

impl From<io::Error> for BackendError {
    fn from(source: io::Error) -> Self {
        Self::Io { what: "using", path: PathBuf::from("a descriptor"), source }
    }
}

/// An image could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountImageError {
    /// The back end that was asked for does not work here.
    #[error("back end {backend} does not work here: {why}")]
    Unavailable {
        /// The back end.
        backend: Backend,
        /// What the probe at start found.
        why: String,
    },
    /// The folder cannot be mounted on.
    #[error("{} cannot be mounted on", dir.display())]
    Dir {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something is mounted there already.
    #[error("{} already has an image mounted on it; unmount it first", .0.display())]
    InUse(PathBuf),
    /// Every back end failed.
    #[error("mounting on {} failed", dir.display())]
    Failed {
        /// The folder.
        dir: PathBuf,
        /// The last back end's reason.
        source: BackendError,
    },
    /// The mount cannot be written down.
    #[error("writing down the mount in {}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Nothing could be given up of a layer.
#[derive(Debug, thiserror::Error)]
pub enum EvictLayerError {
    /// Somebody may read it past us.
    #[error("layer {layer} belongs to a mount that was lost; unmount that first")]
    Lost {
        /// The layer's blob.
        layer: oci::Digest,
    },
    /// The engine, the kernel or the disk.
    #[error(transparent)]
    Layer(#[from] fill::ReopenError),
}

/// An image could not be unmounted.
#[derive(Debug, thiserror::Error)]
pub enum UnmountImageError {
    /// It is in use.
    #[error("{} is in use{}; end them, or detach it with --lazy", dir.display(), users(pids))]
    Busy {
        /// The folder.
        dir: PathBuf,
        /// Processes whose root, working folder or program lies in it.
        pids: Vec<i32>,
    },
    /// No image is mounted there.
    #[error("no image is mounted on {}; `hermes status` lists the mounts", .0.display())]
    NotMounted(PathBuf),
    /// The kernel refused.
    #[error("unmounting {}", dir.display())]
    Io {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn users(pids: &[i32]) -> String {
    if pids.is_empty() {
        return String::new();
    }
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    format!(" by process {}", pids.join(", "))
}

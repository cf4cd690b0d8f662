//! How a command fails: an exit code, and a sentence.

use serde::{Deserialize, Serialize};

/// The exit codes that `hermes --help` lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Exit {
    /// It failed, and only the sentence says why.
    Failed,
    /// The image or index does not exist.
    NotFound,
    /// The registry wants other credentials.
    Unauthorized,
    /// The mount is in use.
    Busy,
    /// What was read is not what was promised.
    Corrupt,
    /// The disk is full.
    NoRoom,
}

impl Exit {
    /// The number for the shell.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::NotFound => 3,
            Self::Unauthorized => 4,
            Self::Busy => 5,
            Self::Corrupt => 6,
            Self::NoRoom => 7,
        }
    }
}

/// A failure whose exit code is not 1.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
}

/// The exit code for `err`, from whatever in its chain knows best.
pub(crate) fn exit_of(err: &anyhow::Error) -> Exit {
    for cause in err.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return failure.exit;
        }
        if cache::is_no_room(cause) {
            return Exit::NoRoom;
        }
        if let Some(fetch) = cause.downcast_ref::<registry::FetchError>() {
            return match fetch {
                registry::FetchError::NotFound { .. } => Exit::NotFound,
                registry::FetchError::Unauthorized { .. } => Exit::Unauthorized,
                registry::FetchError::WrongDigest { .. } => Exit::Corrupt,
                _ => Exit::Failed,
            };
        }
        if let Some(mounts::UnmountImageError::Busy { .. }) = cause.downcast_ref() {
            return Exit::Busy;
        }
        if let Some(origin) = cause.downcast_ref::<artifacts::OriginError>() {
            match origin {
                artifacts::OriginError::WrongDigest { .. } => return Exit::Corrupt,
                artifacts::OriginError::WrongPlatform { .. } => return Exit::NotFound,
                artifacts::OriginError::Local {
                    source: artifacts::LocalError::NoSuchImage { .. },
                    ..
                } => {
                    return Exit::NotFound;
                }
                _ => {}
            }
        }
    }
    Exit::Failed
}

/// The whole chain in one line, without saying anything twice.
pub(crate) fn in_full(err: &anyhow::Error) -> String {
    causes::in_full(err.as_ref())
}

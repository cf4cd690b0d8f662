//! What `install` made and changed, written down for `uninstall`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oci::Digest;
use serde::{Deserialize, Serialize};

use super::edit::Change;

/// Its place in the root folder.
const NAME: &str = "node.json";

/// What was made and changed.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// Folders that were not there, in the order in which they were made.
    pub(super) folders: Vec<PathBuf>,
    /// Files, in the order in which they were first written.
    pub(super) files: Vec<WrittenFile>,
    /// Whether the service was enabled.
    pub(super) enabled_service: bool,
}

/// A file that was made or changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct WrittenFile {
    pub(super) path: PathBuf,
    /// Of what was written.
    pub(super) digest: Digest,
    pub(super) before: Before,
    /// The keys that were changed in it, if it was there.
    #[serde(default)]
    pub(super) changes: Vec<Change>,
}

/// What was there before a file was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Before {
    /// Nothing.
    Nothing,
    /// A file, of which this is a copy.
    File {
        /// Beside the file.
        copy: PathBuf,
        /// Of its content.
        digest: Digest,
    },
    /// What somebody else has made of what was written before: only keys can be taken out of it.
    Mixture,
}

impl WrittenFile {
    /// Whether a file says what was written, or what it said before, since nothing more came of it.
    pub(super) fn is(&self, bytes: &[u8]) -> bool {
        let now = Digest::of(bytes);
        now == self.digest || matches!(self.before, Before::File { digest, .. } if digest == now)
    }
}

impl Record {
    /// Reads what there is.
    pub(super) fn read(root: &Path) -> Result<Option<Self>> {
        let path = root.join(NAME);
        let context = || format!("reading {}, which says what was installed", path.display());
        match fs::read(&path) {
            Err(err) if err.kind() == ErrorKind::NotFound => Ok(None),
            other => {
                let json = other.with_context(context)?;
                serde_json::from_slice(&json).with_context(context).map(Some)
            }
        }
    }

    /// Writes it down.
    pub(super) fn write(&self, root: &Path) -> Result<()> {
        let path = root.join(NAME);
        let json = serde_json::to_vec_pretty(self)?;
        sys::files::replace_durably(&path, &json)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Removes it: nothing is installed any more.
    pub(super) fn remove(root: &Path) -> Result<()> {
        let path = root.join(NAME);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// What was written at a path.
    pub(super) fn file(&self, path: &Path) -> Option<&WrittenFile> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Notes a file; of a key that was noted before, what it said first counts.
    pub(super) fn note(&mut self, file: WrittenFile) {
        let Some(known) = self.files.iter_mut().find(|known| known.path == file.path) else {
            self.files.push(file);
            return;
        };
        (known.digest, known.before) = (file.digest, file.before);
        for mut change in file.changes {
            let same = known.changes.iter().position(|old| old.path == change.path);
            if let Some(old) = same.map(|at| known.changes.remove(at))
                && change.before.as_ref() == Some(&old.after)
            {
                change.before = old.before;
            }
            known.changes.push(change);
        }
    }
}

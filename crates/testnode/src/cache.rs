//! Where the expensive parts lie: folders named by the content of the recipe that makes them.

use std::env;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

/// The recipe of the Debian root.
const ROOT_RECIPE: &str = include_str!("../root.sh");

/// What decides the content of the peers built from source, besides the root that they are built on.
const PEERS_RECIPE: &[&str] = &[
    include_str!("../peers/build.sh"),
    include_str!("../peers/containerd/go.mod"),
    include_str!("../peers/containerd/go.sum"),
    include_str!("../peers/soci15/go.mod"),
    include_str!("../peers/soci15/go.sum"),
    include_str!("../peers/soci15/main.go"),
    include_str!("../peers/cri/go.mod"),
    include_str!("../peers/cri/go.sum"),
    include_str!("../peers/cri/main.go"),
    include_str!("../peers/collector/go.mod"),
    include_str!("../peers/collector/go.sum"),
    include_str!("../peers/collector/main.go"),
    include_str!("../peers/suite/go.mod"),
    include_str!("../peers/suite/go.sum"),
    include_str!("../peers/suite/calls_test.go"),
    include_str!("../peers/suite/suite_test.go"),
];

/// The folder, outside of any clone, that keeps what tests need between runs.
///
/// `$XDG_CACHE_HOME/hermes-test`, or `/var/cache/hermes-test`. Each part has a name that contains a
/// hash of its recipe, so clones at different revisions share the folder without a conflict.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Finds the folder; it need not exist yet.
    #[must_use]
    pub fn locate() -> Self {
        let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
        Self { folder: base.unwrap_or_else(|| PathBuf::from("/var/cache")).join("hermes-test") }
    }

    /// The folder itself.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The Debian root, whether it is there or not.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.join(format!("root-{}", key(&[ROOT_RECIPE])))
    }

    /// The folder with `containerd`, `ctr`, `containerd-shim-runc-v2`, `soci15`, `cri`,
    /// `collector` and `snapshotter-suite`, whether it is there or not.
    #[must_use]
    pub fn peers(&self) -> PathBuf {
        self.part("peers", PEERS_RECIPE)
    }

    /// The folder of a part that is made on the Debian root by a recipe, whether it is there or not.
    #[must_use]
    pub fn part(&self, name: &str, recipe: &[&str]) -> PathBuf {
        let recipe: Vec<&str> = [ROOT_RECIPE].iter().chain(recipe).copied().collect();
        self.folder.join(format!("{name}-{}", key(&recipe)))
    }

    /// Lets one process at a time make parts, for as long as the value lives.
    ///
    /// # Errors
    /// When the folder cannot be made or locked.
    pub fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("making {}", self.folder.display()))?;
        let lock =
            File::create(self.folder.join("lock")).context("making the lock of the cache")?;
        flock(lock.as_fd(), FlockOperation::LockExclusive).context("locking the cache")?;
        Ok(lock)
    }

    /// Lets `how` fill a folder unless `path` exists, then gives it that name: what is there is whole.
    ///
    /// # Errors
    /// When a folder cannot be made or renamed, and what `how` fails with.
    pub fn make(path: &Path, how: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if path.exists() {
            return Ok(());
        }
        let partial = path.with_extension("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)
                .with_context(|| format!("removing {}", partial.display()))?;
        }
        fs::create_dir(&partial).with_context(|| format!("making {}", partial.display()))?;
        how(&partial)?;
        fs::rename(&partial, path).with_context(|| format!("renaming {}", partial.display()))
    }

    /// The folder in which running nodes keep their changes.
    #[must_use]
    pub fn nodes(&self) -> PathBuf {
        self.folder.join("nodes")
    }

    /// The Debian root.
    ///
    /// # Errors
    /// When it is not there, with what to do about it.
    pub fn existing_root(&self) -> Result<PathBuf> {
        existing(self.root(), "the Debian root of test nodes")
    }

    /// The peers built from source.
    ///
    /// # Errors
    /// When they are not there, with what to do about it.
    pub fn existing_peers(&self) -> Result<PathBuf> {
        existing(self.peers(), "the peers that tests run against")
    }
}

fn existing(path: PathBuf, what: &str) -> Result<PathBuf> {
    if !path.is_dir() {
        bail!("{what} is missing at {}: run `cargo xtask setup` as root", path.display());
    }
    Ok(path)
}

/// A name for `parts`; 64 bits are plenty to tell a project's recipes apart.
fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        hash.update(part);
    }
    let mut name = hex::encode(hash.finalize());
    name.truncate(16);
    name
}

#[cfg(test)]
mod tests {
    use super::key;

    #[test]
    fn a_key_depends_on_where_parts_end() {
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&[]).len(), 16);
    }
}

//! The policies of a folder, read again whenever something changes there.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use parking_lot::{Mutex, RwLock};
use policy::{HermesPolicy, PolicySet};
use rustix::fs::inotify;
use rustix::io::retry_on_intr;

/// The policies of a folder.
#[derive(Debug)]
pub(crate) struct Policies {
    folder: PathBuf,
    current: RwLock<Arc<PolicySet>>,
    files: Mutex<Files>,
    /// Tells of changes, if the folder can be watched.
    changes: io::Result<OwnedFd>,
}

/// What the files said when they could last be used.
#[derive(Debug, Default)]
struct Files {
    good: BTreeMap<PathBuf, Vec<HermesPolicy>>,
    /// Why some of what lies there is not in force.
    trouble: Vec<String>,
}

impl Policies {
    /// Reads the policies of a folder, which is made if need be. What cannot be used is left out: images that
    /// it would have selected are not lazy, and start.
    pub(crate) fn open(folder: &Path) -> Self {
        if let Err(err) = fs::create_dir_all(folder) {
            tracing::warn!(folder = %folder.display(), error = %err, "the policies' folder cannot be made");
        }
        let policies = Self {
            folder: folder.to_owned(),
            current: RwLock::default(),
            files: Mutex::default(),
            // First: what changed before the watch is not told.
            changes: watch(folder),
        };
        policies.read_again();
        policies
    }

    /// What is in force now.
    pub(crate) fn current(&self) -> Arc<PolicySet> {
        Arc::clone(&self.current.read())
    }

    /// Why some of what lies in the folder is not in force.
    pub(crate) fn trouble(&self) -> Vec<String> {
        self.files.lock().trouble.clone()
    }

    /// Reads the folder. Of a file that cannot be used, what it said before stays in force.
    fn read_again(&self) {
        let mut files = self.files.lock();
        files.trouble.clear();
        let found = match list(&self.folder) {
            Ok(found) => found,
            Err(err) => {
                let error = crate::failure::in_full(&err);
                tracing::error!(error, "policies cannot be read; what was before stays");
                return files.trouble.push(error);
            }
        };
        let mut now = BTreeMap::new();
        for path in found {
            match read(&path) {
                Ok(policies) => {
                    now.insert(path, policies);
                }
                Err(err) => {
                    files.trouble.push(crate::failure::in_full(&err));
                    if let Some(before) = files.good.remove(&path) {
                        now.insert(path, before);
                    }
                }
            }
        }
        let all: Vec<HermesPolicy> = now.values().flatten().cloned().collect();
        match PolicySet::new(&all) {
            Ok(set) => {
                tracing::info!(folder = %self.folder.display(), policies = set.len(), "policies are in force");
                *self.current.write() = Arc::new(set);
            }
            // Each file is fine by itself.
            Err(err) => files.trouble.push(causes::in_full(&err)),
        }
        files.good = now;
        for error in &files.trouble {
            tracing::error!(error, "a policy is not in force; what was before stays");
        }
    }

    /// Reads the folder again whenever something changes there, for as long as the process lives.
    pub(crate) fn watch(self: &Arc<Self>) -> io::Result<()> {
        let policies = Arc::clone(self);
        let watch = move || {
            let Err(err) = policies.follow();
            let folder = policies.folder.display();
            tracing::error!(%folder, error = %err, "policies are read at the next start only");
        };
        std::thread::Builder::new().name("policies".to_owned()).spawn(watch).map(drop)
    }

    fn follow(&self) -> Result<Infallible, String> {
        let changes = self.changes.as_ref().map_err(ToString::to_string)?;
        let mut events = [0; 4096];
        loop {
            // Only that there is something matters.
            retry_on_intr(|| rustix::io::read(changes, &mut events))
                .map_err(|err| err.to_string())?;
            self.read_again();
        }
    }
}

fn watch(folder: &Path) -> io::Result<OwnedFd> {
    let inotify = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    let changes = inotify::WatchFlags::CLOSE_WRITE
        | inotify::WatchFlags::CREATE
        | inotify::WatchFlags::DELETE
        | inotify::WatchFlags::MOVE;
    inotify::add_watch(&inotify, folder, changes)?;
    Ok(inotify)
}

/// The policies of a folder, all of which can be used.
pub(crate) fn read_strictly(folder: &Path) -> Result<PolicySet> {
    let mut policies = Vec::new();
    for path in list(folder)? {
        policies.extend(read(&path)?);
    }
    PolicySet::new(&policies).with_context(|| format!("reading {}", folder.display()))
}

/// The files with policies, in order. What Kubernetes mounts has its own hidden folders beside them.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let context = || format!("reading the policies' folder {}", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let is_hidden =
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !is_hidden && matches!(extension, Some("yaml" | "yml" | "json")) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<HermesPolicy>> {
    let context = || format!("reading {}", path.display());
    let mut text = String::new();
    let file = File::open(path).with_context(context)?;
    let n_read = file.take(MOST_TEXT + 1).read_to_string(&mut text).with_context(context)?;
    ensure!(n_read as u64 <= MOST_TEXT, "{} is longer than {MOST_TEXT} bytes", path.display());
    let policies = policy::parse(&text).with_context(context)?;
    PolicySet::new(&policies).with_context(context)?;
    Ok(policies)
}

/// Nobody writes more by hand.
const MOST_TEXT: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use oci::Platform;
    use policy::Reason;

    use super::*;

    fn policy(name: &str, glob: &str) -> String {
        format!(
            "apiVersion: {}\nkind: {}\nmetadata: {{name: {name}}}\n\
             spec: {{imageSelectors: [{{glob: '{glob}'}}]}}\n",
            policy::API_VERSION,
            policy::KIND
        )
    }

    fn check(policies: &Policies, image: &str, expected: Result<&str, Reason>) {
        let set = policies.current();
        let image = image.parse().unwrap();
        let found = set.select(&image, &Platform::host());
        let found = found.map(|selected| selected.policy).map_err(|(reason, _)| reason);
        assert_eq!(found, expected, "{image}");
    }

    #[test]
    fn what_cannot_be_used_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("a.yaml", &policy("a", "reg.test/a:*"));
        write("b.yaml", &policy("b", "reg.test/b:*"));
        write("c.yaml", "spec: [");
        write("notes.txt", "spec: [");
        write(".hidden.yaml", "spec: [");
        let policies = Policies::open(dir.path());
        check(&policies, "reg.test/a:1", Ok("a"));
        check(&policies, "reg.test/b:1", Ok("b"));
        let [trouble] = <[_; 1]>::try_from(policies.trouble()).unwrap();
        assert!(trouble.contains("c.yaml"), "{trouble}");
        read_strictly(dir.path()).unwrap_err();

        write("a.yaml", "spec: [");
        write("b.yaml", &policy("b", "reg.test/other:*"));
        fs::remove_file(dir.path().join("c.yaml")).unwrap();
        policies.read_again();
        check(&policies, "reg.test/a:1", Ok("a"));
        check(&policies, "reg.test/b:1", Err(Reason::NoPolicy));
        check(&policies, "reg.test/other:1", Ok("b"));

        // The same name in two files.
        write("c.yaml", &policy("b", "**"));
        policies.read_again();
        check(&policies, "reg.test/new:1", Err(Reason::NoPolicy));
        assert!(policies.trouble().iter().any(|trouble| trouble.contains("two policies `b`")));

        for name in ["a.yaml", "c.yaml"] {
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        policies.read_again();
        check(&policies, "reg.test/a:1", Err(Reason::NoPolicy));
        assert_eq!(policies.trouble(), [""; 0]);
        assert_eq!(read_strictly(dir.path()).unwrap().len(), 1);

        // The folder itself.
        fs::rename(dir.path(), dir.path().with_extension("away")).unwrap();
        policies.read_again();
        check(&policies, "reg.test/other:1", Ok("b"));
        assert!(policies.trouble()[0].contains("policies' folder"), "{:?}", policies.trouble());
        fs::rename(dir.path().with_extension("away"), dir.path()).unwrap();
    }

    #[test]
    fn a_folder_that_is_not_there_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let policies = Policies::open(&dir.path().join("a/b"));
        assert!(dir.path().join("a/b").is_dir());
        check(&policies, "reg.test/a:1", Err(Reason::NoPolicy));
    }
}

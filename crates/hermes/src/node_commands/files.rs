//! Files and folders that are made or changed so that all of it can be taken back.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oci::Digest;

use super::edit::{self, Change};
use super::record::{Before, Record, WrittenFile};
use super::steps::Steps;

/// Makes changes, and writes them down before it makes them.
pub(super) struct Files<'a> {
    pub(super) root: &'a Path,
    pub(super) record: Record,
    pub(super) steps: Steps,
}

impl Files<'_> {
    /// Makes a folder, with those above it.
    pub(super) fn make_folder(&mut self, path: &Path, what: &str) -> Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|folder| !folder.exists()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.steps.tell(format!("make {}, {what}", path.display()))?;
        if self.steps.is_trial() {
            return Ok(());
        }
        // First: it may be the one that this is written down in.
        fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
        self.record.folders.extend(missing.iter().rev().map(|folder| folder.to_path_buf()));
        self.record.write(self.root)
    }

    /// Writes a file unless it says so already. True if it did not.
    pub(super) fn write(
        &mut self,
        path: &Path,
        text: &str,
        what: &str,
        changes: &[Change],
    ) -> Result<bool> {
        let old = read(path)?;
        if old.as_deref() == Some(text.as_bytes()) {
            return Ok(false);
        }
        let known = self.record.file(path);
        let is_others = known.zip(old.as_deref()).is_some_and(|(known, old)| !known.is(old));
        if is_others && changes.is_empty() {
            let shown = path.display();
            self.steps.note(format!("{shown} was changed by somebody, and stays as it is"))?;
            return Ok(false);
        }
        let known = known.map(|known| known.before.clone());
        if let Some(folder) = path.parent() {
            self.make_folder(folder, "for what follows")?;
        }
        let verb = if old.is_some() { "change" } else { "write" };
        self.steps.tell(format!("{verb} {}, {what}", path.display()))?;
        for change in changes {
            self.steps.note(format!("    {}", change.shown()))?;
        }
        if self.steps.is_trial() {
            return Ok(true);
        }
        let digest = Digest::of(text.as_bytes());
        let before = match (&old, known) {
            (None, _) => Before::Nothing,
            (Some(_), Some(_)) if is_others => Before::Mixture,
            (Some(_), Some(before)) => before,
            (Some(old), None) => self.save(path, old)?,
        };
        let changes = changes.to_vec();
        self.record.note(WrittenFile { path: path.to_owned(), digest, before, changes });
        self.record.write(self.root)?;
        replace(path, text.as_bytes())?;
        Ok(true)
    }

    /// Saves a copy beside a file.
    fn save(&mut self, path: &Path, old: &[u8]) -> Result<Before> {
        let copy = beside(path);
        self.steps.note(format!("    as it was, it is kept as {}", copy.display()))?;
        write_like(path, &copy, old)?;
        Ok(Before::File { copy, digest: Digest::of(old) })
    }

    /// Takes back what was done to a file. True if something changed.
    pub(super) fn undo(&mut self, file: &WrittenFile) -> Result<bool> {
        let WrittenFile { path, digest, before, changes } = file;
        let Some(now) = read(path)? else {
            self.steps.note(format!("{} is gone already", path.display()))?;
            return Ok(false);
        };
        let is_ours = Digest::of(&now) == *digest;
        match before {
            Before::File { copy, digest } if Digest::of(&now) == *digest => {
                remove(copy)?;
                return Ok(false);
            }
            Before::Nothing if is_ours => {
                self.steps.tell(format!("remove {}", path.display()))?;
                remove(path)?;
            }
            Before::File { copy, digest } if is_ours => {
                let old = read(copy)?;
                let Some(old) = old.filter(|old| Digest::of(old) == *digest) else {
                    return self.undo_keys(path, &now, changes);
                };
                self.steps.tell(format!("put {} back as it was", path.display()))?;
                replace(path, &old)?;
                remove(copy)?;
            }
            Before::Nothing | Before::File { .. } | Before::Mixture => {
                return self.undo_keys(path, &now, changes);
            }
        }
        Ok(true)
    }

    /// Takes single keys out of a file that somebody else has changed.
    fn undo_keys(&mut self, path: &Path, now: &[u8], changes: &[Change]) -> Result<bool> {
        let shown = path.display();
        if changes.is_empty() {
            self.steps.note(format!("{shown} was changed since, and stays: remove it by hand"))?;
            return Ok(false);
        }
        let text = std::str::from_utf8(now).with_context(|| format!("reading {shown}"))?;
        let undone = edit::undo(text, changes);
        let (text, left) = undone.with_context(|| format!("taking our keys out of {shown}"))?;
        self.steps
            .tell(format!("take out of {shown} what is ours, since somebody has changed it"))?;
        for key in left {
            self.steps.note(format!("    left, since it was changed: {key}"))?;
        }
        if text.trim().is_empty() {
            remove(path)?;
        } else {
            replace(path, text.as_bytes())?;
        }
        if let Some(copy) = fs::exists(beside(path)).is_ok_and(|is| is).then(|| beside(path)) {
            self.steps.note(format!("    what it was at first is in {}", copy.display()))?;
        }
        Ok(true)
    }
}

/// Where the copy of a file is kept.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".before-hermes");
    name.into()
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(err) if err.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some).with_context(|| format!("reading {}", path.display())),
    }
}

pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != ErrorKind::NotFound => {
            Err(err).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Replaces a file and keeps its owner and mode. What a link points to is changed, not the link.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let path = fs::canonicalize(path).unwrap_or_else(|_not_there| path.to_owned());
    write_like(&path, &path, bytes)
}

/// Writes a file with the owner and the mode of another one, if that is there: it may hold secrets.
fn write_like(model: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let context = || format!("writing {}", path.display());
    let model = fs::metadata(model).ok();
    let mode = model.as_ref().map_or(0o644, MetadataExt::mode);
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    let mut new = tempfile::Builder::new().tempfile_in(folder).with_context(context)?;
    new.write_all(bytes).with_context(context)?;
    if let Some(model) = model {
        fchown(&new, Some(model.uid()), Some(model.gid())).with_context(context)?;
    }
    new.as_file().set_permissions(Permissions::from_mode(mode)).with_context(context)?;
    new.as_file().sync_all().with_context(context)?;
    new.persist(path).map(drop).with_context(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::OutputFormat;
    use crate::output::Output;

    fn files(root: &Path) -> Files<'_> {
        let record = Record::read(root).unwrap().unwrap_or_default();
        let steps = Steps::new(Output::new(OutputFormat::Json), false);
        Files { root, record, steps }
    }

    #[track_caller]
    fn undo(root: &Path, expected: Option<&str>) {
        let path = root.join("file.toml");
        let mut files = files(root);
        let file = files.record.file(&path).unwrap().clone();
        files.undo(&file).unwrap();
        assert_eq!(fs::read_to_string(&path).ok().as_deref(), expected);
        assert_eq!(fs::read_dir(root).unwrap().count(), 1 + usize::from(expected.is_some()));
    }

    #[test]
    fn an_interrupted_installation_is_finished_and_can_be_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let (root, path) = (dir.path(), dir.path().join("file.toml"));
        fs::write(&path, "a = 1\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert!(files(root).write(&path, "a = 2\n", "", &[]).unwrap());
        // As if it had been written down and not done.
        fs::write(&path, "a = 1\n").unwrap();
        assert!(files(root).write(&path, "a = 3\n", "", &[]).unwrap());
        assert!(!files(root).write(&path, "a = 3\n", "", &[]).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "a = 3\n");
        undo(root, Some("a = 1\n"));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        undo(root, Some("a = 1\n"));
    }

    #[test]
    fn the_root_folder_need_not_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        let mut files = files(&root);
        files.make_folder(&root, "").unwrap();
        files.make_folder(&root, "").unwrap();
        let folders = [dir.path().join("a"), root.clone()];
        assert_eq!(Record::read(&root).unwrap().unwrap().folders, folders);
    }

    #[test]
    fn a_file_that_somebody_else_has_changed_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (root, path) = (dir.path(), dir.path().join("file.toml"));
        assert!(files(root).write(&path, "a = 2\n", "", &[]).unwrap());
        fs::write(&path, "b = 2\n").unwrap();
        assert!(!files(root).write(&path, "a = 3\n", "", &[]).unwrap());
        undo(root, Some("b = 2\n"));
        fs::write(&path, "a = 2\n").unwrap();
        undo(root, None);
    }
}

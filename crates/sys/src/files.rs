//! Files that are replaced as a whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Writes a file that is either the old one or the new one, also after this process was killed. Several
/// may replace one file at once: the last one counts.
///
/// # Errors
/// What the disk says; the old file is there as before, and nothing of the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_by(path, |mut file| file.write_all(bytes))
}

/// As [`replace`], and the new file is whole after a loss of power too, if it is there.
///
/// # Errors
/// As [`replace`].
pub fn replace_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_by(path, |mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    })
}

/// As [`replace`], with what `write` writes.
///
/// # Errors
/// As [`replace`], and what `write` says.
pub fn replace_by<T>(path: &Path, write: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
    // One name, so that a process that is killed leaves no more than one file behind, which the next one
    // takes.
    let new = path.with_extension("new");
    let file = claim(&new)?;
    let write_and_rename = || {
        file.set_len(0)?;
        let written = write(&file)?;
        fs::rename(&new, path)?;
        Ok(written)
    };
    // On a full disk it may be there, and empty.
    write_and_rename().inspect_err(|_| fs::remove_file(&new).unwrap_or_default())
}

/// Opens the file at `path`, made if need be, for nobody else who claims it: two that write to one file
/// would both have the bytes of both. It is let go when it is closed.
fn claim(path: &Path) -> io::Result<File> {
    loop {
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        file.lock()?;
        let ours = file.metadata()?;
        match fs::metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => return Ok(file),
            // Whoever had it before has renamed or removed it.
            Ok(_) => {}
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => return Err(err),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_may_replace_one_file_and_it_is_always_one_of_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        std::thread::scope(|scope| {
            for number in 0..4_u8 {
                let path = &path;
                scope.spawn(move || {
                    let bytes = vec![number; 10_000 + usize::from(number)];
                    for _ in 0..100 {
                        replace(path, &bytes).unwrap();
                        let found = fs::read(path).unwrap();
                        assert!(found.len() == 10_000 + usize::from(found[0]));
                        assert!(found.iter().all(|byte| *byte == found[0]));
                    }
                });
            }
        });
        replace_durably(&path, b"last").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"last");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_process_left_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        fs::write(dir.path().join("file.new"), "longer than the next one").unwrap();
        replace(&path, b"next").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"next");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_replaced_stays_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder");
        fs::create_dir_all(path.join("full")).unwrap();
        replace(&path, b"x").unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        replace(&dir.path().join("nowhere/file"), b"x").unwrap_err();
    }
}

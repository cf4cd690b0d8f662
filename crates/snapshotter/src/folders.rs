//! The folders of snapshots: `ID/fs` holds what is written, `ID/work` is overlayfs' own.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::mem;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::ids::{IdMapping, Owner};
use crate::store::{Kind, Lineage, SnapshotId, Usage};

/// Where what is written in a snapshot lies.
pub(crate) fn content(dir: &Path, id: SnapshotId) -> PathBuf {
    folder(dir, id).join(CONTENT)
}

/// Where overlayfs prepares what it changes.
pub(crate) fn work(dir: &Path, id: SnapshotId) -> PathBuf {
    folder(dir, id).join(WORK)
}

fn folder(dir: &Path, id: SnapshotId) -> PathBuf {
    dir.join(id.0.to_string())
}

/// The snapshot that has this folder for what is written in it.
pub(crate) fn written_in(dir: &Path, folder: &Path) -> Option<SnapshotId> {
    let name = folder.strip_prefix(dir).ok()?.parent()?.to_str()?;
    let id = SnapshotId(name.parse().ok()?);
    (content(dir, id) == folder).then_some(id)
}

/// Whom the root of a snapshot belongs to.
pub(crate) fn owner(dir: &Path, id: SnapshotId) -> io::Result<Owner> {
    let content = fs::metadata(content(dir, id))?;
    Ok((content.uid(), content.gid()))
}

/// The folders of an active snapshot, made before there is one: that takes longer than all else that is to be
/// done for it.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    is_there: Mutex<bool>,
}

impl Spare {
    /// Makes them, unless they are there.
    pub(crate) fn make(&self, dir: &Path) -> io::Result<()> {
        let mut is_there = self.is_there.lock();
        if !*is_there {
            let folder = dir.join(SPARE);
            // Left by another daemon.
            remove_all(&folder)?;
            make_new(&folder, Kind::Active)?;
            *is_there = true;
        }
        Ok(())
    }

    /// Moves them to `folder`. If there are none, or something is in the way, nothing happens.
    fn take(&self, dir: &Path, folder: &Path) -> bool {
        let taken = self.is_there.try_lock().is_some_and(|mut is_there| mem::take(&mut *is_there));
        taken && fs::rename(dir.join(SPARE), folder).is_ok()
    }
}

fn make_new(folder: &Path, kind: Kind) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(folder)?;
    let content = folder.join(CONTENT);
    fs::create_dir(&content)?;
    // Whatever the umask is: it is the root of a container.
    fs::set_permissions(&content, Permissions::from_mode(0o755))?;
    match kind {
        Kind::Active => DirBuilder::new().mode(0o711).create(folder.join(WORK)),
        Kind::View | Kind::Committed => Ok(()),
    }
}

/// Makes the folders of a new snapshot. `ids` are those that what is below it is seen with.
pub(crate) fn make(
    (dir, spare): (&Path, &Spare),
    lineage: &Lineage,
    ids: Option<&IdMapping>,
) -> io::Result<()> {
    let folder = folder(dir, lineage.id);
    if lineage.kind != Kind::Active || !spare.take(dir, &folder) {
        // What a transaction that did not end has left has the same number.
        remove_all(&folder)?;
        make_new(&folder, lineage.kind)?;
    }
    let content = content(dir, lineage.id);
    let parent = lineage.below.parents.first().map(|parent| owner(dir, *parent)).transpose()?;
    let owner = match (parent, ids) {
        (Some(owner), Some(ids)) => Some(ids.outside(owner)),
        (None, Some(ids)) => Some(ids.root()),
        (owner, None) => owner,
    };
    if let Some((user, group)) = owner {
        std::os::unix::fs::chown(&content, Some(user), Some(group))?;
    }
    Ok(())
}

/// Makes the folder of a lazy snapshot, for the image to be mounted on.
pub(crate) fn make_mount_point(dir: &Path, id: SnapshotId) -> io::Result<()> {
    remove_all(&folder(dir, id))?;
    DirBuilder::new().mode(0o700).create(folder(dir, id))?;
    fs::create_dir(content(dir, id))?;
    settle(dir, id)
}

/// Waits until the folder of a snapshot is on the disk. What containerd has written in it is for containerd to
/// sync.
pub(crate) fn settle(dir: &Path, id: SnapshotId) -> io::Result<()> {
    let folders = [content(dir, id), folder(dir, id), dir.to_owned()];
    folders.iter().try_for_each(|folder| File::open(folder)?.sync_all())
}

/// The snapshots that have a folder.
pub(crate) fn all(dir: &Path) -> io::Result<Vec<SnapshotId>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.parse().ok()).map(SnapshotId));
    }
    Ok(found)
}

/// Moves the folder of a snapshot to where its number means nothing.
pub(crate) fn put_away(dir: &Path, id: SnapshotId) -> io::Result<()> {
    let nanos =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    fs::rename(folder(dir, id), dir.join(format!("{PUT_AWAY}{}-{nanos}", id.0)))
}

/// Removes what was put away; returns how many folders.
pub(crate) fn remove_put_away(dir: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PUT_AWAY) {
            remove_all(&entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

const CONTENT: &str = "fs";
const WORK: &str = "work";
const SPARE: &str = ".spare";
const PUT_AWAY: &str = "removed-";

fn remove_all(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

/// What lies in a snapshot. Files that vanish meanwhile are not counted.
pub(crate) fn usage(dir: &Path, id: SnapshotId) -> io::Result<Usage> {
    let (mut usage, mut seen) = (Usage::default(), HashSet::new());
    let mut waiting = vec![content(dir, id)];
    while let Some(path) = waiting.pop() {
        let metadata = match fs::symlink_metadata(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        // Of a file with several names, the bytes are there once.
        if metadata.nlink() > 1 && !metadata.is_dir() && !seen.insert(metadata.ino()) {
            continue;
        }
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            match fs::read_dir(&path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                entries => {
                    for entry in entries? {
                        waiting.push(entry?.path());
                    }
                }
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::store::Below;

    fn make_one(dir: &TempDir, spare: &Spare, id: i64) {
        let lineage = Lineage { id: SnapshotId(id), kind: Kind::Active, below: Below::default() };
        make((dir.path(), spare), &lineage, None).unwrap();
    }

    #[test]
    fn files_with_several_names_are_counted_once() {
        let dir = TempDir::new().unwrap();
        let id = SnapshotId(3);
        make_one(&dir, &Spare::default(), id.0);
        let empty = usage(dir.path(), id).unwrap();
        let file = content(dir.path(), id).join("file");
        fs::write(&file, [1; 10_000]).unwrap();
        let one = usage(dir.path(), id).unwrap();
        assert!(one.inodes == empty.inodes + 1 && one.bytes >= empty.bytes + 10_000, "{one:?}");
        fs::hard_link(&file, file.with_extension("again")).unwrap();
        assert_eq!(usage(dir.path(), id).unwrap(), one);
    }

    #[test]
    fn what_an_unfinished_transaction_left_is_replaced() {
        let dir = TempDir::new().unwrap();
        let (id, spare) = (SnapshotId(3), Spare::default());
        make_one(&dir, &spare, id.0);
        for has_spare in [false, true] {
            fs::write(content(dir.path(), id).join("stale"), b"x").unwrap();
            if has_spare {
                spare.make(dir.path()).unwrap();
            }
            make_one(&dir, &spare, id.0);
            assert!(fs::read_dir(content(dir.path(), id)).unwrap().next().is_none());
        }
        assert_eq!(all(dir.path()).unwrap(), [id]);
        put_away(dir.path(), id).unwrap();
        remove_all(&dir.path().join(SPARE)).unwrap();
        assert_eq!(all(dir.path()).unwrap(), []);
        assert_eq!(remove_put_away(dir.path()).unwrap(), 1);
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    }

    #[test]
    fn folders_made_ahead_are_like_any_others_and_used_once() {
        let (dir, spare) = (TempDir::new().unwrap(), Spare::default());
        let look = |id: i64| {
            let folder = folder(dir.path(), SnapshotId(id));
            [folder.clone(), folder.join(CONTENT), folder.join(WORK)].map(|path| {
                let found = fs::metadata(path).unwrap();
                (found.ino(), (found.mode(), found.uid(), found.gid()))
            })
        };
        make_one(&dir, &spare, 1);
        // What a daemon has left that was killed while it made them.
        fs::create_dir(dir.path().join(SPARE)).unwrap();
        spare.make(dir.path()).unwrap();
        let made_ahead = fs::metadata(dir.path().join(SPARE)).unwrap().ino();
        make_one(&dir, &spare, 2);
        make_one(&dir, &spare, 3);
        let [one, two, three] = [1, 2, 3].map(look);
        assert_eq!([one, two].map(|found| found[0].0 == made_ahead), [false, true]);
        for found in [two, three] {
            assert_eq!(found.map(|(_, rest)| rest), one.map(|(_, rest)| rest));
        }
    }
}

//! What the tests share: a marked sparse file, readers in threads, mounts that nobody else sees.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::fanotify::{Event, Group};
use sys::journal::Journal;
use sys::mount::make_private;
use sys::namespace::{Namespace, unshare};
use tempfile::TempDir;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether something can be read from `fd` within `patience`.
pub(crate) fn readable_within(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let patience = Timespec::try_from(patience).unwrap();
    poll(&mut fds, Some(&patience)).unwrap() > 0
}

/// A file of holes, a descriptor of it from before the mark, and the group that listens.
pub(crate) struct Rig {
    _folder: TempDir,
    pub(crate) path: PathBuf,
    /// Raises no events.
    pub(crate) file: File,
    pub(crate) group: Group,
    pub(crate) journal: Journal,
}

impl Rig {
    /// A sparse file of `len` bytes, marked.
    pub(crate) fn new(len: u64) -> Self {
        let rig = Self::unmarked(len);
        rig.mark();
        rig
    }

    pub(crate) fn unmarked(len: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("layer");
        let file = File::create_new(&path).unwrap();
        file.set_len(len).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Self { _folder: folder, path, file, group: group(), journal: Journal::create(8).unwrap() }
    }

    pub(crate) fn mark(&self) {
        mark(&self.group, &self.file);
    }

    pub(crate) fn event(&self) -> Event {
        next_event(&self.group, &self.journal)
    }

    /// Asserts that no event waits. Whoever could have raised one must have returned.
    #[track_caller]
    pub(crate) fn assert_no_event(&self) {
        let event = self.group.read_event(&self.journal).unwrap();
        assert!(event.is_none(), "an event was raised: {event:?}");
    }

    /// Reads in a thread of its own, through a descriptor opened there, after the mark.
    pub(crate) fn reader(&self, offset: u64, len: usize) -> JoinHandle<io::Result<Vec<u8>>> {
        reader(&self.path, offset, len)
    }
}

pub(crate) fn group() -> Group {
    Group::new().expect("a fanotify group needs root and CONFIG_FANOTIFY_ACCESS_PERMISSIONS")
}

#[track_caller]
pub(crate) fn mark(group: &Group, file: &File) {
    let folder = std::env::temp_dir();
    group.mark(file.as_fd()).unwrap_or_else(|err| {
        panic!(
            "pre-content events do not work in {}: {err}. They need Linux 6.15 and ext4, xfs or \
             btrfs; TMPDIR chooses another folder",
            folder.display()
        )
    });
}

pub(crate) fn next_event(group: &Group, journal: &Journal) -> Event {
    assert!(readable_within(group.as_fd(), PATIENCE), "no event came");
    group.read_event(journal).unwrap().expect("there was one to be read")
}

pub(crate) fn reader(path: &Path, offset: u64, len: usize) -> JoinHandle<io::Result<Vec<u8>>> {
    let path = path.to_owned();
    std::thread::spawn(move || {
        let mut bytes = vec![0; len];
        File::open(path)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    })
}

/// Whether it is one of our threads, but not the first, which is also the process.
pub(crate) fn is_own_thread(pid: i32) -> bool {
    let is_first = u32::try_from(pid) == Ok(std::process::id());
    !is_first && Path::new(&format!("/proc/self/task/{pid}")).exists()
}

/// Bytes that differ from place to place and are never zero.
pub(crate) fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at / 251 + at) % 255).unwrap() + 1).collect()
}

/// Copies what the event asks for out of `truth`, through the event's own descriptor.
pub(crate) fn fill(event: &Event, truth: &[u8]) {
    fill_through(event.file(), event.range(), truth);
}

pub(crate) fn fill_through(file: BorrowedFd<'_>, range: std::ops::Range<u64>, truth: &[u8]) {
    let start = usize::try_from(range.start).unwrap();
    let end = usize::try_from(range.end).unwrap().min(truth.len());
    let n_written = rustix::io::pwrite(file, &truth[start..end], range.start).unwrap();
    assert_eq!(n_written, end - start);
}

/// Gives the test's thread mounts of its own: whatever happens, none stays behind.
pub(crate) fn own_mounts() {
    unshare(&[Namespace::Mount]).expect("a mount namespace needs root");
    make_private(Path::new("/")).unwrap();
}

/// An uncompressed EROFS image of one file, `/file`, with the given content; and the offset of that
/// content in the image.
pub(crate) fn erofs_image(folder: &Path, content: &[u8]) -> (Vec<u8>, usize) {
    let (tree, image) = (folder.join("tree"), folder.join("image"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), content).unwrap();
    let output = Command::new("mkfs.erofs")
        .args([&image, &tree])
        .output()
        .expect("mkfs.erofs is needed; on Debian it is in the package erofs-utils");
    assert!(output.status.success(), "{output:?}");
    let image = std::fs::read(&image).unwrap();
    let at = image.windows(content.len()).position(|window| window == content);
    (image, at.expect("mkfs.erofs does not compress unless told to"))
}

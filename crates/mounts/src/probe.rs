//! Which back ends work here, found out by using each once on a file of one block.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use causes::in_full;
use fuse::{BytesThen, Connection, Session, SessionOptions, TreeFs};
use rustix::event::{PollFd, PollFlags, poll};
use sys::fanotify::Group;
use sys::journal::Journal;
use sys::loop_device::LoopDevice;
use sys::mount::{Overlay, Unmount};
use sys::namespace::{IdRange, user_namespace};
use tree::{LaterTree, Tree};
use ztoc::{EntryKind, TocEntry};

use crate::error::BackendError;
use crate::front_ends::fuse_options;
use crate::record::Backend;
use crate::served;

/// What works, and why the rest does not.
#[derive(Debug, Clone)]
pub struct Probe {
    results: Vec<(Backend, Result<(), String>)>,
    found_no_room: bool,
}

impl Probe {
    /// Tries every back end in `dir`, which is emptied.
    pub(crate) fn run(dir: &Path) -> Self {
        let mut found_no_room = false;
        let attempt = |backend: Backend| {
            let result = attempt(dir, backend, Question::Bytes).map_err(|err| {
                found_no_room |= cache::is_no_room(&err);
                in_full(&err)
            });
            tracing::info!(%backend, works = result.is_ok(), why_not = result.as_ref().err(), "back end tried");
            (backend, result)
        };
        let results = Backend::ALL.into_iter().map(attempt).collect();
        Self { results, found_no_room }
    }

    /// Whether some could not be tried, because the disk is full.
    #[must_use]
    pub fn found_no_room(&self) -> bool {
        self.found_no_room
    }

    /// Why `backend` does not work, or `None` if it does.
    #[must_use]
    pub fn why_not(&self, backend: Backend) -> Option<&str> {
        let found = self.results.iter().find(|(tried, _)| *tried == backend);
        found.and_then(|(_, result)| result.as_ref().err()).map(String::as_str)
    }

    /// Why each of those that do not work does not.
    pub(crate) fn reasons(&self) -> String {
        let reason = |(backend, result): &(Backend, Result<(), String>)| {
            result.as_ref().err().map(|why| format!("{backend}: {why}"))
        };
        self.results.iter().filter_map(reason).collect::<Vec<_>>().join("; ")
    }

    /// The back ends that work, the best first.
    pub fn working(&self) -> impl Iterator<Item = Backend> + '_ {
        self.results.iter().filter(|(_, result)| result.is_ok()).map(|(backend, _)| *backend)
    }
}

/// Whether containers in user namespaces can stand on images, mounted by the best back end that works, and on
/// folders beside them. Tried in a folder in `dir`, which is removed.
///
/// # Errors
/// Why not.
pub fn try_user_namespaces(dir: &Path) -> Result<(), BackendError> {
    let dir = dir.join(format!("hermes-probe-{}", std::process::id()));
    let mut reasons = Vec::new();
    let mut works = |backend: &Backend| {
        let result = attempt(&dir, *backend, Question::Bytes);
        reasons.extend(result.as_ref().err().map(|why| format!("{backend}: {}", in_full(why))));
        result.is_ok()
    };
    let best = Backend::ALL.into_iter().find(|backend| works(backend));
    let result = match best {
        Some(backend) => attempt(&dir, backend, Question::Owners),
        None => Err(BackendError::None(reasons.join("; "))),
    };
    // What is left of it was never made.
    fs::remove_dir(&dir).ok();
    result
}

fn attempt(dir: &Path, backend: Backend, question: Question) -> Result<(), BackendError> {
    let ground = Ground::new(&dir.join(backend.to_string()), question)?;
    match backend {
        Backend::Erofs => ground.erofs(),
        Backend::ErofsLoop => ground.erofs_loop(),
        Backend::Fuse => ground.fuse(),
    }
}

/// What is asked of a mount.
#[derive(Debug, Clone, Copy)]
enum Question {
    /// Whether it has the right bytes.
    Bytes,
    /// Whether a container in a user namespace can stand on it too.
    Owners,
}

/// A folder with an image of one file, and places to mount; gone when dropped.
struct Ground {
    dir: PathBuf,
    tree: Arc<LaterTree>,
    question: Question,
}

impl Ground {
    fn new(dir: &Path, question: Question) -> Result<Self, BackendError> {
        let failed = |source| BackendError::io("preparing", dir, source);
        for place in PLACES {
            fs::create_dir_all(dir.join(place)).map_err(failed)?;
        }
        let size = CONTENT.len() as u64;
        let layer = [TocEntry { size, ..TocEntry::new("file", EntryKind::File) }];
        let tree = Tree::merge(&[&layer], &tree::Limits::default());
        let tree = tree.map_err(|err| failed(io::Error::other(err)))?;
        let mut image = Vec::new();
        let device = erofs::Device { tag: "probe".to_owned(), bytes: CONTENT.len() as u64 };
        erofs::write_image(&tree, &[device], &mut image)?;
        fs::write(dir.join("image"), image).map_err(failed)?;
        Ok(Self { dir: dir.to_owned(), tree: Arc::new(LaterTree::from(Arc::new(tree))), question })
    }

    /// A sparse file, filled when the kernel says that it is about to be read.
    fn erofs(&self) -> Result<(), BackendError> {
        let (group, journal) = (
            Group::new().map_err(crate::PreContentError::Group)?,
            Journal::create(4).map_err(crate::PreContentError::Journal)?,
        );
        let data = self.data()?;
        data.set_len(CONTENT.len() as u64)?;
        group.mark(data.as_fd())?;
        let device = PathBuf::from(format!("/proc/self/fd/{}", data.as_raw_fd()));
        sys::mount::mount_erofs(&self.dir.join("image"), &[device], &self.target())?;
        let path = self.target().join("file");
        let reader =
            thread::Builder::new().name("probe".to_owned()).spawn(move || fs::read(path))?;
        let mut fds = [PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN)];
        let timeout = rustix::event::Timespec::try_from(PATIENCE).unwrap_or_default();
        poll(&mut fds, Some(&timeout)).map_err(io::Error::from)?;
        if let Some(event) = group.read_event(&journal)? {
            data.write_all_at(CONTENT, 0)?;
            event.allow()?;
        }
        // Without an event the reader got zeros; when the group goes, it is let go in any case.
        drop(group);
        let read = reader.join().map_err(|_panicked| io::Error::other("the reader died"))?;
        self.answer(&read?)
    }

    fn erofs_loop(&self) -> Result<(), BackendError> {
        let data = self.data()?;
        data.write_all_at(CONTENT, 0)?;
        let image = File::open(self.dir.join("image"))?;
        let data = LoopDevice::attach(data.as_fd(), served::options(CONTENT.len() as u64))?;
        let image = LoopDevice::attach(image.as_fd(), served::options(image.metadata()?.len()))?;
        sys::mount::mount_erofs(image.path(), &[data.path().to_owned()], &self.target())?;
        self.answer(&fs::read(self.target().join("file"))?)
    }

    fn fuse(&self) -> Result<(), BackendError> {
        let connection = Connection::mount(
            &self.target(),
            &fuse_options("hermes-probe", fuse::Access::Mounter),
        )?;
        let data = self.data()?;
        data.write_all_at(CONTENT, 0)?;
        let fs = Arc::new(TreeFs::new(Arc::clone(&self.tree), Arc::new(OneFile(data))));
        let session =
            Session::start(connection, fs, &SessionOptions { threads: 1, negotiated: None })?;
        let read = fs::read(self.target().join("file"));
        let answer = read.map_err(BackendError::from).and_then(|read| self.answer(&read));
        drop(session);
        answer
    }

    fn data(&self) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.dir.join("data"))
    }

    /// While the image is mounted, and served.
    fn answer(&self, read: &[u8]) -> Result<(), BackendError> {
        match self.question {
            _ if read != CONTENT => Err(BackendError::WrongBytes),
            Question::Bytes => Ok(()),
            Question::Owners => self.expect_owners(),
        }
    }

    /// An overlay as containerd makes it for a user namespace.
    fn expect_owners(&self) -> Result<(), BackendError> {
        let ids = [IdRange { inside: 0, outside: ROOT, count: 1 }];
        let namespace = user_namespace(&ids, &ids)?;
        let place = |name: &str| self.dir.join(name);
        let lower = [place(MAPPED_IMAGE), place(MAPPED_FOLDER)];
        for (source, target) in [self.target(), place(FOLDER)].iter().zip(&lower) {
            let failed = |err| BackendError::io("showing other owners of", source, err);
            sys::mount::bind_mapped(source, target, namespace.as_fd()).map_err(failed)?;
        }
        let (upper, work, merged) = (place(UPPER), place(WORK), place(MERGED));
        let overlay = Overlay { lower: &lower, upper: Some(&upper), work: Some(&work), flags: &[] };
        sys::mount::mount_overlay(overlay, &merged)?;
        match fs::metadata(merged.join("file"))?.uid() {
            ROOT => Ok(()),
            _ => Err(BackendError::WrongOwner),
        }
    }

    fn target(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for place in PLACES.iter().rev() {
            // EINVAL: nothing was mounted.
            sys::mount::unmount(&self.dir.join(place), Unmount::Detach).ok();
        }
        fs::remove_dir_all(&self.dir).ok();
    }
}

struct OneFile(File);

impl fuse::Bytes for OneFile {
    fn read(&self, _layer: u32, range: std::ops::Range<u64>, then: BytesThen) {
        then(Ok((&self.0, range.start)));
    }
}

/// Where the image is mounted.
const IMAGE: &str = "mnt";
/// A folder beside it.
const FOLDER: &str = "folder";
const MAPPED_IMAGE: &str = "mapped-mnt";
const MAPPED_FOLDER: &str = "mapped-folder";
const UPPER: &str = "upper";
const WORK: &str = "work";
const MERGED: &str = "merged";
/// What is mounted on others comes later.
const PLACES: [&str; 7] = [IMAGE, FOLDER, MAPPED_IMAGE, MAPPED_FOLDER, UPPER, WORK, MERGED];
/// Who root of a user namespace is outside; nobody who has anything.
const ROOT: u32 = 0x7abc_0000;

const CONTENT: &[u8] = &[b'h'; 4096];
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_namespaces_can_stand_on_every_back_end() {
        let dir = tempfile::TempDir::new().unwrap();
        for backend in Backend::ALL {
            attempt(dir.path(), backend, Question::Owners).unwrap();
        }
        try_user_namespaces(dir.path()).unwrap();
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing is left");
        // Nothing can be put on top of it.
        try_user_namespaces(Path::new("/proc")).unwrap_err();
    }
}

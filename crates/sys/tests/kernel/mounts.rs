//! Mounts, and EROFS over a file that is filled on demand.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Advice, FallocateFlags};
use rustix::io::Errno;
use sys::fanotify::Group;
use sys::journal::Journal;
use sys::mount::{
    Bdi, FsContext, MountEntry, MountError, Overlay, Unmount, bind, bind_mapped, bind_read_only,
    location, mount_erofs, mount_overlay, mountinfo, unmount,
};
use sys::namespace::{IdRange, user_namespace};
use tempfile::TempDir;

use crate::rig::{content, erofs_image, fill, group, mark, own_mounts, reader};

const LEN: usize = 4 << 20;

/// An EROFS image whose file content is a hole, and what belongs there.
struct Lazy {
    folder: TempDir,
    image: PathBuf,
    truth: Arc<Vec<u8>>,
    content: Vec<u8>,
    /// Where the content begins in the image.
    at: u64,
    /// Opened before any mark.
    file: File,
}

impl Lazy {
    fn new() -> Self {
        Self::of_len(LEN)
    }

    fn of_len(len: usize) -> Self {
        let folder = TempDir::new().unwrap();
        let content = content(len);
        let (truth, at) = erofs_image(folder.path(), &content);
        let image = folder.path().join("image");
        let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
        std::fs::create_dir(folder.path().join("mnt")).unwrap();
        let lazy = Self { folder, image, truth: Arc::new(truth), content, at: at as u64, file };
        lazy.punch();
        lazy
    }

    fn punch(&self) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, hole, self.at, self.content.len() as u64).unwrap();
    }

    fn point(&self) -> PathBuf {
        self.folder.path().join("mnt")
    }

    fn mounted_file(&self) -> PathBuf {
        self.point().join("file")
    }

    #[track_caller]
    fn check_read(&self, offset: usize, len: usize) {
        let read = reader(&self.mounted_file(), offset as u64, len).join().unwrap().unwrap();
        assert!(read == self.content[offset..offset + len], "wrong bytes at {offset}");
    }

    /// Reads all in order, in pieces as `cat` would.
    fn check_stream(&self) {
        let file = File::open(self.mounted_file()).unwrap();
        let len = 128 << 10;
        let mut piece = vec![0; len];
        for (n, expected) in self.content.chunks(len).enumerate() {
            file.read_exact_at(&mut piece, (n * len) as u64).unwrap();
            assert!(piece == expected, "wrong bytes in piece {n}");
        }
    }
}

/// A thread that fills whatever is asked for. Ends when dropped.
struct Filler {
    stop: Option<std::io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
    n_events: Arc<AtomicUsize>,
}

impl Filler {
    fn start(group: Group, truth: Arc<Vec<u8>>) -> Self {
        let (stopped, stop) = std::io::pipe().unwrap();
        let n_events = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&n_events);
        let thread = std::thread::spawn(move || {
            let journal = Journal::create(8).unwrap();
            loop {
                let mut fds = [
                    PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN),
                    PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN),
                ];
                poll(&mut fds, None).unwrap();
                if !fds[1].revents().is_empty() {
                    return;
                }
                while let Some(event) = group.read_event(&journal).unwrap() {
                    count.fetch_add(1, Ordering::Relaxed);
                    fill(&event, &truth);
                    event.allow().unwrap();
                }
            }
        });
        Self { stop: Some(stop), thread: Some(thread), n_events }
    }

    fn n_events(&self) -> usize {
        self.n_events.load(Ordering::Relaxed)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

#[test]
fn erofs_is_filled_on_demand() {
    own_mounts();
    let lazy = Lazy::new();
    let group = group();
    mark(&group, &lazy.file);
    let filler = Filler::start(group, Arc::clone(&lazy.truth));
    mount_erofs(&lazy.image, &[], &lazy.point()).unwrap();
    lazy.check_read(1 << 20, 4096);
    assert!(filler.n_events() > 0);
    lazy.check_read(0, LEN);
    let all = filler.n_events();
    lazy.check_read(0, LEN);
    assert_eq!(filler.n_events(), all, "what is in the page cache raises no events");
    unmount(&lazy.point(), Unmount::Now).unwrap();
}

#[test]
fn more_read_ahead_means_fewer_events() {
    own_mounts();
    let lazy = Lazy::of_len(32 << 20);
    let group = group();
    mark(&group, &lazy.file);
    let filler = Filler::start(group, Arc::clone(&lazy.truth));
    // Another process may mount at the same moment: then it cannot be told which is ours.
    let bdi = loop {
        match mount_erofs(&lazy.image, &[], &lazy.point()).unwrap().bdi {
            Some(bdi) => break bdi,
            None => unmount(&lazy.point(), Unmount::Now).unwrap(),
        }
    };
    assert_eq!(Bdi::named(bdi.name()), Some(bdi.clone()));
    lazy.check_stream();
    let small = filler.n_events();
    bdi.set_read_ahead_kb(4096).unwrap();
    forget_pages(&lazy.mounted_file());
    lazy.check_stream();
    let large = filler.n_events() - small;
    assert!(large * 4 < small, "{small} events with 128 KiB, {large} with 4096");
    unmount(&lazy.point(), Unmount::Now).unwrap();
    assert_eq!(Bdi::named(bdi.name()), None);
}

/// Drops the clean pages of one file from the page cache.
fn forget_pages(path: &Path) {
    rustix::fs::fadvise(File::open(path).unwrap(), 0, None, Advice::DontNeed).unwrap();
}

/// What happens if even the keeper dies, and that a new mark heals the mount for all that is not in
/// the page cache.
#[test]
fn a_new_group_heals_a_mount_that_had_none() {
    own_mounts();
    let lazy = Lazy::new();
    let first = group();
    mark(&first, &lazy.file);
    let filler = Filler::start(first, Arc::clone(&lazy.truth));
    mount_erofs(&lazy.image, &[], &lazy.point()).unwrap();
    lazy.check_read(0, 4096);
    drop(filler);

    let unguarded = reader(&lazy.mounted_file(), 2 << 20, 4096).join().unwrap().unwrap();
    assert_eq!(unguarded, vec![0; 4096], "the kernel lets readers through to the holes");

    let second = group();
    mark(&second, &lazy.file);
    let filler = Filler::start(second, Arc::clone(&lazy.truth));
    lazy.check_read(3 << 20, 4096);
    assert!(filler.n_events() > 0, "an old mount raises events for a new group");
    forget_pages(&lazy.mounted_file());
    lazy.check_read(0, LEN);
    unmount(&lazy.point(), Unmount::Now).unwrap();
}

/// A mount made before the mark is not healed by it: it never raises an event.
#[test]
fn a_mark_after_the_mount_comes_too_late() {
    own_mounts();
    let lazy = Lazy::new();
    mount_erofs(&lazy.image, &[], &lazy.point()).unwrap();
    let group = group();
    mark(&group, &lazy.file);
    let filler = Filler::start(group, Arc::clone(&lazy.truth));
    let read = reader(&lazy.mounted_file(), 0, 4096).join().unwrap().unwrap();
    assert_eq!(read, vec![0; 4096]);
    assert_eq!(filler.n_events(), 0);
    unmount(&lazy.point(), Unmount::Now).unwrap();
}

#[test]
fn punched_and_marked_again_means_filled_again() {
    own_mounts();
    let lazy = Lazy::new();
    let group = group();
    mark(&group, &lazy.file);
    let filler = Filler::start(group.clone(), Arc::clone(&lazy.truth));
    mount_erofs(&lazy.image, &[], &lazy.point()).unwrap();
    lazy.check_read(0, LEN);
    group.unmark(lazy.file.as_fd()).unwrap();
    let filled = filler.n_events();
    forget_pages(&lazy.mounted_file());
    lazy.check_read(0, LEN);
    assert_eq!(filler.n_events(), filled, "a whole layer needs nobody");

    mark(&group, &lazy.file);
    lazy.punch();
    forget_pages(&lazy.mounted_file());
    lazy.check_read(0, LEN);
    assert!(filler.n_events() > filled);
    unmount(&lazy.point(), Unmount::Now).unwrap();
}

#[test]
fn a_refusal_says_what_the_file_system_said() {
    own_mounts();
    let folder = TempDir::new().unwrap();
    let (image, point) = (folder.path().join("image"), folder.path().join("mnt"));
    std::fs::write(&image, [0; 8192]).unwrap();
    std::fs::create_dir(&point).unwrap();
    let err = mount_erofs(&image, &[], &point).expect_err("it is not an image");
    assert_eq!(err.errno(), Errno::INVAL);
    let text = err.to_string();
    assert!(text.contains("cannot find valid erofs superblock"), "{text}");

    let err = mount_erofs(&folder.path().join("none"), &[], &point).expect_err("there is none");
    assert_eq!(err.errno(), Errno::NOENT);
    let unknown = FsContext::open("no such thing").map(drop);
    assert!(matches!(unknown, Err(MountError::UnknownFileSystem { .. })), "{unknown:?}");
}

#[test]
fn a_device_too_many_is_refused() {
    own_mounts();
    let lazy = Lazy::new();
    let err = mount_erofs(&lazy.image, std::slice::from_ref(&lazy.image), &lazy.point())
        .expect_err("the image has no device table");
    assert_eq!(err.errno(), Errno::INVAL);
}

#[test]
fn long_paths_are_possible() {
    own_mounts();
    let lazy = Lazy::new();
    let deep = lazy.folder.path().join("d".repeat(200)).join("e".repeat(200));
    std::fs::create_dir_all(&deep).unwrap();
    let image = deep.join("image");
    std::fs::rename(&lazy.image, &image).unwrap();
    mount_erofs(&image, &[], &lazy.point()).unwrap();
    assert_eq!(std::fs::metadata(lazy.mounted_file()).unwrap().len(), LEN as u64);
    unmount(&lazy.point(), Unmount::Now).unwrap();
}

fn entry_at(point: &Path) -> MountEntry {
    let entries = mountinfo().unwrap();
    entries.into_iter().find(|entry| entry.point == point).expect("it is in the mount table")
}

#[test]
fn the_mount_table_shows_a_mount() {
    own_mounts();
    let lazy = Lazy::new();
    mount_erofs(&lazy.image, &[], &lazy.point()).unwrap();
    let entry = entry_at(&lazy.point());
    let here = location(&lazy.point()).unwrap();
    assert_eq!(
        (entry.fstype.as_str(), entry.source.as_os_str()),
        ("erofs", lazy.image.as_os_str())
    );
    assert_eq!((entry.id, entry.dev), (here.mount_id, here.device));
    assert!(entry.options.split(',').any(|option| option == "ro"), "{entry:?}");
    unmount(&lazy.point(), Unmount::Detach).unwrap();
    assert_ne!(location(&lazy.point()).unwrap(), here);
    let err = unmount(&lazy.point(), Unmount::Now).expect_err("nothing is mounted any more");
    assert_eq!(err.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
}

#[test]
fn an_overlay_merges_folders_with_odd_names() {
    own_mounts();
    let folder = TempDir::new().unwrap();
    let make = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let lower = [make("a:b,c"), make("back\\slash")];
    let (upper, work, point) = (make("up\\per,"), make("work"), make("mnt"));
    std::fs::write(lower[0].join("both"), "upper of the two").unwrap();
    std::fs::write(lower[1].join("both"), "lower of the two").unwrap();
    std::fs::write(lower[1].join("one"), "alone").unwrap();
    let overlay = Overlay { lower: &lower, upper: Some(&upper), work: Some(&work), flags: &[] };
    mount_overlay(overlay, &point).unwrap();
    assert_eq!(std::fs::read_to_string(point.join("both")).unwrap(), "upper of the two");
    assert_eq!(std::fs::read_to_string(point.join("one")).unwrap(), "alone");
    std::fs::write(point.join("new"), "written").unwrap();
    assert_eq!(std::fs::read_to_string(upper.join("new")).unwrap(), "written");
    unmount(&point, Unmount::Now).unwrap();

    let read_only = Overlay { lower: &lower, upper: None, work: None, flags: &["userxattr"] };
    mount_overlay(read_only, &point).unwrap();
    let err = std::fs::write(point.join("new"), "").expect_err("it is read-only");
    assert_eq!(err.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    unmount(&point, Unmount::Now).unwrap();
}

#[test]
fn a_mapped_bind_shows_other_owners_and_nothing_is_written_through_it() {
    own_mounts();
    let folder = TempDir::new().unwrap();
    let [source, point] = ["source", "mnt"].map(|name| folder.path().join(name));
    [&source, &point].iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
    std::fs::write(source.join("root's"), "").unwrap();
    std::fs::write(source.join("other's"), "").unwrap();
    std::os::unix::fs::chown(source.join("other's"), Some(5), Some(5)).unwrap();
    let users = [IdRange { inside: 0, outside: 70_000, count: 1 }];
    let groups = [IdRange { inside: 0, outside: 80_000, count: 10 }];
    let namespace = user_namespace(&users, &groups).unwrap();
    bind_mapped(&source, &point, namespace.as_fd()).unwrap();
    let owner = |name: &str| {
        let metadata = std::fs::metadata(point.join(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("root's"), (70_000, 80_000));
    // Nobody, who is not mapped.
    assert_eq!(owner("other's"), (65_534, 80_005));
    let err = std::fs::write(point.join("new"), "").expect_err("it is read-only");
    assert_eq!(err.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    unmount(&point, Unmount::Now).unwrap();
    // Not every file system can be shown so.
    bind_mapped(Path::new("/proc"), &point, namespace.as_fd()).unwrap_err();
}

#[test]
fn binds_show_the_same_files() {
    own_mounts();
    let folder = TempDir::new().unwrap();
    let (source, point) = (folder.path().join("source"), folder.path().join("mnt"));
    std::fs::create_dir(&source).unwrap();
    std::fs::create_dir(&point).unwrap();
    bind(&source, &point).unwrap();
    std::fs::write(point.join("file"), "x").unwrap();
    unmount(&point, Unmount::Now).unwrap();
    bind_read_only(&source, &point).unwrap();
    assert_eq!(std::fs::read_to_string(point.join("file")).unwrap(), "x");
    let err = std::fs::write(point.join("file"), "").expect_err("it is read-only");
    assert_eq!(err.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    unmount(&point, Unmount::Now).unwrap();
}

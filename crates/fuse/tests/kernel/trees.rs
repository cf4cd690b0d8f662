//! A whole tree, mounted: everything that a program can see of it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use std::borrow::Cow;

use fuse::{
    Attr, DirSink, Errno, Filesystem, Ino, Names, ReadReply, Session, SessionOptions, Statfs,
    TreeFs, Xattrs,
};
use sys::mount::{Unmount, unmount};
use ztoc::{EntryKind, Mtime, TocEntry};

use crate::images::{entry, file, folder, link, sparse, tree, tree_fs, with_xattrs};
use crate::support::{
    LayerBytes, Layers, Mountpoint, When, in_time, mount, pattern, serve, started, still_waits,
};

#[test]
fn names_bytes_and_metadata_are_those_of_the_tree() {
    let device = |name, kind, device| TocEntry { device, ..entry(name, kind) };
    let entries = [
        TocEntry { mode: 0o1777, ..folder("tmp") },
        folder("a"),
        folder("a/b"),
        TocEntry {
            mode: 0o4711,
            uid: 3_000_000_000,
            gid: 70_000,
            mtime: Mtime { seconds: -5, nanos: 250_000_000 },
            ..file("a/b/file", 1000, 300_001)
        },
        file("a/empty", 0, 0),
        link("a/hard", EntryKind::HardLink, "a/b/file"),
        link("a/soft", EntryKind::Symlink, "b/file"),
        device("a/null", EntryKind::CharDevice, (1, 3)),
        device("a/disk", EntryKind::BlockDevice, (259, 70_000)),
        entry("a/pipe", EntryKind::Fifo),
        file("a/\u{e9}t\u{e9} \n\t", 5, 1),
    ];
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&entries, 400_000, When::Now);
    let _session = serve(mount(&at), fs);

    let names = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(at.join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names(""), BTreeSet::from(["a", "tmp"].map(str::to_owned)));
    let in_a = ["b", "disk", "empty", "hard", "null", "pipe", "soft", "\u{e9}t\u{e9} \n\t"];
    assert_eq!(names("a"), BTreeSet::from(in_a.map(str::to_owned)));

    let meta = fs::symlink_metadata(at.join("a/b/file")).unwrap();
    assert_eq!((meta.len(), meta.blocks(), meta.nlink()), (300_001, 586, 2));
    assert_eq!((meta.mode(), meta.uid(), meta.gid()), (0o104_711, 3_000_000_000, 70_000));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (-5, 250_000_000));
    assert_eq!(meta.ino(), fs::metadata(at.join("a/hard")).unwrap().ino());
    for name in ["a/b/file", "a/hard", "a/soft"] {
        assert!(fs::read(at.join(name)).unwrap() == pattern(0, 1000..301_001), "{name}");
    }
    assert_eq!(fs::read(at.join("a/empty")).unwrap(), b"");
    assert_eq!(fs::read_link(at.join("a/soft")).unwrap(), Path::new("b/file"));
    assert_eq!(fs::symlink_metadata(at.join("a/soft")).unwrap().len(), 6);
    assert_eq!(fs::metadata(at.join("tmp")).unwrap().mode(), 0o041_777);
    assert_eq!(fs::metadata(at.join("a")).unwrap().nlink(), 3);
    let null = fs::metadata(at.join("a/null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
    let disk = fs::metadata(at.join("a/disk")).unwrap();
    assert!(disk.file_type().is_block_device());
    assert_eq!(disk.rdev(), rustix::fs::makedev(259, 70_000));
    assert!(fs::metadata(at.join("a/pipe")).unwrap().file_type().is_fifo());
}

#[test]
fn nothing_can_be_changed() {
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&[file("f", 0, 10)], 10, When::Now);
    let _session = serve(mount(&at), fs);
    let read_only = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    };
    read_only(fs::write(at.join("f"), b"x"));
    read_only(fs::write(at.join("new"), b"x"));
    read_only(fs::remove_file(at.join("f")));
    read_only(fs::rename(at.join("f"), at.join("g")));
    read_only(fs::create_dir(at.join("folder")));
}

#[test]
fn every_range_of_a_file_is_right() {
    let at = Mountpoint::new();
    let (fs, layers) = tree_fs(&[file("f", 777, 50_000)], 60_000, When::Later);
    let _session = serve(mount(&at), fs);
    let file = open_direct(&at.join("f"));
    for (start, len) in [
        (0_u64, 1_usize),
        (0, 50_000),
        (1, 4095),
        (4095, 2),
        (49_999, 1),
        (49_990, 100),
        (50_000, 10),
    ] {
        let mut bytes = vec![0; len];
        let n_read = file.read_at(&mut bytes, start).unwrap();
        let end = (start + u64::try_from(len).unwrap()).min(50_000);
        assert_eq!(bytes[..n_read], pattern(0, 777 + start..777 + end), "{start}+{len}");
    }
    // Only what was read was asked for.
    assert!(layers.take_asked().contains(&(0, 777 + 4095..777 + 4097)));
}

#[test]
fn holes_are_zeros_and_need_no_bytes() {
    let pieces = [(5000, 300), (8192, 4096), (1_000_000, 1)];
    let at = Mountpoint::new();
    let entries = [sparse("s", 512, &pieces, 3_000_000), sparse("hole", 512, &[], 1 << 40)];
    let (fs, layers) = tree_fs(&entries, 8192, When::Later);
    let _session = serve(mount(&at), fs);

    let mut expect = vec![0; 3_000_000];
    let mut from = 512;
    for (start, len) in pieces {
        let start = usize::try_from(start).unwrap();
        let bytes = pattern(0, from..from + len);
        expect[start..start + bytes.len()].copy_from_slice(&bytes);
        from += len;
    }
    assert!(fs::read(at.join("s")).unwrap() == expect);
    assert_eq!(fs::metadata(at.join("s")).unwrap().blocks(), 9);
    let direct = open_direct(&at.join("s"));
    for (start, len) in [(4999_u64, 302_usize), (5299, 2), (0, 10_000), (8192, 4096), (999_999, 3)]
    {
        let mut bytes = vec![1; len];
        direct.read_exact_at(&mut bytes, start).unwrap();
        let start = usize::try_from(start).unwrap();
        assert_eq!(bytes, expect[start..start + len]);
    }

    layers.take_asked();
    let mut bytes = [1; 4096];
    File::open(at.join("hole")).unwrap().read_exact_at(&mut bytes, 1 << 39).unwrap();
    assert_eq!(bytes, [0; 4096]);
    assert_eq!(layers.take_asked(), []);
}

#[test]
fn xattrs_are_bytes() {
    // A version 2 capability of 20 bytes, with a line feed in it.
    let capability = b"\x01\0\0\x02\x0a\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let long = [0xff; 3000];
    let xattrs: [(&str, &[u8]); 4] = [
        ("security.capability", capability),
        ("trusted.other", b"y"),
        ("user.binary", b"\0\x0a=\xff"),
        ("user.long", &long),
    ];
    let at = Mountpoint::new();
    let entries = [with_xattrs(file("f", 0, 1), &xattrs), file("plain", 0, 1)];
    let (fs, _layers) = tree_fs(&entries, 1, When::Now);
    let _session = serve(mount(&at), fs);

    let path = at.join("f");
    for (name, value) in xattrs {
        let mut buffer = vec![0; 4096];
        let len = rustix::fs::getxattr(&path, name, &mut buffer).unwrap();
        assert_eq!(&buffer[..len], value, "{name}");
        let mut small = vec![0; value.len() - 1];
        if !small.is_empty() {
            let refused = rustix::fs::getxattr(&path, name, &mut small);
            assert_eq!(refused, Err(Errno::RANGE), "{name}");
        }
    }
    let mut names = vec![0; 4096];
    let len = rustix::fs::listxattr(&path, &mut names).unwrap();
    let expect: Vec<u8> =
        xattrs.iter().flat_map(|(name, _)| [name.as_bytes(), b"\0"].concat()).collect();
    assert_eq!(names[..len], expect);
    let missing = rustix::fs::getxattr(&path, "user.other", &mut names);
    assert_eq!(missing, Err(Errno::NODATA));
    assert_eq!(rustix::fs::listxattr(at.join("plain"), &mut names), Ok(0));
}

#[test]
fn access_control_lists_are_enforced() {
    // Version 2: owner rw-, user 1234 r--, group ---, mask r--, other ---.
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 4, 1234),
        (4, 0, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&perm.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    let secret = TocEntry { mode: 0o640, ..file("secret", 0, 5) };
    let at = Mountpoint::new();
    let entries = [with_xattrs(secret, &[("system.posix_acl_access", &acl)])];
    let (fs, _layers) = tree_fs(&entries, 5, When::Now);
    let _session = serve(mount(&at), fs);
    make_reachable(&at);

    let may_read = |uid: &str| {
        let ids = [format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()];
        let mut command = std::process::Command::new("setpriv");
        let command = command.args(ids).arg("cat").arg(at.join("secret"));
        command.output().expect("needs setpriv of util-linux").status.success()
    };
    assert!(may_read("1234"));
    assert!(!may_read("1235"));
}

#[test]
fn a_directory_of_a_hundred_thousand_entries() {
    let n_files = 100_000_u64;
    let mut entries = vec![folder("d")];
    entries.extend((0..n_files).map(|n| file(&format!("d/{n:x}-{n}"), n, n % 7)));
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&entries, 10, When::Now);
    let _session = serve(mount(&at), fs);
    for _again in 0..2 {
        let listed: Vec<(String, u64)> = fs::read_dir(at.join("d"))
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())
            })
            .collect();
        let mut expect: Vec<_> = (0..n_files).map(|n| (format!("{n:x}-{n}"), n % 7)).collect();
        expect.sort();
        assert!(listed == expect, "{} entries", listed.len());
    }
}

#[test]
fn the_kernel_asks_once_for_names_and_attributes() {
    let at = Mountpoint::new();
    let entries = [folder("d"), file("d/f", 0, 10), link("d/l", EntryKind::Symlink, "f")];
    let (fs, layers) = tree_fs(&entries, 10, When::Now);
    let fs = Arc::new(Counting { fs, n_asked: AtomicUsize::new(0) });
    let counting = Arc::clone(&fs);
    let _session = serve(mount(&at), fs);
    let look = || {
        assert_eq!(fs::read(at.join("d/l")).unwrap(), pattern(0, 0..10));
        assert!(!at.join("d/missing").exists());
        assert!(!at.join("missing/too").exists());
        assert_eq!(fs::read_dir(at.join("d")).unwrap().count(), 2);
        let mut buffer = [0; 10];
        let xattr = rustix::fs::getxattr(at.join("d/f"), "user.x", &mut buffer);
        assert_eq!(xattr, Err(Errno::OPNOTSUPP));
    };
    look();
    let n_asked = counting.n_asked.load(Ordering::SeqCst);
    assert!(n_asked > 0);
    layers.take_asked();
    look();
    look();
    assert_eq!(counting.n_asked.load(Ordering::SeqCst), n_asked);
    assert_eq!(layers.take_asked(), []);
}

#[test]
fn a_read_waits_for_its_bytes_and_holds_up_nothing_else() {
    let at = Mountpoint::new();
    let entries: Vec<_> = (0..200).map(|n| file(&format!("f{n}"), n, 100)).collect();
    let (fs, layers) = tree_fs(&entries, 400, When::Held);
    let _session = serve(mount(&at), fs);
    let n_readers = 100;
    let readers: Vec<_> = (0..n_readers)
        .map(|n| {
            let path = at.join(format!("f{n}"));
            started(move || fs::read(path))
        })
        .collect();
    layers.wait_for_held(n_readers);
    assert!(still_waits(&readers[0]));
    // Two threads serve, a hundred reads wait.
    assert_eq!(fs::metadata(at.join("f150")).unwrap().len(), 100);
    layers.set(When::Later);
    assert_eq!(fs::read(at.join("f151")).unwrap(), pattern(0, 151..251));
    layers.release();
    for (n, reader) in (0..).zip(readers) {
        let bytes = in_time(move || reader.recv()).unwrap().unwrap();
        assert_eq!(bytes, pattern(0, n..n + 100));
    }
}

#[test]
fn thousands_of_reads_wait_without_a_thread() {
    use rustix::fs::{Advice, fadvise};
    let n_files = 3000;
    let at = Mountpoint::new();
    let entries: Vec<_> = (0..n_files).map(|n| file(&format!("f{n}"), n, 100)).collect();
    let (fs, layers) = tree_fs(&entries, n_files + 100, When::Held);
    let _session = serve(mount(&at), fs);
    for n in 0..n_files {
        let file = File::open(at.join(format!("f{n}"))).unwrap();
        fadvise(&file, 0, None, Advice::WillNeed).unwrap();
    }
    layers.wait_for_held(usize::try_from(n_files).unwrap());
    // The kernel asks again for pages that it has given up meanwhile.
    layers.set(When::Now);
    layers.release();
    for n in 0..n_files {
        assert_eq!(fs::read(at.join(format!("f{n}"))).unwrap(), pattern(0, n..n + 100));
    }
}

#[test]
fn a_failed_or_lost_read_is_an_error_and_not_remembered() {
    let at = Mountpoint::new();
    let (fs, layers) = tree_fs(&[file("f", 0, 100)], 100, When::Never);
    let _session = serve(mount(&at), fs);
    let direct = open_direct(&at.join("f"));
    let mut bytes = [0; 100];
    let errno = |result: io::Result<usize>| result.unwrap_err().raw_os_error();
    assert_eq!(errno(direct.read_at(&mut bytes, 0)), Some(5));
    assert_eq!(fs::read(at.join("f")).unwrap_err().raw_os_error(), Some(5));
    layers.set(When::Fails(110));
    assert_eq!(errno(direct.read_at(&mut bytes, 0)), Some(110));
    // Older kernels make EIO of it.
    assert!(matches!(fs::read(at.join("f")).unwrap_err().raw_os_error(), Some(5 | 110)));
    layers.set(When::Now);
    assert_eq!(fs::read(at.join("f")).unwrap(), pattern(0, 0..100));
}

#[test]
fn bytes_that_the_cache_file_does_not_have_are_an_error() {
    let at = Mountpoint::new();
    let entries = [file("f", 0, 100), sparse("s", 0, &[(10, 100)], 300)];
    let layers = Layers::new(&[50], When::Now);
    let bytes = Arc::new(LayerBytes(Arc::clone(&layers)));
    let _session =
        serve(mount(&at), Arc::new(TreeFs::new(Arc::new(tree(&[&entries]).into()), bytes)));
    for name in ["f", "s"] {
        assert_eq!(fs::read(at.join(name)).unwrap_err().raw_os_error(), Some(5), "{name}");
    }
}

#[test]
fn a_panic_of_the_file_system_is_one_failed_request() {
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&[file("f", 0, 100)], 100, When::Now);
    let fs = Arc::new(Panicking(fs));
    let session = Session::start(mount(&at), fs, &SessionOptions { threads: 1, negotiated: None });
    let _session = session.unwrap();
    for _again in 0..3 {
        assert_eq!(fs::read_link(at.join("f")).unwrap_err().raw_os_error(), Some(22));
        assert_eq!(fs::metadata(at.join("panic")).unwrap_err().raw_os_error(), Some(5));
        assert_eq!(fs::read(at.join("f")).unwrap_err().raw_os_error(), Some(5));
    }
}

#[test]
fn unmounting_ends_the_session() {
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&[file("f", 0, 100)], 100, When::Now);
    let session = Arc::new(serve(mount(&at), fs));
    assert_eq!(fs::read(at.join("f")).unwrap().len(), 100);
    assert!(!session.is_unmounted());
    unmount(at.path(), Unmount::Now).unwrap();
    let waiting = Arc::clone(&session);
    in_time(move || waiting.wait_unmounted());
    assert!(session.is_unmounted());
}

#[test]
fn a_dropped_session_leaves_the_mount() {
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&[file("f", 0, 100)], 100, When::Now);
    let session = serve(mount(&at), fs.clone());
    let negotiated = Some(session.negotiated());
    let keeper = crate::support::duplicate(session.connection());
    drop(session);
    let path = at.join("f");
    let reader = started(move || fs::read(path));
    assert!(still_waits(&reader));
    let options = SessionOptions { threads: 1, negotiated };
    let _successor = Session::start(keeper, fs, &options).unwrap();
    assert_eq!(in_time(move || reader.recv()).unwrap().unwrap(), pattern(0, 0..100));
}

#[test]
fn read_ahead_can_be_raised() {
    let at = Mountpoint::new();
    let size = 8 << 20;
    let (fs, layers) = tree_fs(&[file("f", 0, size)], size, When::Now);
    let connection = mount(&at);
    // Before anybody serves: the mount must not be asked.
    let path = at.path().to_owned();
    in_time(move || fuse::bdi_of(&path).unwrap().set_read_ahead_kb(1024).unwrap());
    let _session = serve(connection, fs);
    assert!(fs::read(at.join("f")).unwrap() == pattern(0, 0..size));
    let longest = layers.take_asked().iter().map(|(_, range)| range.end - range.start).max();
    assert_eq!(longest, Some(1 << 20));
}

#[test]
fn statfs_tells_the_size_of_the_whole() {
    let at = Mountpoint::new();
    let (fs, _layers) = tree_fs(&[file("a", 0, 4096), file("b", 0, 8192)], 8192, When::Now);
    let _session = serve(mount(&at), fs);
    let statfs = rustix::fs::statvfs(at.path()).unwrap();
    assert_eq!((statfs.f_bsize, statfs.f_blocks, statfs.f_files), (4096, 3, 3));
    assert_eq!((statfs.f_bfree, statfs.f_namemax), (0, 255));
}

fn open_direct(path: &Path) -> File {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
        .unwrap()
        .into()
}

/// Lets other users come to the mount, whose folder is its maker's own.
fn make_reachable(at: &Mountpoint) {
    let mode = fs::metadata(at.path()).unwrap().mode();
    assert_eq!(mode & 0o777, 0o755, "the tree's root hides the folder");
}

/// Counts what it is asked, except for bytes.
struct Counting {
    fs: Arc<TreeFs>,
    n_asked: AtomicUsize,
}

impl Counting {
    fn count(&self) -> &TreeFs {
        self.n_asked.fetch_add(1, Ordering::SeqCst);
        &self.fs
    }
}

impl Filesystem for Counting {
    fn names(&self) -> Names {
        self.fs.names()
    }
    fn xattrs(&self) -> Xattrs {
        self.fs.xattrs()
    }
    fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attr>, Errno> {
        self.count().lookup(parent, name)
    }
    fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        self.count().getattr(ino)
    }
    fn readlink(&self, ino: Ino) -> Result<Cow<'_, [u8]>, Errno> {
        self.count().readlink(ino)
    }
    fn parent(&self, directory: Ino) -> Result<Ino, Errno> {
        self.fs.parent(directory)
    }
    fn readdir(&self, directory: Ino, after: u64, sink: &mut DirSink<'_>) -> Result<(), Errno> {
        self.count().readdir(directory, after, sink)
    }
    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Cow<'_, [u8]>, Errno> {
        self.count().getxattr(ino, name)
    }
    fn listxattr(&self, ino: Ino, names: &mut Vec<u8>) -> Result<(), Errno> {
        self.count().listxattr(ino, names)
    }
    fn statfs(&self) -> Statfs {
        self.fs.statfs()
    }
    fn read(&self, ino: Ino, range: Range<u64>, reply: ReadReply) {
        self.fs.read(ino, range, reply);
    }
}

/// Panics at the name `panic` and at every read.
struct Panicking(Arc<TreeFs>);

impl Filesystem for Panicking {
    fn names(&self) -> Names {
        Names::Fixed
    }
    fn xattrs(&self) -> Xattrs {
        Xattrs::None
    }
    fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attr>, Errno> {
        assert_ne!(name, b"panic", "as intended");
        self.0.lookup(parent, name)
    }
    fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        self.0.getattr(ino)
    }
    fn readlink(&self, ino: Ino) -> Result<Cow<'_, [u8]>, Errno> {
        self.0.readlink(ino)
    }
    fn parent(&self, directory: Ino) -> Result<Ino, Errno> {
        self.0.parent(directory)
    }
    fn readdir(&self, directory: Ino, after: u64, sink: &mut DirSink<'_>) -> Result<(), Errno> {
        self.0.readdir(directory, after, sink)
    }
    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Cow<'_, [u8]>, Errno> {
        self.0.getxattr(ino, name)
    }
    fn listxattr(&self, ino: Ino, names: &mut Vec<u8>) -> Result<(), Errno> {
        self.0.listxattr(ino, names)
    }
    fn statfs(&self) -> Statfs {
        self.0.statfs()
    }
    fn read(&self, _ino: Ino, _range: Range<u64>, _reply: ReadReply) {
        unreachable!("as intended");
    }
}

//! Images with known bytes, mounts that go away, and bytes that come when a test says so.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use fuse::{
    Access, Bytes, BytesThen, Connection, Errno, Filesystem, MountOptions, Session, SessionOptions,
};
use rustix::mount::UnmountFlags;
use tempfile::TempDir;

/// Longer than anything takes here; reached only when something hangs.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A folder for a mount, which is taken away with the mount.
///
/// Waiting accesses are ended, so that a failing test does not leave processes behind.
#[derive(Debug)]
pub(crate) struct Mountpoint(TempDir);

impl Mountpoint {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of it as the argument of a program, with something before it.
    pub(crate) fn argument(&self, prefix: &str, name: &str) -> OsString {
        let mut argument = OsString::from(prefix);
        argument.push(self.join(name));
        argument
    }
}

impl Drop for Mountpoint {
    fn drop(&mut self) {
        // A failure means that nothing is mounted (any more).
        rustix::mount::unmount(self.path(), UnmountFlags::DETACH | UnmountFlags::FORCE).ok();
    }
}

pub(crate) fn mount_options() -> MountOptions {
    MountOptions {
        fsname: "hermes-test".to_owned(),
        subtype: Some("hermes".to_owned()),
        access: Access::Everybody,
        default_permissions: true,
        max_read: None,
    }
}

pub(crate) fn mount(at: &Mountpoint) -> Connection {
    Connection::mount(at.path(), &mount_options()).unwrap()
}

pub(crate) fn serve(connection: Connection, fs: Arc<dyn Filesystem>) -> Session {
    Session::start(connection, fs, &SessionOptions { threads: 2, negotiated: None }).unwrap()
}

/// What a keeper would hold.
pub(crate) fn duplicate(connection: &Connection) -> Connection {
    use std::os::fd::AsFd;
    Connection::from_fd(connection.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

/// Runs `work` in a thread and gives its result, or fails the test if that takes too long.
#[track_caller]
pub(crate) fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    started(work).recv_timeout(LONG).expect("it must not hang")
}

/// Runs `work` in a thread, to look later whether it has ended.
pub(crate) fn started<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, result) = channel();
    std::thread::spawn(move || done.send(work()));
    result
}

/// Whether nothing comes for long enough to say that it waits.
pub(crate) fn still_waits<T>(result: &Receiver<T>) -> bool {
    matches!(result.recv_timeout(Duration::from_millis(400)), Err(RecvTimeoutError::Timeout))
}

/// Bytes that differ from place to place and from layer to layer, and are never 0.
pub(crate) fn pattern(layer: u32, range: Range<u64>) -> Vec<u8> {
    let byte = |place: u64| {
        let mixed = (place ^ (u64::from(layer) << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed.to_le_bytes()[7].max(1)
    };
    range.map(byte).collect()
}

/// A file in which each layer's bytes stand from a place of its own on.
fn backing_file(lens: &[u64]) -> (File, Vec<u64>) {
    let mut file = tempfile::tempfile().unwrap();
    let mut starts = Vec::new();
    let mut at = 0;
    for (layer, &len) in (0..).zip(lens) {
        let gap = 4096 + 17;
        file.write_all(&vec![0xee; gap]).unwrap();
        at += u64::try_from(gap).unwrap();
        starts.push(at);
        file.write_all(&pattern(layer, 0..len)).unwrap();
        at += len;
    }
    (file, starts)
}

/// What the bytes do when they are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// They are there at once.
    Now,
    /// Another thread brings them.
    Later,
    /// They wait for [`Layers::release`].
    Held,
    /// They are lost.
    Never,
    /// There are none.
    Fails(i32),
}

struct Asked {
    layer: u32,
    range: Range<u64>,
    then: BytesThen,
}

/// Layers whose byte `n` is that of [`pattern`].
pub(crate) struct Layers {
    file: File,
    starts: Vec<u64>,
    when: Mutex<When>,
    held: Mutex<Vec<Asked>>,
    held_changed: Condvar,
    asked: Mutex<Vec<(u32, Range<u64>)>>,
}

impl Layers {
    pub(crate) fn new(lens: &[u64], when: When) -> Arc<Self> {
        let (file, starts) = backing_file(lens);
        Arc::new(Self {
            file,
            starts,
            when: Mutex::new(when),
            held: Mutex::default(),
            held_changed: Condvar::new(),
            asked: Mutex::default(),
        })
    }

    pub(crate) fn set(&self, when: When) {
        *self.when.lock().unwrap() = when;
    }

    /// Waits until at least `n` reads are held.
    #[track_caller]
    pub(crate) fn wait_for_held(&self, n: usize) {
        let held = self.held.lock().unwrap();
        let too_few = |held: &mut Vec<Asked>| held.len() < n;
        let (_held, waited) = self.held_changed.wait_timeout_while(held, LONG, too_few).unwrap();
        assert!(!waited.timed_out(), "the reads must arrive");
    }

    /// Answers all held reads.
    pub(crate) fn release(&self) {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        held.into_iter().for_each(|asked| self.answer(asked));
    }

    /// Drops all held reads unanswered.
    pub(crate) fn forget_held(&self) {
        self.held.lock().unwrap().clear();
    }

    /// Everything that was asked for since the last call.
    pub(crate) fn take_asked(&self) -> Vec<(u32, Range<u64>)> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    fn answer(&self, asked: Asked) {
        let start = self.starts[usize::try_from(asked.layer).unwrap()];
        (asked.then)(Ok((&self.file, start + asked.range.start)));
    }
}

/// Gives a file system its bytes; the threads that bring them hold the layers too.
pub(crate) struct LayerBytes(pub(crate) Arc<Layers>);

impl Bytes for LayerBytes {
    fn read(&self, layer: u32, range: Range<u64>, then: BytesThen) {
        self.0.asked.lock().unwrap().push((layer, range.clone()));
        let when = *self.0.when.lock().unwrap();
        let asked = Asked { layer, range, then };
        match when {
            When::Now => self.0.answer(asked),
            When::Later => {
                let layers = Arc::clone(&self.0);
                std::thread::spawn(move || layers.answer(asked));
            }
            When::Held => {
                self.0.held.lock().unwrap().push(asked);
                self.0.held_changed.notify_all();
            }
            When::Never => drop(asked),
            When::Fails(errno) => (asked.then)(Err(Errno::from_raw_os_error(errno))),
        }
    }
}

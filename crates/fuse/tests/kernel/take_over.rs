//! A session's place is taken by another while the mount is in use.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;

use fuse::{Connection, Negotiated, Session, SessionOptions, TreeFs};
use rustix::fs::{Advice, Mode, OFlags, fadvise};
use sys::fuse_device::{MIN_REQUEST_BUFFER, Operation, Request};

use crate::images::{file, tree_fs};
use crate::support::{
    LONG, Layers, Mountpoint, When, duplicate, in_time, mount, pattern, serve, started, still_waits,
};

const SIZE: u64 = 1 << 20;

fn image(when: When) -> (Arc<TreeFs>, Arc<Layers>) {
    tree_fs(&[file("f", 100, SIZE)], SIZE + 100, when)
}

fn take_over(connection: Connection, fs: Arc<TreeFs>, negotiated: Option<Negotiated>) -> Session {
    Session::start(connection, fs, &SessionOptions { threads: 2, negotiated }).unwrap()
}

/// A process that serves and can be killed.
struct Daemon(Child);

impl Daemon {
    /// Starts [`a_daemon_whose_bytes_never_come`] with the connection.
    fn start(connection: &Connection) -> Self {
        let device: OwnedFd = connection.as_fd().try_clone_to_owned().unwrap();
        let this_test = std::env::current_exe().unwrap();
        let name = "take_over::a_daemon_whose_bytes_never_come";
        let mut command = Command::new(this_test);
        let command = command.args(["--exact", name]).stdin(device).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Not a test but the process of one, which has the connection as its standard input.
#[test]
fn a_daemon_whose_bytes_never_come() {
    let input = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let Ok(connection) = Connection::from_fd(input) else { return };
    let (fs, _layers) = image(When::Held);
    serve(connection, fs).wait_unmounted();
}

#[test]
fn reads_of_a_killed_daemon_are_answered_by_the_next() {
    let at = Mountpoint::new();
    let keeper = mount(&at);
    let mut daemon = Daemon::start(&keeper);
    let size_of_f = || Reader::start("stat", &["-c%s".into(), at.argument("", "f")]).finish();
    assert_eq!(size_of_f(), format!("{SIZE}\n").as_bytes());
    let buffered = Reader::start("dd", &[at.argument("if=", "f"), "bs=64K".into()]);
    let direct = Reader::start("dd", &[at.argument("if=", "f"), "iflag=direct".into()]);
    assert!(still_waits(&buffered.bytes));
    daemon.kill();
    assert_eq!(size_of_f(), format!("{SIZE}\n").as_bytes(), "the kernel knows it");
    let missing = Reader::start("stat", &["-c%s".into(), at.argument("", "missing")]);
    for reader in [&buffered, &direct, &missing] {
        assert!(still_waits(&reader.bytes));
    }

    // The dead daemon's note did not arrive anywhere: the hardest case.
    let (fs, _layers) = image(When::Later);
    let _successor = take_over(duplicate(&keeper), fs, None);
    assert!(buffered.finish() == pattern(0, 100..100 + SIZE));
    assert!(direct.finish() == pattern(0, 100..100 + SIZE));
    assert_eq!(missing.finish(), b"");
}

#[test]
fn a_daemon_may_be_killed_several_times_in_one_read() {
    let at = Mountpoint::new();
    let keeper = mount(&at);
    let readers: Vec<_> = ["iflag=direct", "iflag=nofollow"]
        .map(|flag| Reader::start("dd", &[at.argument("if=", "f"), flag.into()]))
        .into();
    for _death in 0..3 {
        let mut daemon = Daemon::start(&keeper);
        assert!(still_waits(&readers[0].bytes));
        daemon.kill();
    }
    let (fs, _layers) = image(When::Now);
    let _successor = take_over(keeper, fs, None);
    for reader in readers {
        assert!(reader.finish() == pattern(0, 100..100 + SIZE));
    }
}

/// A process that reads from a mount. Where daemons are started too it cannot be a thread: closing
/// its inherited files would make the new process wait for a daemon.
struct Reader {
    bytes: Receiver<Vec<u8>>,
}

impl Reader {
    fn start(program: &str, arguments: &[OsString]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        Self { bytes: started(move || command.output().expect("needs coreutils").stdout) }
    }

    #[track_caller]
    fn finish(self) -> Vec<u8> {
        self.bytes.recv_timeout(LONG).expect("it must not hang")
    }
}

#[test]
fn errors_after_the_end_of_a_session_reach_nobody() {
    let at = Mountpoint::new();
    let (fs, layers) = image(When::Held);
    let session = serve(mount(&at), fs.clone());
    let keeper = duplicate(session.connection());
    let negotiated = session.negotiated();
    assert!(negotiated.may_resend(), "Linux 6.9 or later is needed");
    let path = at.join("f");
    let reader = started(move || read_direct(&path));
    layers.wait_for_held(1);
    session.stop();
    // As when a daemon's engine goes down before its process ends.
    layers.forget_held();
    assert!(still_waits(&reader));
    let note = negotiated.to_bytes();
    layers.set(When::Later);
    let _successor = take_over(keeper, fs, Negotiated::from_bytes(&note));
    assert_eq!(in_time(move || reader.recv()).unwrap(), pattern(0, 100..4196));
}

#[test]
fn bytes_after_the_end_of_a_session_are_delivered() {
    let at = Mountpoint::new();
    let (fs, layers) = image(When::Held);
    let session = serve(mount(&at), fs);
    let path = at.join("f");
    // After the first close of a file the kernel does not ask for one any more.
    drop(File::open(&path).unwrap());
    let reader = started(move || read_direct(&path));
    layers.wait_for_held(1);
    let _keeper = duplicate(session.connection());
    session.stop();
    layers.release();
    assert_eq!(in_time(move || reader.recv()).unwrap(), pattern(0, 100..4196));
}

#[test]
fn a_daemon_may_die_before_and_in_the_middle_of_the_first_request() {
    for read_first in [false, true] {
        let at = Mountpoint::new();
        let connection = mount(&at);
        if read_first {
            let mut message = vec![0; MIN_REQUEST_BUFFER];
            let len = connection.read_request(&mut message).unwrap().unwrap();
            let request = Request::parse(&message[..len]).unwrap();
            assert!(matches!(request.operation, Operation::Init(_)));
        }
        let (fs, _layers) = image(When::Now);
        let _session = serve(duplicate(&connection), fs);
        let path = at.join("f");
        let read = in_time(move || fs::read(path)).unwrap();
        assert!(read == pattern(0, 100..100 + SIZE));
    }
}

#[test]
fn sixty_four_readers_do_not_notice_replacements() {
    let at = Mountpoint::new();
    let (fs, _layers) = image(When::Later);
    let mut session = serve(mount(&at), fs.clone());
    let keeper = duplicate(session.connection());
    let negotiated = Some(session.negotiated());
    let expect = Arc::new(pattern(0, 100..100 + SIZE));
    let ends = Arc::new(AtomicBool::new(false));
    let n_reads = Arc::new(AtomicUsize::new(0));
    let readers: Vec<_> = (0..64_u64)
        .map(|number| {
            let (path, expect) = (at.join("f"), Arc::clone(&expect));
            let (ends, n_reads) = (Arc::clone(&ends), Arc::clone(&n_reads));
            started(move || {
                let mut place = number;
                while !ends.load(Ordering::SeqCst) {
                    place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(number | 1);
                    read_somewhere(&path, place >> 33, &expect);
                    n_reads.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for _replacement in 0..40 {
        session.stop();
        session = take_over(duplicate(&keeper), fs.clone(), negotiated);
        let before = n_reads.load(Ordering::SeqCst);
        while n_reads.load(Ordering::SeqCst) < before + 64 {
            std::thread::yield_now();
        }
    }
    ends.store(true, Ordering::SeqCst);
    for reader in readers {
        in_time(move || reader.recv()).expect("no reader may fail");
    }
}

/// Reads up to 64 KiB at a place made of `random`, through the page cache or not, and checks them.
fn read_somewhere(path: &Path, random: u64, expect: &[u8]) {
    let direct = if random.is_multiple_of(2) { OFlags::DIRECT } else { OFlags::empty() };
    let file = open(path, direct);
    let start = usize::try_from((random >> 1) % (SIZE - 1)).unwrap();
    let len = (expect.len() - start).min(1 + start % 65_536);
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, u64::try_from(start).unwrap()).unwrap();
    assert!(bytes == expect[start..start + len]);
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
}

fn read_direct(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    open(path, OFlags::DIRECT).read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn open(path: &Path, flags: OFlags) -> File {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | flags;
    rustix::fs::open(path, flags, Mode::empty()).unwrap().into()
}

//! The keeper as a process of its own, and daemons that are killed. The last test needs root, Linux
//! 6.15 and a folder for temporary files on ext4, xfs or btrfs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use keeper::{Client, ClientError, StartError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use sys::descriptors;
use sys::fanotify::FileId;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

/// A root folder, and the end of all processes that were started for it.
struct Rig {
    root: TempDir,
    listener: OwnedFd,
    children: Vec<Child>,
}

/// A process that has reported, for as long as its socket is held.
struct Reported {
    pid: Pid,
    text: String,
    socket: OwnedFd,
}

impl Rig {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let listener = descriptors::listen(&root.path().join("test.sock")).unwrap();
        Self { root, listener, children: Vec::new() }
    }

    fn socket(&self) -> PathBuf {
        self.root.path().join("keeper.sock")
    }

    fn command(&self, role: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keeper-under-test"));
        command.arg(role).arg(self.root.path());
        command
    }

    /// Starts a keeper that starts the given role again when it dies.
    fn keeper(&self, respawn: Option<&str>) -> Client {
        let mut command = self.command("keeper");
        if let Some(role) = respawn {
            let respawn = self.command(role);
            command.arg(respawn.get_program()).args(respawn.get_args());
        }
        keeper::start(&mut command, &self.socket()).unwrap()
    }

    fn start(&mut self, role: &str) {
        let child = self.command(role).spawn().unwrap();
        self.children.push(child);
    }

    /// The next process that reports.
    #[track_caller]
    fn reported(&self) -> Reported {
        assert!(readable_within(&self.listener, PATIENCE), "nobody reports");
        let socket = descriptors::accept(self.listener.as_fd()).unwrap();
        assert!(readable_within(&socket, PATIENCE), "it says nothing");
        let mut buffer = [0; 256];
        let len = descriptors::receive(socket.as_fd(), &mut buffer).unwrap().len;
        let text = std::str::from_utf8(&buffer[..len]).unwrap();
        let (pid, text) = text.split_once(' ').expect("a report begins with the process id");
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        Reported { pid, text: text.to_owned(), socket }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Kills the keeper first, so that it starts no more daemons; those that live see the end of
        // their sockets.
        if let Ok(keeper) = Client::connect(&self.socket()) {
            keeper.pid().map(|pid| kill_process(pid_of(pid), Signal::KILL)).ok();
        }
        for child in &mut self.children {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

fn readable_within(fd: impl AsFd, patience: Duration) -> bool {
    let fd = fd.as_fd();
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::try_from(patience).unwrap())).unwrap() > 0
}

fn some_file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

#[track_caller]
fn check_held(keeper: &Client, expected: &[(&str, &[u8], &File)]) {
    let held = keeper.take_all().unwrap();
    let found: Vec<_> = held
        .iter()
        .map(|held| {
            let id = FileId::of(held.fd.as_fd()).unwrap();
            (held.name.as_str(), held.note.as_slice(), id)
        })
        .collect();
    let expected: Vec<_> = expected
        .iter()
        .map(|(name, note, file)| (*name, *note, FileId::of(file.as_fd()).unwrap()))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn what_is_put_is_held() {
    let rig = Rig::new();
    let keeper = rig.keeper(None);
    check_held(&keeper, &[]);
    let (first, second, third) = (some_file(b"1"), some_file(b"2"), some_file(b"3"));
    keeper.put("b", b"a note", first.as_fd()).unwrap();
    keeper.put("a", &[0; keeper::MAX_NOTE_LEN], second.as_fd()).unwrap();
    check_held(&keeper, &[("a", &[0; keeper::MAX_NOTE_LEN], &second), ("b", b"a note", &first)]);
    keeper.put("b", b"", third.as_fd()).unwrap();
    keeper.remove("a").unwrap();
    keeper.remove("never held").unwrap();
    let other = Client::connect(&rig.socket()).unwrap();
    check_held(&other, &[("b", b"", &third)]);
}

#[test]
fn a_descriptor_survives_the_one_who_put_it() {
    let rig = Rig::new();
    rig.keeper(None).put("pipe", b"", std::io::pipe().unwrap().0.as_fd()).unwrap();
    let keeper = Client::connect(&rig.socket()).unwrap();
    let held = keeper.take_all().unwrap();
    assert_eq!(held.len(), 1);
}

#[test]
fn more_is_held_than_fits_a_socket() {
    let rig = Rig::new();
    let keeper = rig.keeper(None);
    let file = some_file(b"");
    for n in 0..500 {
        keeper.put(&format!("{n:03}"), &[b'n'; 2000], file.as_fd()).unwrap();
    }
    let held = keeper.take_all().unwrap();
    assert!(held.iter().enumerate().all(|(n, held)| held.name == format!("{n:03}")));
    assert_eq!(held.len(), 500);
}

#[test]
fn what_cannot_be_held_is_refused() {
    let rig = Rig::new();
    let keeper = rig.keeper(None);
    let file = some_file(b"");
    for (name, note_len) in [("", 0), ("x", keeper::MAX_NOTE_LEN + 1)] {
        let err = keeper.put(name, &vec![0; note_len], file.as_fd()).expect_err("it is too much");
        assert!(matches!(err, ClientError::Invalid { .. }), "{err:?}");
    }
    check_held(&keeper, &[]);
}

#[test]
fn the_client_notices_that_the_keeper_dies() {
    let rig = Rig::new();
    let keeper = rig.keeper(None);
    assert!(!keeper.closed());
    let pid = keeper.pid().unwrap();
    kill_process(pid_of(pid), Signal::KILL).unwrap();
    assert!(keeper.wait_closed(Some(PATIENCE)).unwrap());
    assert!(keeper.closed());
    let err = keeper.pid().expect_err("it is dead");
    assert!(matches!(err, ClientError::Gone { .. }), "{err:?}");
    // A new one takes its place, whatever the dead one left behind.
    let keeper = rig.keeper(None);
    assert_ne!(keeper.pid().unwrap(), pid);
}

#[test]
fn there_is_one_keeper() {
    let rig = Rig::new();
    let keeper = rig.keeper(None);
    let second = keeper::start(&mut rig.command("keeper"), &rig.socket());
    assert!(matches!(second, Err(StartError::Ended { .. })), "{second:?}");
    let pid_file = rig.root.path().join("keeper.pid");
    let pid = keeper.pid().unwrap();
    assert_eq!(std::fs::read_to_string(pid_file).unwrap(), format!("{pid}\n"));
}

/// Whoever holds the lock and does not listen is dying.
#[test]
fn a_keeper_waits_for_the_end_of_a_dying_one() {
    let rig = Rig::new();
    let pid_file = rig.root.path().join("keeper.pid");
    let lock = File::create(&pid_file).unwrap();
    lock.lock().unwrap();
    let keeper = std::thread::scope(|scope| {
        let started = scope.spawn(|| rig.keeper(None));
        let looks = || {
            std::fs::read_dir("/proc").unwrap().flatten().any(|process| {
                let ours = process.file_name() == std::process::id().to_string().as_str();
                let fds =
                    std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
                !ours
                    && fds
                        .map(|fd| std::fs::read_link(fd.path()))
                        .any(|to| to.is_ok_and(|to| to == pid_file))
            })
        };
        let begin = Instant::now();
        while !looks() {
            assert!(begin.elapsed() < PATIENCE && !started.is_finished());
            std::thread::yield_now();
        }
        drop(lock);
        started.join().unwrap()
    });
    assert!(keeper.pid().unwrap() > 0);
}

#[test]
fn only_an_empty_keeper_terminates() {
    let rig = Rig::new();
    let keeper = rig.keeper(None);
    let pid = pid_of(keeper.pid().unwrap());
    keeper.put("x", b"", some_file(b"").as_fd()).unwrap();
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        kill_process(pid, signal).unwrap();
        // The keeper looks at signals before requests.
        keeper.pid().unwrap();
    }
    keeper.remove("x").unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert!(keeper.wait_closed(Some(PATIENCE)).unwrap());
}

/// In a namespace whose first process has the name of the one that ends a machine. Arguments: the root
/// folder, the keeper's command.
const ENDING_MACHINE: &str = "
exec 3<&0
root=$1; shift
echo systemd-shutdow > /proc/self/comm
sleep infinity 3<&- & reader=$!
\"$@\" <&3 3<&- & keeper=$!
exec 3<&-
read -r _ < $root/terminate
kill -TERM $keeper
read -r _ < $root/end-reader
kill -KILL $reader
wait $keeper
";

/// A service manager waits for what it has told to terminate.
#[test]
fn at_the_end_of_the_machine_it_outlives_only_readers() {
    let rig = Rig::new();
    let fifo = |name: &str| rig.root.path().join(name);
    for name in ["terminate", "end-reader"] {
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, fifo(name), rustix::fs::FileType::Fifo, mode, 0)
            .unwrap();
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["bash", "-euc", ENDING_MACHINE, "bash"]).arg(rig.root.path());
    let keeper = rig.command("keeper");
    command.arg(keeper.get_program()).args(keeper.get_args());
    let keeper = keeper::start(&mut command, &rig.socket()).unwrap();
    keeper.put("x", b"", some_file(b"").as_fd()).unwrap();
    std::fs::write(fifo("terminate"), "\n").unwrap();
    // Somebody opens it to read once the signal was sent.
    let mut end_reader = File::options().write(true).open(fifo("end-reader")).unwrap();
    assert!(!keeper.wait_closed(Some(Duration::from_millis(200))).unwrap());
    keeper.pid().unwrap();
    std::io::Write::write_all(&mut end_reader, b"\n").unwrap();
    assert!(keeper.wait_closed(Some(PATIENCE)).unwrap());
}

#[test]
fn shutting_down_lets_everything_go() {
    let rig = Rig::new();
    let keeper = rig.keeper(None);
    let (reader, writer) = std::io::pipe().unwrap();
    keeper.put("pipe", b"", writer.as_fd()).unwrap();
    drop(writer);
    assert!(!readable_within(&reader, Duration::ZERO), "the keeper holds the other end");
    keeper.shutdown().unwrap();
    assert!(readable_within(&reader, PATIENCE), "the other end is closed");
}

#[test]
fn a_killed_daemon_is_started_again() {
    let mut rig = Rig::new();
    let keeper = rig.keeper(Some("daemon"));
    keeper.put("x", b"", some_file(b"").as_fd()).unwrap();
    rig.start("daemon");
    let first = rig.reported();
    let oom = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let expected = format!("daemon x oom={}", oom.trim_end());
    assert_eq!(first.text, expected);
    kill_process(first.pid, Signal::KILL).unwrap();
    let second = rig.reported();
    assert_eq!(second.text, expected);
    assert_ne!(second.pid, first.pid);
    // It was started by a keeper that holds signals back and is protected: it must be neither.
    kill_process(second.pid, Signal::TERM).unwrap();
    let third = rig.reported();
    assert_ne!(third.pid, second.pid);
    // One that ends without a goodbye is missed as well.
    descriptors::send(third.socket.as_fd(), b"end", &[]).unwrap();
    let fourth = rig.reported();
    descriptors::send(fourth.socket.as_fd(), b"goodbye", &[]).unwrap();
    assert!(readable_within(&fourth.socket, PATIENCE), "it ends");
    let long_after = Duration::from_millis(700);
    assert!(!readable_within(&rig.listener, long_after), "it is started all the same");
    assert!(!keeper.closed());
}

#[test]
fn a_daemon_is_started_as_its_successor_wants_it() {
    let mut rig = Rig::new();
    let keeper = rig.keeper(Some("dying"));
    let command = rig.command("daemon");
    let mut words = vec![command.get_program().to_owned()];
    words.extend(command.get_args().map(OsStr::to_owned));
    keeper.respawn(&words).unwrap();
    rig.start("daemon");
    let first = rig.reported();
    kill_process(first.pid, Signal::KILL).unwrap();
    let second = rig.reported();
    assert!(second.text.starts_with("daemon"), "{}", second.text);
    keeper.respawn(&[]).unwrap();
    kill_process(second.pid, Signal::KILL).unwrap();
    assert!(!readable_within(&rig.listener, Duration::from_millis(700)), "nobody wants it");
    for words in [vec!["zero\0byte".into()], vec!["long".repeat(2000).into()]] {
        let err = keeper.respawn(&words).expect_err("it cannot be sent");
        assert!(matches!(err, ClientError::Invalid { .. }), "{err:?}");
    }
}

#[test]
fn a_daemon_that_was_superseded_is_not_missed() {
    let mut rig = Rig::new();
    let _keeper = rig.keeper(Some("daemon"));
    rig.start("daemon");
    let old = rig.reported();
    rig.start("daemon");
    let new = rig.reported();
    kill_process(old.pid, Signal::KILL).unwrap();
    assert!(!readable_within(&rig.listener, Duration::from_millis(300)), "the new one lives");
    kill_process(new.pid, Signal::KILL).unwrap();
    let next = rig.reported();
    assert_ne!(next.pid, new.pid);
}

#[test]
fn attempts_become_rarer() {
    let mut rig = Rig::new();
    let _keeper = rig.keeper(Some("dying"));
    rig.start("daemon");
    let daemon = rig.reported();
    let killed = Instant::now();
    kill_process(daemon.pid, Signal::KILL).unwrap();
    for _ in 0..4 {
        assert_eq!(rig.reported().text, "dying");
    }
    let least = Duration::from_millis(50 + 100 + 200 + 400);
    assert!(killed.elapsed() >= least, "{:?}", killed.elapsed());
}

/// The promise of this crate in one test.
#[test]
fn a_reader_does_not_notice_that_the_daemon_was_killed() {
    let mut rig = Rig::new();
    let _keeper = rig.keeper(Some("filler"));
    let path = rig.root.path().join("layer");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    rig.start("filler");
    let first = rig.reported();
    assert_eq!(first.text, "filler marked");
    let read = |offset| {
        let path = path.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 5000];
            File::open(path)?.read_exact_at(&mut bytes, offset).map(|()| bytes)
        })
    };
    let reader = read(12345);
    assert_eq!(rig.reported().text, "filler has an event");
    kill_process(first.pid, Signal::KILL).unwrap();
    // This one is not in the journal: nobody has read it yet.
    let second_reader = read(500_000);
    let successor = rig.reported();
    assert_eq!(successor.text, "filler took over");
    assert_eq!(reader.join().unwrap().unwrap(), [b'x'; 5000]);
    assert_eq!(second_reader.join().unwrap().unwrap(), [b'x'; 5000]);
    drop(successor.socket);
}

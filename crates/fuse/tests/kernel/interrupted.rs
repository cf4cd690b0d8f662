//! Readers that get signals while they wait.

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Receiver;

use fuse::{Session, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};

use crate::images::{file, tree_fs};
use crate::support::{LONG, Mountpoint, When, duplicate, mount, serve, started, still_waits};

/// A process that reads, with a handler for SIGUSR1. Ended with the test.
struct Reader {
    pid: Pid,
    ended: Receiver<ExitStatus>,
}

/// Flags for `sysopen`: reads of the first kind are made by read-ahead, the others by the reader
/// itself, which then cannot be killed without our help.
const BUFFERED: &str = "O_RDONLY";
const DIRECT: &str = "O_RDONLY|040000";

impl Reader {
    /// It exits with 0 if it could read 100 bytes.
    fn start(path: &Path, flags: &str) -> Self {
        let script = format!(
            "use Fcntl; $SIG{{USR1}} = sub {{}}; sysopen(F, $ARGV[0], {flags}) or exit 2; \
             exit(sysread(F, $b, 100) == 100 ? 0 : 3);"
        );
        let mut command = Command::new("perl");
        let command = command.args(["-e", &script]).arg(path).stdin(Stdio::null());
        let child: Child = command.spawn().expect("needs perl");
        let pid = Pid::from_child(&child);
        Self { pid, ended: started(move || wait(child)) }
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // It may have ended, and then its number means nobody: the child is waited for elsewhere,
        // but no test starts so many processes that the number is used again.
        kill_process(self.pid, Signal::KILL).ok();
    }
}

fn wait(mut child: Child) -> ExitStatus {
    child.wait().unwrap()
}

#[track_caller]
fn check_killed(flags: &str, before: &[Signal]) {
    let at = Mountpoint::new();
    let (fs, layers) = tree_fs(&[file("f", 0, 100)], 100, When::Held);
    let _session = serve(mount(&at), fs);
    let reader = Reader::start(&at.join("f"), flags);
    layers.wait_for_held(1);
    for signal in before {
        reader.signal(*signal);
        assert!(still_waits(&reader.ended), "a handled signal must not end the read");
    }
    reader.signal(Signal::KILL);
    let status = reader.ended.recv_timeout(LONG).expect("SIGKILL must end the reader");
    assert!(!status.success());
    // The late bytes find nobody.
    layers.release();
}

#[test]
fn a_reader_that_waits_for_a_page_can_be_killed() {
    check_killed(BUFFERED, &[]);
}

#[test]
fn a_reader_that_waits_for_its_own_request_can_be_killed() {
    check_killed(DIRECT, &[]);
}

#[test]
fn a_reader_can_be_killed_after_other_signals() {
    check_killed(BUFFERED, &[Signal::USR1]);
    check_killed(DIRECT, &[Signal::USR1, Signal::USR1]);
}

#[test]
fn other_signals_do_not_fail_a_read() {
    for flags in [BUFFERED, DIRECT] {
        let at = Mountpoint::new();
        let (fs, layers) = tree_fs(&[file("f", 0, 100)], 100, When::Held);
        let _session = serve(mount(&at), fs);
        let reader = Reader::start(&at.join("f"), flags);
        layers.wait_for_held(1);
        reader.signal(Signal::USR1);
        assert!(still_waits(&reader.ended));
        layers.release();
        let status = reader.ended.recv_timeout(LONG).expect("it must go on");
        assert!(status.success(), "{flags}: {status}");
    }
}

#[test]
fn a_reader_can_be_killed_in_and_after_a_replacement() {
    for killed_between in [true, false] {
        let at = Mountpoint::new();
        let (fs, layers) = tree_fs(&[file("f", 0, 100)], 100, When::Held);
        let session = serve(mount(&at), fs.clone());
        let keeper = duplicate(session.connection());
        let negotiated = Some(session.negotiated());
        let reader = Reader::start(&at.join("f"), DIRECT);
        layers.wait_for_held(1);
        reader.signal(Signal::USR1);
        session.stop();
        if killed_between {
            reader.signal(Signal::KILL);
        }
        let options = SessionOptions { threads: 2, negotiated };
        let _successor = Session::start(keeper, fs, &options).unwrap();
        if !killed_between {
            layers.wait_for_held(2);
            reader.signal(Signal::KILL);
        }
        let status = reader.ended.recv_timeout(LONG).expect("SIGKILL must end the reader");
        assert!(!status.success());
    }
}

//! Events, their answers, and who raises them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use sys::fanotify::{Denial, Event, FileId};
use sys::journal::Journal;

use crate::child::Other;
use crate::rig::{Rig, content, fill, is_own_thread};

const LEN: u64 = 1 << 20;

#[test]
fn a_reader_waits_for_its_bytes() {
    let truth = content(1 << 20);
    let rig = Rig::new(LEN);
    let reader = rig.reader(500_000, 4096);
    let event = rig.event();
    let range = event.range();
    assert!(range.start <= 500_000 && range.end >= 504_096, "{range:?}");
    assert!(is_own_thread(event.pid()));
    assert_eq!(event.file_id().unwrap(), FileId::of(rig.file.as_fd()).unwrap());
    assert!(!reader.is_finished());
    fill(&event, &truth);
    event.allow().unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), &truth[500_000..504_096]);
    // Neither our write through the event's descriptor nor the reader's close has raised any.
    rig.assert_no_event();
}

#[test]
fn many_readers_wait_at_once() {
    let truth = content(1 << 20);
    let rig = Rig::new(LEN);
    let readers: Vec<_> = (0..6).map(|n| (n, rig.reader(n << 16, 1 << 16))).collect();
    let events: Vec<_> = readers.iter().map(|_| rig.event()).collect();
    for event in events.into_iter().rev() {
        fill(&event, &truth);
        event.allow().unwrap();
    }
    for (n, reader) in readers {
        let start = usize::try_from(n << 16).unwrap();
        assert_eq!(reader.join().unwrap().unwrap(), &truth[start..start + (1 << 16)]);
    }
    rig.assert_no_event();
}

#[test]
fn a_file_opened_before_the_mark_raises_no_events() {
    let rig = Rig::new(LEN);
    let mut bytes = [0; 7];
    rig.file.write_all_at(b"our own", 4096).unwrap();
    rig.file.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(&bytes, b"our own");
    rig.assert_no_event();
}

#[test]
fn nor_does_it_in_another_process() {
    let rig = Rig::new(LEN);
    let other = Other::start("write and read", &[rig.file.as_fd()]);
    assert_eq!(other.report(), "done");
    rig.assert_no_event();
    let mut bytes = [0; 7];
    rig.file.read_exact_at(&mut bytes, 8192).unwrap();
    assert_eq!(&bytes, b"written");
}

/// The trap that the keeper exists for: a successor that opened the file itself would wait for
/// itself as soon as it fills it.
#[test]
fn a_file_opened_after_the_mark_waits_for_its_own_writes() {
    let rig = Rig::new(LEN);
    let path = rig.path.clone();
    let writer = std::thread::spawn(move || -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.write_all_at(b"filled", 0)
    });
    let event = rig.event();
    assert!(is_own_thread(event.pid()));
    assert!(!writer.is_finished());
    event.allow().unwrap();
    writer.join().unwrap().unwrap();
}

#[test]
fn without_the_mark_there_are_no_events() {
    let rig = Rig::new(LEN);
    let opened_while_marked = File::open(&rig.path).unwrap();
    rig.group.unmark(rig.file.as_fd()).unwrap();
    let mut bytes = [1; 16];
    opened_while_marked.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 16]);
    rig.assert_no_event();
    let err = rig.group.unmark(rig.file.as_fd()).expect_err("it is not marked any more");
    assert_eq!(err.raw_os_error(), Some(Errno::NOENT.raw_os_error()));
}

/// What eviction relies on: a file that was sealed and unmarked can be marked again under whoever
/// has it open.
#[test]
fn a_second_mark_reaches_descriptors_of_the_first() {
    let truth = content(1 << 20);
    let rig = Rig::new(LEN);
    let opened_while_marked = File::open(&rig.path).unwrap();
    rig.group.unmark(rig.file.as_fd()).unwrap();
    rig.mark();
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 16];
        opened_while_marked.read_exact_at(&mut bytes, 4096).map(|()| bytes)
    });
    let event = rig.event();
    fill(&event, &truth);
    event.allow().unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), truth[4096..4112]);
}

#[track_caller]
fn check_denied(deny: impl FnOnce(Event), expected: Errno) {
    let rig = Rig::new(LEN);
    let reader = rig.reader(0, 1);
    deny(rig.event());
    let err = reader.join().unwrap().expect_err("the read was denied");
    assert_eq!(err.raw_os_error(), Some(expected.raw_os_error()));
}

#[test]
fn a_denied_reader_gets_the_error() {
    check_denied(|event| event.deny(Denial::Io).unwrap(), Errno::IO);
    check_denied(|event| event.deny(Denial::NotPermitted).unwrap(), Errno::PERM);
    check_denied(|event| event.deny(Denial::Busy).unwrap(), Errno::BUSY);
    check_denied(|event| event.deny(Denial::TryAgain).unwrap(), Errno::AGAIN);
    check_denied(|event| event.deny(Denial::NoSpace).unwrap(), Errno::NOSPC);
    check_denied(|event| event.deny(Denial::Quota).unwrap(), Errno::DQUOT);
}

#[test]
fn a_forgotten_event_is_denied() {
    check_denied(drop, Errno::IO);
}

#[test]
fn answered_events_leave_nothing_in_the_journal() {
    let rig = Rig::new(LEN);
    for n in 0..3 {
        let reader = rig.reader(n, 1);
        rig.event().allow().unwrap();
        reader.join().unwrap().unwrap();
    }
    let copy = rig.journal.as_fd().try_clone_to_owned().unwrap();
    assert!(Journal::open(copy).unwrap().orphans().is_empty());
}

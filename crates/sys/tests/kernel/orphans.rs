//! Events that a process had read when it was killed.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::io::Errno;
use sys::fanotify::{Answer, Denial};
use sys::journal::{Journal, Orphan};

use crate::child::Other;
use crate::rig::{Rig, content, fill_through, is_own_thread};

const LEN: u64 = 1 << 20;

type Reader = JoinHandle<std::io::Result<Vec<u8>>>;

/// Lets a reader of 4096 bytes at `offset` wait, a process take its event, and the process die.
/// This process is keeper and successor at once.
fn orphan(rig: &Rig, role: &str, offset: u64) -> (Reader, Orphan, Journal) {
    let reader = rig.reader(offset, 4096);
    let other = Other::start(role, &[rig.group.as_fd(), rig.journal.as_fd()]);
    let number = other.report();
    other.kill();
    assert!(!reader.is_finished());
    let journal = Journal::open(rig.journal.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let mut orphans = journal.orphans();
    let orphan = orphans.pop().expect("the journal names the event");
    assert!(orphans.is_empty() && journal.orphans().is_empty());
    assert_eq!(orphan.number().to_string(), number);
    assert!(orphan.range().contains(&offset), "{orphan:?}");
    assert!(is_own_thread(orphan.pid()));
    (reader, orphan, journal)
}

#[track_caller]
fn assert_empty(rig: &Rig) {
    let copy = rig.journal.as_fd().try_clone_to_owned().unwrap();
    assert!(Journal::open(copy).unwrap().orphans().is_empty());
}

#[test]
fn the_successor_fills_and_answers() {
    let truth = content(1 << 20);
    let rig = Rig::new(LEN);
    let (reader, orphan, _journal) = orphan(&rig, "read an event", 65536);
    assert_eq!(orphan.tag(), None);
    fill_through(rig.file.as_fd(), orphan.range(), &truth);
    rig.group.answer_orphan(orphan, Answer::Allow).unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), &truth[65536..65536 + 4096]);
    assert_empty(&rig);
}

#[test]
fn an_adopted_event_is_like_any_other() {
    let truth = content(1 << 20);
    let rig = Rig::new(LEN);
    let (reader, orphan, _journal) = orphan(&rig, "read an event and tag it", 4096);
    assert_eq!(orphan.tag(), Some(77));
    let event = rig.group.adopt(orphan, OwnedFd::from(rig.file.try_clone().unwrap()));
    crate::rig::fill(&event, &truth);
    event.allow().unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), &truth[4096..8192]);
    assert_empty(&rig);
}

#[test]
fn an_adopted_and_forgotten_event_is_denied() {
    let rig = Rig::new(LEN);
    let (reader, orphan, _journal) = orphan(&rig, "read an event", 0);
    drop(rig.group.adopt(orphan, OwnedFd::from(rig.file.try_clone().unwrap())));
    let err = reader.join().unwrap().expect_err("the read was denied");
    assert_eq!(err.raw_os_error(), Some(Errno::IO.raw_os_error()));
}

#[test]
fn an_orphan_can_be_denied() {
    let rig = Rig::new(LEN);
    let (reader, orphan, _journal) = orphan(&rig, "read an event", 0);
    rig.group.answer_orphan(orphan, Answer::Deny(Denial::NoSpace)).unwrap();
    let err = reader.join().unwrap().expect_err("the read was denied");
    assert_eq!(err.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
}

/// The kernel gives an answer to the oldest event of that number, so a new event of the same number
/// must not be answered first.
#[test]
fn an_orphans_number_is_not_given_to_a_new_event() {
    let truth = content(1 << 20);
    let rig = Rig::new(LEN);
    let (first, orphan, journal) = orphan(&rig, "read an event", 0);
    let second = rig.reader(8192, 4096);
    let event = crate::rig::next_event(&rig.group, &journal);
    let number = orphan.number();
    if event.number() == number {
        // Other tests' files were in the way when the number was to be reserved.
        let answer = std::thread::spawn(move || event.allow());
        rig.group.answer_orphan(orphan, Answer::Deny(Denial::Busy)).unwrap();
        answer.join().unwrap().unwrap();
    } else {
        crate::rig::fill(&event, &truth);
        event.allow().unwrap();
        rig.group.answer_orphan(orphan, Answer::Deny(Denial::Busy)).unwrap();
    }
    let err = first.join().unwrap().expect_err("the orphan was denied");
    assert_eq!(err.raw_os_error(), Some(Errno::BUSY.raw_os_error()));
    second.join().unwrap().expect("the new event was allowed");
}

/// As when the dead process was killed between its answer and the clearing of the slot.
#[test]
fn an_orphan_that_was_answered_already_is_no_error() {
    let rig = Rig::new(LEN);
    let (reader, orphan, _journal) = orphan(&rig, "read an event", 0);
    let again = Journal::open(rig.journal.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let stale = again.orphans().pop().expect("it is not answered yet");
    rig.group.answer_orphan(orphan, Answer::Allow).unwrap();
    reader.join().unwrap().unwrap();
    rig.group.answer_orphan(stale, Answer::Deny(Denial::Io)).unwrap();
}

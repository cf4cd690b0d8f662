//! Spans that are given up under readers, and disks that are full.
//!
//! The disks need root.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, wherever in it that is")]

mod setup;
mod windows;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use fill::{Event, Gate, ReadError, Room};
use parking_lot::Mutex;
use testkit::disk::SmallDisk;

use crate::setup::{PATIENCE, SPAN, Setup};

const DEADLINE: Duration = Duration::from_mins(5);

/// Notes what it is told, and opens unless it is stuck.
#[derive(Default)]
struct NotingGate {
    told: Mutex<Vec<&'static str>>,
    is_stuck: AtomicBool,
}

impl Gate for NotingGate {
    fn sealed(&self) {
        self.told.lock().push("sealed");
    }

    fn reopened(&self) -> io::Result<()> {
        if self.is_stuck.load(Ordering::Relaxed) {
            return Err(io::Error::other("stuck"));
        }
        self.told.lock().push("reopened");
        Ok(())
    }
}

#[test]
fn what_was_given_up_comes_back_when_it_is_read_and_is_sealed_again() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::new(dir.path(), 2, DEADLINE);
    let gate = Arc::new(NotingGate::default());
    setup.layer.add_gate(Arc::clone(&gate) as Arc<dyn Gate>);
    setup.layer.complete();
    setup.until_sealed();
    assert_eq!(*gate.told.lock(), ["reopened", "sealed"]);

    assert_eq!(setup.evict(&[1, 2, 3]), [1, 2, 3]);
    assert!(!setup.layer.is_sealed() && !setup.layer.is_completing());
    assert_eq!(*gate.told.lock(), ["reopened", "sealed", "reopened"]);
    let before = setup.source.bytes_fetched();
    // A gzip trailer belongs to no span.
    assert!(before + 16 >= setup.source.size());
    setup.check(setup.range(2));
    let again = setup.source.bytes_fetched() - before;
    assert!(again > 0 && again < before / 4, "only what was read comes back: {again}");
    assert!(!setup.cache.is_present(1));

    setup.layer.complete();
    setup.until_sealed();
    assert_eq!(*gate.told.lock(), ["reopened", "sealed", "reopened", "sealed"]);
    setup.check(0..setup.layer.bytes());
}

#[test]
fn a_reader_does_not_wait_for_a_request_of_which_nothing_comes() {
    for after in [0, 1000, 300_000] {
        let dir = tempfile::tempdir().unwrap();
        let setup = Setup::new(dir.path(), 2, DEADLINE);
        setup.source.hang_next_after(after);
        setup.layer.complete();
        while !setup.source.has_hung() {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        let first = setup.request(setup.range(0));
        setup.check(setup.range(4));
        setup.assert_right(&setup.range(0), &first.recv_timeout(PATIENCE).unwrap().unwrap());
        let fetched = setup.source.bytes_fetched();
        assert!(fetched < 2 * setup.source.size(), "{after}: only what is read comes twice");
    }
}

#[test]
fn a_layer_becomes_whole_although_its_last_request_hangs() {
    for after in [0, 1000, 300_000] {
        let dir = tempfile::tempdir().unwrap();
        let setup = Setup::new(dir.path(), 2, DEADLINE);
        setup.complete_and_before_the_last_request(|source| source.hang_next_after(after));
        setup.until_sealed();
        setup.check(0..setup.layer.bytes());
        let fetched = setup.source.bytes_fetched();
        assert!(fetched <= 2 * setup.source.size(), "{after}: nothing comes three times");
    }
}

#[test]
fn a_layer_does_not_wait_for_the_slowest_request() {
    for after in [1000, 300_000] {
        let dir = tempfile::tempdir().unwrap();
        let setup = Setup::new(dir.path(), 2, DEADLINE);
        setup.complete_and_before_the_last_request(|source| source.slow_down_next_after(after));
        setup.until_sealed();
        setup.check(0..setup.layer.bytes());
        let slowly = setup.source.carried_slowly() as u64;
        assert!(slowly < setup.source.size() / 10, "{after}: {slowly} bytes");
    }
}

#[test]
fn a_received_layer_is_sealed_although_nobody_completes_it() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::received(dir.path(), 2, DEADLINE);
    setup.until_sealed();
    setup.check(0..setup.layer.bytes());
    assert_eq!((setup.source.bytes_fetched(), setup.layer.is_completing()), (0, false));
}

#[test]
fn what_a_received_layer_has_lost_is_proven_again() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::received(dir.path(), 2, DEADLINE);
    setup.until_sealed();
    setup.evict(&[2]);
    assert_eq!(setup.cache.proven(), None);
    setup.check(setup.range(2));
    setup.until_sealed();
}

#[test]
fn a_layer_whose_gate_is_stuck_stays_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::new(dir.path(), 1, DEADLINE);
    let gates = [NotingGate::default(), NotingGate::default()].map(Arc::new);
    for gate in &gates {
        setup.layer.add_gate(Arc::clone(gate) as Arc<dyn Gate>);
    }
    setup.layer.complete();
    setup.until_sealed();
    gates[1].is_stuck.store(true, Ordering::Relaxed);
    setup.layer.evict(&[0], Duration::ZERO, &|_| false).unwrap_err();
    assert!(setup.layer.is_sealed() && setup.cache.is_sealed() && setup.cache.is_present(0));
    assert_eq!(gates[0].told.lock().last(), Some(&"sealed"), "reads pass again");
}

#[test]
fn readers_see_right_bytes_while_spans_are_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::new(dir.path(), 4, DEADLINE);
    let given_up = AtomicUsize::new(0);
    let is_enough = || given_up.load(Ordering::Relaxed) > 400;
    let all = setup.all_spans();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_enough() {
                    given_up.fetch_add(setup.evict(&all).len(), Ordering::Relaxed);
                }
            });
        }
        for number in 0..4_u64 {
            let setup = &setup;
            scope.spawn(move || {
                let rounds = (0..).take_while(|round| *round < 50 || !is_enough());
                for round in rounds {
                    let len = 1 + (round * 37 + number * 11) % 3 * SPAN;
                    let start = (round * 7919 + number * 104_729) % (setup.layer.bytes() - len);
                    setup.check(start..start + len);
                }
            });
        }
    });
}

#[test]
fn a_layer_that_loses_spans_while_it_is_proven_is_not_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::new(dir.path(), 4, DEADLINE);
    let middle = [11, 12, 13];
    for _ in 0..30 {
        setup.layer.complete();
        while setup.cache.first_absent(0).is_some() {
            std::thread::yield_now();
        }
        // Now its proof begins.
        setup.evict(&middle);
    }
    setup.layer.complete();
    setup.until_sealed();
    setup.check(0..setup.layer.bytes());
}

#[test]
fn what_a_reader_waits_for_is_kept_until_he_has_it_all() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::new(dir.path(), 2, DEADLINE);
    setup.check(setup.range(3));
    setup.source.hold_from(0);
    let range = setup.range(3).start..setup.range(5).end;
    let answer = setup.request(range.clone());
    assert_eq!(setup.evict(&setup.all_spans()), [0; 0]);
    // It may go all the same, for example because its bytes were found wrong.
    setup.cache.forget(&[3]).unwrap();
    setup.source.hold_from(u64::MAX);
    let found = answer.recv_timeout(PATIENCE).unwrap().unwrap();
    setup.assert_right(&range, &found);
}

#[test]
fn spans_in_doubt_are_checked_before_the_layer_is_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::new(dir.path(), 2, DEADLINE);
    setup.check(setup.range(2).start..setup.range(6).end);
    setup.cache.doubt();
    let wrong = setup.range(4).start + 1000;
    std::os::unix::fs::FileExt::write_all_at(setup.cache.data(), b"rot", wrong).unwrap();
    setup.layer.complete();
    setup.until_sealed();
    setup.check(0..setup.layer.bytes());
}

#[track_caller]
fn on_a_full_disk(disk: &SmallDisk) {
    let setup = Setup::new(disk.path().as_path(), 4, DEADLINE);
    setup.check(setup.range(0));
    let ballast = disk.fill("ballast").unwrap();
    setup.layer.complete();
    setup.wait_for(|event| matches!(event, Event::NoRoom));
    assert_eq!(setup.engine.room(), Room::None);
    let range = setup.range(20);
    let answer = setup.request(range.clone());
    answer.recv_timeout(Duration::from_millis(300)).unwrap_err();
    // What is there is served, and nothing is fetched in vain.
    setup.check(setup.range(0));
    let fetched = setup.until_nothing_is_fetched();
    // Still none, which is found out at the cost of a span.
    setup.engine.set_room(Room::Scarce);
    let again = setup.until_nothing_is_fetched() - fetched;
    assert!((1..3 * SPAN).contains(&again), "{again}");
    assert_eq!(setup.engine.room(), Room::None);
    assert!(setup.engine.needs_room() >= SPAN);

    std::fs::remove_file(ballast).unwrap();
    assert!(setup.store.has_room(setup.engine.needs_room()).unwrap());
    setup.engine.set_room(Room::Scarce);
    let found = answer.recv_timeout(PATIENCE).unwrap().unwrap();
    setup.assert_right(&range, &found);
    assert!(setup.cache.first_absent(0).is_some(), "nobody waits for the rest");
    setup.engine.set_room(Room::Enough);
    setup.until_sealed();
    setup.check(0..setup.layer.bytes());
}

#[test]
fn reads_wait_on_a_full_ext4_until_there_is_room() {
    on_a_full_disk(&SmallDisk::ext4(32 << 20).unwrap());
}

#[test]
fn reads_wait_on_a_full_tmpfs_until_there_is_room() {
    on_a_full_disk(&SmallDisk::tmpfs(16 << 20).unwrap());
}

#[test]
fn a_read_that_finds_no_room_fails_at_its_deadline() {
    let disk = SmallDisk::tmpfs(16 << 20).unwrap();
    let setup = Setup::new(disk.path().as_path(), 4, Duration::from_millis(300));
    disk.fill("ballast").unwrap();
    for span in [3, 20] {
        let failed = setup.request(setup.range(span)).recv_timeout(PATIENCE).unwrap().unwrap_err();
        let ReadError::Deadline { last, .. } = failed else { panic!("{failed}") };
        assert!(last.contains("no room") || last.contains("full"), "{last}");
    }
}

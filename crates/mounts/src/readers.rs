//! Readers whom the kernel was told to let go, and who may not have read yet.
//!
//! The kernel says nothing when a read is over. But one thread makes one read at a time, so it is over
//! when the same thread asks again, has ended, or is seen in a state that does not occur between the
//! permission and the end of the read: there it runs, waits for the CPU, or is in uninterruptible sleep
//! (as it is when frozen). See `docs/design/0002-eviction.md`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::ops::Range;

use parking_lot::Mutex;
use sys::fanotify::FileId;

/// The last read that each thread was allowed, unless it is known to be over.
#[derive(Debug, Default)]
pub(crate) struct Readers(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    reads: HashMap<i32, Read>,
    last_number: u64,
    /// At so many entries those of dead threads are looked for.
    sweep_at: usize,
}

#[derive(Debug, Clone)]
struct Read {
    /// Distinguishes it from later reads of the thread.
    number: u64,
    file: FileId,
    range: Range<u64>,
}

impl Readers {
    /// Notes that a thread is about to be allowed to read. To be called before it is.
    pub(crate) fn let_go(&self, thread: i32, file: FileId, range: Range<u64>) {
        let mut table = self.0.lock();
        table.last_number += 1;
        let number = table.last_number;
        table.reads.insert(thread, Read { number, file, range });
        let is_large = table.reads.len() > table.sweep_at.max(SWEEP_AT);
        drop(table);
        if is_large {
            self.settle();
            let mut table = self.0.lock();
            table.sweep_at = 2 * table.reads.len();
        }
    }

    /// The thread asks again: its last read is over.
    pub(crate) fn is_back(&self, thread: i32) {
        self.0.lock().reads.remove(&thread);
    }

    /// Forgets the reads that are over by now.
    pub(crate) fn settle(&self) {
        let reads: Vec<(i32, u64)> = {
            let table = self.0.lock();
            table.reads.iter().map(|(thread, read)| (*thread, read.number)).collect()
        };
        for (thread, number) in reads {
            if may_be_reading(thread) {
                continue;
            }
            let mut table = self.0.lock();
            // It may have been allowed another one meanwhile.
            if table.reads.get(&thread).is_some_and(|read| read.number == number) {
                table.reads.remove(&thread);
            }
        }
    }

    /// Whether somebody may be about to read some of these bytes.
    pub(crate) fn may_read(&self, file: FileId, range: &Range<u64>) -> bool {
        let table = self.0.lock();
        let overlaps = |read: &Read| {
            read.file == file && read.range.start < range.end && range.start < read.range.end
        };
        table.reads.values().any(overlaps)
    }
}

/// Whether the thread can be between the permission and the end of its read.
fn may_be_reading(thread: i32) -> bool {
    match fs::read(format!("/proc/{thread}/stat")) {
        Ok(stat) => !is_elsewhere(&stat),
        Err(err) if err.kind() == io::ErrorKind::NotFound => false,
        Err(err) => err.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()),
    }
}

/// Whether `/proc/<thread>/stat` shows a state that a thread in the middle of a read is never in.
fn is_elsewhere(stat: &[u8]) -> bool {
    // The name before it is in parentheses and may have some itself.
    let state = stat.iter().rposition(|byte| *byte == b')').and_then(|at| stat.get(at + 2));
    state.is_some_and(|state| ELSEWHERE.contains(state))
}

/// Interruptible sleep, stopped, traced, ended, and idle as kernel threads are.
const ELSEWHERE: &[u8] = b"STtZXxI";

/// From so many entries on, those of dead threads are looked for.
const SWEEP_AT: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = FileId { dev: 1, ino: 2 };

    fn me() -> i32 {
        rustix::thread::gettid().as_raw_pid()
    }

    #[test]
    fn a_read_is_over_when_its_thread_asks_again() {
        let readers = Readers::default();
        readers.let_go(me(), FILE, 100..200);
        // We run, so we might be reading.
        readers.settle();
        assert!(readers.may_read(FILE, &(199..300)) && readers.may_read(FILE, &(0..101)));
        assert!(!readers.may_read(FILE, &(200..300)) && !readers.may_read(FILE, &(0..100)));
        assert!(!readers.may_read(FileId { ino: 3, ..FILE }, &(100..200)));
        readers.let_go(me(), FILE, 500..600);
        assert!(!readers.may_read(FILE, &(100..200)), "that one is over");
        readers.is_back(me());
        assert!(!readers.may_read(FILE, &(0..1000)));
    }

    #[test]
    fn a_read_is_over_when_its_thread_sleeps_or_has_ended() {
        let readers = Readers::default();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            tell.send(me()).unwrap();
            stopped.recv().unwrap_err();
        });
        let thread = told.recv().unwrap();
        readers.let_go(thread, FILE, 0..10);
        while readers.may_read(FILE, &(0..10)) {
            readers.settle();
        }
        readers.let_go(thread, FILE, 0..10);
        drop(stop);
        sleeper.join().unwrap();
        while readers.may_read(FILE, &(0..10)) {
            readers.settle();
        }
    }

    #[test]
    fn threads_that_have_ended_are_not_kept_for_ever() {
        let readers = Readers::default();
        for number in 0..5000 {
            // Numbers of threads end at 2^22.
            readers.let_go(i32::MAX - number, FILE, 0..10);
        }
        assert!(readers.0.lock().reads.len() <= SWEEP_AT + 1);
    }

    #[test]
    fn only_states_outside_of_a_read_prove_anything() {
        let check = |stat: &[u8], expected| assert_eq!(is_elsewhere(stat), expected);
        check(b"1 (cat) S 0 1", true);
        check(b"1 (cat) R 0 1", false);
        check(b"1 (cat) D 0 1", false);
        check(b"1 (a) S) D 0 1", false);
        check(b"1 (S) Z 0", true);
        check(b"", false);
        check(b"1 (cat)", false);
    }
}

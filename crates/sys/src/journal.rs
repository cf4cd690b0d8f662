//! A journal of events in flight, in shared memory that outlives the process that writes it.
//!
//! The kernel copies each pre-content event straight into a slot of this memory. When the process
//! is killed at any later moment, whoever else holds the memory descriptor still knows the number
//! by which the event must be answered, the range that was asked for and, once it was known, the
//! file. This is not a log: a slot is cleared as soon as its event is answered.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::fanotify::RawEvent;

/// The most slots a journal may have: 8 MiB of shared memory.
pub const MAX_SLOTS: u32 = 1 << 16;

/// Room for one event as the kernel writes it; a pre-content event takes 48 bytes.
pub(crate) const EVENT_LEN: usize = 64;

const SLOT_LEN: usize = 128;
const SLOT_WORDS: usize = SLOT_LEN / 8;
const EVENT_WORDS: usize = EVENT_LEN / 8;
const TAG_WORD: usize = EVENT_WORDS;
const STATE_WORD: usize = EVENT_WORDS + 1;
const UNTAGGED: u64 = 0;
const TAGGED: u64 = 1;

/// "HERMESJ1": the last digit is the version of the layout.
const MAGIC: u64 = u64::from_be_bytes(*b"HERMESJ1");
const MAGIC_WORD: usize = 0;
const N_SLOTS_WORD: usize = 1;
const HEADER_WORDS: usize = SLOT_WORDS;

const SEALS: SealFlags =
    SealFlags::from_bits_retain(SealFlags::SHRINK.bits() | SealFlags::GROW.bits());

/// A journal could not be made or taken over.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A journal has between one and [`MAX_SLOTS`] slots.
    #[error("a journal of {n_slots} slots was asked for; 1 to {MAX_SLOTS} are possible")]
    SlotCount {
        /// What was asked for.
        n_slots: u32,
    },
    /// The descriptor is not that of a journal which this version can read.
    #[error("the descriptor is not that of an event journal: {reason}")]
    NotAJournal {
        /// What gave it away.
        reason: &'static str,
    },
    /// The kernel refused.
    #[error("cannot {step} the shared memory of the event journal")]
    System {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
}

/// Shared memory with a slot for each event in flight.
///
/// Cloning gives another handle to the same memory. Any thread may take slots; each slot belongs to
/// one event at a time.
#[derive(Debug, Clone)]
pub struct Journal {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    memory: Mapping,
    fd: OwnedFd,
    slots: Mutex<SlotTable>,
    changed: Condvar,
}

#[derive(Debug)]
struct SlotTable {
    free: Vec<usize>,
    /// Slots that a dead process left occupied and that nobody has asked for yet.
    left: Vec<usize>,
    /// Event numbers of dead processes that are not answered yet.
    orphaned: BTreeSet<RawFd>,
}

impl Journal {
    /// Makes an empty journal for `n_slots` events in flight, 128 bytes each.
    ///
    /// # Errors
    /// [`JournalError::SlotCount`], or the kernel's refusal of the memory.
    pub fn create(n_slots: u32) -> Result<Self, JournalError> {
        if n_slots == 0 || n_slots > MAX_SLOTS {
            return Err(JournalError::SlotCount { n_slots });
        }
        let fd = rustix::fs::memfd_create(
            "hermes-journal",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )
        .map_err(system("create"))?;
        let n_words = words_for(n_slots);
        rustix::fs::ftruncate(&fd, (n_words * 8) as u64).map_err(system("size"))?;
        rustix::fs::fcntl_add_seals(&fd, SEALS | SealFlags::SEAL).map_err(system("seal"))?;
        let memory = Mapping::new(fd.as_fd(), n_words)?;
        memory.word(N_SLOTS_WORD).store(u64::from(n_slots), Ordering::Relaxed);
        memory.word(MAGIC_WORD).store(MAGIC, Ordering::Release);
        Ok(Self::over(memory, fd, n_slots))
    }

    /// Takes over the journal behind `fd`; [`orphans`](Self::orphans) then tells what its last
    /// owner left unanswered.
    ///
    /// # Errors
    /// [`JournalError::NotAJournal`] if size, seals or header are not those of a journal.
    pub fn open(fd: OwnedFd) -> Result<Self, JournalError> {
        let not = |reason| JournalError::NotAJournal { reason };
        let seals = rustix::fs::fcntl_get_seals(&fd)
            .map_err(|source| JournalError::System { step: "read the seals of", source })?;
        // Without the seals another holder could shrink the memory, and a later access would be SIGBUS.
        if !seals.contains(SEALS) {
            return Err(not("its size is not sealed"));
        }
        let len = rustix::fs::fstat(&fd).map_err(system("stat"))?.st_size;
        let n_words = usize::try_from(len).map_or(0, |len| len / 8);
        if n_words < words_for(1) || n_words > words_for(MAX_SLOTS) {
            return Err(not("its size is out of range"));
        }
        let memory = Mapping::new(fd.as_fd(), n_words)?;
        if memory.word(MAGIC_WORD).load(Ordering::Acquire) != MAGIC {
            return Err(not("it does not start with the magic number of this version"));
        }
        let n_slots = memory.word(N_SLOTS_WORD).load(Ordering::Relaxed);
        match u32::try_from(n_slots) {
            Ok(n_slots) if n_slots <= MAX_SLOTS && words_for(n_slots) == n_words => {
                Ok(Self::over(memory, fd, n_slots))
            }
            _ => Err(not("its size and its number of slots disagree")),
        }
    }

    fn over(memory: Mapping, fd: OwnedFd, n_slots: u32) -> Self {
        let (mut free, mut left, mut orphaned) = (Vec::new(), Vec::new(), BTreeSet::new());
        // Backwards, because slots are handed out from the end of the list.
        for index in (0..n_slots as usize).rev() {
            match RawEvent::parse(&memory.event(index)) {
                Some(event) => {
                    left.push(index);
                    orphaned.insert(event.number);
                }
                None => free.push(index),
            }
        }
        let slots = Mutex::new(SlotTable { free, left, orphaned });
        Self { inner: Arc::new(Inner { memory, fd, slots, changed: Condvar::new() }) }
    }

    /// The number of slots, free or not.
    #[must_use]
    pub fn n_slots(&self) -> usize {
        (self.inner.memory.n_words - HEADER_WORDS) / SLOT_WORDS
    }

    /// The descriptor to leave with the keeper.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }

    /// Takes a free slot, or `None` while all are in use.
    #[must_use]
    pub fn try_slot(&self) -> Option<Slot> {
        let index = self.inner.slots.lock().free.pop()?;
        Some(self.slot_at(index))
    }

    /// Takes a free slot, waiting until an event is answered when all are in use.
    ///
    /// That wait is the back-pressure: meanwhile the kernel queues further events and their readers
    /// wait. The events in flight must be answered by other threads than the one that waits here.
    #[must_use]
    pub fn slot(&self) -> Slot {
        let mut slots = self.inner.slots.lock();
        loop {
            if let Some(index) = slots.free.pop() {
                drop(slots);
                return self.slot_at(index);
            }
            self.inner.changed.wait(&mut slots);
        }
    }

    fn slot_at(&self, index: usize) -> Slot {
        let slot = Slot { inner: Arc::clone(&self.inner), index, when_dropped: WhenDropped::Clear };
        slot.clear();
        slot
    }

    /// Takes the events that a dead process had read and not answered. They are handed out once.
    ///
    /// For as long as an [`Orphan`] lives its number is occupied in this process where possible, so
    /// that no new event gets it. Call this before the first event is read, and early: a number that
    /// an open file already has cannot be reserved. Should a new event get such a number all the
    /// same, its answer waits until the orphan's is given.
    #[must_use]
    pub fn orphans(&self) -> Vec<Orphan> {
        let left = std::mem::take(&mut self.inner.slots.lock().left);
        left.into_iter().filter_map(|index| self.orphan_at(index)).collect()
    }

    fn orphan_at(&self, index: usize) -> Option<Orphan> {
        let slot = Slot { inner: Arc::clone(&self.inner), index, when_dropped: WhenDropped::Leave };
        let event = RawEvent::parse(&slot.inner.memory.event(index))?;
        let reservation = rustix::io::fcntl_dupfd_cloexec(&self.inner.fd, event.number)
            .ok()
            .filter(|fd| fd.as_raw_fd() == event.number);
        let tag = slot.tag();
        Some(Orphan { slot, event, tag, reservation })
    }
}

/// A place for one event. Dropping it clears it and gives it back.
#[derive(Debug)]
pub struct Slot {
    inner: Arc<Inner>,
    index: usize,
    when_dropped: WhenDropped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WhenDropped {
    Clear,
    /// The slot names an event that is not answered: it stays as it is for the next process.
    Leave,
}

impl Slot {
    /// Where the kernel is to write an event of up to [`EVENT_LEN`] bytes.
    pub(crate) fn event_area(&mut self) -> *mut u8 {
        self.inner.memory.event_area(self.index)
    }

    pub(crate) fn event(&self) -> [u8; EVENT_LEN] {
        self.inner.memory.event(self.index)
    }

    pub(crate) fn clear(&self) {
        let words = self.inner.memory.slot(self.index);
        // The first word holds the event's length: without it the slot counts as empty.
        words[0].store(0, Ordering::Release);
        words[STATE_WORD].store(UNTAGGED, Ordering::Release);
    }

    /// Notes which file the event is about, in numbers that the next process will understand.
    pub(crate) fn set_tag(&self, tag: u64) {
        let words = self.inner.memory.slot(self.index);
        words[TAG_WORD].store(tag, Ordering::Relaxed);
        words[STATE_WORD].store(TAGGED, Ordering::Release);
    }

    fn tag(&self) -> Option<u64> {
        let words = self.inner.memory.slot(self.index);
        let tagged = words[STATE_WORD].load(Ordering::Acquire) == TAGGED;
        tagged.then(|| words[TAG_WORD].load(Ordering::Relaxed))
    }

    /// Waits until no dead process' event of the same number is unanswered any more: the kernel
    /// gives an answer to the oldest event of that number.
    pub(crate) fn wait_for_orphan(&self, number: RawFd) {
        let mut slots = self.inner.slots.lock();
        while slots.orphaned.contains(&number) {
            self.inner.changed.wait(&mut slots);
        }
    }

    pub(crate) fn orphan_answered(&self, number: RawFd) {
        self.inner.slots.lock().orphaned.remove(&number);
        self.inner.changed.notify_all();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.when_dropped == WhenDropped::Leave {
            return;
        }
        self.clear();
        self.inner.slots.lock().free.push(self.index);
        self.inner.changed.notify_all();
    }
}

/// An event that a dead process had read and not answered: its reader still waits.
///
/// Give it to [`Group::adopt`](crate::fanotify::Group::adopt) or
/// [`Group::answer_orphan`](crate::fanotify::Group::answer_orphan). One that is dropped instead stays
/// in the journal for the next process, and its reader waits until then.
#[derive(Debug)]
#[must_use = "a process waits for the answer"]
pub struct Orphan {
    slot: Slot,
    event: RawEvent,
    tag: Option<u64>,
    reservation: Option<OwnedFd>,
}

/// An orphan that is about to be answered: from here on its slot is cleared when dropped.
pub(crate) struct Adopted {
    pub(crate) slot: Slot,
    pub(crate) event: RawEvent,
    /// Keeps the event's number occupied.
    pub(crate) reservation: Option<OwnedFd>,
}

impl Orphan {
    pub(crate) fn adopt(mut self) -> Adopted {
        self.slot.when_dropped = WhenDropped::Clear;
        Adopted { slot: self.slot, event: self.event, reservation: self.reservation }
    }

    /// The number that the kernel knows the event by: a descriptor of the dead process.
    #[must_use]
    pub fn number(&self) -> RawFd {
        self.event.number
    }

    /// The bytes that are about to be read.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.event.range.clone()
    }

    /// The file as the dead process had noted it, or `None` if it died in the few microseconds
    /// before. Then any marked file may be meant: only when the range is present in all of them may
    /// the reader go on.
    #[must_use]
    pub fn tag(&self) -> Option<u64> {
        self.tag
    }

    /// The process that reads, as numbered in the dead process' namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.event.pid
    }
}

/// A mapping of a memory descriptor whose size is sealed, seen as words.
#[derive(Debug)]
struct Mapping {
    start: NonNull<AtomicU64>,
    n_words: usize,
}

// SAFETY: the mapping lives until `drop`, is not tied to a thread, and is only accessed through
// atomics or by the kernel on behalf of the one owner of a slot.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, n_words: usize) -> Result<Self, JournalError> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let start = unsafe {
            rustix::mm::mmap(ptr::null_mut(), n_words * 8, access, MapFlags::SHARED, fd, 0)
        }
        .map_err(system("map"))?;
        let start = NonNull::new(start.cast::<AtomicU64>())
            .ok_or(JournalError::System { step: "map", source: Errno::NOMEM })?;
        Ok(Self { start, n_words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `new` mapped `n_words` words, page-aligned; the seals checked before keep them from
        // shrinking; atomics may be shared with other processes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.n_words) }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.words()[index]
    }

    fn slot(&self, index: usize) -> &[AtomicU64] {
        &self.words()[HEADER_WORDS + index * SLOT_WORDS..][..SLOT_WORDS]
    }

    fn event_area(&self, index: usize) -> *mut u8 {
        self.slot(index)[0].as_ptr().cast()
    }

    fn event(&self, index: usize) -> [u8; EVENT_LEN] {
        let mut bytes = [0; EVENT_LEN];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.slot(index)) {
            chunk.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
        bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and the length are those of the mapping made in `new`, and the references
        // handed out borrow from `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.n_words * 8) };
        debug_assert_eq!(unmapped, Ok(()), "unmapping what was mapped cannot fail");
    }
}

fn words_for(n_slots: u32) -> usize {
    HEADER_WORDS + n_slots as usize * SLOT_WORDS
}

fn system(step: &'static str) -> impl FnOnce(Errno) -> JournalError {
    move |source| JournalError::System { step, source }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::RecvTimeoutError;
    use std::time::Duration;

    use super::*;

    fn duplicate(journal: &Journal) -> OwnedFd {
        journal.as_fd().try_clone_to_owned().unwrap()
    }

    /// Does what the kernel does when it writes an event.
    fn occupy(slot: &Slot, number: i32) {
        let words = slot.inner.memory.slot(slot.index);
        let descriptor = u64::from(number.cast_unsigned());
        words[2].store(descriptor, Ordering::Relaxed);
        // A length of 24, and version 3 in the fifth byte.
        words[0].store(24 | 3 << 32, Ordering::Relaxed);
    }

    #[test]
    fn slots_are_handed_out_once() {
        let journal = Journal::create(2).unwrap();
        assert_eq!(journal.n_slots(), 2);
        let first = journal.try_slot().unwrap();
        let second = journal.slot();
        assert_ne!(first.index, second.index);
        assert!(journal.try_slot().is_none());
        let waiting = std::thread::spawn({
            let journal = journal.clone();
            move || journal.slot().index
        });
        let freed = first.index;
        drop(first);
        assert_eq!(waiting.join().unwrap(), freed);
    }

    #[test]
    fn a_successor_sees_what_was_left_and_not_what_was_done() {
        let journal = Journal::create(4).unwrap();
        let (left, tagged, done, free) =
            (journal.slot(), journal.slot(), journal.slot(), journal.slot());
        occupy(&left, 400);
        occupy(&tagged, 401);
        tagged.set_tag(u64::MAX);
        occupy(&done, 402);
        drop(done);
        free.set_tag(1);

        let successor = Journal::open(duplicate(&journal)).unwrap();
        let orphans = successor.orphans();
        let mut found: Vec<_> =
            orphans.iter().map(|orphan| (orphan.number(), orphan.tag())).collect();
        found.sort_unstable();
        assert_eq!(found, [(400, None), (401, Some(u64::MAX))]);
        assert!(successor.orphans().is_empty(), "they are handed out once");
        // Their numbers and slots are not given to others until they are answered.
        assert!(orphans.iter().all(|orphan| orphan.reservation.is_some()));
        assert!((successor.slot(), successor.slot()).0.tag().is_none());
        let slots = [successor.try_slot(), successor.try_slot(), successor.try_slot()];
        assert_eq!(slots.iter().flatten().count(), 2);
        // What is dropped unanswered is left to the next process; what is answered is not.
        let mut orphans = orphans.into_iter();
        drop(orphans.next());
        assert!(successor.try_slot().is_none());
        drop(orphans.next().map(Orphan::adopt));
        assert!(successor.try_slot().is_some());
        drop(slots);
        assert_eq!(Journal::open(duplicate(&journal)).unwrap().orphans().len(), 1);
        std::mem::forget((left, tagged, free));
    }

    #[test]
    fn an_answer_waits_for_the_orphan_of_the_same_number() {
        let journal = Journal::create(2).unwrap();
        let left = journal.slot();
        occupy(&left, 500);
        let successor = Journal::open(duplicate(&journal)).unwrap();
        let orphan = successor.orphans().pop().unwrap();
        let (new, (answered, answer)) = (successor.slot(), std::sync::mpsc::channel());
        let waiting = std::thread::spawn(move || {
            new.wait_for_orphan(501);
            answered.send("another number").unwrap();
            new.wait_for_orphan(500);
            answered.send("the same number").unwrap();
        });
        assert_eq!(answer.recv(), Ok("another number"));
        let waited = answer.recv_timeout(Duration::from_millis(100));
        assert_eq!(waited, Err(RecvTimeoutError::Timeout));
        orphan.slot.orphan_answered(500);
        assert_eq!(answer.recv(), Ok("the same number"));
        waiting.join().unwrap();
        std::mem::forget(left);
    }

    #[track_caller]
    fn check_not_a_journal(fd: OwnedFd, expected: &str) {
        let err = Journal::open(fd).expect_err("it is no journal");
        assert!(err.to_string().contains(expected), "{err}");
    }

    fn memory(len: u64, first_words: [u64; 2]) -> OwnedFd {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("test", flags).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        let bytes = first_words.map(u64::to_ne_bytes).concat();
        rustix::io::pwrite(&fd, &bytes[..bytes.len().min(usize::try_from(len).unwrap())], 0)
            .unwrap();
        fd
    }

    #[test]
    fn other_memory_is_refused() {
        let sealed = |len, words| {
            let fd = memory(len, words);
            rustix::fs::fcntl_add_seals(&fd, SEALS).unwrap();
            fd
        };
        check_not_a_journal(memory(256, [MAGIC, 1]), "not sealed");
        check_not_a_journal(sealed(0, [MAGIC, 1]), "out of range");
        check_not_a_journal(sealed(128, [MAGIC, 0]), "out of range");
        check_not_a_journal(sealed(1 << 30, [MAGIC, 1]), "out of range");
        check_not_a_journal(sealed(256, [MAGIC + 1, 1]), "magic number");
        check_not_a_journal(sealed(256, [MAGIC, 2]), "disagree");
        check_not_a_journal(sealed(256, [MAGIC, u64::MAX]), "disagree");
        assert_eq!(Journal::open(sealed(256, [MAGIC, 1])).unwrap().n_slots(), 1);
        let err = Journal::open(tempfile::tempfile().unwrap().into()).expect_err("it is no memory");
        assert!(matches!(err, JournalError::System { .. }), "{err:?}");
    }

    #[test]
    fn the_number_of_slots_is_limited() {
        for n_slots in [0, MAX_SLOTS + 1] {
            let err = Journal::create(n_slots).expect_err("too many or too few");
            assert!(matches!(err, JournalError::SlotCount { .. }), "{err:?}");
        }
        assert_eq!(Journal::create(MAX_SLOTS).unwrap().n_slots(), MAX_SLOTS as usize);
    }
}

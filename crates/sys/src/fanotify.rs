//! Pre-content events: a process stops in the kernel until its bytes are there.
//!
//! Source of formats: `linux/fanotify.h` of Linux 6.14, the first with these events. `libc` knows
//! neither the event nor its range record.
//!
//! What a user of this module must know:
//!
//! - An open file raises events on access only if the mark existed when *it* was opened, and the
//!   mode stays with it when it is passed to another process. So mark first, then let the file
//!   system open the file.
//! - For the same reason a file opened after the mark must not be used to fill it: its own writes
//!   would wait for themselves. Write through [`Event::file`], or a descriptor opened before.
//! - When the last descriptor of a group closes, the kernel lets every reader go: holes are read as
//!   zeros. Another process must hold a duplicate of [`Group::as_fd`].

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use rustix::io::Errno;

use crate::journal::{Adopted, EVENT_LEN, Journal, Orphan, Slot};

const FAN_PRE_ACCESS: u64 = 0x0010_0000;
const FAN_EVENT_INFO_TYPE_RANGE: u8 = 6;
const FAN_ERRNO_SHIFT: u32 = 24;
const FANOTIFY_METADATA_VERSION: u8 = 3;
const METADATA_LEN: usize = 24;
const RANGE_RECORD_LEN: usize = 24;

/// A listener for accesses to marked files.
///
/// Cloning gives another handle to the same descriptor.
#[derive(Debug, Clone)]
pub struct Group {
    fd: Arc<OwnedFd>,
}

impl Group {
    /// Makes a group without limits on queue and marks; needs `CAP_SYS_ADMIN` in the first user
    /// namespace.
    ///
    /// # Errors
    /// `EINVAL` on a kernel without permission events, `EPERM`, `EMFILE` at 128 groups per user.
    pub fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_PRE_CONTENT
            | libc::FAN_UNLIMITED_QUEUE
            | libc::FAN_UNLIMITED_MARKS
            | libc::FAN_REPORT_TID
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK;
        let event_flags = (libc::O_RDWR | libc::O_LARGEFILE | libc::O_CLOEXEC).cast_unsigned();
        // SAFETY: takes two integers.
        let fd = unsafe { libc::fanotify_init(flags, event_flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(Self::from_fd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Goes on with a group that another process made, for example a dead predecessor.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd) }
    }

    /// The descriptor: readable when an event waits, and to be left with the keeper.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Raises an event before each later access to the file through descriptors opened from now on.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the file system does not take part (ext4, xfs, btrfs do; tmpfs, overlayfs and
    /// FUSE do not), `EINVAL` before Linux 6.14.
    pub fn mark(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.change_mark(libc::FAN_MARK_ADD, file)
    }

    /// Stops the events of the file at once, also for descriptors that are open.
    ///
    /// Events that wait already must still be answered.
    ///
    /// # Errors
    /// `ENOENT` if the file is not marked.
    pub fn unmark(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.change_mark(libc::FAN_MARK_REMOVE, file)
    }

    fn change_mark(&self, change: libc::c_uint, file: BorrowedFd<'_>) -> io::Result<()> {
        let (group, file) = (self.fd.as_raw_fd(), file.as_raw_fd());
        // SAFETY: both descriptors are open; a null path means the file behind the descriptor itself.
        let failed =
            unsafe { libc::fanotify_mark(group, change, FAN_PRE_ACCESS, file, ptr::null()) };
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads one event into a slot of the journal, or returns `None` if none waits.
    ///
    /// Waits for a free slot if all are in use ([`Journal::slot`]). Does not wait for an event: poll
    /// [`as_fd`](Self::as_fd).
    ///
    /// # Errors
    /// `EMFILE` if the process has no descriptor left for the event; the kernel has then denied it.
    pub fn read_event(&self, journal: &Journal) -> io::Result<Option<Event>> {
        let mut slot = journal.slot();
        let area = slot.event_area();
        // SAFETY: the area has EVENT_LEN bytes, and `slot` keeps everyone else from writing there.
        let n_read = unsafe { libc::read(self.fd.as_raw_fd(), area.cast(), EVENT_LEN) };
        if n_read < 0 {
            let err = io::Error::last_os_error();
            return match err.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(err),
            };
        }
        let Some(RawEvent { number, range, pid }) = RawEvent::parse(&slot.event()) else {
            return Ok(None);
        };
        // SAFETY: the kernel has just opened this descriptor for us alone.
        let file = unsafe { OwnedFd::from_raw_fd(number) };
        let group = Arc::clone(&self.fd);
        Ok(Some(Event {
            group,
            answer: None,
            orphan: Orphaned::No,
            slot,
            file,
            number,
            range,
            pid,
        }))
    }

    /// Makes an event in flight of what a dead process had read.
    ///
    /// `file` is the file that the orphan's tag names, through a descriptor that raises no events:
    /// one opened before the mark. It is what [`Event::file`] will return.
    pub fn adopt(&self, orphan: Orphan, file: OwnedFd) -> Event {
        let Adopted { slot, event, reservation } = orphan.adopt();
        let RawEvent { number, range, pid } = event;
        let orphan = Orphaned::Yes { reservation };
        Event { group: Arc::clone(&self.fd), answer: None, orphan, slot, file, number, range, pid }
    }

    /// Answers what a dead process had read. An event that it had answered already is no error.
    ///
    /// # Errors
    /// As for [`Event::allow`]; the orphan is given up.
    pub fn answer_orphan(&self, orphan: Orphan, answer: Answer) -> io::Result<()> {
        let Adopted { slot, event, reservation } = orphan.adopt();
        let answered = respond(self.fd.as_fd(), event.number, answer);
        slot.orphan_answered(event.number);
        drop(slot);
        drop(reservation);
        answered
    }
}

/// What the reader gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It may read what is in the file now.
    Allow,
    /// It gets this error.
    Deny(Denial),
}

/// The errors that the kernel lets a listener give to a reader.
///
/// A process that reads through EROFS gets `EIO` whichever is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// `EIO`
    Io,
    /// `EPERM`
    NotPermitted,
    /// `EBUSY`
    Busy,
    /// `EAGAIN`
    TryAgain,
    /// `ENOSPC`
    NoSpace,
    /// `EDQUOT`
    Quota,
}

impl Denial {
    fn errno(self) -> Errno {
        match self {
            Self::Io => Errno::IO,
            Self::NotPermitted => Errno::PERM,
            Self::Busy => Errno::BUSY,
            Self::TryAgain => Errno::AGAIN,
            Self::NoSpace => Errno::NOSPC,
            Self::Quota => Errno::DQUOT,
        }
    }
}

impl Answer {
    fn code(self) -> u32 {
        match self {
            Self::Allow => libc::FAN_ALLOW,
            Self::Deny(denial) => {
                let errno = denial.errno().raw_os_error().cast_unsigned();
                libc::FAN_DENY | ((errno & 0xff) << FAN_ERRNO_SHIFT)
            }
        }
    }
}

/// A process stopped in the kernel until we answer.
///
/// Dropping it unanswered denies with `EIO`: a bug must not leave a container hanging.
#[derive(Debug)]
#[must_use = "dropping the event denies the access"]
pub struct Event {
    group: Arc<OwnedFd>,
    answer: Option<Answer>,
    number: RawFd,
    range: Range<u64>,
    pid: i32,
    // These are dropped in this order, after the answer: while the slot names the number, the number
    // must not be given to another event.
    slot: Slot,
    file: OwnedFd,
    orphan: Orphaned,
}

/// Whether a dead process had read the event.
#[derive(Debug)]
enum Orphaned {
    No,
    Yes {
        #[expect(dead_code, reason = "keeps the number occupied until the answer is given")]
        reservation: Option<OwnedFd>,
    },
}

impl Event {
    /// The file, open for reading and writing; access through this descriptor raises no events.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Which file it is.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub fn file_id(&self) -> io::Result<FileId> {
        FileId::of(self.file())
    }

    /// Notes the file in the journal, in numbers that the next process will understand, for example
    /// that of a layer. To be called as soon as the file is identified.
    pub fn set_tag(&self, tag: u64) {
        self.slot.set_tag(tag);
    }

    /// The bytes that are about to be read. May reach past the end of the file; the whole of
    /// `0..u64::MAX` if the kernel did not say.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The thread that reads. 0 if it is not visible in our process namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The number by which the kernel knows the event.
    #[must_use]
    pub fn number(&self) -> RawFd {
        self.number
    }

    /// Lets the read go on: the bytes of [`range`](Self::range) are in the file.
    ///
    /// A reader that was killed in the meantime is no error.
    ///
    /// # Errors
    /// The kernel's refusal of the answer, which means that the group is broken.
    pub fn allow(self) -> io::Result<()> {
        self.answer(Answer::Allow)
    }

    /// Lets the read fail.
    ///
    /// # Errors
    /// As for [`allow`](Self::allow).
    pub fn deny(self, denial: Denial) -> io::Result<()> {
        self.answer(Answer::Deny(denial))
    }

    /// Lets the read go on or fail.
    ///
    /// # Errors
    /// As for [`allow`](Self::allow).
    pub fn answer(mut self, answer: Answer) -> io::Result<()> {
        self.answer = Some(answer);
        self.respond(answer)
    }

    fn respond(&self, answer: Answer) -> io::Result<()> {
        match self.orphan {
            Orphaned::No => {
                self.slot.wait_for_orphan(self.number);
                respond(self.group.as_fd(), self.number, answer)
            }
            Orphaned::Yes { .. } => {
                let answered = respond(self.group.as_fd(), self.number, answer);
                self.slot.orphan_answered(self.number);
                answered
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.answer.is_none() {
            // A failure means that the group is broken, and then nobody can be answered.
            self.respond(Answer::Deny(Denial::Io)).ok();
        }
    }
}

/// A file's identity for as long as it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// The device number of its file system.
    pub dev: u64,
    /// Its inode number there.
    pub ino: u64,
}

impl FileId {
    /// The identity of an open file.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        Ok(Self { dev: stat.st_dev, ino: stat.st_ino })
    }
}

/// Writes `struct fanotify_response`.
fn respond(group: BorrowedFd<'_>, number: RawFd, answer: Answer) -> io::Result<()> {
    let mut response = [0; 8];
    response[..4].copy_from_slice(&number.to_ne_bytes());
    response[4..].copy_from_slice(&answer.code().to_ne_bytes());
    match rustix::io::retry_on_intr(|| rustix::io::write(group, &response)) {
        // ENOENT: answered before, or the reader was killed.
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        Err(err) => Err(err.into()),
    }
}

/// What the bytes of an event say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawEvent {
    pub(crate) number: RawFd,
    pub(crate) range: Range<u64>,
    pub(crate) pid: i32,
}

impl RawEvent {
    /// Reads `struct fanotify_event_metadata` and the range record after it. `None` if there is no
    /// event, or none that could be answered.
    pub(crate) fn parse(bytes: &[u8; EVENT_LEN]) -> Option<Self> {
        let event_len = usize::try_from(u32::from_ne_bytes(field(bytes, 0)?)).ok()?;
        let version = bytes[4];
        let number = i32::from_ne_bytes(field(bytes, 16)?);
        let pid = i32::from_ne_bytes(field(bytes, 20)?);
        if event_len < METADATA_LEN || version != FANOTIFY_METADATA_VERSION || number < 0 {
            return None;
        }
        let records = bytes.get(METADATA_LEN..event_len.min(EVENT_LEN))?;
        let range = range_record(records).unwrap_or(0..u64::MAX);
        Some(Self { number, range, pid })
    }
}

/// Finds the range in the list of `struct fanotify_event_info_header`.
fn range_record(mut records: &[u8]) -> Option<Range<u64>> {
    loop {
        let kind = *records.first()?;
        let len = usize::from(u16::from_ne_bytes(field(records, 2)?));
        let record = records.get(..len)?;
        if kind == FAN_EVENT_INFO_TYPE_RANGE && len >= RANGE_RECORD_LEN {
            let offset = u64::from_ne_bytes(field(record, 8)?);
            let count = u64::from_ne_bytes(field(record, 16)?);
            return Some(offset..offset.saturating_add(count));
        }
        if len == 0 {
            return None;
        }
        records = &records[len..];
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of an event: its length, version and descriptor, then the records.
    fn event(len: u32, version: u8, fd: i32, records: &[&[u8]]) -> [u8; EVENT_LEN] {
        let mut bytes = [0; EVENT_LEN];
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes[4] = version;
        bytes[8..16].copy_from_slice(&FAN_PRE_ACCESS.to_ne_bytes());
        bytes[16..20].copy_from_slice(&fd.to_ne_bytes());
        bytes[20..24].copy_from_slice(&4711_i32.to_ne_bytes());
        let records = records.concat();
        bytes[24..24 + records.len()].copy_from_slice(&records);
        bytes
    }

    fn record(kind: u8, len: u16, offset: u64, count: u64) -> Vec<u8> {
        let mut bytes = vec![kind, 0];
        bytes.extend(len.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(count.to_ne_bytes());
        bytes
    }

    #[track_caller]
    fn check(bytes: [u8; EVENT_LEN], expected: Option<Range<u64>>) {
        let found = RawEvent::parse(&bytes);
        let expected = expected.map(|range| RawEvent { number: 9, range, pid: 4711 });
        assert_eq!(found, expected);
    }

    #[test]
    fn events_of_the_kernel() {
        check(event(48, 3, 9, &[&record(6, 24, 499_712, 8192)]), Some(499_712..507_904));
        check(event(48, 3, 9, &[&record(6, 24, 8, 0)]), Some(8..8));
        check(event(56, 3, 9, &[&[4, 0, 8, 0, 0, 0, 0, 0], &record(6, 24, 1, 2)]), Some(1..3));
    }

    #[test]
    fn events_without_a_range_mean_the_whole_file() {
        check(event(24, 3, 9, &[]), Some(0..u64::MAX));
        check(event(48, 3, 9, &[&record(7, 24, 1, 2)]), Some(0..u64::MAX));
        check(event(48, 3, 9, &[&record(7, 0, 1, 2)]), Some(0..u64::MAX));
        check(event(48, 3, 9, &[&record(6, 25, 1, 2)]), Some(0..u64::MAX));
        check(event(40, 3, 9, &[&record(6, 24, 1, 2)]), Some(0..u64::MAX));
        check(event(48, 3, 9, &[&record(6, 24, u64::MAX, 2)]), Some(u64::MAX..u64::MAX));
    }

    #[test]
    fn what_cannot_be_answered_is_no_event() {
        check([0; EVENT_LEN], None);
        check(event(23, 3, 9, &[]), None);
        check(event(48, 4, 9, &[&record(6, 24, 1, 2)]), None);
        check(event(24, 3, libc::FAN_NOFD, &[]), None);
    }

    #[test]
    fn answers_are_encoded_for_the_kernel() {
        let check = |answer: Answer, expected| assert_eq!(answer.code(), expected, "{answer:?}");
        check(Answer::Allow, 1);
        check(Answer::Deny(Denial::Io), 0x0500_0002);
        check(Answer::Deny(Denial::NoSpace), 0x1c00_0002);
    }
}

//! Writes down the changes of the running test's thread, and refuses them from a given one on.

use std::cell::RefCell;
use std::io;

use super::{Name, Op};

/// One change with its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Write { name: Name, offset: u64, bytes: Vec<u8> },
    Length { name: Name, bytes: u64 },
    Punch { offset: u64, len: u64 },
    Sync(Name),
    Rename { from: Name, to: Name },
    Unlink(Name),
    SyncFolder,
}

#[derive(Default)]
struct Recorder {
    changes: Option<Vec<Change>>,
    /// How many changes are still let through.
    allowed: Option<usize>,
}

thread_local! {
    static RECORDER: RefCell<Recorder> = RefCell::default();
}

/// Lets `allowed` changes of this thread through and refuses the rest, as if the process had been
/// killed; without a number all go through. Returns what `work` returned and the changes made.
pub(crate) fn record<T>(allowed: Option<usize>, work: impl FnOnce() -> T) -> (T, Vec<Change>) {
    RECORDER.set(Recorder { changes: Some(Vec::new()), allowed });
    let result = work();
    let changes = RECORDER.take().changes.unwrap_or_default();
    (result, changes)
}

pub(super) fn observe(op: &Op<'_>) -> io::Result<()> {
    RECORDER.with_borrow_mut(|recorder| {
        match &mut recorder.allowed {
            Some(0) => return Err(io::Error::other("killed by the test")),
            Some(left) => *left -= 1,
            None => {}
        }
        if let Some(changes) = &mut recorder.changes {
            changes.push(owned(op));
        }
        Ok(())
    })
}

fn owned(op: &Op<'_>) -> Change {
    match *op {
        Op::Write { name, offset, bytes } => Change::Write { name, offset, bytes: bytes.to_vec() },
        Op::Length { name, bytes } => Change::Length { name, bytes },
        Op::Punch { offset, len } => Change::Punch { offset, len },
        Op::Sync(name) => Change::Sync(name),
        Op::Rename { from, to } => Change::Rename { from, to },
        Op::Unlink(name) => Change::Unlink(name),
        Op::SyncFolder => Change::SyncFolder,
    }
}

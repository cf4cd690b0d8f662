//! The digest of a stream of bytes on a thread of its own.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use super::{Digest, Hasher};

/// A digest of bytes that come piece by piece and are many: of a whole layer.
///
/// [`WholeHasher::aside`] leaves it to another thread, so that whoever has the bytes goes on with them
/// meanwhile. Dropped before [`WholeHasher::finish`] it leaves nothing behind.
#[derive(Debug)]
pub struct WholeHasher(Place);

#[derive(Debug)]
enum Place {
    Here(Hasher),
    Aside(Aside),
}

#[derive(Debug)]
struct Aside {
    /// What has come since the last full block.
    block: Vec<u8>,
    full: SyncSender<Vec<u8>>,
    used: Receiver<Vec<u8>>,
    thread: JoinHandle<Digest>,
}

impl WholeHasher {
    /// Starts with no bytes, on the thread that gives them.
    #[must_use]
    pub fn here() -> Self {
        Self(Place::Here(Hasher::new()))
    }

    /// Starts with no bytes, on a thread of its own, which is up to a MiB behind. Where no more threads can
    /// be had it is the same as [`WholeHasher::here`].
    #[must_use]
    pub fn aside() -> Self {
        let (full, blocks) = sync_channel::<Vec<u8>>(BLOCKS);
        let (used_up, used) = channel();
        let work = move || hash(&blocks, &used_up);
        match thread::Builder::new().name("digest".to_owned()).spawn(work) {
            Ok(thread) => {
                let block = Vec::with_capacity(BLOCK);
                Self(Place::Aside(Aside { block, full, used, thread }))
            }
            Err(_no_thread) => Self::here(),
        }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Place::Here(hasher) => hasher.update(bytes),
            Place::Aside(aside) => aside.take(bytes),
        }
    }

    /// The digest of everything added.
    ///
    /// # Panics
    /// When the thread did, which nothing makes it do.
    #[must_use]
    pub fn finish(self) -> Digest {
        match self.0 {
            Place::Here(hasher) => hasher.finish(),
            Place::Aside(aside) => aside.finish(),
        }
    }
}

impl Aside {
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = BLOCK.saturating_sub(self.block.len());
            let (piece, rest) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
            self.block.extend_from_slice(piece);
            bytes = rest;
            if self.block.len() == BLOCK {
                let next = self.used.try_recv().unwrap_or_else(|_none| Vec::with_capacity(BLOCK));
                // Only a thread that has panicked takes no more, and the end tells.
                self.full.send(std::mem::replace(&mut self.block, next)).ok();
            }
        }
    }

    fn finish(self) -> Digest {
        let Self { block, full, used: _, thread } = self;
        full.send(block).ok();
        drop(full);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn hash(blocks: &Receiver<Vec<u8>>, used_up: &Sender<Vec<u8>>) -> Digest {
    let mut hasher = Hasher::new();
    for mut block in blocks {
        hasher.update(&block);
        block.clear();
        // Nobody wants it any more at the end.
        used_up.send(block).ok();
    }
    hasher.finish()
}

/// Bytes that are handed over at once: many enough that what a hand-over costs is little beside them.
const BLOCK: usize = 128 << 10;

/// How many blocks wait to be hashed.
const BLOCKS: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pieces: &[usize]) {
        let bytes: Vec<u8> = (0..=250).cycle().take(pieces.iter().sum()).collect();
        let mut hashers = [WholeHasher::here(), WholeHasher::aside()];
        let mut rest = bytes.as_slice();
        for &len in pieces {
            let (piece, behind) = rest.split_at(len);
            hashers.iter_mut().for_each(|hasher| hasher.update(piece));
            rest = behind;
        }
        for hasher in hashers {
            assert_eq!(hasher.finish(), Digest::of(&bytes), "{pieces:?}");
        }
    }

    #[test]
    fn it_is_the_same_on_either_thread_however_the_bytes_are_cut() {
        check(&[]);
        check(&[0, 1, 0]);
        check(&[BLOCK]);
        check(&[BLOCK - 1, 1, 1]);
        check(&[3 * BLOCK + 5, 7, 2 * BLOCK]);
        check(&[20 * BLOCK, 1]);
        check(&[1000; 2000]);
    }

    #[test]
    fn one_that_is_dropped_ends_its_thread() {
        let mut hasher = WholeHasher::aside();
        hasher.update(&[7; 10 * BLOCK]);
        let WholeHasher(Place::Aside(Aside { full, thread, .. })) = hasher else {
            panic!("there are threads");
        };
        drop(full);
        thread.join().unwrap();
    }
}

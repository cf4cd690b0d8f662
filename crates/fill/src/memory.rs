//! The memory that compressed bytes may take from the moment they are asked for until they are inflated.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Halved: what is needed soon must not wait for what makes a layer whole.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Of completion.
    background: Arc<Semaphore>,
    /// Of all else. What a reader waits for is bounded by the number of connections, and goes on where there
    /// is no room.
    ahead: Arc<Semaphore>,
    /// Permits of each.
    half: usize,
}

impl Memory {
    /// Of `bytes` in all.
    pub(crate) fn new(bytes: u32) -> Self {
        let half = permits(u64::from(bytes / 2));
        let semaphore = || Arc::new(Semaphore::new(half));
        Self { background: semaphore(), ahead: semaphore(), half }
    }

    /// Room for a transfer of so many bytes that are needed soon, if there is any. To be taken when the transfer
    /// is planned: the next one must not be planned with the same room.
    pub(crate) fn take_ahead(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.ahead).try_acquire_many_owned(self.wanted(bytes)).ok()
    }

    /// Room for a transfer of completion, which waits for it.
    pub(crate) async fn take_background(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.background).acquire_many_owned(self.wanted(bytes)).await.ok()
    }

    fn wanted(&self, bytes: u64) -> u32 {
        u32::try_from(permits(bytes).min(self.half)).unwrap_or(u32::MAX)
    }

    /// For how many bytes that nobody waits for there is room, completion aside. Where all of it is free a
    /// single span may be longer.
    pub(crate) fn left_ahead(&self) -> u64 {
        match self.ahead.available_permits() {
            all if all == self.half => u64::MAX,
            left => (left as u64).saturating_mul(UNIT),
        }
    }
}

/// The part of `permit` that stands for `len` bytes.
pub(crate) fn share(
    permit: &mut Option<OwnedSemaphorePermit>,
    len: usize,
) -> Option<OwnedSemaphorePermit> {
    let permit = permit.as_mut()?;
    permit.split(permits(len as u64).min(permit.num_permits()))
}

fn permits(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(UNIT)).unwrap_or(Semaphore::MAX_PERMITS)
}

/// Bytes of a permit.
const UNIT: u64 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_needed_soon_has_room_beside_completion() {
        let memory = Memory::new(64 << 10);
        let completion = memory.take_background(1 << 20).await.unwrap();
        assert_eq!(memory.left_ahead(), u64::MAX);
        let mut ahead = memory.take_ahead(20 << 10);
        assert_eq!(memory.left_ahead(), 12 << 10);
        assert!(memory.take_ahead(13 << 10).is_none(), "a reader does not wait");
        let first = share(&mut ahead, 5000);
        drop(ahead);
        assert_eq!(memory.left_ahead(), 27 << 10);
        drop((first, completion));
        assert_eq!(memory.left_ahead(), u64::MAX);
        assert!(memory.take_background(32 << 10).await.is_some());
    }
}

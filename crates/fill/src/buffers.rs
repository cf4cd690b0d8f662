//! The memory that compressed spans come in.

use std::mem;
use std::ops::Deref;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// Buffers to be used again. A fresh one costs the kernel a fault for each of its pages, and all threads a
/// look at what is mapped when it goes.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    free: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// An empty buffer with room for `len` bytes.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.free.lock().pop().unwrap_or_default();
        buffer.reserve_exact(len);
        buffer
    }

    /// Makes a buffer come back when it has been used.
    pub(crate) fn lend(self: &Arc<Self>, bytes: Vec<u8>) -> Lent {
        Lent { bytes, home: Arc::downgrade(self) }
    }

    fn put(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut free = self.free.lock();
        if free.len() < MOST_FREE && buffer.capacity() <= LONGEST {
            free.push(buffer);
        }
    }
}

/// The bytes of a compressed span.
#[derive(Debug)]
pub(crate) struct Lent {
    bytes: Vec<u8>,
    home: Weak<Buffers>,
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            home.put(mem::take(&mut self.bytes));
        }
    }
}

/// So many lie about at most, for ever.
const MOST_FREE: usize = 8;

/// None of them is longer, in bytes. What a buffer has beyond its span is in memory as well: of long spans that
/// would be megabytes, and they are few.
const LONGEST: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_is_used_again_up_to_a_bound() {
        let buffers = Arc::new(Buffers::default());
        let free = || buffers.free.lock().iter().map(Vec::capacity).collect::<Vec<_>>();
        let mut bytes = buffers.take(1000);
        bytes.extend([7; 1000]);
        let (lent, at) = (buffers.lend(bytes), free());
        assert_eq!((&*lent, at), ([7; 1000].as_slice(), Vec::new()));
        drop(lent);
        assert_eq!(free(), [1000]);
        let again = buffers.take(10);
        assert_eq!((again.len(), again.capacity(), free()), (0, 1000, Vec::new()));
        drop(buffers.lend(buffers.take(LONGEST + 1)));
        assert_eq!(free(), [0_usize; 0], "one that is too long is given back");
        let many: Vec<Lent> = (0..20).map(|_| buffers.lend(buffers.take(10))).collect();
        drop(many);
        assert_eq!(free(), [10; MOST_FREE]);
    }

    #[test]
    fn nobody_is_left_to_take_them_back() {
        let buffers = Arc::new(Buffers::default());
        let lent = buffers.lend(vec![1, 2, 3]);
        drop(buffers);
        assert_eq!(&*lent, [1, 2, 3]);
    }
}

//! Buffers for reads, kept between them.

use parking_lot::Mutex;

/// Hands out buffers of one length; longer ones are made and thrown away.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
    buffer_len: usize,
    /// How many unused buffers are kept at most.
    keep: usize,
}

impl Pool {
    pub(crate) fn new(buffer_len: usize, keep: usize) -> Self {
        Self { free: Mutex::new(Vec::new()), buffer_len, keep }
    }

    /// Calls `with` with a buffer of `len` bytes, whose content is whatever was there before.
    pub(crate) fn with<T>(&self, len: usize, with: impl FnOnce(&mut [u8]) -> T) -> T {
        let kept = if len <= self.buffer_len { self.free.lock().pop() } else { None };
        let mut buffer = kept.unwrap_or_else(|| vec![0; len.max(self.buffer_len)]);
        let result = with(&mut buffer[..len]);
        if buffer.len() == self.buffer_len {
            let mut free = self.free.lock();
            if free.len() < self.keep {
                free.push(buffer);
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_only_some_and_only_of_its_length() {
        let pool = Pool::new(16, 1);
        pool.with(40, |buffer| assert_eq!(buffer.len(), 40));
        assert_eq!(pool.free.lock().len(), 0);
        pool.with(3, |_| pool.with(16, |buffer| assert_eq!(buffer.len(), 16)));
        assert_eq!(pool.free.lock().len(), 1);
    }
}

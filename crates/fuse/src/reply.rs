//! The answer to a read, which may be given later and from any thread.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use sys::fuse_device::Errno;

use crate::session::Shared;

/// The duty to answer one read of the kernel.
///
/// Dropped unanswered, the read fails with `EIO`. Once its session is being stopped, errors (and
/// drops) are not sent: the kernel asks the successor instead. Bytes are sent all the same.
///
/// The kernel takes a reply that is too short for the end of the file and fills up with zeros, so
/// every reply has all bytes up to the end of the range or of the file.
#[derive(Debug)]
pub struct ReadReply {
    /// Taken when answered.
    session: Option<Arc<Shared>>,
    unique: u64,
    pid: u32,
}

/// A piece of a read that lies in a file; between pieces there are zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where in the reply it begins, in bytes.
    pub at: usize,
    /// Its length in bytes.
    pub len: usize,
}

impl ReadReply {
    pub(crate) fn new(session: Arc<Shared>, unique: u64, pid: u32) -> Self {
        session.waiting.insert(unique, pid);
        Self { session: Some(session), unique, pid }
    }

    /// The thread that reads, in the pid namespace of whoever mounted; 0 if unknown. For reads made
    /// by read-ahead it is the one that caused them.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Answers with these bytes.
    pub fn data(mut self, bytes: &[u8]) {
        self.answer(Ok(bytes));
    }

    /// Answers with zeros.
    pub fn zeros(mut self, len: usize) {
        let Some(session) = self.session.clone() else { return };
        session.pool.with(len, |buffer| {
            buffer.fill(0);
            self.answer(Ok(buffer));
        });
    }

    /// Answers with the `len` bytes of a file from `offset` on. If it ends before, with `EIO`.
    pub fn file(mut self, file: &File, offset: u64, len: usize) {
        let Some(session) = self.session.clone() else { return };
        session.pool.with(len, |buffer| match read_exact(file, offset, buffer) {
            Ok(()) => self.answer(Ok(buffer)),
            Err(errno) => self.answer(Err(errno)),
        });
    }

    /// Answers with `total` bytes: zeros but for the pieces, whose bytes follow one another in the
    /// file from `offset` on. Pieces must be disjoint, and what lies beyond `total` is left out.
    pub fn scattered(mut self, file: &File, offset: u64, total: usize, pieces: &[Piece]) {
        let Some(session) = self.session.clone() else { return };
        let stored = pieces.iter().map(|piece| piece.len).fold(0, usize::saturating_add);
        if stored > total {
            return self.answer(Err(Errno::IO));
        }
        session.pool.with(stored, |bytes| {
            if let Err(errno) = read_exact(file, offset, bytes) {
                return self.answer(Err(errno));
            }
            session.pool.with(total, |buffer| {
                buffer.fill(0);
                scatter(bytes, pieces, buffer);
                self.answer(Ok(buffer));
            });
        });
    }

    /// Answers with an error.
    pub fn error(mut self, errno: Errno) {
        self.answer(Err(errno));
    }

    fn answer(&mut self, body: Result<&[u8], Errno>) {
        let Some(session) = self.session.take() else { return };
        session.waiting.remove(self.unique);
        if body.is_err() && session.is_stopping() {
            return;
        }
        session.reply(self.unique, body);
    }
}

impl Drop for ReadReply {
    fn drop(&mut self) {
        self.answer(Err(Errno::IO));
    }
}

fn read_exact(file: &File, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    file.read_exact_at(buffer, offset).map_err(|error| {
        tracing::error!(%error, offset, len = buffer.len(), "cannot read from the cache");
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}

fn scatter(mut bytes: &[u8], pieces: &[Piece], into: &mut [u8]) {
    for piece in pieces {
        let Some((head, tail)) = bytes.split_at_checked(piece.len) else { return };
        bytes = tail;
        let Some(room) = into.get_mut(piece.at..) else { continue };
        let len = room.len().min(head.len());
        room[..len].copy_from_slice(&head[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_land_where_they_belong() {
        let check = |pieces: &[(usize, usize)], expect: &[u8; 8]| {
            let pieces: Vec<_> = pieces.iter().map(|&(at, len)| Piece { at, len }).collect();
            let mut into = *b"........";
            scatter(b"abcdef", &pieces, &mut into);
            assert_eq!(&into, expect);
        };
        check(&[], b"........");
        check(&[(0, 6)], b"abcdef..");
        check(&[(1, 2), (5, 1)], b".ab..c..");
        check(&[(6, 4), (0, 2)], b"ef....ab");
        check(&[(9, 2), (0, 1)], b"c.......");
        check(&[(0, 7)], b"........");
    }
}

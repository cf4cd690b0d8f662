//! Reading a tar that streams by: what its entries are and where their data lies.
//!
//! The yardstick is Go's archive/tar, which SOCI and containerd use: what it accepts, names and
//! sizes is accepted, named and sized the same here. In two things this goes further: global PAX
//! headers are stepped over (Go returns them as entries, SOCI then gives up), and sparse files keep
//! their map.

mod header;
mod pax;
#[cfg(test)]
mod tests;

use crate::limits::Limits;
use crate::sparse::{self, PaxSparse};
use crate::toc::{EntryKind, TocEntry};
use header::{BLOCK, Block, GnuSparse, Header};
use pax::{Records, SparseMapText};

/// A layer that is not a tar as container runtimes unpack it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// Something is not as it must be.
    #[error("tar header at byte {at}: {what}")]
    Malformed {
        /// Where the offending block begins in the uncompressed tar.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The bytes end in the middle of an entry.
    #[error("the tar ends in the middle of an entry, at byte {at}")]
    Truncated {
        /// Where the bytes end.
        at: u64,
    },
    /// The layer is beyond what is taken in.
    #[error("tar at byte {at}: {what} exceeds the limit of {limit}")]
    TooLarge {
        /// Where the offending block begins in the uncompressed tar.
        at: u64,
        /// What is too large.
        what: &'static str,
        /// The limit in force, see [`Limits`].
        limit: u64,
    },
}

/// What a whole tar holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TarToc {
    /// Its entries in archive order.
    pub entries: Vec<TocEntry>,
    /// Where the archive ends: after the two zero blocks, if there are any. Padding after them is
    /// not counted.
    pub archive_size: u64,
}

/// A reader of a tar whose bytes come piece by piece.
#[derive(Debug)]
pub struct TarScanner {
    limits: Limits,
    state: State,
    /// The block being collected, in the states that want whole blocks.
    block: Block,
    filled: usize,
    /// How many bytes of the archive were taken.
    position: u64,
    entries: Vec<TocEntry>,
    /// How many entries were found, those included that were taken.
    found: usize,
    /// How many bytes their names and records have.
    text: u64,
    pending: Pending,
}

/// Metadata read ahead of the entry that it describes.
#[derive(Debug, Default)]
struct Pending {
    pax: Records,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

#[derive(Debug)]
enum State {
    /// A header block comes next.
    Header,
    /// One zero block was read; only a second one may follow.
    SecondZero,
    /// The body of a metadata record.
    Record { kind: RecordKind, left: u64, body: Vec<u8> },
    /// Data that nobody looks at, then padding, which may be missing at the very end.
    Skip { data: u64, padding: u64 },
    /// Extension blocks of the old GNU sparse map.
    GnuMap { entry: Box<TocEntry>, map: GnuSparse },
    /// The map of PAX sparse 1.0, at the start of the data; `entry.size` is what is left of it.
    PaxMap { entry: Box<TocEntry>, map: SparseMapText },
    /// After the two zero blocks.
    End,
}

#[derive(Debug, Clone, Copy)]
enum RecordKind {
    Pax,
    LongName,
    LongLink,
}

impl TarScanner {
    /// Starts at the beginning of an archive.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: State::Header,
            block: [0; BLOCK],
            filled: 0,
            position: 0,
            entries: Vec::new(),
            found: 0,
            text: 0,
            pending: Pending::default(),
        }
    }

    /// Takes the next bytes of the archive; those after its end are ignored.
    ///
    /// # Errors
    /// [`TarError::Malformed`] and [`TarError::TooLarge`]; the scanner is of no more use then.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), TarError> {
        while !bytes.is_empty() && !matches!(self.state, State::End) {
            let wanted = match &self.state {
                State::Skip { data, padding } => data.saturating_add(*padding),
                State::Record { left, .. } => *left,
                _ => header::to_u64(BLOCK.saturating_sub(self.filled)),
            };
            let len = usize::try_from(wanted).unwrap_or(usize::MAX).min(bytes.len());
            let (piece, rest) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
            bytes = rest;
            self.position = self.position.saturating_add(header::to_u64(len));
            self.take(piece)?;
        }
        Ok(())
    }

    /// The entries found so far, without those that were taken.
    #[must_use]
    pub fn entries(&self) -> &[TocEntry] {
        &self.entries
    }

    /// Takes the entries found since the last call, so that they need not all be in memory.
    /// [`finish`](Self::finish) has the others.
    pub fn take_entries(&mut self) -> Vec<TocEntry> {
        std::mem::take(&mut self.entries)
    }

    /// What the archive held. An archive without its two zero blocks is complete, as in Go.
    ///
    /// # Errors
    /// [`TarError::Truncated`] if the bytes ended in the middle of an entry.
    pub fn finish(self) -> Result<TarToc, TarError> {
        let complete = match self.state {
            State::Header | State::SecondZero => self.filled == 0,
            State::Skip { data, .. } => data == 0,
            State::End => true,
            State::Record { .. } | State::GnuMap { .. } | State::PaxMap { .. } => false,
        };
        if !complete {
            return Err(TarError::Truncated { at: self.position });
        }
        Ok(TarToc { entries: self.entries, archive_size: self.position })
    }

    /// Takes a piece that does not reach beyond what the state wants.
    fn take(&mut self, piece: &[u8]) -> Result<(), TarError> {
        let len = header::to_u64(piece.len());
        match &mut self.state {
            State::Skip { data, padding } => {
                let of_padding = len.saturating_sub(*data);
                *data = data.saturating_sub(len);
                *padding = padding.saturating_sub(of_padding);
                if *data == 0 && *padding == 0 {
                    self.state = State::Header;
                }
                Ok(())
            }
            State::Record { left, body, .. } => {
                body.extend_from_slice(piece);
                *left = left.saturating_sub(len);
                if *left == 0 { self.end_record() } else { Ok(()) }
            }
            _ => {
                let filled = self.filled.saturating_add(piece.len());
                if let Some(room) = self.block.get_mut(self.filled..filled) {
                    room.copy_from_slice(piece);
                }
                self.filled = filled;
                if filled < BLOCK {
                    return Ok(());
                }
                self.filled = 0;
                let block = self.block;
                self.take_block(&block)
            }
        }
    }

    fn take_block(&mut self, block: &Block) -> Result<(), TarError> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::SecondZero => {
                if block.iter().any(|&byte| byte != 0) {
                    return Err(self.malformed("one zero block and then no second one"));
                }
                self.state = State::End;
                Ok(())
            }
            State::GnuMap { entry, mut map } => {
                header::sparse_extension(block, &mut map)
                    .ok_or_else(|| self.malformed("bad GNU sparse map"))?;
                self.continue_gnu_map(entry, map)
            }
            State::PaxMap { entry, map } => self.continue_pax_map(entry, map, block),
            _ => self.take_header(block),
        }
    }

    fn take_header(&mut self, block: &Block) -> Result<(), TarError> {
        if block.iter().all(|&byte| byte == 0) {
            self.state = State::SecondZero;
            return Ok(());
        }
        let header = Header::parse(block).map_err(|what| self.malformed(what))?;
        match header.flag {
            b'x' => self.begin_record(RecordKind::Pax, &header),
            b'L' => self.begin_record(RecordKind::LongName, &header),
            b'K' => self.begin_record(RecordKind::LongLink, &header),
            b'g' => {
                self.pending = Pending::default();
                let size = self.size_of(&header)?;
                self.skip(size);
                Ok(())
            }
            _ => self.take_entry(&header, block),
        }
    }

    fn begin_record(&mut self, kind: RecordKind, header: &Header) -> Result<(), TarError> {
        let left = self.size_of(header)?;
        self.within(left, self.limits.record, "a metadata record")?;
        self.state = State::Record { kind, left, body: Vec::new() };
        if left == 0 { self.end_record() } else { Ok(()) }
    }

    fn end_record(&mut self) -> Result<(), TarError> {
        let State::Record { kind, body, .. } = std::mem::replace(&mut self.state, State::Header)
        else {
            return Ok(());
        };
        let len = header::to_u64(body.len());
        match kind {
            RecordKind::Pax => {
                let at = self.position.saturating_sub(len);
                let what = "bad PAX record";
                let bad = TarError::Malformed { at, what };
                self.pending.pax = pax::parse(&body).ok_or(bad)?;
            }
            RecordKind::LongName => self.pending.long_name = header::string(&body).to_vec(),
            RecordKind::LongLink => self.pending.long_link = header::string(&body).to_vec(),
        }
        self.state = State::Skip { data: 0, padding: header::padding(len) };
        if header::padding(len) == 0 {
            self.state = State::Header;
        }
        Ok(())
    }

    fn take_entry(&mut self, header: &Header, block: &Block) -> Result<(), TarError> {
        let pending = std::mem::take(&mut self.pending);
        let (mut entry, size) = header
            .entry(pending.pax)
            .ok_or_else(|| self.malformed("bad number in a PAX record"))?;
        if !pending.long_name.is_empty() {
            entry.name = pending.long_name;
        }
        if !pending.long_link.is_empty() {
            entry.linkname = pending.long_link;
        }
        entry.kind = header::kind(header.flag, &entry.name).ok_or_else(|| {
            self.malformed("an entry of a type that no container runtime unpacks")
        })?;
        if entry.kind == EntryKind::File {
            entry.size = u64::try_from(size).map_err(|_neg| self.malformed("negative size"))?;
        }
        if header.flag == b'S' {
            let map = header::gnu_sparse(header, block)
                .ok_or_else(|| self.malformed("bad GNU sparse map"))?;
            return self.continue_gnu_map(Box::new(entry), map);
        }
        let sparse = sparse::from_records(&entry.pax)
            .map_err(|_bad| self.malformed("bad PAX sparse map"))?;
        if sparse != PaxSparse::No {
            if entry.kind != EntryKind::File {
                return Err(self.malformed("a sparse entry that is not a file"));
            }
            let name = sparse::value(&entry.pax, sparse::NAME);
            if !name.is_empty() {
                entry.name = name.to_vec();
            }
        }
        match sparse {
            PaxSparse::No => self.finish_entry(entry),
            PaxSparse::InData => {
                self.state =
                    State::PaxMap { entry: Box::new(entry), map: SparseMapText::default() };
                Ok(())
            }
            PaxSparse::Pieces(pieces) => self.finish_sparse(entry, pieces),
        }
    }

    fn continue_gnu_map(
        &mut self,
        mut entry: Box<TocEntry>,
        map: GnuSparse,
    ) -> Result<(), TarError> {
        // 24 bytes in the archive for each piece.
        let len = header::to_u64(map.pieces.len()).saturating_mul(24);
        self.within(len, self.limits.record, "a sparse map")?;
        if map.more {
            self.state = State::GnuMap { entry, map };
            return Ok(());
        }
        let map = sparse::checked_map(map.pieces, map.logical_size, Some(entry.size))
            .map_err(|_bad| self.malformed("bad GNU sparse map"))?;
        entry.sparse = Some(map);
        self.finish_entry(*entry)
    }

    fn continue_pax_map(
        &mut self,
        mut entry: Box<TocEntry>,
        mut map: SparseMapText,
        block: &Block,
    ) -> Result<(), TarError> {
        let bad = self.malformed("bad PAX sparse map");
        entry.size = entry.size.checked_sub(header::to_u64(BLOCK)).ok_or(bad)?;
        let pieces = map.push(block).map_err(|_malformed| bad)?;
        self.within(header::to_u64(map.len()), self.limits.record, "a sparse map")?;
        match pieces {
            None => {
                self.state = State::PaxMap { entry, map };
                Ok(())
            }
            Some(pieces) => self.finish_sparse(*entry, pieces),
        }
    }

    fn finish_sparse(
        &mut self,
        mut entry: TocEntry,
        pieces: Vec<(u64, u64)>,
    ) -> Result<(), TarError> {
        let map = sparse::logical_size(&entry.pax)
            .and_then(|size| {
                sparse::checked_map(pieces, size.unwrap_or(entry.size), Some(entry.size))
            })
            .map_err(|_bad| self.malformed("bad PAX sparse map"))?;
        entry.sparse = Some(map);
        self.finish_entry(entry)
    }

    /// Adds an entry whose data begins at the current position.
    fn finish_entry(&mut self, mut entry: TocEntry) -> Result<(), TarError> {
        entry.offset = self.position;
        sparse::complete_records(&mut entry);
        let longest = entry.name.len().max(entry.linkname.len());
        self.within(header::to_u64(longest), self.limits.name, "a name")?;
        self.text = self.text.saturating_add(entry.text_bytes());
        if self.text > self.limits.text {
            return Err(self.too_large("all names and records", self.limits.text));
        }
        self.found = self.found.saturating_add(1);
        self.within(header::to_u64(self.found), self.limits.entries, "the number of entries")?;
        let size = entry.size;
        self.entries.push(entry);
        self.skip(size);
        Ok(())
    }

    fn skip(&mut self, data: u64) {
        let padding = header::padding(data);
        self.state = if data == 0 { State::Header } else { State::Skip { data, padding } };
    }

    fn size_of(&self, header: &Header) -> Result<u64, TarError> {
        u64::try_from(header.size).map_err(|_negative| self.malformed("negative size"))
    }

    fn within(&self, len: u64, limit: usize, what: &'static str) -> Result<(), TarError> {
        let limit = header::to_u64(limit);
        if len > limit { Err(self.too_large(what, limit)) } else { Ok(()) }
    }

    fn malformed(&self, what: &'static str) -> TarError {
        TarError::Malformed { at: self.block_start(), what }
    }

    fn too_large(&self, what: &'static str, limit: u64) -> TarError {
        TarError::TooLarge { at: self.block_start(), what, limit }
    }

    fn block_start(&self) -> u64 {
        self.position.saturating_sub(header::to_u64(BLOCK))
    }
}

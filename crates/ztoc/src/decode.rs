//! Inflating one span.

use sys::inflate::{Inflate, InflateError, State, Step, Stop};

use crate::spans::{Compression, SpanId, SpanTable, WINDOW_SIZE};

/// A span that could not be inflated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeSpanError {
    /// The caller gave other bytes than the table asks for: a mistake of the caller, or a short
    /// answer of a registry.
    #[error("span {}: {found} bytes given, {expected} needed", .span.0)]
    WrongLength {
        /// Which span.
        span: SpanId,
        /// How many bytes there must be: of the layer, or of the window.
        expected: u64,
        /// How many were given.
        found: u64,
    },
    /// The bytes are not what a gzip layer holds at this place, or the index is wrong.
    #[error("span {} is damaged, or its index is wrong", .span.0)]
    Damaged {
        /// Which span.
        span: SpanId,
        /// What the inflater says.
        source: InflateError,
    },
    /// The bytes make less than the index promises, so the index is wrong.
    #[error("span {} ends {missing} bytes early: its index is wrong", .span.0)]
    Short {
        /// Which span.
        span: SpanId,
        /// How many bytes of output are missing.
        missing: u64,
    },
}

/// Makes the bytes of one span, piece by piece.
///
/// It never trusts the index further than the bytes given: whatever either holds, each call ends,
/// and no byte outside of them is read. Whether the bytes are the right ones is for
/// [`SpanTable::digest`] to tell, before they come here: damaged deflate data mostly still inflates.
#[derive(Debug)]
pub struct SpanDecoder<'a> {
    span: SpanId,
    input: &'a [u8],
    /// Bytes that must still come.
    wanted: u64,
    /// Whether to go on after these, to the end of the layer.
    to_the_end: bool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// A plain tar: bytes are copied.
    Copy,
    /// In the member that the span begins in; raw, so that its trailer is not the inflater's.
    FirstMember(Inflate),
    /// In a later member.
    LaterMember(Inflate),
    /// Everything was made.
    Done,
}

impl<'a> SpanDecoder<'a> {
    /// Begins a span. `compressed` is exactly [`SpanTable::compressed_range`] of the layer; `window`
    /// is the [`WINDOW_SIZE`] bytes of [`SpanTable::window`], or empty where that is `None`.
    ///
    /// # Errors
    /// [`DecodeSpanError::WrongLength`] if they are not of that length.
    ///
    /// # Panics
    /// If the table has no such span.
    pub fn new(
        table: &SpanTable,
        span: SpanId,
        compressed: &'a [u8],
        window: &'a [u8],
    ) -> Result<Self, DecodeSpanError> {
        let range = table.compressed_range(span);
        check_len(span, compressed, range.end.saturating_sub(range.start))?;
        let needs_window = table.window(span).is_some();
        let window = if needs_window { window } else { &[] };
        check_len(span, window, if needs_window { to_u64(WINDOW_SIZE) } else { 0 })?;
        let made = table.made_range(span);
        let to_the_end = span.0 == table.len().saturating_sub(1);
        let mut decoder = Self {
            span,
            input: compressed,
            wanted: made.end.saturating_sub(made.start),
            to_the_end,
            phase: Phase::Copy,
        };
        if table.compression() == Compression::Gzip {
            let bits = table.checkpoint(span).bits;
            let shared = if bits > 0 { decoder.take_byte() } else { 0 };
            let inflate = Inflate::resume(bits, shared, window)
                .map_err(|source| DecodeSpanError::Damaged { span, source })?;
            decoder.phase = Phase::FirstMember(inflate);
        }
        Ok(decoder)
    }

    /// Fills `out` from its beginning and returns how many bytes were written: 0 only when the span
    /// is complete (or `out` is empty).
    ///
    /// A span makes [`SpanTable::uncompressed_range`] and then, if the archive ends in it or before
    /// it, padding. The last one makes that up to the end of the layer, of which the index does not know
    /// the length: the caller bounds it.
    ///
    /// # Errors
    /// [`DecodeSpanError::Damaged`], [`DecodeSpanError::Short`]; the decoder is of no more use then.
    pub fn read(&mut self, out: &mut [u8]) -> Result<usize, DecodeSpanError> {
        let room = if self.to_the_end { out.len() } else { out.len().min(to_usize(self.wanted)) };
        let out = out.get_mut(..room).unwrap_or_default();
        if out.is_empty() {
            return Ok(0);
        }
        let made = loop {
            let made = match &self.phase {
                Phase::Done => break 0,
                Phase::Copy => self.copy(out),
                Phase::FirstMember(_) | Phase::LaterMember(_) => self.inflate(out)?,
            };
            if made > 0 {
                break made;
            }
        };
        if made == 0 && self.wanted > 0 {
            return Err(DecodeSpanError::Short { span: self.span, missing: self.wanted });
        }
        self.wanted = self.wanted.saturating_sub(to_u64(made));
        Ok(made)
    }

    fn copy(&mut self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.input.len());
        let (piece, rest) = self.input.split_at_checked(len).unwrap_or_default();
        if let Some(to) = out.get_mut(..piece.len()) {
            to.copy_from_slice(piece);
        }
        self.input = rest;
        if len == 0 {
            self.phase = Phase::Done;
        }
        len
    }

    /// One step of the inflater. Each call makes output, takes input, or ends the phase: that is
    /// what makes the loop in [`SpanDecoder::read`] end.
    fn inflate(&mut self, out: &mut [u8]) -> Result<usize, DecodeSpanError> {
        let span = self.span;
        let damaged = |source| DecodeSpanError::Damaged { span, source };
        let (Phase::FirstMember(inflate) | Phase::LaterMember(inflate)) = &mut self.phase else {
            return Ok(0);
        };
        let Step { consumed, produced, state } =
            inflate.run(self.input, out, Stop::Anywhere).map_err(damaged)?;
        self.input = self.input.get(consumed..).unwrap_or_default();
        if state == State::StreamEnd {
            self.end_member().map_err(damaged)?;
        } else if consumed == 0 && produced == 0 {
            // All input was offered, and there was room: it ends in the middle of a member.
            return Err(DecodeSpanError::Short { span, missing: self.wanted.max(1) });
        }
        Ok(produced)
    }

    /// Goes on to the next member, if there is one.
    fn end_member(&mut self) -> Result<(), InflateError> {
        let phase = std::mem::replace(&mut self.phase, Phase::Done);
        let inflate = match phase {
            Phase::FirstMember(mut inflate) => {
                // A raw stream ends before the member's checksum and length. If they are cut short,
                // nothing can follow them.
                self.input = self.input.get(TRAILER_LEN..).unwrap_or_default();
                inflate.reset_gzip();
                inflate
            }
            Phase::LaterMember(mut inflate) => {
                inflate.reset_gzip();
                inflate
            }
            Phase::Copy | Phase::Done => return Ok(()),
        };
        if !self.input.is_empty() {
            self.phase = Phase::LaterMember(inflate);
        }
        Ok(())
    }

    fn take_byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.input.split_first() else { return 0 };
        self.input = rest;
        first
    }
}

/// A gzip member ends with a CRC-32 and a length.
const TRAILER_LEN: usize = 8;

fn check_len(span: SpanId, bytes: &[u8], expected: u64) -> Result<(), DecodeSpanError> {
    let found = to_u64(bytes.len());
    if found == expected {
        Ok(())
    } else {
        Err(DecodeSpanError::WrongLength { span, expected, found })
    }
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

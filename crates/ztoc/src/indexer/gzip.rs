//! Finding the spans of a gzip layer.
//!
//! The rule is AWS's: the first span begins after the gzip header; another one at the first end of a
//! deflate block (but not of the last in a member), or of the header of a further member, that lies
//! more than the span size of output after the beginning of the one before.

use oci::{Digest, Hasher};
use sys::inflate::{Inflate, InflateError, State, Step, Stop};

use super::{Deliver, FoundSpans, IndexError, SpanOptions, gzip_header, to_u64};
use crate::spans::{Checkpoint, RECORD_LEN, WINDOW_SIZE, gzip_record};
use crate::window::Thinner;

/// How much is inflated before the window has to be moved.
const OUTPUT_SIZE: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct GzipSpans {
    inflate: Inflate,
    between_members: bool,
    buffer: OutputBuffer,
    /// How much was consumed and produced.
    consumed: u64,
    produced: u64,
    last_byte: u8,
    table: Table,
    /// A second table of the same layer.
    also: Option<Table>,
}

/// The spans of one size, as they are found.
#[derive(Debug)]
struct Table {
    span_size: u64,
    /// How long the windows together may become.
    max_zinfo: u64,
    checkpoints: Vec<Checkpoint>,
    digests: Vec<Digest>,
    /// The records of the checkpoints, headed by room for the count.
    zinfo: Vec<u8>,
    /// Over the span being read, the byte shared with the one before included.
    hasher: Hasher,
    /// If windows are to be thinned.
    thinner: Option<Thinner>,
}

impl GzipSpans {
    pub(super) fn new(
        spans: SpanOptions,
        also: Option<SpanOptions>,
        max_zinfo: u64,
    ) -> Result<Self, IndexError> {
        let no_memory = |source| IndexError::Inflate { at: 0, source };
        let table = |spans| Table::new(spans, max_zinfo).map_err(no_memory);
        Ok(Self {
            inflate: Inflate::gzip().map_err(no_memory)?,
            between_members: false,
            buffer: OutputBuffer::new(),
            consumed: 0,
            produced: 0,
            last_byte: 0,
            table: table(spans)?,
            also: also.map(table).transpose()?,
        })
    }

    pub(super) fn push(
        &mut self,
        mut input: &[u8],
        deliver: Deliver<'_>,
    ) -> Result<(), IndexError> {
        if !input.is_empty() && self.between_members {
            self.begin_member();
        }
        loop {
            let Step { consumed, produced, state } = self
                .inflate
                .run(input, self.buffer.room(deliver)?, Stop::BlockEnds)
                .map_err(|source| IndexError::Inflate { at: self.consumed, source })?;
            let (taken, rest) = input.split_at_checked(consumed).unwrap_or((input, &[]));
            self.count(taken, produced);
            input = rest;
            match state {
                State::Running if consumed == 0 && produced == 0 => break,
                State::Running | State::BlockEnd { last: true, .. } => {}
                State::BlockEnd { unused_bits, last: false } => {
                    self.block_end(unused_bits, deliver)?;
                }
                State::StreamEnd => {
                    self.between_members = true;
                    if input.is_empty() {
                        break;
                    }
                    self.begin_member();
                }
            }
        }
        self.buffer.deliver(deliver)
    }

    pub(super) fn check_complete(&self) -> Result<(), IndexError> {
        if self.between_members { Ok(()) } else { Err(IndexError::Truncated { at: self.consumed }) }
    }

    /// The spans, and those of the second table.
    pub(super) fn finish(self) -> Result<(FoundSpans, Option<FoundSpans>), IndexError> {
        self.check_complete()?;
        Ok((self.table.finish()?, self.also.map(Table::finish).transpose()?))
    }

    fn begin_member(&mut self) {
        self.inflate.reset_gzip();
        self.between_members = false;
    }

    fn count(&mut self, taken: &[u8], produced: usize) {
        self.consumed = self.consumed.saturating_add(to_u64(taken.len()));
        self.produced = self.produced.saturating_add(to_u64(produced));
        self.buffer.filled = self.buffer.filled.saturating_add(produced);
        if let Some(&last) = taken.last() {
            self.last_byte = last;
        }
        self.table.take(taken);
        if let Some(also) = &mut self.also {
            also.take(taken);
        }
    }

    fn block_end(&mut self, bits: u8, deliver: Deliver<'_>) -> Result<(), IndexError> {
        let point = Checkpoint { compressed: self.consumed, uncompressed: self.produced, bits };
        if self.table.is_due(&point) {
            if !self.table.checkpoints.is_empty() {
                self.buffer.deliver(deliver)?;
            }
            self.table.begin_span(point, self.buffer.window(), self.last_byte)?;
        }
        match &mut self.also {
            Some(also) if also.is_due(&point) => {
                also.begin_span(point, self.buffer.window(), self.last_byte)
            }
            _ => Ok(()),
        }
    }
}

impl Table {
    fn new(options: SpanOptions, max_zinfo: u64) -> Result<Self, InflateError> {
        let SpanOptions { span_size, sparse_windows } = options;
        Ok(Self {
            span_size,
            max_zinfo,
            checkpoints: Vec::new(),
            digests: Vec::new(),
            zinfo: gzip_header(0, span_size).to_vec(),
            hasher: Hasher::new(),
            thinner: sparse_windows.then(Thinner::new).transpose()?,
        })
    }

    /// The next bytes of the layer.
    fn take(&mut self, taken: &[u8]) {
        // What precedes the first checkpoint is the header, which belongs to no span.
        if !self.checkpoints.is_empty() {
            self.hash(taken);
        }
    }

    fn is_due(&self, point: &Checkpoint) -> bool {
        match self.checkpoints.last() {
            // AWS's tool adds one after each leading empty block, which gives spans that make nothing
            // and that its own reader refuses.
            Some(_) if point.uncompressed == 0 => false,
            Some(last) => point.uncompressed.saturating_sub(last.uncompressed) > self.span_size,
            None => true,
        }
    }

    fn begin_span(
        &mut self,
        point: Checkpoint,
        window: &[u8],
        last_byte: u8,
    ) -> Result<(), IndexError> {
        if to_u64(self.zinfo.len()).saturating_add(to_u64(RECORD_LEN)) > self.max_zinfo {
            return Err(IndexError::IndexTooLarge);
        }
        if !self.checkpoints.is_empty() {
            self.end_span();
        }
        gzip_record(&mut self.zinfo, &point, window);
        self.checkpoints.push(point);
        if point.bits > 0 {
            self.hash(&[last_byte]);
        }
        Ok(())
    }

    fn end_span(&mut self) {
        self.digests.push(std::mem::take(&mut self.hasher).finish());
        // The span's record is the last one, and ends with its window.
        if let (Some(thinner), Some(point)) = (&mut self.thinner, self.checkpoints.last())
            && let Some(window) = self.zinfo.last_chunk_mut::<WINDOW_SIZE>()
        {
            thinner.blank_unused(point.bits, window);
        }
    }

    /// Takes in bytes of the span being read.
    fn hash(&mut self, taken: &[u8]) {
        self.hasher.update(taken);
        if let Some(thinner) = &mut self.thinner {
            thinner.take(taken);
        }
    }

    fn finish(mut self) -> Result<FoundSpans, IndexError> {
        self.end_span();
        let count =
            u32::try_from(self.checkpoints.len()).map_err(|_many| IndexError::IndexTooLarge)?;
        let header = gzip_header(count, self.span_size);
        if let Some(head) = self.zinfo.first_chunk_mut() {
            *head = header;
        }
        Ok(FoundSpans { checkpoints: self.checkpoints, digests: self.digests, zinfo: self.zinfo })
    }
}

/// The output not yet delivered, and the 32 KiB before it.
///
/// It begins with 32 KiB of zeros, as if they had been made before the layer: so windows of the
/// first spans are padded on their left, as the format wants.
struct OutputBuffer {
    bytes: Box<[u8]>,
    /// What is before was delivered.
    delivered: usize,
    /// What is behind is free.
    filled: usize,
}

impl OutputBuffer {
    fn new() -> Self {
        let bytes = vec![0; WINDOW_SIZE.saturating_add(OUTPUT_SIZE)].into_boxed_slice();
        Self { bytes, delivered: WINDOW_SIZE, filled: WINDOW_SIZE }
    }

    /// The free part; never empty.
    fn room(&mut self, deliver: Deliver<'_>) -> Result<&mut [u8], IndexError> {
        if self.filled == self.bytes.len() {
            self.deliver(deliver)?;
            let window = self.filled.saturating_sub(WINDOW_SIZE)..self.filled;
            self.bytes.copy_within(window, 0);
            self.delivered = WINDOW_SIZE;
            self.filled = WINDOW_SIZE;
        }
        Ok(self.bytes.get_mut(self.filled..).unwrap_or_default())
    }

    fn deliver(&mut self, deliver: Deliver<'_>) -> Result<(), IndexError> {
        let waiting = self.bytes.get(self.delivered..self.filled).unwrap_or_default();
        self.delivered = self.filled;
        if waiting.is_empty() { Ok(()) } else { deliver(waiting) }
    }

    /// The last 32 KiB.
    fn window(&self) -> &[u8] {
        let start = self.filled.saturating_sub(WINDOW_SIZE);
        self.bytes.get(start..self.filled).unwrap_or_default()
    }
}

impl std::fmt::Debug for OutputBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutputBuffer").field("filled", &self.filled).finish_non_exhaustive()
    }
}

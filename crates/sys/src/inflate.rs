//! Raw deflate and gzip decoding that can stop at block ends and start in the middle.
//!
//! A safe front of zlib-rs's C interface, which has what its Rust interface lacks: `Z_BLOCK`,
//! `inflatePrime` and `inflateSetDictionary`. Values in, values out; no policy.

use std::ffi::{CStr, c_char, c_int};

use libz_rs_sys as z;

/// How far back deflate can refer: 32 KiB.
pub const WINDOW_SIZE: usize = 32768;

/// Where a call to [`Inflate::run`] may stop while it has both input and room for output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Only where it must.
    Anywhere,
    /// Also after the header and at the end of every deflate block.
    BlockEnds,
}

/// Where a call to [`Inflate::run`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// In the middle: the input is used up or the output is full.
    Running,
    /// Just after the header or a block; each such place is reported once.
    BlockEnd {
        /// How many high bits of the last byte consumed belong to the next block, 0 to 7.
        unused_bits: u8,
        /// Whether the block was the last of its stream.
        last: bool,
    },
    /// After the stream (gzip: after its trailer, which was checked).
    StreamEnd,
}

/// What one call to [`Inflate::run`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// How many bytes of the input were taken.
    pub consumed: usize,
    /// How many bytes of the output were written.
    pub produced: usize,
    /// Where it stopped.
    pub state: State,
}

/// Bytes that are not a deflate or gzip stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// The stream breaks the format's rules.
    #[error("damaged deflate data: {0}")]
    Data(&'static str),
    /// The inflater's memory could not be had.
    #[error("no memory for the inflater")]
    Memory,
}

/// An inflater of one stream.
pub struct Inflate {
    /// Boxed, as zlib's contract forbids moving an initialised stream.
    stream: Box<z::z_stream>,
}

// SAFETY: the stream owns all that its pointers lead to (its state was allocated by `inflateInit2_`
// and belongs to it alone), keeps no pointer to a caller's buffer between calls, and zlib-rs has no
// thread-bound state.
unsafe impl Send for Inflate {}

impl Inflate {
    /// Decodes a gzip stream: header, deflate data, trailer (which is checked).
    ///
    /// # Errors
    /// [`InflateError::Memory`].
    pub fn gzip() -> Result<Self, InflateError> {
        Self::with_window_bits(GZIP_WINDOW_BITS)
    }

    /// Decodes a raw deflate stream from its beginning.
    ///
    /// # Errors
    /// [`InflateError::Memory`].
    pub fn raw() -> Result<Self, InflateError> {
        Self::with_window_bits(RAW_WINDOW_BITS)
    }

    /// Decodes a raw deflate stream from a block boundary in its middle: the first `bits` bits
    /// (0 to 7; more count as 7) are the high bits of `byte`, the byte before the input, and
    /// `window` is the output before that place (its last 32 KiB are used).
    ///
    /// # Errors
    /// [`InflateError::Memory`].
    pub fn resume(bits: u8, byte: u8, window: &[u8]) -> Result<Self, InflateError> {
        let mut inflate = Self::raw()?;
        inflate.enter(bits, byte, window)?;
        Ok(inflate)
    }

    /// As [`resume`](Self::resume), with the memory that this inflater has.
    ///
    /// # Errors
    /// [`InflateError::Memory`].
    pub fn resume_again(&mut self, bits: u8, byte: u8, window: &[u8]) -> Result<(), InflateError> {
        // SAFETY: `stream` was initialised by `inflateInit2_`.
        check_setup(unsafe { z::inflateReset2(&raw mut *self.stream, RAW_WINDOW_BITS) })?;
        self.enter(bits, byte, window)
    }

    /// Makes a fresh raw inflater go on from the middle of a stream.
    fn enter(&mut self, bits: u8, byte: u8, window: &[u8]) -> Result<(), InflateError> {
        let bits = bits.min(7);
        if bits > 0 {
            let value = c_int::from(byte >> (8 - bits));
            // SAFETY: `stream` was initialised by `inflateInit2_`.
            let code = unsafe { z::inflatePrime(&raw mut *self.stream, c_int::from(bits), value) };
            check_setup(code)?;
        }
        let window = &window[window.len().saturating_sub(WINDOW_SIZE)..];
        if !window.is_empty() {
            let len = offered(window.len());
            // SAFETY: `stream` was initialised by `inflateInit2_`; `window` is valid for `len` bytes
            // and is copied, not kept.
            let code =
                unsafe { z::inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), len) };
            check_setup(code)?;
        }
        Ok(())
    }

    /// Decodes from `input` into `output` as far as either goes, or to the next place named by
    /// `stop`. No progress at all (nothing consumed, nothing produced, still running) means that
    /// more input or more room is needed.
    ///
    /// # Errors
    /// [`InflateError::Data`] if the input is damaged; the inflater is of no more use then.
    pub fn run(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        stop: Stop,
    ) -> Result<Step, InflateError> {
        let (input_len, room) = (offered(input.len()), offered(output.len()));
        let stream = &mut *self.stream;
        stream.next_in = input.as_ptr();
        stream.avail_in = input_len;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = room;
        let flush = match stop {
            Stop::Anywhere => z::Z_NO_FLUSH,
            Stop::BlockEnds => z::Z_BLOCK,
        };
        // SAFETY: `stream` was initialised by `inflateInit2_`; `next_in`/`avail_in` and
        // `next_out`/`avail_out` describe the two slices, which are borrowed until the call returns.
        let code = unsafe { z::inflate(&raw mut *stream, flush) };
        let consumed = (input_len - stream.avail_in) as usize;
        let produced = (room - stream.avail_out) as usize;
        // The buffers are the caller's again: no pointer to them may outlive this call.
        stream.next_in = std::ptr::null();
        stream.avail_in = 0;
        stream.next_out = std::ptr::null_mut();
        stream.avail_out = 0;
        let state = match code {
            z::Z_OK | z::Z_BUF_ERROR => block_state(stream.data_type, stop),
            z::Z_STREAM_END => State::StreamEnd,
            z::Z_MEM_ERROR => return Err(InflateError::Memory),
            z::Z_NEED_DICT => return Err(InflateError::Data("needs a preset dictionary")),
            _ => return Err(InflateError::Data(message(stream.msg))),
        };
        Ok(Step { consumed, produced, state })
    }

    /// Makes ready for another gzip stream, with an empty window.
    pub fn reset_gzip(&mut self) {
        // SAFETY: `stream` was initialised by `inflateInit2_`.
        let code = unsafe { z::inflateReset2(&raw mut *self.stream, GZIP_WINDOW_BITS) };
        debug_assert_eq!(code, z::Z_OK, "the stream is initialised and the window size is valid");
    }

    /// The last output, 32 KiB at most, oldest byte first.
    #[must_use]
    pub fn window(&self) -> Vec<u8> {
        let mut window = vec![0; WINDOW_SIZE];
        let mut len = 0;
        // SAFETY: `stream` was initialised by `inflateInit2_`; the dictionary is 32 KiB at most, and
        // `window` has room for as much.
        let code = unsafe {
            z::inflateGetDictionary(&raw const *self.stream, window.as_mut_ptr(), &raw mut len)
        };
        debug_assert_eq!(code, z::Z_OK, "the stream is initialised");
        window.truncate(len as usize);
        window
    }

    fn with_window_bits(window_bits: c_int) -> Result<Self, InflateError> {
        // `z_stream` holds function pointers: `default` sets them, zeroed memory would not do.
        let mut stream = Box::<z::z_stream>::default();
        let size = c_int::try_from(size_of::<z::z_stream>()).expect("a struct of a hundred bytes");
        // SAFETY: `stream` is a valid `z_stream` whose allocators are set; the version is the
        // library's own, a NUL-terminated constant.
        let code =
            unsafe { z::inflateInit2_(&raw mut *stream, window_bits, z::zlibVersion(), size) };
        check_setup(code)?;
        Ok(Self { stream })
    }
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: `stream` was initialised by `inflateInit2_` and is ended only here.
        unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

impl std::fmt::Debug for Inflate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflate").finish_non_exhaustive()
    }
}

/// gzip only: `+32` would also take zlib streams, whose trailer has another length.
const GZIP_WINDOW_BITS: c_int = 16 + 15;
const RAW_WINDOW_BITS: c_int = -15;

/// The lengths of one call are 32-bit; of longer buffers the beginning is offered.
fn offered(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// `data_type` after a call: bits 0-2 unused bits, 64 in the last block, 128 just after a block.
fn block_state(data_type: c_int, stop: Stop) -> State {
    if stop != Stop::BlockEnds || data_type & 128 == 0 {
        return State::Running;
    }
    let unused_bits = u8::try_from(data_type & 7).expect("three bits");
    State::BlockEnd { unused_bits, last: data_type & 64 != 0 }
}

fn check_setup(code: c_int) -> Result<(), InflateError> {
    if code == z::Z_OK { Ok(()) } else { Err(InflateError::Memory) }
}

/// zlib's own words about damaged data.
fn message(msg: *const c_char) -> &'static str {
    if msg.is_null() {
        return "no details";
    }
    // SAFETY: zlib sets `msg` only to NUL-terminated constants of the library.
    let text: &'static CStr = unsafe { CStr::from_ptr(msg) };
    text.to_str().unwrap_or("no details")
}

#[cfg(test)]
mod tests;

//! The part of the flatbuffer format that zTOCs use: tables, strings, vectors.
//!
//! An own reader, because the bytes are foreign: every offset is checked where it is followed, and
//! nothing recurses. An own writer, because the bytes must be those of Go's builder: zTOCs are named
//! by their digest. Format: <https://flatbuffers.dev/internals/>.

mod reader;
mod writer;

pub(crate) use reader::{OutOfBounds, Table};
pub(crate) use writer::{Builder, Place};

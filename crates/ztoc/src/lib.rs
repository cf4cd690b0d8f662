//! gzip checkpoints, the zTOC 0.9 format, tar reading and spans: values only, no I/O.
#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![cfg_attr(
    test,
    expect(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test that goes out of bounds fails, which is what tests are for"
    )
)]

mod decode;
mod document;
mod flatbuffer;
mod indexer;
mod limits;
mod rfc3339;
mod spans;
mod sparse;
mod tar;
mod toc;
mod window;

pub use decode::{DecodeSpanError, SpanDecoder};
pub use document::{ParseZtocError, TocEntries, Ztoc, ZtocTooLarge};
pub use indexer::{BuiltIndex, IndexError, Indexer, IndexerOptions, SpanOptions};
pub use limits::Limits;
pub use spans::{Checkpoint, Compression, SpanId, SpanTable, WINDOW_SIZE, Window, WindowFrame};
pub use tar::{TarError, TarScanner, TarToc};
pub use toc::{Entries, EntryKind, Mtime, ReadTocError, SparseMap, Toc, TocEntry};

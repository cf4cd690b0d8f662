//! What can go wrong for a reader, and for one span.

use std::io;
use std::ops::Range;
use std::time::Duration;

use index::{WindowError, ZstdError};
use oci::Digest;
use ztoc::{DecodeSpanError, SpanId};

use crate::source::SourceError;

/// A reader does not get its bytes. The next read of the same range tries again from the start.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The deadline passed while the bytes were still missing.
    #[error(
        "bytes {}-{} of layer {layer} did not come within {} s: {last}; see `hermes status`",
        range.start, range.end, waited.as_secs()
    )]
    Deadline {
        /// The layer's blob.
        layer: Digest,
        /// Uncompressed bytes.
        range: Range<u64>,
        /// How long the reader waited.
        waited: Duration,
        /// The last thing that went wrong.
        last: String,
    },
    /// Every source gave bytes that are not what the index promises.
    #[error("layer {layer} is corrupt at its source: {last}; compare `hermes index verify`")]
    Corrupt {
        /// The layer's blob.
        layer: Digest,
        /// The last mismatch.
        last: String,
    },
    /// The layer was dropped while the reader waited.
    #[error("layer {layer} was unmounted during a read")]
    Gone {
        /// The layer's blob.
        layer: Digest,
    },
}

/// A layer could not be opened again, or nothing could be given up of it.
#[derive(Debug, thiserror::Error)]
pub enum ReopenError {
    /// Reads would pass us.
    #[error("having reads of a sealed layer come to us again")]
    Gate(#[from] io::Error),
    /// The disk failed.
    #[error(transparent)]
    Unseal(#[from] cache::UnsealError),
    /// The disk failed, or the layer was sealed at the same moment.
    #[error(transparent)]
    Evict(#[from] cache::EvictError),
}

/// One attempt at one span failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpanFault {
    /// The bytes did not come.
    #[error("fetching")]
    Source(#[from] SourceError),
    /// The bytes came and have another digest than the index says.
    #[error("span {} has digest {found}, the index says {expected}", span.0)]
    WrongBytes { span: SpanId, found: Digest, expected: Digest },
    /// The bytes are those of the index, and do not decode.
    #[error("decoding")]
    Decode(#[from] DecodeSpanError),
    /// The blob is not what its compression says.
    #[error("decoding the layer from its beginning")]
    Unpack(#[from] ZstdError),
    /// The whole blob makes less than its index says, or more.
    #[error("the layer does not unpack to the {expected} bytes that its index promises")]
    OtherLength { expected: u64 },
    /// Its window cannot be had.
    #[error("the window of span {} of the stored index", span.0)]
    Window { span: SpanId, source: WindowError },
    /// The cache could not take the bytes.
    #[error("writing to the cache")]
    Cache(#[from] cache::WriteError),
}

impl SpanFault {
    /// Whether the bytes themselves are wrong, rather than late.
    pub(crate) fn is_wrong_bytes(&self) -> bool {
        match self {
            Self::WrongBytes { .. }
            | Self::Decode(_)
            | Self::Unpack(_)
            | Self::OtherLength { .. } => true,
            // It was fetched before the span.
            Self::Window { source, .. } => !matches!(source, WindowError::Read(_)),
            Self::Source(_) | Self::Cache(_) => false,
        }
    }

    /// Whether there was no room for the bytes.
    pub(crate) fn is_no_room(&self) -> bool {
        matches!(self, Self::Cache(cache::WriteError::NoSpace(_)))
    }

    /// How long the source asked us to wait.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Source(err) => err.retry_after,
            Self::WrongBytes { .. }
            | Self::Decode(_)
            | Self::Unpack(_)
            | Self::OtherLength { .. }
            | Self::Window { .. }
            | Self::Cache(_) => None,
        }
    }
}

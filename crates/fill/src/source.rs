//! Where compressed bytes come from, as far as the engine cares.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use oci::Digest;

/// The bytes of a range, in order, in pieces of any size.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;

/// What a source gives for a range.
pub struct Transfer {
    /// The bytes.
    pub bytes: ByteStream,
    /// Who sends them, to be told if they are wrong; `None` if nobody else could send them.
    pub sender: Option<Box<dyn Sender>>,
}

/// One of several servers that give the same bytes.
pub trait Sender: Send + Sync {
    /// A span that it sent has the digest `found`, and should have `expected`: the next
    /// [`open`](Source::open) should ask another one.
    fn lied(&self, expected: Digest, found: Digest);
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer").finish_non_exhaustive()
    }
}

/// One layer blob that can be read by ranges.
pub trait Source: Send + Sync + fmt::Debug {
    /// Starts reading `range` (bytes of the compressed blob).
    ///
    /// *Guarantees:* the stream yields exactly as many bytes as the range has, or ends with an error.
    /// *Cancellation:* dropping the future or the stream stops the transfer.
    fn open(&self, range: Range<u64>) -> BoxFuture<'_, Result<Transfer, SourceError>>;
}

/// Bytes did not come.
#[derive(Debug)]
pub struct SourceError {
    /// Whether the same request may succeed later without anybody doing anything.
    pub transient: bool,
    /// How long the other side asked us to stay away.
    pub retry_after: Option<Duration>,
    /// What happened.
    pub cause: Box<dyn Error + Send + Sync>,
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("reading the layer from its source")
    }
}

impl Error for SourceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(self.cause.as_ref())
    }
}

//! An image's blobs as the engine reads them.

use std::ops::Range;

use artifacts::Origin;
use fill::{Sender, Source, SourceError, Transfer};
use futures_util::future::BoxFuture;
use futures_util::stream;
use oci::Digest;
use registry::FetchError;

/// One layer blob, where its image lies.
#[derive(Debug)]
pub(super) struct Blob {
    pub(super) origin: Origin,
    pub(super) digest: Digest,
}

impl Source for Blob {
    fn open(&self, range: Range<u64>) -> BoxFuture<'_, Result<Transfer, SourceError>> {
        Box::pin(async move {
            let stream = self.origin.stream(&self.digest, range).await.map_err(source_error)?;
            let sender = stream.server().map(|server| Box::new(Server(server)) as Box<dyn Sender>);
            let next = |mut stream: artifacts::BlobStream| async move {
                let piece = stream.next().await.map_err(source_error)?;
                Ok(piece.map(|piece| (piece, stream)))
            };
            Ok(Transfer { bytes: Box::pin(stream::try_unfold(stream, next)), sender })
        })
    }
}

/// The server of the registry, or its mirror, that a range comes from.
struct Server(registry::Source);

impl Sender for Server {
    fn lied(&self, expected: Digest, found: Digest) {
        self.0.put_aside(expected, found);
    }
}

fn source_error(err: FetchError) -> SourceError {
    SourceError {
        transient: err.is_transient(),
        retry_after: err.retry_after(),
        cause: Box::new(err),
    }
}

//! A range of a blob as it comes over the network.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use oci::Digest;
use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE, HeaderMap, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use crate::error::public;
use crate::range::{parse_content_range, request_header};
use crate::redirect::RedirectKey;
use crate::transport::{Answer, Call, Chunk, Exchange, Server, content_length, next_chunk};
use crate::{Client, FetchError};

/// The bytes of a range, in order.
///
/// Gives exactly the range, or an error. What was given before an error is what the server sent.
pub struct BlobStream {
    open: Option<Open>,
    want: u64,
    remaining: u64,
    total: Option<u64>,
}

struct Open {
    response: Response,
    url: Url,
    /// Bytes before the range that a server sends which does not know ranges.
    skip: u64,
    source: Source,
    stall_timeout: Duration,
}

/// Where a stream's bytes come from.
#[derive(Clone)]
pub struct Source {
    client: Client,
    server: Arc<Server>,
    key: RedirectKey,
    url: Url,
}

impl BlobStream {
    /// A range without bytes.
    pub(crate) const fn empty() -> Self {
        Self { open: None, want: 0, remaining: 0, total: None }
    }

    /// The next bytes, never none of them; or `None` after the last byte of the range.
    ///
    /// # Errors
    /// `Truncated` if the answer ends early, `Stalled` if no byte comes for the client's
    /// `stall_timeout`. The server is then asked last for a while. Further calls fail as well.
    ///
    /// # Cancellation
    /// No byte is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        while self.remaining > 0 {
            let got = self.want - self.remaining;
            let Some(open) = &mut self.open else {
                return Err(FetchError::Truncated { url: String::new(), got, want: self.want });
            };
            let next = next_chunk(&mut open.response, &open.url, open.stall_timeout).await;
            let mut chunk = match next {
                Ok(Chunk::Bytes(chunk)) => chunk,
                Ok(Chunk::End) => return Err(self.broken(None)),
                Ok(Chunk::Broken(error)) => {
                    tracing::debug!(url = public(&open.url), %error, "the answer broke off");
                    return Err(self.broken(None));
                }
                Err(stalled) => return Err(self.broken(Some(stalled))),
            };
            let skipped = clamp(open.skip, chunk.len());
            chunk.advance(skipped);
            open.skip -= count(skipped);
            chunk.truncate(clamp(self.remaining, chunk.len()));
            if chunk.is_empty() {
                continue;
            }
            self.remaining -= count(chunk.len());
            return Ok(Some(chunk));
        }
        Ok(None)
    }

    /// The size of the whole blob, if the server said.
    #[must_use]
    pub const fn total_size(&self) -> Option<u64> {
        self.total
    }

    /// How many bytes of the range are still to come.
    #[must_use]
    pub const fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Where the bytes come from, to be kept until they have been checked; `None` for an empty
    /// range.
    #[must_use]
    pub fn source(&self) -> Option<Source> {
        self.open.as_ref().map(|open| open.source.clone())
    }

    fn broken(&mut self, error: Option<FetchError>) -> FetchError {
        let open = self.open.take();
        let url = open.as_ref().map(|open| public(&open.url)).unwrap_or_default();
        let (got, want) = (self.want - self.remaining, self.want);
        let error = error.unwrap_or(FetchError::Truncated { url, got, want });
        if let Some(open) = open {
            open.source.failed(&error);
        }
        error
    }
}

impl fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobStream")
            .field("url", &self.open.as_ref().map(|open| public(&open.url)))
            .field("remaining", &self.remaining)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}

impl Source {
    /// Reports that the bytes were not the right ones: the server is asked last for a while.
    pub fn put_aside(&self, expected: Digest, found: Digest) {
        self.failed(&FetchError::WrongDigest { url: public(&self.url), expected, found });
    }

    fn failed(&self, error: &FetchError) {
        self.server.failed(error, self.client.shared.options.rest);
        self.client.identity.redirects.forget(&self.key, &self.url);
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&public(&self.url)).finish()
    }
}

/// Asks one server for a range, which is not empty.
///
/// Where the server redirected to lately is asked first; if that refuses, the server itself is.
pub(crate) async fn open(
    exchange: &Exchange<'_>,
    digest: &Digest,
    range: Range<u64>,
) -> Result<BlobStream, FetchError> {
    let key = RedirectKey {
        server: exchange.server.host.base.to_string(),
        repository: exchange.repository.to_owned(),
        blob: *digest,
    };
    let redirects = &exchange.client.identity.redirects;
    if let Some(url) = redirects.get(&key) {
        let call = range_call(url.clone(), &range);
        if let Ok(response) = exchange.send(&call, &url, None).await
            && response.status().is_success()
        {
            let answer = Answer { response, url, redirected: true };
            return stream(exchange, key, answer, range).await;
        }
        redirects.forget(&key, &url);
    }
    let call = range_call(exchange.url(&format!("blobs/{digest}")), &range);
    let answer = exchange.call(&call).await?;
    if answer.redirected && answer.response.status().is_success() {
        redirects.insert(key.clone(), answer.url.clone());
    }
    stream(exchange, key, answer, range).await
}

fn range_call<'a>(url: Url, range: &Range<u64>) -> Call<'a> {
    Call::new(Method::GET, url).header(RANGE, &request_header(range))
}

async fn stream(
    exchange: &Exchange<'_>,
    key: RedirectKey,
    answer: Answer,
    range: Range<u64>,
) -> Result<BlobStream, FetchError> {
    let headers = answer.response.headers();
    let placed = match answer.response.status() {
        StatusCode::PARTIAL_CONTENT | StatusCode::OK if is_encoded(headers) => {
            Err("the content was compressed on the way, although that was not allowed")
        }
        StatusCode::PARTIAL_CONTENT => place_partial(headers, &range),
        StatusCode::OK => Ok(Placed { skip: range.start, total: content_length(headers) }),
        StatusCode::RANGE_NOT_SATISFIABLE => {
            let url = public(&answer.url);
            let size = stated_range(headers).and_then(|stated| stated.size);
            return Err(FetchError::RangeNotSatisfiable { url, range, size });
        }
        _ => return Err(exchange.refusal(answer).await),
    };
    let placed = placed.map_err(|what| FetchError::Malformed { url: public(&answer.url), what })?;
    if let Some(total) = placed.total.filter(|total| range.end > *total) {
        let (url, size) = (public(&answer.url), Some(total));
        return Err(FetchError::RangeNotSatisfiable { url, range, size });
    }
    // The whole, where the whole was asked for, tells nothing.
    if answer.response.status() == StatusCode::PARTIAL_CONTENT {
        exchange.server.set_ignores_ranges(false);
    } else if placed.total != Some(range.end - range.start) {
        exchange.server.set_ignores_ranges(true);
    }
    let want = range.end - range.start;
    let source = Source {
        client: exchange.client.clone(),
        server: Arc::clone(exchange.server),
        key,
        url: answer.url.clone(),
    };
    let open = Open {
        response: answer.response,
        url: answer.url,
        skip: placed.skip,
        source,
        stall_timeout: exchange.options().stall_timeout,
    };
    Ok(BlobStream { open: Some(open), want, remaining: want, total: placed.total })
}

/// Where a range lies in an answer.
struct Placed {
    skip: u64,
    total: Option<u64>,
}

fn place_partial(headers: &HeaderMap, range: &Range<u64>) -> Result<Placed, &'static str> {
    let stated = stated_range(headers).ok_or("a part without saying which")?;
    let total = stated.size;
    match stated.range {
        Some(part) if part.start <= range.start && range.start < part.end => {
            Ok(Placed { skip: range.start - part.start, total })
        }
        _ => Err("another part than was asked for"),
    }
}

fn stated_range(headers: &HeaderMap) -> Option<crate::range::ContentRange> {
    parse_content_range(headers.get(CONTENT_RANGE)?.to_str().ok()?)
}

fn is_encoded(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity")
}

/// The smaller of both, as a length.
fn clamp(count: u64, len: usize) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX).min(len)
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

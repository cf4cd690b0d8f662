//! A repository: what can be asked of it, over all servers that stand for its registry.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use oci::media_type::MANIFEST_TYPES;
use oci::{Descriptor, Digest, Reference};
use reqwest::header::{ACCEPT, HeaderMap, HeaderName};
use reqwest::{Method, StatusCode};
use serde::Deserialize;

use crate::error::public;
use crate::hosts::LoadHostsError;
use crate::retry::random;
use crate::transport::{Answer, Call, Exchange, Server, content_length, content_type};
use crate::{BlobStream, Capability, Client, FetchError, blob_stream};

/// A handle to one repository. Cheap to make and to clone.
///
/// # Cancellation
/// All futures may be dropped at any moment; a push may then have stored part of what it was to
/// store, which does no harm.
#[derive(Clone)]
pub struct Repository {
    pub(crate) client: Client,
    registry: Arc<str>,
    name: Arc<str>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Repository({}/{})", self.registry, self.name)
    }
}

impl Repository {
    pub(crate) fn new(client: Client, image: &Reference) -> Self {
        Self { client, registry: image.registry().into(), name: image.repository().into() }
    }

    /// Registry and path: `docker.io/library/alpine`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.name)
    }

    /// Finds out what a tag points at, without downloading it; or that a digest exists.
    ///
    /// Retried by the client's [`crate::RetryPolicy`].
    ///
    /// # Errors
    /// `NotFound` if no server has it.
    pub async fn resolve(&self, tag_or_digest: &str) -> Result<Descriptor, FetchError> {
        let capability = capability_for(tag_or_digest);
        self.retry(capability, |server| async move {
            self.exchange(&server).resolve(tag_or_digest).await
        })
        .await
    }

    /// Downloads a manifest or index, of at most 8 MiB, by tag or digest.
    ///
    /// The descriptor's digest is that of the bytes; its media type is what the registry says, or
    /// the document where the registry does not know.
    ///
    /// # Errors
    /// `WrongDigest` if the bytes are not those of the digest, on all servers.
    pub async fn manifest(&self, tag_or_digest: &str) -> Result<(Descriptor, Bytes), FetchError> {
        let capability = capability_for(tag_or_digest);
        self.retry(capability, |server| async move {
            self.exchange(&server).manifest(tag_or_digest).await
        })
        .await
    }

    /// Downloads a whole blob of at most `max` bytes and checks its digest.
    ///
    /// # Errors
    /// `TooLarge`, or `WrongDigest` if no server has the right bytes.
    pub async fn blob(&self, digest: &Digest, max: u64) -> Result<Bytes, FetchError> {
        self.retry(Capability::Pull, |server| async move {
            self.exchange(&server).blob(digest, max).await
        })
        .await
    }

    /// As [`blob`](Self::blob), for a blob of which the size is known. One of some length comes in parts over
    /// several connections: fresh ones carry little in their first round trips.
    ///
    /// # Errors
    /// As for [`blob`](Self::blob).
    pub async fn sized_blob(&self, digest: &Digest, size: u64) -> Result<Bytes, FetchError> {
        let parts = parts_of(size);
        if parts.len() > 1 && self.supports_ranges() {
            // Whatever is wrong, the plain way meets it too, and knows what to do about it.
            match self.blob_in_parts(digest, parts).await {
                Ok(bytes) if Digest::of(&bytes) == *digest => return Ok(bytes),
                Ok(_) => tracing::debug!(%digest, "the parts of a blob are not right"),
                Err(Some(error)) => {
                    tracing::debug!(%digest, %error, "a blob did not come in parts");
                }
                Err(None) => {}
            }
        }
        self.blob(digest, size).await
    }

    /// The bytes of all parts, which nobody has checked. No error is given where the server turns out to
    /// ignore ranges: each part would be a download of all that precedes it.
    async fn blob_in_parts(
        &self,
        digest: &Digest,
        parts: Vec<Range<u64>>,
    ) -> Result<Bytes, Option<FetchError>> {
        let fetch = |part: Range<u64>| async move {
            let mut stream = self.blob_stream(digest, part).await?;
            if !self.supports_ranges() {
                return Err(None);
            }
            let mut pieces = Vec::new();
            while let Some(piece) = stream.next().await? {
                pieces.push(piece);
            }
            Ok(pieces)
        };
        let parts: Vec<Vec<Bytes>> = try_join_all(parts.into_iter().map(fetch)).await?;
        Ok(parts.concat().concat().into())
    }

    /// Starts to download a range of a blob, asking each server at most once.
    ///
    /// The bytes are not checked against the digest: of a range, only the caller can know whether
    /// they are right. If they are not, see [`BlobStream::source`]. An empty range gives an empty
    /// stream without asking anybody.
    ///
    /// # Errors
    /// As of the last server, or of the registry itself if that says that there is no such blob.
    pub async fn blob_stream(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<BlobStream, FetchError> {
        if range.is_empty() {
            return Ok(BlobStream::empty());
        }
        let range = &range;
        self.over_servers(Capability::Pull, |server| async move {
            blob_stream::open(&self.exchange(&server), digest, range.clone()).await
        })
        .await
    }

    /// Opens `count` connections to the server that blobs would be asked of first, by as many requests that
    /// any registry answers. Trouble with it is left to who needs them.
    pub async fn open_connections(&self, count: usize) {
        let Ok(servers) = self.servers(Capability::Pull) else { return };
        let Some(server) = servers.first() else { return };
        let exchange = self.exchange(server);
        join_all((0..count).map(|_| exchange.greet())).await;
    }

    /// Whether the server that would be asked first gives ranges, as far as is known.
    ///
    /// If not, a range costs a download of all that precedes it, and blobs are better read once
    /// from beginning to end.
    #[must_use]
    pub fn supports_ranges(&self) -> bool {
        self.servers(Capability::Pull)
            .ok()
            .and_then(|servers| servers.first().map(|server| !server.ignores_ranges()))
            .unwrap_or(true)
    }

    pub(crate) fn exchange<'a>(&'a self, server: &'a Arc<Server>) -> Exchange<'a> {
        Exchange { client: &self.client, server, repository: &self.name }
    }

    /// The servers that may be asked, those that failed lately last.
    fn servers(&self, capability: Capability) -> Result<Vec<Arc<Server>>, FetchError> {
        let all = self.client.shared.servers(&self.registry)?;
        let able = all.iter().filter(|server| server.may(capability)).cloned();
        let (resting, ready): (Vec<_>, Vec<_>) = able.partition(|server| server.is_resting());
        let servers = [ready, resting].concat();
        if servers.is_empty() {
            let source = Box::new(LoadHostsError::NoServer(capability));
            let registry = self.registry.to_string();
            return Err(FetchError::Misconfigured { registry, source });
        }
        Ok(servers)
    }

    /// Asks one server after the other until one gives what is wanted.
    pub(crate) async fn over_servers<T, F, Fut>(
        &self,
        capability: Capability,
        ask: F,
    ) -> Result<T, FetchError>
    where
        F: Fn(Arc<Server>) -> Fut,
        Fut: Future<Output = Result<T, FetchError>>,
    {
        let mut verdict: Option<Verdict> = None;
        for server in self.servers(capability)? {
            match ask(Arc::clone(&server)).await {
                Ok(found) => {
                    server.succeeded();
                    return Ok(found);
                }
                Err(error) => {
                    server.failed(&error, self.client.shared.options.rest);
                    let next = Verdict { error, of_registry: server.is_own };
                    verdict = Some(match verdict {
                        Some(before) => before.merged(next),
                        None => next,
                    });
                }
            }
        }
        Err(verdict.expect("there is at least one server, and it has failed").error)
    }

    /// Asks all servers, and again after a while, by the client's policy.
    pub(crate) async fn retry<T, F, Fut>(
        &self,
        capability: Capability,
        ask: F,
    ) -> Result<T, FetchError>
    where
        F: Fn(Arc<Server>) -> Fut,
        Fut: Future<Output = Result<T, FetchError>>,
    {
        let mut attempt = 1;
        loop {
            let error = match self.over_servers(capability, &ask).await {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            match self.client.shared.options.retry.delay(attempt, &error, random()) {
                Some(delay) => {
                    tracing::debug!(%error, ?delay, attempt, "asking again");
                    tokio::time::sleep(delay).await;
                }
                None => return Err(error),
            }
            attempt += 1;
        }
    }
}

/// How a blob of `size` bytes is divided among connections. A very long one is not: its connection has the
/// time to gain speed, and while parts are put together they are in memory twice.
fn parts_of(size: u64) -> Vec<Range<u64>> {
    let count = match size {
        size if size > LONGEST_IN_PARTS => 1,
        size if size > LONG => PARTS_OF_A_LONG_ONE,
        size => size.div_ceil(PART).clamp(1, MOST_PARTS),
    };
    let length = size.div_ceil(count);
    (0..count).map(|part| part * length..((part + 1) * length).min(size)).collect()
}

/// The failure of several servers.
struct Verdict {
    error: FetchError,
    of_registry: bool,
}

impl Verdict {
    /// Which of two failures says more.
    ///
    /// That something does not exist counts if the registry itself says so. Otherwise a server that
    /// may come back is the better reason: it is worth waiting for.
    fn merged(self, next: Self) -> Self {
        let final_word = |v: &Self| v.of_registry && matches!(v.error, FetchError::NotFound { .. });
        if final_word(&self) || (self.error.is_transient() && !final_word(&next)) {
            return self;
        }
        next
    }
}

fn capability_for(tag_or_digest: &str) -> Capability {
    match tag_or_digest.parse::<Digest>() {
        Ok(_) => Capability::Pull,
        Err(_) => Capability::Resolve,
    }
}

impl Exchange<'_> {
    async fn resolve(&self, target: &str) -> Result<Descriptor, FetchError> {
        let call = manifest_call(Method::HEAD, self.url(&format!("manifests/{target}")));
        let answer = self.call(&call).await?;
        match answer.response.status() {
            StatusCode::OK => {
                if let Some(descriptor) = described(answer.response.headers(), target) {
                    return Ok(descriptor);
                }
            }
            // Some registries do not know HEAD, or do not say the digest.
            StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::BAD_REQUEST
            | StatusCode::NOT_ACCEPTABLE
            | StatusCode::NOT_IMPLEMENTED => {}
            _ => return Err(self.refusal(answer).await),
        }
        self.manifest(target).await.map(|(descriptor, _bytes)| descriptor)
    }

    pub(crate) async fn manifest(&self, target: &str) -> Result<(Descriptor, Bytes), FetchError> {
        let call = manifest_call(Method::GET, self.url(&format!("manifests/{target}")));
        let answer = self.ok(self.call(&call).await?).await?;
        let stated = content_type(answer.response.headers()).map(ToOwned::to_owned);
        let announced = stated_digest(answer.response.headers());
        let url = public(&answer.url);
        let bytes = self.read(answer, MAX_MANIFEST).await?;
        let found = Digest::of(&bytes);
        let expected = target.parse().ok().or(announced);
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(FetchError::WrongDigest { url, expected, found });
        }
        let media_type = match stated {
            Some(stated) if MANIFEST_TYPES.contains(&stated.as_str()) => stated,
            other => own_media_type(&bytes).or(other).unwrap_or_default(),
        };
        Ok((Descriptor::of(&media_type, &bytes), bytes))
    }

    async fn blob(&self, digest: &Digest, max: u64) -> Result<Bytes, FetchError> {
        let call = Call::new(Method::GET, self.url(&format!("blobs/{digest}")));
        let answer = self.ok(self.call(&call).await?).await?;
        let url = public(&answer.url);
        let bytes = self.read(answer, max).await?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(FetchError::WrongDigest { url, expected: *digest, found });
        }
        Ok(bytes)
    }

    /// The answer, if it is the whole of what was asked for.
    pub(crate) async fn ok(&self, answer: Answer) -> Result<Answer, FetchError> {
        match answer.response.status() {
            StatusCode::OK => Ok(answer),
            _ => Err(self.refusal(answer).await),
        }
    }
}

pub(crate) fn manifest_call<'a>(method: Method, url: reqwest::Url) -> Call<'a> {
    Call::new(method, url).header(ACCEPT, &MANIFEST_TYPES.join(", "))
}

/// What an answer to HEAD says about a manifest, if that is enough.
fn described(headers: &HeaderMap, target: &str) -> Option<Descriptor> {
    let digest = stated_digest(headers)?;
    if target.parse().is_ok_and(|asked: Digest| asked != digest) {
        return None;
    }
    let media_type = content_type(headers).filter(|stated| MANIFEST_TYPES.contains(stated))?;
    Some(Descriptor::new(media_type, digest, content_length(headers)?))
}

fn stated_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// What a document says that it is.
fn own_media_type(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Document {
        media_type: Option<String>,
    }
    serde_json::from_slice::<Document>(bytes).ok()?.media_type
}

pub(crate) const DOCKER_CONTENT_DIGEST: HeaderName =
    HeaderName::from_static("docker-content-digest");
/// What a fresh connection carries in two round trips, in bytes.
const PART: u64 = 40 << 10;
const MOST_PARTS: u64 = 4;
/// One that is longer than this, in bytes, is worth more requests.
const LONG: u64 = 8 << 20;
const PARTS_OF_A_LONG_ONE: u64 = 8;
const LONGEST_IN_PARTS: u64 = 256 << 20;

/// What distribution's own limit grants, doubled.
pub(crate) const MAX_MANIFEST: u64 = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(errors: &[(&str, bool)], expected: &str) {
        let error = |name: &str| match name {
            "none" => FetchError::NotFound { url: String::new() },
            "down" => FetchError::Stalled { url: String::new(), after: std::time::Duration::ZERO },
            _ => FetchError::Refused { url: String::new(), status: 400, code: None },
        };
        let verdicts = errors
            .iter()
            .map(|(name, of_registry)| Verdict { error: error(name), of_registry: *of_registry });
        let verdict = verdicts.reduce(Verdict::merged).unwrap();
        let expected = error(expected);
        assert_eq!(verdict.error.to_string(), expected.to_string(), "{errors:?}");
    }

    #[test]
    fn parts_are_the_whole() {
        let check = |size, expected: &[u64]| {
            let parts = parts_of(size);
            let ends: Vec<u64> = parts.iter().map(|part| part.end).collect();
            assert_eq!(ends, expected, "{size}");
            assert!(parts.first().is_some_and(|part| part.start == 0));
            assert!(parts.windows(2).all(|two| two[0].end == two[1].start));
        };
        check(0, &[0]);
        check(40_960, &[40_960]);
        check(40_961, &[20_481, 40_961]);
        check(1_000_001, &[250_001, 500_002, 750_003, 1_000_001]);
        check(8 << 20, &[2 << 20, 4 << 20, 6 << 20, 8 << 20]);
        check(80 << 20, &[10, 20, 30, 40, 50, 60, 70, 80].map(|end| end << 20));
        check((256 << 20) + 1, &[(256 << 20) + 1]);
    }

    #[test]
    fn of_several_failures_the_telling_one_is_reported() {
        check(&[("down", false), ("none", true)], "none");
        check(&[("none", true), ("down", false)], "none");
        check(&[("none", false), ("down", true)], "down");
        check(&[("down", false), ("refused", true)], "down");
        check(&[("none", false), ("refused", true)], "refused");
        check(&[("refused", false), ("down", true)], "down");
    }
}

//! One request to one server: connection, authorization, redirects, time limits, statuses.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;

use crate::auth::{Access, Age};
use crate::challenge;
use crate::client::ClientOptions;
use crate::clock::parse_http_date;
use crate::error::{UnavailableCause, public};
use crate::push::{BlobBody, Progress};
use crate::redirect::may_follow;
use crate::{Client, FetchError};

mod pools;
mod server;

pub(crate) use pools::Pools;
pub use pools::read_authorities;
pub(crate) use server::Server;

/// The dealings with one server about one repository.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exchange<'a> {
    pub(crate) client: &'a Client,
    pub(crate) server: &'a Arc<Server>,
    pub(crate) repository: &'a str,
}

/// One request.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) access: Access,
    pub(crate) body: Option<&'a BlobBody>,
}

/// What came of it, whatever the status.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response,
    /// Where the answer came from in the end.
    pub(crate) url: Url,
    /// Whether that is not the server that was asked.
    pub(crate) redirected: bool,
}

impl<'a> Call<'a> {
    pub(crate) fn new(method: Method, url: Url) -> Self {
        Self { method, url, headers: HeaderMap::new(), access: Access::Pull, body: None }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        // All values are made here, of visible characters, or were headers before.
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.append(name, value);
        }
        self
    }

    pub(crate) const fn pushing(mut self, body: Option<&'a BlobBody>) -> Self {
        self.access = Access::Push;
        self.body = body;
        self
    }
}

impl Exchange<'_> {
    pub(crate) fn options(&self) -> &ClientOptions {
        &self.client.shared.options
    }

    /// The URL of `path` in the repository.
    pub(crate) fn url(&self, path: &str) -> Url {
        let mut url = self.server.host.url(&format!("{}/{path}", self.repository));
        if self.server.needs_namespace() {
            url.query_pairs_mut().append_pair("ns", &self.server.registry);
        }
        url
    }

    /// Whether a URL belongs to the server itself, so that it may see credentials.
    pub(crate) fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.server.host.base.origin()
    }

    /// Sends a request and answers challenges, with one credentials after the other. Any status is
    /// returned that is not, or cannot be, answered.
    pub(crate) async fn call(&self, call: &Call<'_>) -> Result<Answer, FetchError> {
        let mut used = self.authorization(call.access).await;
        let mut refused = Vec::new();
        let mut attempt = 0;
        loop {
            let answer = self.follow(call, used.as_ref()).await?;
            if answer.redirected || !self.is_own(&call.url) || attempt == MAX_CHALLENGES {
                return Ok(answer);
            }
            let fresh = match answer.response.status() {
                StatusCode::UNAUTHORIZED => {
                    let headers = answer.response.headers().get_all(WWW_AUTHENTICATE);
                    let challenge =
                        challenge::choose(headers.iter().filter_map(|v| v.to_str().ok()));
                    let age = if attempt == 0 { Age::Unknown } else { Age::New };
                    let used = used.as_ref().map(|used| (used, age));
                    self.answer_challenge(call.access, challenge, used, &mut refused).await?
                }
                // Amazon's registry says so of a password that has expired.
                StatusCode::FORBIDDEN => {
                    self.changed_authorization(call.access, used.as_ref(), &mut refused).await
                }
                _ => None,
            };
            match fresh {
                Some(fresh) => used = Some(fresh),
                None => return Ok(answer),
            }
            attempt += 1;
        }
    }

    /// Sends a request and follows redirects, which see neither credentials nor our headers.
    async fn follow(
        &self,
        call: &Call<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, FetchError> {
        let mut url = call.url.clone();
        for _hop in 0..=MAX_REDIRECTS {
            let own = self.is_own(&url);
            let response = self.send(call, &url, authorization).await?;
            let reads = matches!(call.method, Method::GET | Method::HEAD);
            if !reads || !is_redirect(response.status()) {
                return Ok(Answer { response, redirected: !own, url });
            }
            let next = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let malformed = |what| FetchError::Malformed { url: public(&url), what };
            let next = next.ok_or_else(|| malformed("a redirect without a place to go to"))?;
            let next = url.join(next).map_err(|_not_a_url| malformed("a redirect to no URL"))?;
            if !may_follow(&url, &next) {
                return Err(malformed("a redirect from TLS to a plain connection, or elsewhere"));
            }
            tracing::trace!(from = public(&url), to = public(&next), "redirected");
            url = next;
        }
        Err(FetchError::Malformed { url: public(&call.url), what: "too many redirects" })
    }

    /// Sends a request once, without following redirects.
    pub(crate) async fn send(
        &self,
        call: &Call<'_>,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, FetchError> {
        let own = self.is_own(url);
        let client = self.pool(own)?;
        let mut headers = call.headers.clone();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if own {
            headers.extend(self.server.host.headers.iter().cloned());
            if let Some(authorization) = authorization {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
        }
        let mut request = reqwest::Request::new(call.method.clone(), url.clone());
        *request.headers_mut() = headers;
        let progress = Progress::new(self.options());
        if let Some(body) = call.body {
            request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(body.size()));
            *request.body_mut() = Some(body.open(&progress).await?);
        }
        tracing::trace!(method = %call.method, url = public(url), "asking");
        progress.watch(url, client.execute(request)).await
    }

    /// Asks for the root of the API, whatever the answer, and leaves the connection open.
    pub(crate) async fn greet(&self) {
        let mut url = self.server.host.base.clone();
        url.set_path(&format!("{}/", url.path()));
        if let Ok(response) = self.send(&Call::new(Method::GET, url.clone()), &url, None).await {
            read_body(response, &url, MAX_GREETING, self.options().stall_timeout).await.ok();
        }
    }

    /// The connections to the server itself, or those to where it sends us.
    pub(crate) fn pool(&self, own: bool) -> Result<reqwest::Client, FetchError> {
        let pools = &self.client.shared.pools;
        pools.client(&self.server.host, own, self.options()).map_err(|source| {
            let registry = self.server.registry.clone();
            FetchError::Misconfigured { registry, source: Box::new(source) }
        })
    }

    /// What an answer that is not the wanted one means.
    pub(crate) async fn refusal(&self, mut answer: Answer) -> FetchError {
        let status = answer.response.status();
        let url = public(&answer.url);
        let retry_after = retry_after(answer.response.headers(), SystemTime::now());
        match status.as_u16() {
            404 | 410 => FetchError::NotFound { url },
            429 => FetchError::TooManyRequests { url, retry_after },
            401 | 403 if !answer.redirected => self.denied(url).await,
            408 | 500 | 502..=504 | 506..=599 => {
                let source = UnavailableCause::Status(status.as_u16());
                FetchError::Unavailable { url, retry_after, source }
            }
            // Storage that refuses a fresh signed URL has a trouble of its own, such as its clock.
            code if answer.redirected => {
                let source = UnavailableCause::Status(code);
                FetchError::Unavailable { url, retry_after, source }
            }
            status => {
                let code = error_code(&mut answer.response).await;
                FetchError::Refused { url, status, code }
            }
        }
    }

    /// Reads a whole body of at most `limit` bytes.
    pub(crate) async fn read(&self, answer: Answer, limit: u64) -> Result<Bytes, FetchError> {
        read_body(answer.response, &answer.url, limit, self.options().stall_timeout).await
    }
}

/// Reads a whole body of at most `limit` bytes; memory grows only with what has come.
pub(crate) async fn read_body(
    mut response: Response,
    url: &Url,
    limit: u64,
    stall_timeout: Duration,
) -> Result<Bytes, FetchError> {
    let too_large = || FetchError::TooLarge { url: public(url), limit };
    let announced = content_length(response.headers());
    if announced.is_some_and(|len| len > limit) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    let mut got = 0;
    loop {
        match next_chunk(&mut response, url, stall_timeout).await? {
            Chunk::Bytes(chunk) => {
                got += u64::try_from(chunk.len()).unwrap_or(u64::MAX);
                if got > limit {
                    return Err(too_large());
                }
                body.extend_from_slice(&chunk);
            }
            Chunk::End => return Ok(body.freeze()),
            Chunk::Broken(error) => {
                tracing::debug!(url = public(url), %error, "the answer broke off");
                let want = announced.unwrap_or(limit);
                return Err(FetchError::Truncated { url: public(url), got, want });
            }
        }
    }
}

/// What comes next of a body.
pub(crate) enum Chunk {
    Bytes(Bytes),
    End,
    /// The connection broke before the end.
    Broken(reqwest::Error),
}

/// Waits for the next bytes of a body, but not for ever.
pub(crate) async fn next_chunk(
    response: &mut Response,
    url: &Url,
    stall_timeout: Duration,
) -> Result<Chunk, FetchError> {
    match tokio::time::timeout(stall_timeout, response.chunk()).await {
        Ok(Ok(Some(chunk))) => Ok(Chunk::Bytes(chunk)),
        Ok(Ok(None)) => Ok(Chunk::End),
        Ok(Err(error)) => Ok(Chunk::Broken(error.without_url())),
        Err(_elapsed) => Err(FetchError::Stalled { url: public(url), after: stall_timeout }),
    }
}

/// The length that an answer announces. For an answer to HEAD the body's own length would be 0.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The media type of an answer, without parameters.
pub(crate) fn content_type(headers: &HeaderMap) -> Option<&str> {
    Some(oci::media_type::essence(headers.get(CONTENT_TYPE)?.to_str().ok()?))
}

const fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_not_seconds) => parse_http_date(value)?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

/// The registry's error code. Its message is not taken: it may repeat what was sent.
async fn error_code(response: &mut Response) -> Option<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        code: String,
    }
    let read = async {
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = response.chunk().await {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ERROR_BODY {
                break;
            }
        }
        body
    };
    let body = tokio::time::timeout(ERROR_BODY_TIMEOUT, read).await.ok()?;
    let code = serde_json::from_slice::<Errors>(&body).ok()?.errors.into_iter().next()?.code;
    let fit = code.len() <= 64 && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    fit.then_some(code)
}

/// Credentials are tried one after the other, and a source must not be able to go on for ever.
const MAX_CHALLENGES: u32 = 8;
const MAX_REDIRECTS: u32 = 5;
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);
/// What a registry may answer to a greeting.
const MAX_GREETING: u64 = 16 << 10;

const MAX_ERROR_BODY: usize = 16 << 10;
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        for (value, expected) in [
            ("3", Some(3)),
            (" 0 ", Some(0)),
            ("Wed, 21 Oct 2015 07:28:30 GMT", Some(30)),
            ("Wed, 21 Oct 2015 07:27:30 GMT", Some(0)),
            ("18446744073709551615", Some(86_400)),
            ("-1", None),
            ("soon", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]);
            let expected = expected.map(Duration::from_secs);
            assert_eq!(retry_after(&headers, now), expected, "{value}");
        }
    }
}

//! Answers before they are sent.

use std::io;

use http::StatusCode;
use http::header::{
    ACCEPT_RANGES, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IntoHeaderName, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use oci::Digest;

use super::faults::Instead;
use super::store::Blob;

/// A status, headers and what the body is read from.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) content: Content,
}

/// A part of a blob.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) blob: Blob,
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Content {
    pub(super) fn whole(blob: Blob) -> Self {
        let end = blob.len();
        Self { blob, start: 0, end }
    }
}

/// Why a request was not answered as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfinished {
    /// The client is gone, or sends nonsense: there is nobody to answer.
    #[error("reading the request")]
    Client(#[from] hyper::Error),
    /// The registry's disk.
    #[error("storing what was sent")]
    Io(#[from] io::Error),
}

impl Unfinished {
    pub(super) fn answer(self) -> io::Result<Answer> {
        match self {
            Self::Client(err) => Err(io::Error::other(err)),
            Self::Io(_) => Ok(Answer::error(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN")),
        }
    }
}

impl Answer {
    pub(super) fn empty(status: StatusCode) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("docker-distribution-api-version", HeaderValue::from_static("registry/2.0"));
        let content = Content { blob: Blob::Memory(bytes::Bytes::new()), start: 0, end: 0 };
        Self { status, headers, content }
    }

    /// Adds a header. Values that cannot be one, which only hostile requests can bring in, are left out.
    pub(super) fn with(mut self, name: impl IntoHeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(super) fn json(document: &serde_json::Value) -> Self {
        let bytes = document.to_string().into_bytes();
        let mut answer = Self::empty(StatusCode::OK).with(CONTENT_TYPE, "application/json");
        answer.content = Content::whole(Blob::Memory(bytes.into()));
        answer
    }

    /// An error document of the distribution API.
    pub(super) fn error(status: StatusCode, code: &str) -> Self {
        let message = status.canonical_reason().unwrap_or("failed");
        let document = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
        Self { status, ..Self::json(&document) }
    }

    pub(super) fn not_found(code: &str) -> Self {
        Self::error(StatusCode::NOT_FOUND, code)
    }

    pub(super) fn unauthorized(challenge: &str) -> Self {
        Self::error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED").with(WWW_AUTHENTICATE, challenge)
    }

    pub(super) fn deleted(deleted: bool, unknown: &str) -> Self {
        if deleted { Self::empty(StatusCode::ACCEPTED) } else { Self::not_found(unknown) }
    }

    pub(super) fn blob(status: StatusCode, digest: Digest, content: Content) -> Self {
        let answer = Self::empty(status)
            .with(CONTENT_TYPE, "application/octet-stream")
            .with(ACCEPT_RANGES, "bytes")
            .with(ETAG, &format!("\"{digest}\""))
            .with(DIGEST_HEADER, &digest.to_string());
        Self { content, ..answer }
    }

    pub(super) fn manifest(digest: Digest, media_type: &str, content: Content) -> Self {
        let answer = Self::empty(StatusCode::OK)
            .with(CONTENT_TYPE, media_type)
            .with(ETAG, &format!("\"{digest}\""))
            .with(DIGEST_HEADER, &digest.to_string());
        Self { content, ..answer }
    }

    /// What a fault answers.
    pub(super) fn instead(instead: Instead) -> Self {
        match instead {
            Instead::TooManyRequests(retry_after) => {
                let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
                Self::error(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS")
                    .with(RETRY_AFTER, &seconds.to_string())
            }
            Instead::Status(status) => {
                let status =
                    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                Self::error(status, "UNKNOWN")
            }
            Instead::NotFound | Instead::Reset => Self::not_found("BLOB_UNKNOWN"),
        }
    }
}

/// The header that names what an answer is about.
pub(super) const DIGEST_HEADER: &str = "docker-content-digest";

//! Why a registry did not give what it was asked for.

use std::fmt;
use std::io;
use std::ops::Range;
use std::time::Duration;

use oci::Digest;
use reqwest::Url;

use crate::credentials::CredentialsError;
use crate::hosts::LoadHostsError;

/// A request that failed, over all mirrors.
///
/// The variants are what callers treat differently. URLs carry no query and no user; no variant
/// carries a credential.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The registry does not have it.
    #[error("{url} does not exist")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// The registry wants other credentials, or any.
    #[error("access to {url} was denied")]
    Unauthorized {
        /// What was asked for.
        url: String,
        /// Why, as far as is known.
        source: UnauthorizedCause,
    },
    /// The registry limits the rate.
    #[error("{url}: the registry limits the rate of requests{}", after(*retry_after))]
    TooManyRequests {
        /// What was asked for.
        url: String,
        /// When the registry wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The registry could not be reached, or has trouble of its own. May pass.
    #[error("{url} is not available{}", after(*retry_after))]
    Unavailable {
        /// What was asked for.
        url: String,
        /// When the registry wants to be asked again.
        retry_after: Option<Duration>,
        /// What happened.
        source: UnavailableCause,
    },
    /// No byte came for too long. May pass.
    #[error("{url}: no byte came for {after:?}")]
    Stalled {
        /// What was asked for.
        url: String,
        /// How long it was waited.
        after: Duration,
    },
    /// The answer ended early. May pass.
    #[error("{url}: the answer ended after {got} of {want} bytes")]
    Truncated {
        /// What was asked for.
        url: String,
        /// How many bytes of what was asked for came.
        got: u64,
        /// How many were asked for.
        want: u64,
    },
    /// The bytes are not those that were asked for.
    #[error("{url}: the content has the digest {found}, not {expected}")]
    WrongDigest {
        /// What was asked for.
        url: String,
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// The blob does not reach that far.
    #[error("{url}: the bytes {} to {} are not in it{}", range.start, range.end, sized(*size))]
    RangeNotSatisfiable {
        /// What was asked for.
        url: String,
        /// The range that was asked for.
        range: Range<u64>,
        /// The size of the blob, if the registry said.
        size: Option<u64>,
    },
    /// It is larger than the caller allowed.
    #[error("{url} is larger than {limit} bytes")]
    TooLarge {
        /// What was asked for.
        url: String,
        /// What the caller allowed, in bytes.
        limit: u64,
    },
    /// The registry refuses the request as such; the same request would fail again.
    #[error("{url}: the registry refused with status {status}{}", coded(code.as_deref()))]
    Refused {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The registry's error code, such as `MANIFEST_INVALID`.
        code: Option<String>,
    },
    /// The answer breaks the protocol.
    #[error("{url}: the answer breaks the protocol: {what}")]
    Malformed {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The hosts configuration, or a certificate that it names, cannot be used.
    #[error("cannot use the registry configuration of {registry}")]
    Misconfigured {
        /// The registry's name.
        registry: String,
        /// What is wrong with it.
        source: Box<LoadHostsError>,
    },
    /// A local file that was to be sent, or stands for a registry, cannot be read.
    #[error("reading a local file")]
    File(#[source] io::Error),
}

/// What is known about a denied access.
#[derive(Debug, thiserror::Error)]
pub enum UnauthorizedCause {
    /// Anonymous access does not do.
    #[error("no credentials for {0} are configured; add some, or check the image's name")]
    NoCredentials(String),
    /// The credentials do not do.
    #[error("the credentials for {0} were not accepted; they may be expired or lack the right")]
    NotAccepted(String),
    /// The registry asks for a scheme that is not known here.
    #[error("{0} asks for neither Basic nor Bearer authentication")]
    UnknownChallenge(String),
    /// Credentials would travel in the clear.
    #[error(
        "the token service {0} has no TLS; to trust it, list its host among those with plain HTTP"
    )]
    InsecureTokenService(String),
    /// The source of the credentials failed.
    #[error("the credentials could not be had")]
    Credentials(#[from] CredentialsError),
}

/// What makes a registry unavailable.
#[derive(Debug, thiserror::Error)]
pub enum UnavailableCause {
    /// It says so.
    #[error("the server answered with status {0}")]
    Status(u16),
    /// It cannot be reached, or the connection broke.
    #[error("the connection failed")]
    Transport(#[source] reqwest::Error),
}

impl FetchError {
    /// A local file that stands where a registry could have stood cannot be read.
    #[must_use]
    pub const fn file(source: io::Error) -> Self {
        Self::File(source)
    }

    /// Whether the same request may succeed later without anybody doing anything.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::TooManyRequests { .. }
            | Self::Unavailable { .. }
            | Self::Stalled { .. }
            | Self::Truncated { .. } => true,
            Self::NotFound { .. }
            | Self::Unauthorized { .. }
            | Self::WrongDigest { .. }
            | Self::RangeNotSatisfiable { .. }
            | Self::TooLarge { .. }
            | Self::Refused { .. }
            | Self::Malformed { .. }
            | Self::Misconfigured { .. }
            | Self::File(_) => false,
        }
    }

    /// How long the registry wants to be left alone, if it said.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::TooManyRequests { retry_after, .. } | Self::Unavailable { retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }

    /// Whether the server that gave this answer should be spared for a while.
    pub(crate) const fn blames_server(&self) -> bool {
        match self {
            Self::TooManyRequests { .. }
            | Self::Unavailable { .. }
            | Self::Stalled { .. }
            | Self::Truncated { .. }
            | Self::WrongDigest { .. }
            | Self::Unauthorized { .. }
            | Self::Refused { .. }
            | Self::Malformed { .. } => true,
            Self::NotFound { .. }
            | Self::RangeNotSatisfiable { .. }
            | Self::TooLarge { .. }
            | Self::Misconfigured { .. }
            | Self::File(_) => false,
        }
    }

    /// A transport error of reqwest, which would show the URL with its query.
    pub(crate) fn transport(url: &Url, source: reqwest::Error) -> Self {
        let source = UnavailableCause::Transport(source.without_url());
        Self::Unavailable { url: public(url), retry_after: None, source }
    }
}

/// A URL fit to be shown: without user, password, query and fragment.
pub(crate) fn public(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{}://{host}:{port}{}", url.scheme(), url.path()),
        None => format!("{}://{host}{}", url.scheme(), url.path()),
    }
}

fn after(retry_after: Option<Duration>) -> impl fmt::Display {
    fmt::from_fn(move |f| match retry_after {
        Some(wait) => write!(f, "; it wants to be asked again after {wait:?}"),
        None => Ok(()),
    })
}

fn sized(size: Option<u64>) -> impl fmt::Display {
    fmt::from_fn(move |f| match size {
        Some(size) => write!(f, ", which has {size} bytes"),
        None => Ok(()),
    })
}

fn coded(code: Option<&str>) -> impl fmt::Display {
    fmt::from_fn(move |f| match code {
        Some(code) => write!(f, " ({code})"),
        None => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_url_has_no_secrets() {
        let url = Url::parse("https://u:p@h.io:8443/v2/a?X-Amz-Signature=s#f").unwrap();
        assert_eq!(public(&url), "https://h.io:8443/v2/a");
        let url = Url::parse("https://[::1]/v2/").unwrap();
        assert_eq!(public(&url), "https://[::1]/v2/");
    }

    #[test]
    fn errors_say_what_was_asked_for() {
        let url = "https://h.io/v2/a".to_owned();
        let retry_after = Some(Duration::from_secs(3));
        let error = FetchError::TooManyRequests { url: url.clone(), retry_after };
        assert!(error.is_transient());
        assert_eq!(error.retry_after(), retry_after);
        assert!(error.to_string().ends_with("asked again after 3s"), "{error}");
        let error = FetchError::Refused { url, status: 400, code: Some("NAME_INVALID".to_owned()) };
        assert!(!error.is_transient());
        assert!(error.to_string().ends_with("status 400 (NAME_INVALID)"), "{error}");
    }
}

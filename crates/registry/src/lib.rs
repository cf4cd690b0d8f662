//! The OCI distribution protocol over HTTP: authentication, mirrors, ranges, referrers, push.
//!
//! A [`Client`] is shared by the whole process; a [`Repository`] is a cheap handle to one
//! repository in it. Nothing is written to disk; read are only the `hosts.toml` folders,
//! certificates and configurations of credentials that the caller names.
//!
//! Requests are HTTP/1.1 on a pool of connections: with HTTP/2 all ranges of a layer would share one
//! connection and its window.
#![forbid(unsafe_code)]

mod auth;
mod blob_stream;
mod challenge;
mod client;
mod clock;
mod credentials;
mod error;
pub mod hosts;
mod push;
mod range;
mod redirect;
mod referrers;
mod repository;
mod retry;
mod secret;
mod transport;

pub use blob_stream::{BlobStream, Source};
pub use client::{Client, ClientOptions};
pub use credentials::{
    Anonymous, CacheKey, Chain, CredentialSource, Credentials, CredentialsError, DockerConfig,
    DockerConfigFile, Given, GivenCredentials, HelperProblem, KubeletPlugins, MalformedAnswer,
    MalformedDockerConfig, MalformedPluginConfig, MalformedPullAuth, Plugin, PluginAnswer,
    PluginConfig, PullAuth, StaticCredentials, Wanted,
};
pub use error::{FetchError, UnauthorizedCause, UnavailableCause};
pub use hosts::{Capability, Host};
pub use push::BlobBody;
pub use repository::Repository;
pub use retry::RetryPolicy;
pub use secret::Secret;
pub use transport::read_authorities;

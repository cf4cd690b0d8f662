//! Where credentials come from.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::Secret;

mod chain;
mod docker_config;
mod given;
mod kubelet_plugins;
mod program;

pub use chain::Chain;
pub use docker_config::{DockerConfig, DockerConfigFile, MalformedDockerConfig};
pub use given::{Given, GivenCredentials, MalformedPullAuth, PullAuth};
pub use kubelet_plugins::{
    CacheKey, KubeletPlugins, MalformedAnswer, MalformedPluginConfig, Plugin, PluginAnswer,
    PluginConfig,
};

/// Docker Hub has one name here, whatever a configuration calls it.
fn one_hub(host: &str) -> &str {
    if matches!(host, "index.docker.io" | "registry-1.docker.io") { DOCKER_HUB } else { host }
}

const DOCKER_HUB: &str = "docker.io";

/// What a server accepts as proof of who is asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User and password.
    Basic {
        /// The user.
        username: String,
        /// The password, or a token that stands in its place.
        password: Secret,
    },
    /// A refresh token, which the token service takes in place of user and password.
    IdentityToken(Secret),
    /// A bearer token, used as it is.
    RegistryToken(Secret),
}

/// What credentials are wanted for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The server that will see them: host and port; `docker.io` for Docker Hub.
    pub server: &'a str,
    /// The registry of the image's name, which is not the server if that is a mirror.
    pub registry: &'a str,
    /// The path of the repository.
    pub repository: &'a str,
    /// What the server has just refused: others are wanted.
    pub refused: &'a [Credentials],
}

impl Wanted<'_> {
    /// These credentials, if the server did not refuse just them.
    #[must_use]
    pub fn unless_refused(&self, credentials: Credentials) -> Option<Credentials> {
        (!self.refused.contains(&credentials)).then_some(credentials)
    }
}

/// Finds credentials.
///
/// Asked when a server demands authentication, each time a token has expired, and again when the
/// server refuses what was given, so that an implementation can give newer ones.
pub trait CredentialSource: fmt::Debug + Send + Sync {
    /// The credentials to try next, or `None` for anonymous access.
    ///
    /// # Cancellation
    /// The future may be dropped at any moment.
    fn credentials<'a>(
        &'a self,
        wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>>;
}

/// Credentials that should be there and cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The configuration cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The configuration is not what it should be. Nothing of it is shown.
    #[error("{} is not a Docker configuration (line {line})", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
    },
    /// The configuration of plugins is not what it should be. Nothing of it but names is shown.
    #[error("{} is not a configuration of credential plugins", path.display())]
    MalformedPlugins {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: MalformedPluginConfig,
    },
    /// The credential helper, or plugin, cannot be run, or failed.
    #[error("running the credential helper `{}`: {problem}", helper.escape_debug())]
    Helper {
        /// The helper's program.
        helper: String,
        /// What happened.
        problem: HelperProblem,
    },
}

/// What can go wrong with a credential helper.
#[derive(Debug, thiserror::Error)]
pub enum HelperProblem {
    /// Its name would be a path.
    #[error("its name is not that of a program")]
    Name,
    /// It cannot be started or talked to.
    #[error("{0}")]
    Run(io::Error),
    /// It takes too long.
    #[error("it did not answer within {0:?}")]
    Timeout(Duration),
    /// Its answer is too long.
    #[error("its answer does not end")]
    TooMuch,
    /// It says that it failed.
    #[error("it ended with status {0}")]
    Status(i32),
    /// It was killed.
    #[error("it was killed")]
    Killed,
    /// Its answer is not what it should be. Nothing of it is shown.
    #[error("its answer is malformed")]
    Answer,
}

/// No credentials for anything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Anonymous;

impl CredentialSource for Anonymous {
    fn credentials<'a>(
        &'a self,
        _wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

/// The same credentials for one server, and none for others.
#[derive(Debug, Clone)]
pub struct StaticCredentials {
    server: String,
    credentials: Credentials,
}

impl StaticCredentials {
    /// Credentials for `server`: host and port, `docker.io` for Docker Hub.
    #[must_use]
    pub fn new(server: impl Into<String>, credentials: Credentials) -> Self {
        Self { server: server.into(), credentials }
    }
}

impl CredentialSource for StaticCredentials {
    fn credentials<'a>(
        &'a self,
        wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>> {
        let found = (wanted.server == self.server).then(|| self.credentials.clone());
        let found = found.and_then(|found| wanted.unless_refused(found));
        Box::pin(std::future::ready(Ok(found)))
    }
}

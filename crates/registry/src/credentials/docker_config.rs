//! Docker's `config.json`, with credential helpers. Kubernetes' pull secrets have the same form.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use futures_util::future::BoxFuture;
use serde::Deserialize;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::{
    CredentialSource, Credentials, CredentialsError, DOCKER_HUB, HelperProblem, Wanted, one_hub,
    program,
};
use crate::Secret;

/// Credentials from a `config.json`, read anew each time they are needed.
///
/// A missing file means anonymous access. The order is Docker's: `credHelpers`, `credsStore`, then
/// `auths`, whose keys may have Kubernetes' wildcards and paths.
#[derive(Debug, Clone)]
pub struct DockerConfig {
    path: PathBuf,
    helper_time_limit: Duration,
}

/// What a `config.json` says.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct DockerConfigFile {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

/// Bytes that are no `config.json`. Nothing of them is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not a Docker configuration (line {line})")]
pub struct MalformedDockerConfig {
    /// Where, from 1.
    pub line: usize,
}

#[derive(Deserialize, Default)]
struct AuthEntry {
    auth: Option<Secret>,
    username: Option<String>,
    password: Option<Secret>,
    identitytoken: Option<Secret>,
    registrytoken: Option<Secret>,
}

/// What a helper prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    secret: Secret,
}

impl DockerConfig {
    /// The configuration at `path`; a helper gets ten seconds.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), helper_time_limit: Duration::from_secs(10) }
    }

    /// Gives helpers another time limit.
    #[must_use]
    pub const fn with_helper_time_limit(mut self, limit: Duration) -> Self {
        self.helper_time_limit = limit;
        self
    }

    async fn find(&self, wanted: Wanted<'_>) -> Result<Option<Credentials>, CredentialsError> {
        let config = self.read().await?;
        let Wanted { server, repository, .. } = wanted;
        if let Some(helper) = config.helper(server)
            && let Some(credentials) = self.ask_helper(helper, server).await?
        {
            return Ok(wanted.unless_refused(credentials));
        }
        let stored = config.stored(server, repository);
        let stored = stored.map_err(|malformed| self.malformed(malformed))?;
        Ok(stored.and_then(|credentials| wanted.unless_refused(credentials)))
    }

    fn malformed(&self, malformed: MalformedDockerConfig) -> CredentialsError {
        CredentialsError::Malformed { path: self.path.clone(), line: malformed.line }
    }

    async fn read(&self) -> Result<DockerConfigFile, CredentialsError> {
        let failed = |source| CredentialsError::Read { path: self.path.clone(), source };
        let file = match tokio::fs::File::open(&self.path).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(DockerConfigFile::default());
            }
            Err(source) => return Err(failed(source)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes).await.map_err(failed)?;
        DockerConfigFile::parse(&bytes).map_err(|malformed| self.malformed(malformed))
    }

    async fn ask_helper(
        &self,
        name: &str,
        server: &str,
    ) -> Result<Option<Credentials>, CredentialsError> {
        let helper = format!("docker-credential-{name}");
        let asked = match name.is_empty() || name.contains(['/', '\0']) {
            true => Err(HelperProblem::Name),
            false => run_helper(&helper, server, self.helper_time_limit).await,
        };
        asked.map_err(|problem| CredentialsError::Helper { helper, problem })
    }
}

impl CredentialSource for DockerConfig {
    fn credentials<'a>(
        &'a self,
        wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>> {
        Box::pin(self.find(wanted))
    }
}

impl DockerConfigFile {
    /// Reads a configuration; what it says beside credentials is left out.
    ///
    /// # Errors
    /// The bytes are not JSON of the right shape.
    pub fn parse(bytes: &[u8]) -> Result<Self, MalformedDockerConfig> {
        // serde_json's own message would show the value.
        serde_json::from_slice(bytes)
            .map_err(|error| MalformedDockerConfig { line: error.line().max(1) })
    }

    /// The name of the helper that is to be asked for `server` first.
    #[must_use]
    pub fn helper(&self, server: &str) -> Option<&str> {
        let own = self.cred_helpers.iter().find(|(key, _)| match_len(key, server, "").is_some());
        let store = self.creds_store.as_ref().filter(|store| !store.is_empty());
        own.map(|(_, name)| name).or(store).map(String::as_str)
    }

    /// The credentials in the file itself for `repository` at `server`, whose key fits best.
    ///
    /// # Errors
    /// The entry is malformed.
    pub fn stored(
        &self,
        server: &str,
        repository: &str,
    ) -> Result<Option<Credentials>, MalformedDockerConfig> {
        let fitting = self
            .auths
            .iter()
            .filter_map(|(key, entry)| Some((match_len(key, server, repository)?, entry)));
        match fitting.max_by_key(|(len, _)| *len) {
            Some((_, entry)) => entry.credentials().ok_or(MalformedDockerConfig { line: 1 }),
            None => Ok(None),
        }
    }
}

impl fmt::Debug for DockerConfigFile {
    /// Without what may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DockerConfigFile")
            .field("auths", &self.auths.keys())
            .field("cred_helpers", &self.cred_helpers)
            .field("creds_store", &self.creds_store)
            .finish()
    }
}

impl AuthEntry {
    /// `Some(None)` if the entry is there but empty, `None` if it is malformed.
    fn credentials(&self) -> Option<Option<Credentials>> {
        let given =
            |secret: &Option<Secret>| secret.clone().filter(|secret| !secret.expose().is_empty());
        if let Some(token) = given(&self.identitytoken) {
            return Some(Some(Credentials::IdentityToken(token)));
        }
        if let Some(token) = given(&self.registrytoken) {
            return Some(Some(Credentials::RegistryToken(token)));
        }
        if let Some(auth) = given(&self.auth) {
            let text = auth.expose().trim_end();
            let decoded = STANDARD.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text)).ok()?;
            let decoded = String::from_utf8(decoded).ok()?;
            let (username, password) = decoded.split_once(':')?;
            // Docker pads the password with zero bytes.
            let password = Secret::new(password.trim_end_matches('\0'));
            return Some(Some(Credentials::Basic { username: username.to_owned(), password }));
        }
        let username = self.username.clone().filter(|username| !username.is_empty());
        Some(
            username
                .zip(given(&self.password))
                .map(|(username, password)| Credentials::Basic { username, password }),
        )
    }
}

async fn run_helper(
    helper: &str,
    server: &str,
    limit: Duration,
) -> Result<Option<Credentials>, HelperProblem> {
    let asked = if server == DOCKER_HUB { DOCKER_HUB_KEY } else { server };
    let said = program::run(Command::new(helper).arg("get"), asked.as_bytes(), limit).await?;
    if !said.status.success()
        && String::from_utf8_lossy(&said.output).contains("credentials not found")
    {
        return Ok(None);
    }
    let answer = said.success()?;
    let answer: HelperAnswer =
        serde_json::from_slice(&answer).map_err(|_would_show_the_secret| HelperProblem::Answer)?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Credentials::IdentityToken(answer.secret),
        _ => Credentials::Basic { username: answer.username, password: answer.secret },
    }))
}

/// How well a key of `auths` fits: the length of its path, or `None` if it does not.
///
/// The host part may have `*` within a label, as in Kubernetes' pull secrets; the path must be a
/// prefix of the repository's at a component's end.
fn match_len(key: &str, server: &str, repository: &str) -> Option<usize> {
    let key = key.trim_start_matches("https://").trim_start_matches("http://");
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let path = path.trim_end_matches('/');
    let path = if matches!(path, "v1" | "v2") { "" } else { path };
    let host = one_hub(host);
    let path_fits = path.is_empty()
        || repository
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    (host_matches(host, server) && path_fits).then_some(path.len())
}

fn host_matches(pattern: &str, server: &str) -> bool {
    let (pattern_host, pattern_port) = split_port(pattern);
    let (host, port) = split_port(server);
    let (pattern_labels, labels) = (pattern_host.split('.'), host.split('.'));
    pattern_port == port
        && pattern_labels.clone().count() == labels.clone().count()
        && pattern_labels.zip(labels).all(|(pattern, label)| label_matches(pattern, label))
}

fn split_port(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, port),
        _ => (authority, ""),
    }
}

/// Matches one label, in which `*` stands for any characters.
fn label_matches(pattern: &str, label: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern.eq_ignore_ascii_case(label);
    };
    let Some(mut label) = label.strip_prefix(first) else {
        return false;
    };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return label.ends_with(part);
        }
        match label.find(part) {
            Some(at) => label = &label[at + part.len()..],
            None => return false,
        }
    }
    true
}

/// What Docker Hub is called in configurations, for historical reasons.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
const MAX_BYTES: u64 = 4 << 20;

#[cfg(test)]
mod tests;

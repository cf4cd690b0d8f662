//! Credentials that came with the pull of an image, in memory.

use std::collections::VecDeque;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::BoxFuture;
use oci::Reference;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{CredentialSource, Credentials, CredentialsError, Wanted, one_hub};
use crate::Secret;

/// What a kubelet sends with a pull: the `AuthConfig` of its container runtime interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullAuth {
    /// The user.
    pub username: String,
    /// The user's password.
    pub password: Secret,
    /// User and password in base64, with a colon between them.
    pub auth: Secret,
    /// The only server that may see the rest, as a URL or a host; empty for all that the image is
    /// pulled from.
    pub server_address: String,
    /// A refresh token.
    pub identity_token: Secret,
}

/// Credentials with the server they are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// `None` for every server of the image.
    server: Option<String>,
    credentials: Credentials,
}

/// A pull's credentials that cannot be understood. Nothing of them is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the credentials of a pull are malformed")]
pub struct MalformedPullAuth;

/// The credentials that images were pulled with, for the fetches to come.
///
/// Kept by repository, the newest first: those of a pull that goes wrong must not take the place of those
/// that others have. How many there are is bounded, and the repository goes first that was pulled longest
/// ago.
#[derive(Debug)]
pub struct GivenCredentials {
    /// The newest first.
    repositories: Mutex<VecDeque<Known>>,
    most_repositories: usize,
    most_bytes: usize,
}

#[derive(Clone)]
struct Known {
    registry: String,
    repository: String,
    given: Vec<Given>,
}

impl PullAuth {
    /// What containerd would take of it: a password, else a refresh token, else what is in `auth`. Nothing
    /// of all that is anonymous access.
    ///
    /// # Errors
    /// If `auth` would be taken and is no user and password.
    pub fn given(&self) -> Result<Option<Given>, MalformedPullAuth> {
        let credentials = if !self.username.is_empty() {
            let (username, password) = (self.username.clone(), self.password.clone());
            Credentials::Basic { username, password }
        } else if !self.identity_token.expose().is_empty() {
            Credentials::IdentityToken(self.identity_token.clone())
        } else if !self.auth.expose().is_empty() {
            let decoded = STANDARD.decode(self.auth.expose());
            let decoded = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let (username, password) = decoded
                .as_deref()
                .and_then(|text| text.split_once(':'))
                .ok_or(MalformedPullAuth)?;
            let password = Secret::new(password.trim_matches('\0'));
            Credentials::Basic { username: username.to_owned(), password }
        } else {
            return Ok(None);
        };
        let server = (!self.server_address.is_empty()).then(|| host_of(&self.server_address));
        Ok(Some(Given { server, credentials }))
    }
}

impl Given {
    fn is_for(&self, server: &str) -> bool {
        self.server.as_deref().is_none_or(|own| own == server)
    }

    fn len(&self) -> usize {
        let credentials = match &self.credentials {
            Credentials::Basic { username, password } => username.len() + password.expose().len(),
            Credentials::IdentityToken(token) | Credentials::RegistryToken(token) => {
                token.expose().len()
            }
        };
        credentials + self.server.as_ref().map_or(0, String::len)
    }
}

impl GivenCredentials {
    /// None yet; at most those of 1000 repositories, and at most 4 MiB.
    #[must_use]
    pub fn new() -> Self {
        Self::bounded(1000, 4 << 20)
    }

    fn bounded(most_repositories: usize, most_bytes: usize) -> Self {
        Self { repositories: Mutex::default(), most_repositories, most_bytes }
    }

    /// Keeps what `image` is being pulled with. Says whether anything is other than before.
    pub fn remember(&self, image: &Reference, given: &Given) -> bool {
        if given.len() > MOST_GIVEN_BYTES {
            tracing::warn!(%image, "the credentials of a pull are too long to be kept");
            return false;
        }
        let mut repositories = self.repositories.lock();
        let at = repositories.iter().position(|known| known.is_of(image));
        if at == Some(0) && repositories[0].given.first() == Some(given) {
            return false;
        }
        let mut known = at.and_then(|at| repositories.remove(at)).unwrap_or_else(|| Known {
            registry: image.registry().to_owned(),
            repository: image.repository().to_owned(),
            given: Vec::new(),
        });
        known.given.retain(|other| other != given);
        known.given.insert(0, given.clone());
        known.given.truncate(MOST_FOR_ONE);
        repositories.push_front(known);
        let mut bytes = 0;
        let fit = repositories.iter().take(self.most_repositories).take_while(|known| {
            bytes += known.len();
            bytes <= self.most_bytes
        });
        let n_fit = fit.count();
        repositories.truncate(n_fit);
        true
    }

    /// Lets go of what `image` could not be pulled with. Says whether it was there.
    pub fn forget(&self, image: &Reference, given: &Given) -> bool {
        let mut repositories = self.repositories.lock();
        let Some(known) = repositories.iter_mut().find(|known| known.is_of(image)) else {
            return false;
        };
        let before = known.given.len();
        known.given.retain(|other| other != given);
        let is_changed = known.given.len() < before;
        repositories.retain(|known| !known.given.is_empty());
        is_changed
    }

    /// All of it, for memory that outlives this process. In it are secrets: it must not get to a disk.
    #[must_use]
    pub fn expose(&self) -> Vec<u8> {
        let saved: Vec<Saved> = self.repositories.lock().iter().flat_map(Known::save).collect();
        serde_json::to_vec(&saved).unwrap_or_else(|_texts_alone_cannot_fail| b"[]".to_vec())
    }

    /// Takes over what another process [exposed](Self::expose).
    ///
    /// # Errors
    /// They are other bytes.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), MalformedPullAuth> {
        let saved: Vec<Saved> =
            serde_json::from_slice(bytes).map_err(|_would_show_the_value| MalformedPullAuth)?;
        let mut restored: VecDeque<Known> = VecDeque::new();
        for saved in saved.into_iter().take(self.most_repositories * MOST_FOR_ONE) {
            let (registry, repository, given) = saved.restore();
            match restored.back_mut() {
                Some(last) if (&last.registry, &last.repository) == (&registry, &repository) => {
                    last.given.push(given);
                }
                _ => restored.push_back(Known { registry, repository, given: vec![given] }),
            }
        }
        *self.repositories.lock() = restored;
        Ok(())
    }
}

impl Default for GivenCredentials {
    fn default() -> Self {
        Self::new()
    }
}

impl CredentialSource for GivenCredentials {
    fn credentials<'a>(
        &'a self,
        wanted: Wanted<'a>,
    ) -> BoxFuture<'a, Result<Option<Credentials>, CredentialsError>> {
        let repositories = self.repositories.lock();
        let known = repositories.iter().find(|known| {
            known.registry == wanted.registry && known.repository == wanted.repository
        });
        let found = known.and_then(|known| {
            let mut fitting = known.given.iter().filter(|given| given.is_for(wanted.server));
            fitting.find_map(|given| wanted.unless_refused(given.credentials.clone()))
        });
        Box::pin(std::future::ready(Ok(found)))
    }
}

impl Known {
    fn is_of(&self, image: &Reference) -> bool {
        self.registry == image.registry() && self.repository == image.repository()
    }

    fn len(&self) -> usize {
        let given: usize = self.given.iter().map(Given::len).sum();
        given + self.registry.len() + self.repository.len()
    }

    fn save(&self) -> impl Iterator<Item = Saved> {
        self.given.iter().map(|given| {
            let (kind, username, secret) = match &given.credentials {
                Credentials::Basic { username, password } => (Kind::Password, username, password),
                Credentials::IdentityToken(token) => (Kind::Identity, &String::new(), token),
                Credentials::RegistryToken(token) => (Kind::Registry, &String::new(), token),
            };
            Saved {
                registry: self.registry.clone(),
                repository: self.repository.clone(),
                server: given.server.clone(),
                kind,
                username: username.clone(),
                secret: secret.expose().to_owned(),
            }
        })
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}: {}", self.registry, self.repository, self.given.len())
    }
}

/// How it is written down.
#[derive(Serialize, Deserialize)]
struct Saved {
    registry: String,
    repository: String,
    server: Option<String>,
    kind: Kind,
    username: String,
    secret: String,
}

#[derive(Serialize, Deserialize)]
enum Kind {
    Password,
    Identity,
    Registry,
}

impl Saved {
    fn restore(self) -> (String, String, Given) {
        let secret = Secret::new(self.secret);
        let credentials = match self.kind {
            Kind::Password => Credentials::Basic { username: self.username, password: secret },
            Kind::Identity => Credentials::IdentityToken(secret),
            Kind::Registry => Credentials::RegistryToken(secret),
        };
        (self.registry, self.repository, Given { server: self.server, credentials })
    }
}

/// The host and port of a URL, whose scheme may be missing. Docker Hub has one name.
fn host_of(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    one_hub(host).to_owned()
}

/// For one repository: those of several users.
const MOST_FOR_ONE: usize = 4;
/// A token of some KiB is usual.
const MOST_GIVEN_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests;

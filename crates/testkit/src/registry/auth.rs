//! What clients must prove, and the token endpoint's tokens.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;

/// What clients must prove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Auth {
    /// Nothing.
    #[default]
    None,
    /// A user's name and password with each request.
    Basic(Credentials),
    /// A token from the registry's own `/token`.
    Bearer(BearerAuth),
}

/// A user's name and password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The name.
    pub user: String,
    /// The password.
    pub password: String,
}

/// How tokens are given out and how long they are good.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BearerAuth {
    /// Who gets one; `None` is everybody.
    pub credentials: Option<Credentials>,
    /// How many requests a token is good for.
    pub uses: Option<u32>,
    /// How long a token is good; told to clients as `expires_in` (in whole seconds, at least 1).
    pub lifetime: Option<Duration>,
}

impl Credentials {
    /// A name and a password.
    pub fn new(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self { user: user.into(), password: password.into() }
    }

    /// Whether this is the value of an `Authorization` header with them.
    pub(super) fn are_in(&self, header: Option<&str>) -> bool {
        let expected = STANDARD.encode(format!("{}:{}", self.user, self.password));
        header.and_then(|value| value.strip_prefix("Basic ")) == Some(expected.as_str())
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// The tokens that were given out.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    issued: Mutex<Issued>,
}

#[derive(Debug, Default)]
struct Issued {
    count: u64,
    access: HashMap<String, Token>,
    refresh: HashMap<String, u64>,
}

#[derive(Debug)]
struct Token {
    epoch: u64,
    uses_left: Option<u32>,
    expires: Option<Instant>,
    scopes: Vec<String>,
}

/// Why a token is not enough; the text is the `error` of the challenge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Unknown, expired or used up.
    Invalid,
    /// Good, but for something else.
    Scope,
}

impl Refused {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid_token",
            Self::Scope => "insufficient_scope",
        }
    }
}

impl Tokens {
    /// A new token for `scopes`, of the form `repository:<name>:<action>,<action>`.
    pub(super) fn issue(&self, auth: &BearerAuth, epoch: u64, scopes: Vec<String>) -> String {
        let mut issued = self.issued.lock();
        issued.count += 1;
        let name = format!("token-{}", issued.count);
        let expires = auth.lifetime.map(|lifetime| Instant::now() + lifetime);
        issued.access.insert(name.clone(), Token { epoch, uses_left: auth.uses, expires, scopes });
        name
    }

    /// A new token that buys new tokens.
    pub(super) fn issue_refresh(&self, epoch: u64) -> String {
        let mut issued = self.issued.lock();
        issued.count += 1;
        let name = format!("refresh-{}", issued.count);
        issued.refresh.insert(name.clone(), epoch);
        name
    }

    pub(super) fn is_refresh(&self, token: &str) -> bool {
        self.issued.lock().refresh.contains_key(token)
    }

    /// Whether the token allows `action` on `repository`; uses it up by one.
    pub(super) fn check(
        &self,
        name: &str,
        epoch: u64,
        repository: Option<&str>,
        action: &str,
    ) -> Result<(), Refused> {
        let mut issued = self.issued.lock();
        let token = issued.access.get_mut(name).ok_or(Refused::Invalid)?;
        let expired = token.expires.is_some_and(|expires| expires <= Instant::now());
        if expired || token.epoch != epoch || token.uses_left == Some(0) {
            return Err(Refused::Invalid);
        }
        let covered = repository.is_none_or(|repository| {
            token.scopes.iter().any(|scope| {
                scope
                    .strip_prefix("repository:")
                    .and_then(|rest| rest.rsplit_once(':'))
                    .is_some_and(|(name, actions)| {
                        name == repository && actions.split(',').any(|one| one == action)
                    })
            })
        });
        if !covered {
            return Err(Refused::Scope);
        }
        token.uses_left = token.uses_left.map(|left| left - 1);
        Ok(())
    }
}

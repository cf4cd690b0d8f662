//! Authorization: challenges answered with passwords or tokens, and tokens kept until they expire.
//!
//! Challenges are believed only from the server that was asked, never from where it redirected.
//! Credentials leave over TLS, or to hosts that speak plain HTTP by configuration or are this
//! machine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::HeaderValue;
use serde::Deserialize;

use crate::challenge::{Challenge, TokenService};
use crate::error::{UnauthorizedCause, UnavailableCause, public};
use crate::redirect::is_loopback;
use crate::transport::{Exchange, read_body};
use crate::{CredentialSource, Credentials, FetchError, Secret, Wanted};

/// What is to be done in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    Push,
}

impl Access {
    const fn actions(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "pull,push",
        }
    }
}

/// The authorizations of one user.
#[derive(Debug)]
pub(crate) struct Authority {
    source: Arc<dyn CredentialSource>,
    slots: Mutex<HashMap<SlotKey, Arc<Slot>>>,
    /// What servers asked for last in any repository: most ask for the same in all of them, and
    /// knowing it beforehand saves a round trip.
    customs: Mutex<HashMap<String, Challenge>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct SlotKey {
    server: String,
    repository: String,
    access: Access,
}

/// Locked while a token is fetched: whoever else needs it waits for that one.
type Slot = tokio::sync::Mutex<SlotState>;

#[derive(Debug, Default)]
struct SlotState {
    /// What the server asked for last, so that an expired token is replaced without a detour.
    challenge: Option<Challenge>,
    authorization: Option<Authorization>,
}

#[derive(Debug, Clone)]
struct Authorization {
    header: HeaderValue,
    /// `None`: until it is refused.
    until: Option<Instant>,
    /// What it was had for, or is; `None` for anonymous access.
    credentials: Option<Credentials>,
    /// Whether it is anonymous for want of anything else.
    anonymous: bool,
}

/// What is known of an authorization that a server does not accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Age {
    /// It may have expired.
    Unknown,
    /// It was made just now.
    New,
}

impl Authorization {
    fn is_current(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

impl Authority {
    pub(crate) fn new(source: Arc<dyn CredentialSource>) -> Self {
        Self { source, slots: Mutex::default(), customs: Mutex::default() }
    }

    fn custom(&self, server: &str) -> Option<Challenge> {
        self.customs.lock().get(server).cloned()
    }

    fn remember_custom(&self, server: String, challenge: &Challenge) {
        let anywhere = match challenge {
            Challenge::Bearer(service) => {
                Challenge::Bearer(TokenService { scope: None, ..service.clone() })
            }
            other => other.clone(),
        };
        let mut customs = self.customs.lock();
        if customs.len() >= MAX_SLOTS {
            customs.clear();
        }
        customs.insert(server, anywhere);
    }

    fn slot(&self, key: SlotKey) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        if slots.len() >= MAX_SLOTS {
            slots.clear();
        }
        Arc::clone(slots.entry(key).or_default())
    }
}

impl Exchange<'_> {
    fn slot(&self, access: Access) -> Arc<Slot> {
        self.client.identity.authority.slot(SlotKey {
            server: self.server.host.base.to_string(),
            repository: self.repository.to_owned(),
            access,
        })
    }

    /// What to send along, as far as is known before the server has asked.
    pub(crate) async fn authorization(&self, access: Access) -> Option<HeaderValue> {
        let slot = self.slot(access);
        let mut state = slot.lock().await;
        if let Some(current) = state.authorization.as_ref().filter(|known| known.is_current()) {
            return Some(current.header.clone());
        }
        state.authorization = None;
        let authority = &self.client.identity.authority;
        let known = state.challenge.clone();
        let challenge = known.or_else(|| authority.custom(self.server.host.base.as_str()))?;
        match self.obtain(&challenge, access, &mut Vec::new()).await {
            Ok(authorization) => {
                let header = authorization.header.clone();
                *state =
                    SlotState { challenge: Some(challenge), authorization: Some(authorization) };
                Some(header)
            }
            // Without it the server will ask again, and then the failure is reported.
            Err(error) => {
                tracing::debug!(%error, "an expired token cannot be replaced");
                None
            }
        }
    }

    /// Does what the server asked for after it refused `used`: with other credentials if it is those
    /// that it refuses. `None` if there are no others.
    pub(crate) async fn answer_challenge(
        &self,
        access: Access,
        challenge: Option<Challenge>,
        used: Option<(&HeaderValue, Age)>,
        refused: &mut Vec<Credentials>,
    ) -> Result<Option<HeaderValue>, FetchError> {
        let slot = self.slot(access);
        let mut state = slot.lock().await;
        let challenge = challenge.unwrap_or_else(|| Challenge::Other(String::new()));
        if let Some(known) = &state.authorization
            && known.is_current()
        {
            if used.is_none_or(|(used, _)| known.header != *used) {
                // Somebody else was faster.
                return Ok(Some(known.header.clone()));
            }
            let is_final = used.is_some_and(|(_, age)| age == Age::New);
            let was_basic = state.challenge == Some(Challenge::Basic);
            match &known.credentials {
                // The same password would be the same header.
                Some(used) if is_final || (was_basic && challenge == Challenge::Basic) => {
                    refused.push(used.clone());
                }
                None if is_final => return Ok(None),
                _ => {}
            }
        }
        let authorization = match self.obtain(&challenge, access, refused).await {
            Ok(authorization) => authorization,
            // What is known then stays, for `denied` to tell about.
            Err(error)
                if is_refusal(&error) && !refused.is_empty() && state.authorization.is_some() =>
            {
                return Ok(None);
            }
            Err(error) => {
                state.authorization = None;
                return Err(error);
            }
        };
        let header = authorization.header.clone();
        let server = self.server.host.base.to_string();
        self.client.identity.authority.remember_custom(server, &challenge);
        *state = SlotState { challenge: Some(challenge), authorization: Some(authorization) };
        Ok(Some(header))
    }

    /// Another password than the one that was `used`, if there is one.
    pub(crate) async fn changed_authorization(
        &self,
        access: Access,
        used: Option<&HeaderValue>,
        refused: &mut Vec<Credentials>,
    ) -> Option<HeaderValue> {
        let used = used?;
        let slot = self.slot(access);
        let mut state = slot.lock().await;
        let Some(challenge @ Challenge::Basic) = state.challenge.clone() else {
            return None;
        };
        if let Some(known) = state.authorization.as_ref().filter(|known| known.header == *used) {
            refused.extend(known.credentials.clone());
        }
        let authorization = self.obtain(&challenge, access, refused).await.ok()?;
        let header = authorization.header.clone();
        state.authorization = Some(authorization);
        (header != used).then_some(header)
    }

    /// The error for an access that was denied in the end; the authorization is forgotten.
    pub(crate) async fn denied(&self, url: String) -> FetchError {
        let mut anonymous = true;
        for access in [Access::Pull, Access::Push] {
            let slot = self.slot(access);
            if let Some(refused) = slot.lock().await.authorization.take() {
                anonymous &= refused.anonymous;
            }
        }
        let name = self.server.credential_name();
        let source = match anonymous {
            true => UnauthorizedCause::NoCredentials(name),
            false => UnauthorizedCause::NotAccepted(name),
        };
        FetchError::Unauthorized { url, source }
    }

    /// What answers `challenge`, with the first credentials that do. Those that are refused on the way
    /// are added to `refused`. In the end anonymous access is tried: the image may be public.
    async fn obtain(
        &self,
        challenge: &Challenge,
        access: Access,
        refused: &mut Vec<Credentials>,
    ) -> Result<Authorization, FetchError> {
        let mut first_refusal = None;
        loop {
            let name = self.server.credential_name();
            let source = &self.client.identity.authority.source;
            let wanted = Wanted {
                server: &name,
                registry: &self.server.registry,
                repository: self.repository,
                refused,
            };
            let found = match refused.len() < MAX_REFUSED {
                true => source.credentials(wanted).await,
                false => Ok(None),
            };
            let (credentials, failure) = match found {
                Ok(found) => (found.and_then(|found| wanted.unless_refused(found)), None),
                Err(error) => (None, Some(error)),
            };
            let obtained = self.obtain_with(challenge, access, credentials.clone(), refused).await;
            match (obtained, credentials, failure) {
                (Ok(authorization), _, _) => return Ok(authorization),
                // That it failed anonymously is only what followed from the first failure.
                (Err(FetchError::Unauthorized { url, .. }), _, Some(error)) => {
                    return Err(FetchError::Unauthorized { url, source: error.into() });
                }
                (Err(refusal), Some(credentials), None) if is_refusal(&refusal) => {
                    refused.push(credentials);
                    first_refusal.get_or_insert(refusal);
                }
                (Err(error), None, None) if is_refusal(&error) => {
                    return Err(first_refusal.unwrap_or(error));
                }
                (Err(error), _, _) => return Err(error),
            }
        }
    }

    async fn obtain_with(
        &self,
        challenge: &Challenge,
        access: Access,
        credentials: Option<Credentials>,
        refused: &[Credentials],
    ) -> Result<Authorization, FetchError> {
        let name = self.server.credential_name();
        let denied =
            |source| FetchError::Unauthorized { url: public(&self.server.host.base), source };
        let header = match (challenge, &credentials) {
            (Challenge::Bearer(_), Some(Credentials::RegistryToken(token))) => {
                format!("Bearer {}", token.expose())
            }
            (Challenge::Bearer(service), _) => {
                let authorization = self.fetch_token(service, access, credentials).await?;
                let anonymous = authorization.anonymous && refused.is_empty();
                return Ok(Authorization { anonymous, ..authorization });
            }
            (Challenge::Basic, Some(Credentials::Basic { username, password })) => {
                basic(username, password)
            }
            (Challenge::Basic, _) => return Err(denied(UnauthorizedCause::NoCredentials(name))),
            (Challenge::Other(_), _) => {
                return Err(denied(UnauthorizedCause::UnknownChallenge(name)));
            }
        };
        let header =
            sensitive(&header).ok_or_else(|| denied(UnauthorizedCause::NotAccepted(name)))?;
        Ok(Authorization { header, until: None, credentials, anonymous: false })
    }

    async fn fetch_token(
        &self,
        service: &TokenService,
        access: Access,
        credentials: Option<Credentials>,
    ) -> Result<Authorization, FetchError> {
        let realm = self.trusted_realm(service)?;
        let anonymous = credentials.is_none();
        let request = self.token_request(&realm, service, access, credentials.as_ref())?;
        let asked = Instant::now();
        let stall_timeout = self.options().stall_timeout;
        let response = tokio::time::timeout(stall_timeout, request.send())
            .await
            .map_err(|_elapsed| FetchError::Stalled { url: public(&realm), after: stall_timeout })?
            .map_err(|error| FetchError::transport(&realm, error))?;
        let status = response.status().as_u16();
        match status {
            200 => {}
            400..=403 => {
                let name = self.server.credential_name();
                let source = match anonymous {
                    true => UnauthorizedCause::NoCredentials(name),
                    false => UnauthorizedCause::NotAccepted(name),
                };
                return Err(FetchError::Unauthorized { url: public(&realm), source });
            }
            429 => {
                return Err(FetchError::TooManyRequests { url: public(&realm), retry_after: None });
            }
            500..=599 => {
                let (url, source) = (public(&realm), UnavailableCause::Status(status));
                return Err(FetchError::Unavailable { url, retry_after: None, source });
            }
            status => return Err(FetchError::Refused { url: public(&realm), status, code: None }),
        }
        let body = read_body(response, &realm, MAX_TOKEN_ANSWER, stall_timeout).await?;
        let malformed =
            || FetchError::Malformed { url: public(&realm), what: "it is not a token's answer" };
        let (token, lifetime) = parse_token(&body).ok_or_else(malformed)?;
        let header = sensitive(&format!("Bearer {}", token.expose())).ok_or_else(malformed)?;
        let until = asked.checked_add(lifetime - lifetime / 10);
        Ok(Authorization { header, until, credentials, anonymous })
    }

    fn token_request(
        &self,
        realm: &Url,
        service: &TokenService,
        access: Access,
        credentials: Option<&Credentials>,
    ) -> Result<reqwest::RequestBuilder, FetchError> {
        let client = self.pool(self.is_own(realm))?;
        let own_scope = format!("repository:{}:{}", self.repository, access.actions());
        // A push begins with a question, and the answer's challenge asks for the right to pull only.
        let enough = |scope: &&str| access == Access::Pull || scope.contains("push");
        let scope = service.scope.as_deref().filter(enough).unwrap_or(&own_scope);
        if let Some(Credentials::IdentityToken(token)) = credentials {
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("client_id", "hermes"),
                ("refresh_token", token.expose()),
                ("scope", scope),
            ];
            form.extend(service.service.as_deref().map(|service| ("service", service)));
            return Ok(client.post(realm.clone()).form(&form));
        }
        let mut query: Vec<_> = service.service.iter().map(|s| ("service", s.as_str())).collect();
        query.extend(scope.split_whitespace().map(|scope| ("scope", scope)));
        let request = client.get(realm.clone());
        Ok(match credentials {
            Some(Credentials::Basic { username, password }) => {
                query.push(("account", username));
                request.query(&query).basic_auth(username, Some(password.expose()))
            }
            _ => request.query(&query),
        })
    }

    /// The token service, if credentials and tokens may travel to it.
    fn trusted_realm(&self, service: &TokenService) -> Result<Url, FetchError> {
        let base = &self.server.host.base;
        let malformed = |what| FetchError::Malformed { url: public(base), what };
        let realm = Url::parse(&service.realm)
            .map_err(|_not_a_url| malformed("its token service is no URL"))?;
        let authority = match realm.port() {
            Some(port) => format!("{}:{port}", realm.host_str().unwrap_or_default()),
            None => realm.host_str().unwrap_or_default().to_owned(),
        };
        let from_plain = base.scheme() == "http";
        let plain_by_configuration = (from_plain
            && (realm.host() == base.host() || is_loopback(&realm)))
            || self.options().plain_http.contains(&authority);
        match realm.scheme() {
            "https" => Ok(realm),
            "http" if plain_by_configuration => Ok(realm),
            _ => Err(FetchError::Unauthorized {
                url: public(base),
                source: UnauthorizedCause::InsecureTokenService(public(&realm)),
            }),
        }
    }
}

/// Whether it is the credentials, or that there are none.
fn is_refusal(error: &FetchError) -> bool {
    use UnauthorizedCause::{NoCredentials, NotAccepted};
    matches!(error, FetchError::Unauthorized { source: NoCredentials(_) | NotAccepted(_), .. })
}

fn basic(username: &str, password: &Secret) -> String {
    format!("Basic {}", STANDARD.encode(format!("{username}:{}", password.expose())))
}

fn sensitive(header: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(header).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn parse_token(body: &[u8]) -> Option<(Secret, Duration)> {
    #[derive(Deserialize)]
    struct TokenAnswer {
        token: Option<Secret>,
        access_token: Option<Secret>,
        expires_in: Option<serde_json::Value>,
    }
    let answer: TokenAnswer = serde_json::from_slice(body).ok()?;
    let given = |token: Option<Secret>| token.filter(|token| !token.expose().is_empty());
    let token = given(answer.token).or_else(|| given(answer.access_token))?;
    let seconds = answer.expires_in.and_then(|value| value.as_u64()).filter(|seconds| *seconds > 0);
    Some((token, seconds.map_or(DEFAULT_LIFETIME, Duration::from_secs)))
}

/// By the specification of Docker's token service.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
const MAX_TOKEN_ANSWER: u64 = 1 << 20;
const MAX_SLOTS: usize = 4096;
/// As many credentials are tried for one request.
const MAX_REFUSED: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_token_services_are_read() {
        for (body, expected) in [
            (r#"{"token":"a","expires_in":300}"#, Some(("a", 300))),
            (r#"{"access_token":"b"}"#, Some(("b", 60))),
            (r#"{"token":"","access_token":"b","expires_in":0}"#, Some(("b", 60))),
            (r#"{"token":"a","expires_in":"300"}"#, Some(("a", 60))),
            (r#"{"token":"a","expires_in":-1,"issued_at":"x"}"#, Some(("a", 60))),
            ("{}", None),
            ("", None),
            (r#"{"token":1}"#, None),
        ] {
            let found = parse_token(body.as_bytes());
            let found = found.as_ref().map(|(token, life)| (token.expose(), life.as_secs()));
            assert_eq!(found, expected, "{body}");
        }
    }

    #[test]
    fn authorizations_are_not_shown() {
        let header = sensitive(&basic("u", &Secret::new("hunter2"))).unwrap();
        assert_eq!(header.to_str().unwrap(), "Basic dTpodW50ZXIy");
        let shown = format!(
            "{:?}",
            Authorization { header, until: None, credentials: None, anonymous: false }
        );
        assert!(!shown.contains("dTpodW50ZXIy"), "{shown}");
        assert!(sensitive("Bearer a\nb").is_none());
    }
}

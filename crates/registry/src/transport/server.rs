//! A server, and how it has behaved.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::{Capability, FetchError, Host};

/// A server that stands for a registry, with what was learned about it.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) host: Host,
    /// The registry that it stands for.
    pub(crate) registry: String,
    /// Whether it is the registry's own, whose word counts most.
    pub(crate) is_own: bool,
    rest: Mutex<Rest>,
    ignores_ranges: AtomicBool,
    has_referrers_api: AtomicBool,
}

/// How long a server is spared.
#[derive(Debug, Default)]
struct Rest {
    failures: u32,
    until: Option<Instant>,
    /// Whether it gave wrong bytes: then an answer, whose bytes nobody has checked yet, does not end
    /// its rest.
    lied: bool,
}

impl Server {
    pub(crate) fn new(host: Host, registry: &str, is_own: bool) -> Self {
        Self {
            host,
            registry: registry.to_owned(),
            is_own,
            rest: Mutex::default(),
            ignores_ranges: AtomicBool::new(false),
            has_referrers_api: AtomicBool::new(false),
        }
    }

    /// Whether it must be told which registry is meant, as containerd tells its mirrors.
    pub(crate) fn needs_namespace(&self) -> bool {
        !self.host.serves(&self.registry)
    }

    /// What credentials for it are found by.
    pub(crate) fn credential_name(&self) -> String {
        if self.needs_namespace() { self.host.authority() } else { self.registry.clone() }
    }

    pub(crate) fn may(&self, capability: Capability) -> bool {
        self.host.capabilities.contains(&capability)
    }

    /// Whether it was seen to list referrers. That it did not is not kept: it may learn to.
    pub(crate) fn has_referrers_api(&self) -> bool {
        self.has_referrers_api.load(Ordering::Relaxed)
    }

    pub(crate) fn found_referrers_api(&self) {
        self.has_referrers_api.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_resting(&self) -> bool {
        self.rest.lock().until.is_some_and(|until| Instant::now() < until)
    }

    /// Takes note of a failure: the server is asked last for a while.
    pub(crate) fn failed(&self, error: &FetchError, rest: Duration) {
        if !error.blames_server() {
            return;
        }
        let mut state = self.rest.lock();
        let longest = rest.saturating_mul(1 << state.failures.min(10)).min(LONGEST_REST);
        let pause = match error {
            // It will lie again, and each lie costs a download.
            FetchError::WrongDigest { .. } => LONGEST_REST,
            other => other.retry_after().unwrap_or(longest).min(LONGEST_REST),
        };
        state.failures = state.failures.saturating_add(1);
        state.until = Instant::now().checked_add(pause);
        state.lied = matches!(error, FetchError::WrongDigest { .. });
        let lied = state.lied;
        drop(state);
        let server = self.host.authority();
        if lied {
            tracing::warn!(server, %error, ?pause, "a server gave wrong bytes and is asked last");
        } else {
            tracing::debug!(server, %error, ?pause, "a server is put aside");
        }
    }

    pub(crate) fn succeeded(&self) {
        let mut state = self.rest.lock();
        let still_rests = || state.until.is_some_and(|until| Instant::now() < until);
        if state.failures > 0 && !(state.lied && still_rests()) {
            *state = Rest::default();
        }
    }

    pub(crate) fn ignores_ranges(&self) -> bool {
        self.ignores_ranges.load(Ordering::Relaxed)
    }

    pub(crate) fn set_ignores_ranges(&self, ignores: bool) {
        self.ignores_ranges.store(ignores, Ordering::Relaxed);
    }
}

const LONGEST_REST: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        let base = reqwest::Url::parse("https://m.example:1/v2").unwrap();
        Server::new(Host::new(base), "r.example", false)
    }

    #[test]
    fn a_server_rests_after_a_failure_until_it_succeeds() {
        let server = server();
        let stalled = FetchError::Stalled { url: String::new(), after: Duration::ZERO };
        server.failed(&stalled, Duration::from_secs(60));
        assert!(server.is_resting());
        server.succeeded();
        assert!(!server.is_resting());
        server.failed(&FetchError::NotFound { url: String::new() }, Duration::from_secs(60));
        assert!(!server.is_resting());
    }

    #[test]
    fn an_answer_does_not_end_the_rest_of_a_server_that_lied() {
        let server = server();
        let (expected, found) = (oci::Digest::of(b"a"), oci::Digest::of(b"b"));
        let lie = FetchError::WrongDigest { url: String::new(), expected, found };
        server.failed(&lie, Duration::from_secs(60));
        // Of a request that was under way, for instance.
        server.succeeded();
        assert!(server.is_resting());
    }

    #[test]
    fn a_mirror_is_told_the_registry_and_has_credentials_of_its_own() {
        let mirror = server();
        assert!(mirror.needs_namespace());
        assert_eq!(mirror.credential_name(), "m.example:1");
        let hub = reqwest::Url::parse("https://registry-1.docker.io/v2").unwrap();
        let hub = Server::new(Host::new(hub), "docker.io", true);
        assert!(!hub.needs_namespace());
        assert_eq!(hub.credential_name(), "docker.io");
    }
}

//! Redirects: where a registry's storage has a blob, and how long that answer holds.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use oci::Digest;
use parking_lot::Mutex;
use reqwest::Url;

use crate::clock::parse_iso_date;

/// Whether a request that went to `from` may be sent on to `to`.
///
/// Leaving TLS would show the blob, and a signed URL, to the network; only a plain registry, or one
/// on this machine with its storage there too, may do that.
pub(crate) fn may_follow(from: &Url, to: &Url) -> bool {
    match to.scheme() {
        "https" => true,
        "http" => from.scheme() == "http" || (is_loopback(from) && is_loopback(to)),
        _ => false,
    }
}

/// Whether a URL's host is this machine.
pub(crate) fn is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(is_loopback_host)
}

/// Whether a host, with or without port, is this machine.
pub(crate) fn is_loopback_host(authority: &str) -> bool {
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _port)) => address,
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || host.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
}

/// How long a URL that a registry redirected to can be used, by what it says itself.
pub(crate) fn valid_for(url: &Url, now: SystemTime) -> Duration {
    let query: HashMap<_, _> =
        url.query_pairs().map(|(key, value)| (key.to_ascii_lowercase(), value)).collect();
    let signed = |prefix: &str| {
        let lifetime = query.get(&format!("{prefix}-expires"))?.parse().ok()?;
        let lifetime = Duration::from_secs(lifetime);
        let issued = query.get(&format!("{prefix}-date")).and_then(|date| parse_iso_date(date));
        // Of a clock that is off, only the lifetime can be used.
        let end = issued.unwrap_or(now).checked_add(lifetime)?;
        Some(end.duration_since(now).unwrap_or(DEFAULT).min(lifetime))
    };
    let until = |end: SystemTime| end.duration_since(now).unwrap_or(Duration::ZERO);
    let epoch = || {
        let seconds = query.get("expires")?.parse().ok()?;
        Some(until(UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?))
    };
    let azure = || Some(until(parse_iso_date(query.get("se")?)?));
    let stated = signed("x-amz").or_else(|| signed("x-goog")).or_else(epoch).or_else(azure);
    match stated {
        // A tenth is kept for clocks that differ and for the time that the request takes.
        Some(stated) => (stated - stated / 10).min(LONGEST),
        None => DEFAULT,
    }
}

/// Where blobs were found, until that expires.
#[derive(Debug, Default)]
pub(crate) struct RedirectCache(Mutex<HashMap<RedirectKey, (Url, Instant)>>);

/// A blob as one server has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct RedirectKey {
    pub(crate) server: String,
    pub(crate) repository: String,
    pub(crate) blob: Digest,
}

impl RedirectCache {
    pub(crate) fn get(&self, key: &RedirectKey) -> Option<Url> {
        let known = self.0.lock();
        let (url, until) = known.get(key)?;
        (Instant::now() < *until).then(|| url.clone())
    }

    pub(crate) fn insert(&self, key: RedirectKey, url: Url) {
        let now = Instant::now();
        let until = now + valid_for(&url, SystemTime::now());
        let mut known = self.0.lock();
        if known.len() >= MAX_ENTRIES {
            known.retain(|_, (_, until)| now < *until);
        }
        if known.len() >= MAX_ENTRIES {
            known.clear();
        }
        known.insert(key, (url, until));
    }

    /// Forgets where a blob was, unless that has changed since `url`.
    pub(crate) fn forget(&self, key: &RedirectKey, url: &Url) {
        let mut known = self.0.lock();
        if known.get(key).is_some_and(|(newest, _)| newest == url) {
            known.remove(key);
        }
    }
}

const DEFAULT: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(3600);
const MAX_ENTRIES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(query: &str, seconds: u64) {
        // 2015-10-21T07:28:00Z
        let now = UNIX_EPOCH + Duration::from_secs(1_445_412_480);
        let url = Url::parse(&format!("https://storage.example/blob?{query}")).unwrap();
        assert_eq!(valid_for(&url, now), Duration::from_secs(seconds), "{query}");
    }

    #[test]
    fn urls_hold_as_long_as_they_say() {
        check("", 60);
        check("X-Amz-Expires=100", 90);
        check("X-Amz-Date=20151021T072800Z&X-Amz-Expires=1200", 1080);
        check("X-Amz-Date=20151021T072700Z&X-Amz-Expires=160", 90);
        check("X-Amz-Date=20151021T070000Z&X-Amz-Expires=60", 54);
        check("X-Amz-Date=20151021T080000Z&X-Amz-Expires=100", 90);
        check("X-Goog-Date=20151021T072800Z&X-Goog-Expires=100", 90);
        check("Expires=1445412580&Signature=s", 90);
        check("expires=1445412380", 0);
        check("se=2015-10-21T07%3A29%3A40Z&sig=s", 90);
        check("X-Amz-Expires=604800", 3600);
        check("X-Amz-Expires=18446744073709551615", 60);
        check("Expires=never", 60);
    }

    #[test]
    fn tls_is_not_left() {
        let url = |text| Url::parse(text).unwrap();
        for (from, to, follow) in [
            ("https://a.io/", "https://b.io/", true),
            ("https://a.io/", "http://b.io/", false),
            ("https://a.io/", "http://127.0.0.1:9/", false),
            ("https://localhost/", "http://127.0.0.1:9/", true),
            ("http://a.io/", "http://b.io/", true),
            ("http://a.io/", "https://b.io/", true),
            ("https://a.io/", "file:///etc/passwd", false),
        ] {
            assert_eq!(may_follow(&url(from), &url(to)), follow, "{from} to {to}");
        }
    }

    #[test]
    fn this_machine_is_known_by_many_names() {
        for host in
            ["localhost", "LocalHost:5000", "127.0.0.1", "127.8.8.8:1", "[::1]:5000", "[::1]"]
        {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in ["localhost.example", "128.0.0.1", "[::2]", "", "127.0.0.1.example:80"] {
            assert!(!is_loopback_host(host), "{host}");
        }
    }

    #[test]
    fn only_the_url_that_failed_is_forgotten() {
        let cache = RedirectCache::default();
        let key = RedirectKey {
            server: "s".to_owned(),
            repository: "r".to_owned(),
            blob: Digest::of(b"b"),
        };
        let (old, new) = (Url::parse("https://a/1").unwrap(), Url::parse("https://a/2").unwrap());
        cache.insert(key.clone(), new.clone());
        cache.forget(&key, &old);
        assert_eq!(cache.get(&key), Some(new.clone()));
        cache.forget(&key, &new);
        assert_eq!(cache.get(&key), None);
        cache.insert(key.clone(), Url::parse("https://a/?Expires=1").unwrap());
        assert_eq!(cache.get(&key), None);
    }
}

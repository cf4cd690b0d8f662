//! What is said to a plugin, and what it answers.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use super::{go_duration, image_pattern};
use crate::credentials::one_hub;
use crate::{Credentials, Secret};

/// The answer of a credential-provider plugin.
pub struct PluginAnswer {
    /// For which images it counts.
    pub cache_key: CacheKey,
    /// For how long; `None` leaves it to the configuration.
    pub cache_duration: Option<Duration>,
    /// Credentials by what images they are for, the longest of similar keys first.
    auth: Vec<(String, Entry)>,
}

/// For which images an answer counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum CacheKey {
    /// For the one that was asked about.
    Image,
    /// For all of its registry.
    Registry,
    /// For all.
    Global,
}

/// Bytes that are no plugin's answer. Nothing of them is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not a plugin's answer")]
pub struct MalformedAnswer;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    kind: String,
    api_version: String,
    cache_key_type: CacheKey,
    cache_duration: Option<String>,
    auth: Option<BTreeMap<String, Entry>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    username: String,
    password: Secret,
}

/// What is asked of a plugin.
pub(super) fn question(api_version: &str, image: &str) -> Vec<u8> {
    let question = serde_json::json!({
        "kind": "CredentialProviderRequest",
        "apiVersion": api_version,
        "image": image,
    });
    question.to_string().into_bytes()
}

impl PluginAnswer {
    /// Reads an answer to a question in `api_version`.
    ///
    /// # Errors
    /// It is not JSON of the right shape, or of another version.
    pub fn parse(bytes: &[u8], api_version: &str) -> Result<Self, MalformedAnswer> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|_would_show_the_value| MalformedAnswer)?;
        let cache_duration = match document.cache_duration {
            Some(text) => Some(go_duration::parse(&text).ok_or(MalformedAnswer)?),
            None => None,
        };
        if document.kind != "CredentialProviderResponse" || document.api_version != api_version {
            return Err(MalformedAnswer);
        }
        let auth = document.auth.unwrap_or_default().into_iter();
        let mut auth: Vec<_> = auth.map(|(key, entry)| (pattern_of(&key), entry)).collect();
        auth.sort_by(|(one, _), (other, _)| other.cmp(one));
        Ok(Self { cache_key: document.cache_key_type, cache_duration, auth })
    }

    /// The credentials for `image`, a registry and a path; those of the longest of similar keys first.
    pub fn credentials(&self, image: &str) -> impl Iterator<Item = Credentials> {
        let fitting = self.auth.iter().filter(|(key, _)| image_pattern::matches(key, image));
        fitting.map(|(_, entry)| Credentials::Basic {
            username: entry.username.clone(),
            password: entry.password.clone(),
        })
    }
}

impl fmt::Debug for PluginAnswer {
    /// Without what may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PluginAnswer")
            .field("cache_key", &self.cache_key)
            .field("cache_duration", &self.cache_duration)
            .field("auth", &self.auth.iter().map(|(key, _)| key).collect::<Vec<_>>())
            .finish()
    }
}

/// As the kubelet's key ring: a scheme counts for nothing, nor does the version of the API in front of a
/// path. Docker Hub has one name.
fn pattern_of(key: &str) -> String {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = key.split_at(key.find('/').unwrap_or(key.len()));
    let path = match path {
        "/" | "/v1" | "/v1/" | "/v2" | "/v2/" => "",
        path if path.starts_with("/v1/") || path.starts_with("/v2/") => &path[3..],
        path => path,
    };
    format!("{}{path}", one_hub(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "credentialprovider.kubelet.k8s.io/v1";

    fn answer(more: &str) -> String {
        format!(r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}",{more}}}"#)
    }

    #[test]
    fn answers_are_read_and_others_refused() {
        let check = |text: &str, expected: Option<(CacheKey, Option<u64>)>| {
            let read = PluginAnswer::parse(text.as_bytes(), V1).ok();
            let read = read.map(|a| (a.cache_key, a.cache_duration.map(|d| d.as_secs())));
            assert_eq!(read, expected, "{text}");
        };
        let image = Some((CacheKey::Image, None));
        check(&answer(r#""cacheKeyType":"Image","auth":{}"#), image);
        check(&answer(r#""cacheKeyType":"Image","auth":null,"cacheDuration":null"#), image);
        check(&answer(r#""cacheKeyType":"Image","more":1"#), image);
        let text = answer(r#""cacheKeyType":"Registry","cacheDuration":"6h0m0s""#);
        check(&text, Some((CacheKey::Registry, Some(21600))));
        check(&text.replace("/v1", "/v1beta1"), None);
        check(&text.replace("Response", "Request"), None);
        check(&text.replace("6h", "6 hours"), None);
        check(&text.replace("Registry", "Region"), None);
        check("hunter2", None);
        check("", None);
    }

    #[test]
    fn the_longest_fitting_key_comes_first() {
        let check = |image: &str, expected: &[&str]| {
            let text = answer(
                r#""cacheKeyType":"Global","auth":{
                    "r.io":{"username":"host","password":"p"},
                    "https://r.io/v2/a/":{"username":"path","password":"p"},
                    "*.r.io":{"username":"glob","password":"p"},
                    "https://index.docker.io/v1/":{"username":"hub","password":"p"}}"#,
            );
            let answer = PluginAnswer::parse(text.as_bytes(), V1).unwrap();
            let found = answer.credentials(image).map(|credentials| match credentials {
                Credentials::Basic { username, .. } => username,
                other => panic!("{other:?}"),
            });
            assert_eq!(found.collect::<Vec<_>>(), expected, "{image}");
        };
        check("r.io/a/b", &["path", "host"]);
        check("r.io/b", &["host"]);
        check("x.r.io/b", &["glob"]);
        check("docker.io/library/b", &["hub"]);
        check("s.io/b", &[]);
    }

    #[test]
    fn nothing_secret_is_shown() {
        let text = answer(
            r#""cacheKeyType":"Global","auth":{"r.io":{"username":"u","password":"hunter2"}}"#,
        );
        let answer = PluginAnswer::parse(text.as_bytes(), V1).unwrap();
        assert!(!format!("{answer:?}").contains("hunter2"));
    }

    #[test]
    fn a_question_names_the_image() {
        let question: serde_json::Value =
            serde_json::from_slice(&question(V1, "r.io/a\"b")).unwrap();
        assert_eq!(question["image"], "r.io/a\"b");
        assert_eq!(question["apiVersion"], V1);
        assert_eq!(question["kind"], "CredentialProviderRequest");
    }
}

//! Image references, normalised as Docker does.
//!
//! The grammar is that of `distribution/reference`: `[registry/]path[:tag][@digest]`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Digest, ParseDigestError};

/// A normalised image reference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A text that is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not an image reference: {problem}", text.escape_debug())]
pub struct ParseReferenceError {
    text: String,
    #[source]
    problem: Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Problem {
    #[error("it is empty")]
    Empty,
    #[error("it is longer than {MAX_TEXT_LEN} bytes")]
    TooLong,
    #[error("it has a URL scheme; write it without `{0}`")]
    Scheme(String),
    #[error("the registry `{}` is not a host name with an optional port", .0.escape_debug())]
    Registry(String),
    #[error("the path has upper-case letters; image names are lower-case")]
    UpperCase,
    #[error(
        "the path component `{}` is not letters and digits joined by `.`, `_`, `__` or dashes",
        .0.escape_debug()
    )]
    PathComponent(String),
    #[error("the path is longer than {MAX_PATH_LEN} bytes")]
    PathTooLong,
    #[error("a name of 64 hex digits could be mistaken for an image id")]
    LooksLikeId,
    #[error(
        "the tag `{}` is not 1 to 128 letters, digits, `_`, `.` or `-` (the first no `.` or `-`)",
        .0.escape_debug()
    )]
    Tag(String),
    #[error(transparent)]
    Digest(ParseDigestError),
}

impl Reference {
    /// The registry by its name, with the port if it has one: `docker.io`, `localhost:5000`.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The host, with the port if it has one, that serves the registry's API.
    ///
    /// Docker Hub's differs from its name.
    #[must_use]
    pub fn api_host(&self) -> &str {
        if self.registry == DOCKER_HUB { DOCKER_HUB_API } else { &self.registry }
    }

    /// The path within the registry: `library/alpine`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if the reference has one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The tag, or `latest` where there is none.
    #[must_use]
    pub fn tag_or_latest(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// The digest, if the reference has one. It decides over the tag.
    #[must_use]
    pub const fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What to ask the registry for: the digest, else the tag, else `latest`.
    #[must_use]
    pub fn target(&self) -> String {
        match &self.digest {
            Some(digest) => digest.to_string(),
            None => self.tag_or_latest().to_owned(),
        }
    }

    /// The same image by digest, without the tag.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The same repository with another tag and no digest.
    ///
    /// # Errors
    /// The tag is not well-formed.
    pub fn with_tag(&self, tag: &str) -> Result<Self, ParseReferenceError> {
        check_tag(tag).map_err(|problem| ParseReferenceError::new(tag, problem))?;
        Ok(Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    /// Registry and repository, without tag and digest.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }
}

impl ParseReferenceError {
    fn new(text: &str, problem: Problem) -> Self {
        Self { text: text.chars().take(300).collect(), problem }
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|problem| ParseReferenceError::new(text, problem))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

fn parse(text: &str) -> Result<Reference, Problem> {
    if text.is_empty() {
        return Err(Problem::Empty);
    }
    if text.len() > MAX_TEXT_LEN {
        return Err(Problem::TooLong);
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(Problem::Scheme(format!("{scheme}://").chars().take(60).collect()));
    }
    let (named, digest) = match text.split_once('@') {
        Some((named, digest)) => (named, Some(digest.parse().map_err(Problem::Digest)?)),
        None => (text, None),
    };
    let (registry, rest) = split_registry(named);
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if registry.is_none() && path.len() == 64 && path.bytes().all(is_lower_hex) {
        return Err(Problem::LooksLikeId);
    }
    let registry = match registry {
        None | Some("index.docker.io") => DOCKER_HUB,
        Some(registry) => registry,
    };
    check_registry(registry)?;
    // The limits hold for the name in full: what is shown must be readable again.
    let in_library = registry == DOCKER_HUB && !path.is_empty() && !path.contains('/');
    let repository = if in_library { format!("library/{path}") } else { path.to_owned() };
    check_path(&repository)?;
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let registry = registry.to_owned();
    Ok(Reference { registry, repository, tag: tag.map(ToOwned::to_owned), digest })
}

/// The first component is a registry if it cannot be a path component of Docker Hub.
fn split_registry(named: &str) -> (Option<&str>, &str) {
    match named.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (Some(first), rest)
        }
        _ => (None, named),
    }
}

fn check_registry(registry: &str) -> Result<(), Problem> {
    let refused = || Problem::Registry(registry.to_owned());
    let (host, port) = match registry.strip_prefix('[') {
        Some(bracketed) => {
            let (address, port) = bracketed.split_once(']').ok_or_else(refused)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_not_v6| refused())?;
            (None, port)
        }
        None => match registry.find(':') {
            Some(colon) => (Some(&registry[..colon]), &registry[colon..]),
            None => (Some(registry), ""),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let host_is_well_formed =
        host.is_none_or(|host| host.len() <= MAX_HOST_LEN && host.split('.').all(label));
    let port_is_well_formed = match port.strip_prefix(':') {
        Some(port) => port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok(),
        None => port.is_empty(),
    };
    if host_is_well_formed && port_is_well_formed { Ok(()) } else { Err(refused()) }
}

fn check_path(path: &str) -> Result<(), Problem> {
    if path.len() > MAX_PATH_LEN {
        return Err(Problem::PathTooLong);
    }
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(Problem::UpperCase);
    }
    match path.split('/').find(|component| !is_path_component(component)) {
        Some(component) => Err(Problem::PathComponent(component.to_owned())),
        None => Ok(()),
    }
}

/// Runs of letters and digits, joined by one `.`, one or two `_`, or any number of dashes.
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let starts_and_ends_well = component.bytes().next().is_some_and(alphanumeric)
        && component.bytes().last().is_some_and(alphanumeric);
    starts_and_ends_well
        && component
            .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .all(|joint| matches!(joint, "" | "." | "_" | "__") || joint.bytes().all(|b| b == b'-'))
}

fn check_tag(tag: &str) -> Result<(), Problem> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let well_formed = tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'));
    if well_formed { Ok(()) } else { Err(Problem::Tag(tag.chars().take(200).collect())) }
}

const fn is_lower_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_API: &str = "registry-1.docker.io";
const MAX_TEXT_LEN: usize = 1024;
const MAX_PATH_LEN: usize = 255;
const MAX_HOST_LEN: usize = 253;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let reference: Reference = text.parse().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(reference.to_string(), expected, "{text}");
        assert_eq!(reference.to_string().parse(), Ok(reference));
    }

    #[track_caller]
    fn check_refused(text: &str, reason: &str) {
        let error = text.parse::<Reference>().unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }

    #[test]
    fn references_are_normalised_as_docker_does() {
        check("alpine", "docker.io/library/alpine");
        check("alpine:3.20", "docker.io/library/alpine:3.20");
        check("docker.io/alpine", "docker.io/library/alpine");
        check("index.docker.io/library/alpine", "docker.io/library/alpine");
        check("vllm/vllm-openai:v0.11", "docker.io/vllm/vllm-openai:v0.11");
        check("a/b/c", "docker.io/a/b/c");
        check("localhost/a", "localhost/a");
        check("localhost:5000/a/b:1", "localhost:5000/a/b:1");
        check("Registry/a", "Registry/a");
        check("127.0.0.1:5000/a", "127.0.0.1:5000/a");
        check("[::1]:5000/a:t", "[::1]:5000/a:t");
        check("[fe80::1]/a", "[fe80::1]/a");
        check("ghcr.io/o/r_e__p-o---x.y:T.a-g_1", "ghcr.io/o/r_e__p-o---x.y:T.a-g_1");
        check(&format!("a@sha256:{HEX}"), &format!("docker.io/library/a@sha256:{HEX}"));
        check(&format!("q.io/a/b:t@sha256:{HEX}"), &format!("q.io/a/b:t@sha256:{HEX}"));
        check(&format!("q.io/{HEX}"), &format!("q.io/{HEX}"));
        check(&format!("localhost:5000/a@sha256:{HEX}"), &format!("localhost:5000/a@sha256:{HEX}"));
        check(
            &format!("a:{}", "t".repeat(128)),
            &format!("docker.io/library/a:{}", "t".repeat(128)),
        );
    }

    #[test]
    fn what_is_not_a_reference_is_refused_with_the_reason() {
        check_refused("", "empty");
        check_refused("https://ghcr.io/a", "https://");
        check_refused("Alpine", "upper-case");
        check_refused("ghcr.io/A", "upper-case");
        check_refused("a:", "tag");
        check_refused("a:.b", "tag");
        check_refused("a:b:c", "tag `b:c`");
        check_refused(&format!("a:{}", "t".repeat(129)), "tag");
        check_refused("a b", "path component");
        check_refused("a//b", "path component ``");
        check_refused("ghcr.io/", "path component ``");
        check_refused("a/../b", "path component `..`");
        check_refused("a___b", "path component");
        check_refused("a._b", "path component");
        check_refused("-a/b", "path component");
        check_refused("a.b-/c", "registry");
        check_refused("a..b/c", "registry");
        check_refused("a:99999/b", "registry");
        check_refused("a.b:/c", "registry");
        check_refused("a:+1/c", "registry");
        check_refused("[::g]/c", "registry");
        check_refused("u:p@h.io/c", "digest");
        check_refused(HEX, "image id");
        check_refused("a@sha256:12", "digest");
        check_refused(&format!("a@sha512:{HEX}"), "digest");
        check_refused(&format!("a.io/{}", "a".repeat(256)), "longer than 255");
        check_refused(&"a/".repeat(600), "longer than 1024");
    }

    #[test]
    fn the_parts_can_be_asked_for() {
        let reference: Reference = format!("alpine:3@sha256:{HEX}").parse().unwrap();
        assert_eq!(reference.registry(), "docker.io");
        assert_eq!(reference.api_host(), "registry-1.docker.io");
        assert_eq!(reference.repository(), "library/alpine");
        assert_eq!(reference.tag(), Some("3"));
        assert_eq!(reference.target(), format!("sha256:{HEX}"));
        let tagged = reference.with_tag("4").unwrap();
        assert_eq!((tagged.target().as_str(), tagged.digest()), ("4", None));
        reference.with_tag("a/b").unwrap_err();
        let by_digest = reference.with_digest(Digest::of(b""));
        assert_eq!(by_digest.to_string(), format!("docker.io/library/alpine@sha256:{HEX}"));
        let plain: Reference = "quay.io/a".parse().unwrap();
        assert_eq!(
            (plain.api_host(), plain.tag(), plain.target().as_str()),
            ("quay.io", None, "latest")
        );
    }

    #[test]
    fn a_short_name_whose_full_form_is_too_long_is_refused() {
        let longest = MAX_PATH_LEN - "library/".len();
        for len in [longest, longest + 1, MAX_PATH_LEN] {
            let parsed = "a".repeat(len).parse::<Reference>();
            assert_eq!(parsed.is_ok(), len <= longest, "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_stays_itself_when_normalised_again(text in "\\PC{0,40}|[a-zA-Z0-9.:/@_\\-\\[\\]]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
            }
        }
    }
}

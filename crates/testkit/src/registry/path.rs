//! Paths and queries of the distribution API.

use oci::Digest;

/// What a path means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    Base,
    Token,
    Manifest { name: String, reference: String },
    Blob { name: String, digest: Option<Digest> },
    Uploads { name: String },
    Upload { name: String, id: u64 },
    Tags { name: String },
    Referrers { name: String, digest: Option<Digest> },
    Cdn(Option<Digest>),
    Unknown,
}

impl Endpoint {
    pub(super) fn parse(path: &str) -> Self {
        match path {
            "/v2/" | "/v2" => return Self::Base,
            "/token" => return Self::Token,
            _ => {}
        }
        path.strip_prefix("/v2/").and_then(Self::parse_in_repository).unwrap_or(Self::Unknown)
    }

    /// Names of repositories have slashes, so what follows them is found from the end.
    fn parse_in_repository(path: &str) -> Option<Self> {
        if let Some(name) = path.strip_suffix("/tags/list") {
            return Some(Self::Tags { name: name.to_owned() });
        }
        if let Some((name, id)) = path.rsplit_once("/blobs/uploads") {
            let name = name.to_owned();
            return match id {
                "" | "/" => Some(Self::Uploads { name }),
                id => Some(Self::Upload { name, id: id.strip_prefix('/')?.parse().ok()? }),
            };
        }
        let (rest, last) = path.rsplit_once('/')?;
        let (name, kind) = rest.rsplit_once('/')?;
        let name = name.to_owned();
        match kind {
            "manifests" => Some(Self::Manifest { name, reference: decode(last) }),
            "blobs" => Some(Self::Blob { name, digest: decode(last).parse().ok() }),
            "referrers" => Some(Self::Referrers { name, digest: decode(last).parse().ok() }),
            _ => None,
        }
    }

    pub(super) fn parse_cdn(path: &str) -> Self {
        path.strip_prefix("/cdn/")
            .map_or(Self::Unknown, |digest| Self::Cdn(decode(digest).parse().ok()))
    }

    pub(super) fn repository(&self) -> Option<&str> {
        match self {
            Self::Manifest { name, .. }
            | Self::Blob { name, .. }
            | Self::Uploads { name }
            | Self::Upload { name, .. }
            | Self::Tags { name }
            | Self::Referrers { name, .. } => Some(name),
            Self::Base | Self::Token | Self::Cdn(_) | Self::Unknown => None,
        }
    }
}

/// A query, or a form: `key=value&key=value`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Query<'a>(pub(super) &'a str);

impl Query<'_> {
    /// All values of a key, decoded.
    pub(super) fn all(self, key: &str) -> Vec<String> {
        let pairs = self.0.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(found, _)| *found == key).map(|(_, value)| decode(value)).collect()
    }

    /// The first value of a key, decoded.
    pub(super) fn first(self, key: &str) -> Option<String> {
        self.all(key).into_iter().next()
    }
}

/// Undoes percent encoding. What is not encoded rightly is left as it is.
fn decode(text: &str) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = after.first_chunk::<2>().filter(|_| byte == b'%');
        let value = hex
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match value {
            Some(value) => {
                decoded.push(value);
                rest = &after[2..];
            }
            None => {
                decoded.push(if byte == b'+' { b' ' } else { byte });
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::{Endpoint, Query};

    #[test]
    fn repositories_may_have_slashes_and_odd_names() {
        let check = |path: &str, expected| assert_eq!(Endpoint::parse(path), expected, "{path}");
        let name = |name: &str| name.to_owned();
        check("/v2/", Endpoint::Base);
        check(
            "/v2/a/b/manifests/1.0",
            Endpoint::Manifest { name: name("a/b"), reference: name("1.0") },
        );
        check("/v2/blobs/blobs/uploads/", Endpoint::Uploads { name: name("blobs") });
        check("/v2/a/blobs/uploads/7", Endpoint::Upload { name: name("a"), id: 7 });
        check("/v2/a/blobs/sha256:00", Endpoint::Blob { name: name("a"), digest: None });
        check("/v2/a/tags/list", Endpoint::Tags { name: name("a") });
        check("/v2/a", Endpoint::Unknown);
        check("/", Endpoint::Unknown);
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query("a=1&digest=sha256%3Aff&scope=x+y&scope=%zz%4");
        assert_eq!(query.first("digest").as_deref(), Some("sha256:ff"));
        assert_eq!(query.all("scope"), ["x y", "%zz%4"]);
        assert_eq!(query.first("b"), None);
    }
}

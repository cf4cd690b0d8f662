//! Which servers stand for a registry: containerd's `hosts.toml` folders.
//!
//! The format is that of containerd's `docs/hosts.md`, so that a node needs one configuration.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use serde::Deserialize;

use crate::redirect::is_loopback_host;

/// What a server may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Capability {
    /// Content by digest.
    Pull,
    /// What a tag points at, and what refers to a manifest: the server is trusted to know.
    Resolve,
    /// To store content.
    Push,
}

/// A server that stands for a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The root of its API: `https://mirror.example/v2`. Its path has no slash at the end, unless it
    /// is nothing else.
    pub base: Url,
    /// What it may be asked for.
    pub capabilities: Vec<Capability>,
    /// Whether any certificate is good enough.
    pub skip_verify: bool,
    /// PEM files with authorities that are trusted besides the system's.
    pub ca: Vec<PathBuf>,
    /// The certificate that the server wants to see.
    pub client: Option<ClientCertificate>,
    /// Headers that go with each request to it; never to where it redirects.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// A TLS client certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClientCertificate {
    /// The PEM file with the certificate.
    pub cert: PathBuf,
    /// The PEM file with the key, unless it is in the same file.
    pub key: Option<PathBuf>,
}

/// A hosts folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadHostsError {
    /// A file cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not TOML of the right shape.
    #[error("{} is not a hosts file: line {line}: {problem}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where in the file, from 1.
        line: usize,
        /// What is wrong, without the text itself: headers may hold credentials.
        problem: &'static str,
    },
    /// A server's address is no URL.
    #[error("{}: `{}` is not the address of a server", path.display(), address.escape_debug())]
    Address {
        /// The file.
        path: PathBuf,
        /// The address.
        address: String,
    },
    /// A capability is none of `pull`, `resolve`, `push`, `referrers`.
    #[error("{}: `{}` is not a capability", path.display(), capability.escape_debug())]
    Capability {
        /// The file.
        path: PathBuf,
        /// The word.
        capability: String,
    },
    /// A header cannot be sent.
    #[error("{}: the header `{}` is malformed", path.display(), name.escape_debug())]
    Header {
        /// The file.
        path: PathBuf,
        /// The header's name.
        name: String,
    },
    /// A certificate or key cannot be used.
    #[error("{} is not a certificate or key in PEM form", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
    },
    /// The TLS library refuses the whole.
    #[error("setting up TLS")]
    Tls(#[source] reqwest::Error),
    /// No server of the registry may be asked for this.
    #[error("no server of the registry has the capability {0:?}")]
    NoServer(Capability),
    /// The registry's own name is not the address of a server.
    #[error("`{}` is not the name of a registry", .0.escape_debug())]
    Registry(String),
}

/// The servers for `registry` by the folder `dir`, the registry's own last.
///
/// `registry` is its name with the port if it has one; `docker.io` for Docker Hub. A folder that
/// says nothing about the registry gives its own server alone. A folder of Docker's form
/// (`*.crt`, and `*.cert` with `*.key`) is read as well.
///
/// # Errors
/// A file cannot be read or is malformed.
pub fn load(dir: &Path, registry: &str) -> Result<Vec<Host>, LoadHostsError> {
    let Some(folder) = folder(dir, registry) else {
        return Ok(vec![own_server(registry, false)?]);
    };
    let path = folder.join("hosts.toml");
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&path, &text, registry),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(vec![docker_certificates(&folder, own_server(registry, false)?)?])
        }
        Err(source) => Err(LoadHostsError::Read { path, source }),
    }
}

/// The registry's own server; `plain` if it has no TLS although it is not this machine.
///
/// # Errors
/// The name is not that of a server.
pub(crate) fn own_server(registry: &str, plain: bool) -> Result<Host, LoadHostsError> {
    let authority = if registry == DOCKER_HUB { DOCKER_HUB_API } else { registry };
    let plain = plain || is_loopback_host(authority);
    let scheme = if plain { "http" } else { "https" };
    let base = Url::parse(&format!("{scheme}://{authority}/v2"))
        .map_err(|_not_a_url| LoadHostsError::Registry(registry.to_owned()))?;
    Ok(Host::new(base))
}

impl Host {
    /// A server that may be asked for everything, with the system's certificates.
    #[must_use]
    pub fn new(base: Url) -> Self {
        Self {
            base,
            capabilities: vec![Capability::Pull, Capability::Resolve, Capability::Push],
            skip_verify: false,
            ca: Vec::new(),
            client: None,
            headers: Vec::new(),
        }
    }

    /// The address of something below the root of its API.
    pub(crate) fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        // The root of a server without any path ends with a slash all the same.
        url.set_path(&format!("{}/{path}", self.base.path().trim_end_matches('/')));
        url
    }

    /// Host and port, as they stand in the URL.
    #[must_use]
    pub fn authority(&self) -> String {
        let host = self.base.host_str().unwrap_or_default();
        match self.base.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// Whether this is the registry itself, not a mirror.
    #[must_use]
    pub fn serves(&self, registry: &str) -> bool {
        let authority = self.authority();
        authority == registry || (registry == DOCKER_HUB && authority == DOCKER_HUB_API)
    }
}

/// Whether `dir` says something about `registry`.
pub(crate) fn has_folder(dir: &Path, registry: &str) -> bool {
    folder(dir, registry).is_some()
}

/// The first folder that there is of those where containerd looks.
fn folder(dir: &Path, registry: &str) -> Option<PathBuf> {
    let with_port = registry
        .rsplit_once(':')
        .filter(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
        .map(|(host, port)| dir.join(format!("{host}_{port}_")));
    let candidates = with_port.into_iter().chain([dir.join(registry), dir.join("_default")]);
    candidates.into_iter().find(|folder| folder.is_dir())
}

#[derive(Deserialize)]
struct HostsFile {
    server: Option<String>,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    own: HostSection,
}

#[derive(Deserialize, Default)]
struct HostSection {
    #[serde(default)]
    capabilities: Vec<String>,
    #[serde(default)]
    skip_verify: bool,
    ca: Option<OneOrMany>,
    client: Option<ClientField>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
    #[serde(default)]
    override_path: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// One file, several files, or pairs of certificate and key.
#[derive(Deserialize)]
#[serde(untagged)]
enum ClientField {
    Files(OneOrMany),
    Pairs(Vec<Vec<String>>),
}

/// The servers that `text` names for `registry`, the registry's own last; no file is read.
///
/// `path` is where the text lies: relative names of certificates start from its folder, and errors
/// name it.
///
/// # Errors
/// The text is malformed.
pub fn parse(path: &Path, text: &str, registry: &str) -> Result<Vec<Host>, LoadHostsError> {
    let malformed = |offset: Option<usize>, problem| {
        let before = text.get(..offset.unwrap_or(0)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        LoadHostsError::Parse { path: path.to_owned(), line, problem }
    };
    let file: HostsFile = toml::from_str(text).map_err(|error| {
        malformed(
            error.span().map(|span| span.start),
            "it is not TOML, or a value has a wrong type",
        )
    })?;
    let mut hosts = Vec::new();
    for (address, section) in file.host {
        let section: HostSection = section.try_into().map_err(|_error| {
            malformed(text.find(&address), "a value of this host has a wrong type")
        })?;
        let base = server_address(path, &address, section.override_path)?;
        hosts.push(section.into_host(path, base)?);
    }
    let own = match &file.server {
        Some(server) => server_address(path, server, file.own.override_path)?,
        None => own_server(registry, false)?.base,
    };
    hosts.push(file.own.into_host(path, own)?);
    Ok(hosts)
}

fn server_address(path: &Path, address: &str, override_path: bool) -> Result<Url, LoadHostsError> {
    let refused = || LoadHostsError::Address { path: path.to_owned(), address: address.to_owned() };
    let with_scheme = match address.contains("://") {
        true => address.to_owned(),
        false => format!("https://{address}"),
    };
    let mut url = Url::parse(&with_scheme).map_err(|_not_a_url| refused())?;
    let fit = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.query().is_none()
        && url.username().is_empty()
        && url.password().is_none();
    if !fit {
        return Err(refused());
    }
    let root = url.path().trim_end_matches('/').to_owned();
    let root = if override_path || root.ends_with("/v2") { root } else { format!("{root}/v2") };
    url.set_path(&root);
    Ok(url)
}

impl HostSection {
    fn into_host(self, path: &Path, base: Url) -> Result<Host, LoadHostsError> {
        let folder = path.parent().unwrap_or(path);
        let mut host = Host::new(base);
        if !self.capabilities.is_empty() {
            host.capabilities = self.capabilities(path)?;
        }
        host.skip_verify = self.skip_verify;
        let ca = self.ca.as_ref().map(OneOrMany::as_slice).unwrap_or_default();
        host.ca = ca.iter().map(|file| folder.join(file)).collect();
        host.client = self.client.as_ref().and_then(|client| client.first(folder));
        for (name, values) in &self.header {
            let refused = || LoadHostsError::Header { path: path.to_owned(), name: name.clone() };
            let parsed: HeaderName = name.parse().map_err(|_malformed| refused())?;
            for value in values.as_slice() {
                let mut value = HeaderValue::from_str(value).map_err(|_malformed| refused())?;
                value.set_sensitive(true);
                host.headers.push((parsed.clone(), value));
            }
        }
        Ok(host)
    }

    fn capabilities(&self, path: &Path) -> Result<Vec<Capability>, LoadHostsError> {
        let mut capabilities = Vec::new();
        for word in &self.capabilities {
            match word.to_ascii_lowercase().as_str() {
                "pull" => capabilities.push(Capability::Pull),
                "resolve" => capabilities.push(Capability::Resolve),
                "push" => capabilities.push(Capability::Push),
                // containerd's newest word; here it goes with `resolve`.
                "referrers" => {}
                _ => {
                    let (path, capability) = (path.to_owned(), word.clone());
                    return Err(LoadHostsError::Capability { path, capability });
                }
            }
        }
        Ok(capabilities)
    }
}

impl ClientField {
    /// The first certificate: TLS can show only one.
    fn first(&self, folder: &Path) -> Option<ClientCertificate> {
        let (cert, key) = match self {
            Self::Files(files) => (files.as_slice().first()?, None),
            Self::Pairs(pairs) => {
                let pair = pairs.first()?;
                (pair.first()?, pair.get(1).filter(|key| !key.is_empty()))
            }
        };
        Some(ClientCertificate { cert: folder.join(cert), key: key.map(|key| folder.join(key)) })
    }
}

/// Docker's form of the folder: certificates by the ends of their names.
fn docker_certificates(folder: &Path, mut host: Host) -> Result<Host, LoadHostsError> {
    let failed = |source| LoadHostsError::Read { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.ca.push(file),
            Some("cert") if host.client.is_none() => {
                let key = Some(file.with_extension("key"));
                host.client = Some(ClientCertificate { cert: file, key });
            }
            _ => {}
        }
    }
    Ok(host)
}

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_API: &str = "registry-1.docker.io";

#[cfg(test)]
mod tests;

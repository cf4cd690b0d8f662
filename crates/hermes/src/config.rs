//! The configuration of a node's daemon: its keys, how it is read, and how it is shown.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hyper::Uri;
use registry::PluginConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::ConfigCommand;
use crate::output::Output;
use crate::protocol::Access;

/// Where the service looks for it.
pub(crate) const USUAL_PLACE: &str = "/etc/hermes/config.toml";

/// The configuration of a node's daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// What is kept of images
    pub(crate) cache: CacheConfig,
    /// What containerd is served with
    pub(crate) containerd: ContainerdConfig,
    /// Credentials for containerd's images, beside those of pulls and of `registry.docker_config`
    pub(crate) credentials: CredentialsConfig,
    /// How the registries of containerd's images are reached
    pub(crate) registry: RegistryConfig,
    /// What can be watched
    pub(crate) metrics: MetricsConfig,
    /// What OpenTelemetry is told
    pub(crate) tracing: TracingConfig,
}

/// What is kept of images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CacheConfig {
    /// Disk space that layers may take: bytes such as "200g", or a share of the file system such as "80%".
    /// It is kept by removing layers that no mount uses, then by giving up what was not read for long
    pub(crate) quota: Quota,
    /// Seconds that bytes stay after they were read, if others can be given up
    pub(crate) eviction_grace_seconds: u32,
}

/// What containerd is served with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ContainerdConfig {
    /// containerd's own socket. With it the kubelet can have its image service at `socket`: its calls are
    /// handed on, and what it pulls with serves the lazy images too
    #[schemars(example = "/run/containerd/containerd.sock")]
    pub(crate) address: Option<PathBuf>,
    /// The unix socket where containerd finds its snapshotter
    pub(crate) socket: PathBuf,
    /// The folder of the `HermesPolicy` objects that say which images are lazy: every `.yaml`, `.yml` and
    /// `.json` file. It is read again when something changes there
    pub(crate) policies: PathBuf,
    /// What becomes of images that a policy selects and that have no index, or whose policy wants them
    /// eager: "unpack" leaves them to containerd; "stream" has Hermes fetch them whole while containerd
    /// waits, index them on the way, and mount them
    pub(crate) eager: Eager,
    /// Seconds that a pull waits for the registry to say whether there is an index
    pub(crate) index_patience_seconds: u32,
}

/// Credentials for containerd's images, beside those of pulls and of `registry.docker_config`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CredentialsConfig {
    /// The folder of the kubelet's credential-provider plugins: its --image-credential-provider-bin-dir
    #[schemars(example = "/usr/libexec/kubernetes/credential-providers")]
    pub(crate) kubelet_bin_dir: Option<PathBuf>,
    /// The kubelet's `CredentialProviderConfig`: its --image-credential-provider-config
    #[schemars(example = "/etc/kubernetes/credential-provider.yaml")]
    pub(crate) kubelet_config: Option<PathBuf>,
}

/// How the registries of containerd's images are reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RegistryConfig {
    /// The folder with one `hosts.toml` for each registry, as containerd has it
    pub(crate) hosts_dir: PathBuf,
    /// Docker's `config.json` with credentials
    #[schemars(example = "/etc/hermes/docker.json")]
    pub(crate) docker_config: Option<PathBuf>,
}

/// What can be watched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct MetricsConfig {
    /// Where Prometheus finds `/metrics`, over plain HTTP without a password; nowhere if not set
    #[schemars(example = "127.0.0.1:9464")]
    pub(crate) address: Option<SocketAddr>,
}

/// What OpenTelemetry is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TracingConfig {
    /// Where traces of pulls, mounts and first reads are sent: the base address of an OTLP receiver that
    /// speaks HTTP, which has them at `/v1/traces`; nowhere if not set. What else the receiver wants, as
    /// a token, is for the service's environment: `OTEL_EXPORTER_OTLP_HEADERS`
    #[schemars(example = "http://127.0.0.1:4318")]
    pub(crate) endpoint: Option<String>,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { quota: Quota::Share(80), eviction_grace_seconds: 60 }
    }
}

impl Default for ContainerdConfig {
    fn default() -> Self {
        Self {
            address: None,
            socket: "/run/hermes/containerd.sock".into(),
            policies: "/etc/hermes/policies".into(),
            eager: Eager::Unpack,
            index_patience_seconds: 10,
        }
    }
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self { hosts_dir: "/etc/containerd/certs.d".into(), docker_config: None }
    }
}

/// What becomes of images that a policy selects and that are not lazy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Eager {
    /// containerd unpacks them.
    Unpack,
    /// Hermes fetches them whole, and mounts them.
    Stream,
}

/// Disk space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub(crate) enum Quota {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the file system.
    Share(u8),
}

impl Quota {
    /// What it comes to where the file system has `size` bytes.
    pub(crate) fn bytes(self, size: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Share(percent) => size / 100 * u64::from(percent),
        }
    }
}

/// How large the file system of a folder is, in bytes.
pub(crate) fn size_of_disk(folder: &Path) -> std::io::Result<u64> {
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_blocks * disk.f_frsize)
}

impl TryFrom<String> for Quota {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_suffix('%').map(str::parse) {
            None => crate::args::size(&text).map(Self::Bytes),
            Some(Ok(percent @ 1..=100)) => Ok(Self::Share(percent)),
            Some(_) => Err(format!("`{text}` is not between 1% and 100%")),
        }
    }
}

impl From<Quota> for String {
    fn from(quota: Quota) -> Self {
        match quota {
            Quota::Bytes(bytes) => bytes.to_string(),
            Quota::Share(percent) => format!("{percent}%"),
        }
    }
}

impl Config {
    /// Reads a file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path);
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} cannot be used", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        let ContainerdConfig { address, socket, policies, .. } = &config.containerd;
        let CredentialsConfig { kubelet_bin_dir, kubelet_config } = &config.credentials;
        let paths = [
            ("containerd.address", address.as_ref()),
            ("containerd.socket", Some(socket)),
            ("containerd.policies", Some(policies)),
            ("credentials.kubelet_bin_dir", kubelet_bin_dir.as_ref()),
            ("credentials.kubelet_config", kubelet_config.as_ref()),
        ];
        for (key, path) in paths {
            ensure!(path.is_none_or(|path| path.is_absolute()), "{key} is not an absolute path");
        }
        ensure!(
            kubelet_bin_dir.is_some() == kubelet_config.is_some(),
            "credentials.kubelet_bin_dir and credentials.kubelet_config need each other"
        );
        ensure!(
            address.as_ref() != Some(socket),
            "containerd.address is our own containerd.socket"
        );
        config.tracing.endpoint.as_deref().map_or(Ok(()), check_endpoint)?;
        Ok(config)
    }

    /// As [`read`](Self::read), for a daemon of `root`. One that has mounts to serve goes on with what it
    /// was started with last, rather than not at all.
    pub(crate) fn read_or_last(path: &Path, root: &Path) -> Result<Self> {
        let last = root.join(LAST);
        let err = match Self::read(path) {
            Ok(config) => {
                let json = serde_json::to_vec(&config)?;
                sys::files::replace_durably(&last, &json)
                    .with_context(|| format!("writing {}", last.display()))?;
                return Ok(config);
            }
            Err(err) => err,
        };
        let has_mounts = fs::read_dir(root.join("mounts")).is_ok_and(|dir| dir.count() > 0);
        let config = fs::read(&last).ok().and_then(|json| serde_json::from_slice(&json).ok());
        match config.filter(|_| has_mounts) {
            Some(config) => {
                let error = crate::failure::in_full(&err);
                tracing::error!(
                    error,
                    "containers run: going on with the configuration of the last start"
                );
                Ok(config)
            }
            None => Err(err),
        }
    }

    /// How the registries of containerd's images are reached.
    pub(crate) fn access(&self) -> Access {
        let RegistryConfig { hosts_dir, docker_config } = self.registry.clone();
        Access { hosts_dir, docker_config, kubelet: true }
    }

    pub(crate) fn eviction_grace(&self) -> Duration {
        Duration::from_secs(self.cache.eviction_grace_seconds.into())
    }

    pub(crate) fn index_patience(&self) -> Duration {
        Duration::from_secs(self.containerd.index_patience_seconds.into())
    }
}

/// Whether traces can be sent there, and the address is one that may be logged.
fn check_endpoint(endpoint: &str) -> Result<()> {
    let address: Uri = endpoint.parse().context("tracing.endpoint is no address")?;
    ensure!(
        matches!(address.scheme_str(), Some("http" | "https")) && address.query().is_none(),
        "tracing.endpoint is not as http://127.0.0.1:4318"
    );
    let has_user = address.authority().is_some_and(|authority| authority.as_str().contains('@'));
    ensure!(
        !has_user,
        "tracing.endpoint has credentials: they are for OTEL_EXPORTER_OTLP_HEADERS, in the environment"
    );
    Ok(())
}

/// Runs a command on the configuration.
pub(crate) fn run(output: Output, command: &ConfigCommand) -> Result<()> {
    match command {
        ConfigCommand::Default => output.bytes(show_default()?.as_bytes()),
        ConfigCommand::Policy { glob, name } => output.bytes(show_policy(glob, name)?.as_bytes()),
        ConfigCommand::Check { file } => {
            let config = Config::read(file)?;
            let policies = crate::policies::read_strictly(&config.containerd.policies)?.len();
            if let Some(path) = &config.credentials.kubelet_config {
                let shown = path.display();
                let text = fs::read_to_string(path).with_context(|| format!("reading {shown}"))?;
                PluginConfig::parse(&text).with_context(|| format!("{shown} cannot be used"))?;
            }
            let report = serde_json::json!({ "file": file, "policies": policies });
            output.result(&report, |_| format!("{}: fine; policies: {policies}", file.display()))
        }
    }
}

/// A file with every key, made of the types above.
pub(crate) fn show_default() -> Result<String> {
    let mut settings = schemars::generate::SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    let schema = settings.into_generator().into_root_schema_for::<Config>();
    let defaults = serde_json::to_value(Config::default())?;
    let mut text = String::from("# The configuration of Hermes' daemon, with its defaults.\n");
    for (table, schema) in properties(schema.as_value()) {
        write!(text, "\n{}[{table}]\n", comment(schema))?;
        for (key, schema) in properties(schema) {
            text.push_str(&comment(schema));
            match &defaults[table][key] {
                Value::Null => writeln!(text, "# {key} = {}", toml_value(&schema["examples"][0])?)?,
                value => writeln!(text, "{key} = {}", toml_value(value)?)?,
            }
        }
    }
    Ok(text)
}

/// A policy that selects the images of a glob, as somebody would write it.
fn show_policy(glob: &str, name: &str) -> Result<String> {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let text = format!(
        "apiVersion: {}\nkind: {}\nmetadata:\n  name: {}\nspec:\n  imageSelectors:\n  - glob: {}\n",
        policy::API_VERSION,
        policy::KIND,
        quoted(name),
        quoted(glob)
    );
    policy::PolicySet::new(&policy::parse(&text)?)?;
    Ok(text)
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flatten()
}

fn toml_value(value: &Value) -> Result<String> {
    Ok(toml::Value::try_from(value)?.to_string())
}

/// What a schema says of itself, in lines that are not too long.
fn comment(schema: &Value) -> String {
    let mut lines = vec![String::from("#")];
    for word in schema["description"].as_str().unwrap_or_default().split_whitespace() {
        let room = lines.last().map_or(0, |line| LINE.saturating_sub(line.len()));
        match lines.last_mut() {
            Some(line) if word.len() < room => line.extend([" ", word]),
            _ => lines.push(format!("# {word}")),
        }
    }
    lines.join("\n") + "\n"
}

/// What a daemon was last started with.
const LAST: &str = "config.json";

const LINE: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_the_default_and_says_what_each_key_means() {
        let text = show_default().unwrap();
        assert_eq!(Config::parse(&text).unwrap(), Config::default());
        assert_eq!(Config::parse("").unwrap(), Config::default());
        let lines: Vec<&str> = text.lines().collect();
        for (before, line) in lines.iter().zip(&lines[1..]) {
            let is_key = line.contains(" = ");
            assert!(!is_key || before.starts_with("# ") || before.ends_with(" = "), "{line}");
        }
        let optional: String = lines
            .iter()
            .map(|line| match line.strip_prefix("# ") {
                Some(key) if key.contains(" = ") => format!("{key}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert!(Config::parse(&optional).unwrap().registry.docker_config.is_some());
    }

    #[test]
    fn a_policy_that_is_shown_selects_what_was_given() {
        for glob in ["reg.test/**", "it's/**", "*:1", "# no comment"] {
            let text = show_policy(glob, "all").unwrap();
            let policy = policy::parse(&text).unwrap().pop().unwrap();
            assert_eq!(policy.spec.image_selectors, [policy::Selector::Glob(glob.to_owned())]);
            assert_eq!(policy.metadata.name, "all");
        }
        show_policy("", "all").unwrap_err();
    }

    #[test]
    fn the_page_shows_the_default() {
        let page = include_str!("../../../docs/configuration.md");
        assert!(page.contains(&show_default().unwrap()), "run `hermes config default`");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let check = |text: &str, expected: &str| {
            let err = crate::failure::in_full(&Config::parse(text).unwrap_err());
            assert!(err.contains(expected), "{text}: {err}");
        };
        check("quota = 1", "quota");
        check("[cache]\nqota = '1g'", "qota");
        check("[cache]\nquota = '1x'", "1x");
        check("[cache]\nquota = '0%'", "between 1% and 100%");
        check("[cache]\nquota = '101%'", "between 1% and 100%");
        check("[cache]\neviction_grace_seconds = -1", "eviction_grace_seconds");
        check("[containerd]\nsocket = 'hermes.sock'", "containerd.socket is not an absolute path");
        check("[containerd]\npolicies = 'policies'", "containerd.policies");
        check("[containerd]\naddress = 'containerd.sock'", "containerd.address");
        check("[containerd]\naddress = '/run/hermes/containerd.sock'", "is our own");
        check("[credentials]\nkubelet_config = '/a.yaml'", "need each other");
        check("[tracing]\nendpoint = 'collector:4318'", "is not as http://");
        check("[tracing]\nendpoint = 'grpc://collector:4317'", "is not as http://");
        check("[tracing]\nendpoint = 'https://user:word@collector'", "has credentials");
        check(
            "[credentials]\nkubelet_config = 'a'\nkubelet_bin_dir = '/'",
            "kubelet_config is not",
        );
    }

    #[test]
    fn a_quota_is_bytes_or_a_share_of_the_file_system() {
        let check = |text: &str, expected: u64| {
            assert_eq!(Quota::try_from(text.to_owned()).unwrap().bytes(1000), expected, "{text}");
        };
        check("10g", 10 << 30);
        check("17", 17);
        check("80%", 800);
        check("100%", 1000);
    }

    #[test]
    fn a_daemon_with_mounts_goes_on_with_its_last_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let (path, root) = (dir.path().join("config.toml"), dir.path().join("root"));
        fs::create_dir_all(root.join("mounts")).unwrap();
        fs::write(&path, "[cache]\nquota = '1g'\n").unwrap();
        let good = Config::read_or_last(&path, &root).unwrap();
        fs::write(&path, "[cache]\nqota = '2g'\n").unwrap();
        let err = crate::failure::in_full(&Config::read_or_last(&path, &root).unwrap_err());
        assert!(err.contains("config.toml cannot be used") && err.contains("qota"), "{err}");
        fs::write(root.join("mounts/1.json"), "").unwrap();
        assert_eq!(Config::read_or_last(&path, &root).unwrap(), good);
        fs::remove_file(root.join("config.json")).unwrap();
        Config::read_or_last(&path, &root).unwrap_err();
    }
}

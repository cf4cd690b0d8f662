//! The kubelet's `CredentialProviderConfig`: which plugins there are, and for which images.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{go_duration, image_pattern};
use crate::Secret;

/// The plugins of a node.
#[derive(Debug, Default)]
pub struct PluginConfig {
    /// Those that can be asked, in their order.
    pub plugins: Vec<Plugin>,
    /// The names of those that want a token of the Pod's service account, which only the kubelet has.
    pub skipped: Vec<String>,
}

/// How a plugin is asked.
#[derive(Debug)]
pub struct Plugin {
    /// The name of its program.
    pub name: String,
    /// What it and we speak.
    pub(super) api_version: String,
    /// How long an answer counts that does not say.
    pub(super) default_cache_duration: Duration,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<Variable>,
    match_images: Vec<String>,
}

/// Added to the environment of a plugin.
#[derive(Deserialize)]
pub(super) struct Variable {
    pub(super) name: String,
    #[serde(default)]
    pub(super) value: Secret,
}

/// Why a file is no `CredentialProviderConfig`. Nothing of it but names is shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedPluginConfig {
    /// It is not YAML, or lacks something.
    #[error("line {line} is not what is expected there")]
    Line {
        /// Where, from 1.
        line: u64,
    },
    /// It is something else.
    #[error("its kind is not CredentialProviderConfig, or its version is unknown")]
    Kind,
    /// A plugin cannot be asked.
    #[error("the {} of the provider `{}` is not what it should be", field, name.escape_debug())]
    Provider {
        /// Which plugin.
        name: String,
        /// What of it.
        field: &'static str,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    kind: String,
    api_version: String,
    #[serde(default)]
    providers: Vec<Provider>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    api_version: String,
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    args: Option<Vec<String>>,
    env: Option<Vec<Variable>>,
    token_attributes: Option<IgnoredAny>,
}

impl PluginConfig {
    /// Reads a configuration, YAML or JSON.
    ///
    /// # Errors
    /// As the kubelet would refuse to start with it, but for fields that are unknown.
    pub fn parse(text: &str) -> Result<Self, MalformedPluginConfig> {
        let document: Document = serde_saphyr::from_str(text).map_err(|error| {
            let line = error.location().map_or(1, |location| location.line());
            MalformedPluginConfig::Line { line }
        })?;
        let version = document.api_version.strip_prefix("kubelet.config.k8s.io/");
        if document.kind != "CredentialProviderConfig" || !version.is_some_and(is_version) {
            return Err(MalformedPluginConfig::Kind);
        }
        let mut config = Self::default();
        for provider in document.providers {
            if provider.token_attributes.is_some() {
                config.skipped.push(provider.name);
            } else {
                config.plugins.push(Plugin::new(provider)?);
            }
        }
        Ok(config)
    }
}

impl Plugin {
    fn new(provider: Provider) -> Result<Self, MalformedPluginConfig> {
        let Provider { name, api_version, match_images, .. } = provider;
        let malformed = |field| MalformedPluginConfig::Provider { name: name.clone(), field };
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', ' ', '\0']) {
            return Err(malformed("name"));
        }
        if !api_version.strip_prefix("credentialprovider.kubelet.k8s.io/").is_some_and(is_version) {
            return Err(malformed("apiVersion"));
        }
        // The kubelet demands one.
        let default_cache_duration = provider.default_cache_duration.as_deref();
        let default_cache_duration = default_cache_duration
            .and_then(go_duration::parse)
            .ok_or_else(|| malformed("defaultCacheDuration"))?;
        let env = provider.env.unwrap_or_default();
        if env.iter().any(|one| one.name.is_empty() || one.name.contains(['=', '\0'])) {
            return Err(malformed("env"));
        }
        let args = provider.args.unwrap_or_default();
        Ok(Self { name, api_version, default_cache_duration, args, env, match_images })
    }

    /// Whether it is to be asked about `image`, a registry and a path.
    #[must_use]
    pub fn is_for(&self, image: &str) -> bool {
        self.match_images.iter().any(|pattern| image_pattern::matches(pattern, image))
    }
}

impl fmt::Debug for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={:?}", self.name, self.value)
    }
}

/// The versions of both APIs.
fn is_version(text: &str) -> bool {
    matches!(text, "v1" | "v1beta1" | "v1alpha1")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the documentation of Kubernetes has it.
    const FULL: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
      - "public.ecr.aws"
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args:
      - get-credentials
    env:
      - name: AWS_PROFILE
        value: hunter2
  - name: gcp
    matchImages: ["gcr.io"]
    defaultCacheDuration: 0s
    apiVersion: credentialprovider.kubelet.k8s.io/v1beta1
    future: {field: 1}
  - name: of-the-pod
    matchImages: ["pod.example"]
    defaultCacheDuration: "1m"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    tokenAttributes:
      serviceAccountTokenAudience: x
      requireServiceAccount: true
"#;

    #[test]
    fn a_configuration_is_read() {
        let config = PluginConfig::parse(FULL).unwrap();
        let [ecr, gcp] = config.plugins.as_slice() else { panic!("{config:?}") };
        assert_eq!(ecr.name, "ecr-credential-provider");
        assert_eq!(ecr.default_cache_duration, Duration::from_secs(43_200));
        assert_eq!(ecr.args, ["get-credentials"]);
        assert_eq!(ecr.env[0].name, "AWS_PROFILE");
        assert_eq!(ecr.env[0].value.expose(), "hunter2");
        assert!(ecr.is_for("1.dkr.ecr.eu-west-1.amazonaws.com/a"));
        assert!(ecr.is_for("public.ecr.aws/a") && !ecr.is_for("gcr.io/a"));
        assert!(gcp.api_version.ends_with("/v1beta1") && gcp.args.is_empty());
        assert_eq!(config.skipped, ["of-the-pod"]);
        assert!(!format!("{config:?}").contains("hunter2"));
        let json = r#"{"kind":"CredentialProviderConfig",
            "apiVersion":"kubelet.config.k8s.io/v1alpha1","providers":[]}"#;
        assert_eq!(PluginConfig::parse(json).unwrap().plugins.len(), 0);
    }

    #[test]
    fn another_document_is_refused_without_showing_it() {
        let check = |from: &str, to: &str, expected: &str| {
            let text = FULL.replace(from, to);
            assert_ne!(text, FULL);
            assert_eq!(PluginConfig::parse(&text).unwrap_err().to_string(), expected);
        };
        let provider = |field: &str, name: &str| {
            format!("the {field} of the provider `{name}` is not what it should be")
        };
        let kind = "its kind is not CredentialProviderConfig, or its version is unknown";
        check("kind: Cred", "kind: Kred", kind);
        check("kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v2", kind);
        check("name: gcp", "name: ../gcp", &provider("name", "../gcp"));
        check("v1beta1", "v9", &provider("apiVersion", "gcp"));
        check("0s", "later", &provider("defaultCacheDuration", "gcp"));
        check("AWS_PROFILE", "A=B", &provider("env", "ecr-credential-provider"));
    }

    #[test]
    fn a_broken_document_is_refused_with_its_line() {
        let check = |text: &str, expected: u64| {
            let error = PluginConfig::parse(text).unwrap_err();
            assert_eq!(error, MalformedPluginConfig::Line { line: expected });
        };
        check("kind: [hunter2", 1);
        check("kind: a\napiVersion: b\nproviders: hunter2\n", 3);
    }
}

//! `HermesPolicy` as it is written: the object of Kubernetes, in YAML or JSON.

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::selector::Selector;

/// What `apiVersion` says. The group is that of the Go Hermes, whose objects are understood.
pub const API_VERSION: &str = "hermes.cloudpilot.ai/v1alpha1";

/// What `kind` says.
pub const KIND: &str = "HermesPolicy";

/// Says which images are lazy, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HermesPolicy {
    /// `hermes.cloudpilot.ai/v1alpha1`
    pub api_version: String,
    /// `HermesPolicy`
    pub kind: String,
    /// Its name; all else that Kubernetes keeps here is ignored.
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: PolicySpec,
}

/// What Kubernetes knows of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Metadata {
    /// The policy's name.
    pub name: String,
}

/// What a policy wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicySpec {
    /// The policy selects nothing for the time being; what is mounted stays
    pub paused: bool,
    /// The policy with the highest number decides of an image that several select; of equal ones the first by
    /// name
    pub priority: i32,
    /// Images that are selected: by any of these
    pub image_selectors: Vec<Selector>,
    /// Images that are not selected all the same; another policy may select them
    pub exclude: Vec<Selector>,
    /// Platforms such as `linux/arm64` of the nodes that it is for; none means all
    pub platforms: Vec<String>,
    /// Whether the images are lazy
    pub mode: Mode,
    /// How they are mounted
    pub backend: BackendChoice,
    /// When the rest of an image is fetched
    pub completion: Completion,
    /// Seconds that a read waits for bytes that do not come before it fails
    pub read_deadline_seconds: u32,
    /// What of the cache is given up first when room is needed
    pub cache_class: CacheClass,
}

impl Default for PolicySpec {
    fn default() -> Self {
        Self {
            paused: false,
            priority: 0,
            image_selectors: Vec::new(),
            exclude: Vec::new(),
            platforms: Vec::new(),
            mode: Mode::default(),
            backend: BackendChoice::default(),
            completion: Completion::default(),
            read_deadline_seconds: 300,
            cache_class: CacheClass::default(),
        }
    }
}

/// What becomes of an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// It starts before it is downloaded
    #[default]
    Lazy,
    /// It is downloaded first, as if there was no policy
    Eager,
}

/// Which back end to use.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum BackendChoice {
    /// The best that works here
    #[default]
    Auto,
    /// EROFS over files that the kernel asks us to fill (fanotify pre-content events)
    Erofs,
    /// EROFS over loop devices whose files we serve
    ErofsLoop,
    /// A FUSE file system
    Fuse,
}

/// When the rest of an image is fetched.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Completion {
    /// From the moment of the mount, behind all readers
    #[default]
    Now,
    /// Once no read on the machine has had to wait for half a minute
    Idle,
    /// Only what is read
    Never,
}

/// Which bytes are given up first when room is needed, in this order. Of images that share a layer, the last
/// class counts.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
    ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum CacheClass {
    /// Before all others, however lately they were read
    Disposable,
    /// What was not read for long goes first
    #[default]
    Standard,
    /// Only when there is nothing else
    Retained,
}

/// Text that is no policy.
#[derive(Debug, thiserror::Error)]
pub enum ParsePolicyError {
    /// It is not what a policy looks like.
    #[error("{0}")]
    Malformed(Box<serde_saphyr::Error>),
    /// It is another object.
    #[error("this is a {kind} of {api_version}, not a {KIND} of {API_VERSION}")]
    Another {
        /// What it says that it is.
        kind: String,
        /// And of which version.
        api_version: String,
    },
}

/// Reads the policies of a YAML file, which may have several documents, or none.
///
/// # Errors
/// When one of them is not a policy.
pub fn parse(text: &str) -> Result<Vec<HermesPolicy>, ParsePolicyError> {
    let policies: Vec<HermesPolicy> = serde_saphyr::from_multiple(text)
        .map_err(|err| ParsePolicyError::Malformed(Box::new(err)))?;
    let another = policies.iter().find(|it| it.kind != KIND || it.api_version != API_VERSION);
    match another {
        Some(HermesPolicy { kind, api_version, .. }) => {
            Err(ParsePolicyError::Another { kind: kind.clone(), api_version: api_version.clone() })
        }
        None => Ok(policies),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(spec: &str) -> String {
        format!("apiVersion: {API_VERSION}\nkind: {KIND}\nmetadata: {{name: a}}\nspec: {spec}\n")
    }

    #[test]
    fn policies_are_read_as_kubernetes_shows_them() {
        let text = "---
# What a platform team writes.
apiVersion: hermes.cloudpilot.ai/v1alpha1
kind: HermesPolicy
metadata:
  name: gpu
  uid: 17d5
  labels: {team: platform}
spec:
  priority: 10
  imageSelectors:
  - imageRegex: 'reg\\.test/ml/.*'
  - glob: reg.test/**
  - prefix: reg.test/a
  exclude:
  - glob: '**:debug'
  platforms: [linux/amd64]
  completion: idle
  readDeadlineSeconds: 60
  cacheClass: retained
status:
  ready: 3
---
apiVersion: hermes.cloudpilot.ai/v1alpha1
kind: HermesPolicy
metadata: {name: never}
spec: {mode: eager, imageSelectors: [{glob: '**'}], backend: erofs-loop}
";
        let [gpu, never] = <[_; 2]>::try_from(parse(text).unwrap()).unwrap();
        assert_eq!(gpu.metadata.name, "gpu");
        assert_eq!(gpu.spec.image_selectors.len(), 3);
        assert_eq!(gpu.spec.exclude, [Selector::Glob("**:debug".to_owned())]);
        assert_eq!((gpu.spec.completion, gpu.spec.mode), (Completion::Idle, Mode::Lazy));
        assert_eq!(gpu.spec.cache_class, CacheClass::Retained);
        assert_eq!(gpu.spec.read_deadline_seconds, 60);
        assert_eq!((never.spec.mode, never.spec.backend), (Mode::Eager, BackendChoice::ErofsLoop));
        assert_eq!(never.spec.read_deadline_seconds, 300);
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        let check = |text: &str, expected: &str| {
            let err = parse(text).unwrap_err().to_string();
            assert!(err.contains(expected), "{text}: {err}");
        };
        check(&document("{pause: true}"), "pause");
        check(&document("{imageSelectors: [{regex: a}]}"), "regex");
        check(&document("{imageSelectors: [{glob: a, prefix: b}]}"), "line");
        check(&document("{mode: lazier}"), "lazier");
        check(&document("{completion: now").replace("}\n", "\n"), "line");
        check(&document("{}").replace(KIND, "Pod"), "this is a Pod");
        check(&document("{}").replace("v1alpha1", "v9"), "v9");
        check("metadata: 1", "line");
        check("a: &a [*a, *a]", "");
    }

    #[test]
    fn an_empty_file_has_no_policy() {
        for text in ["", "---\n", "# nothing\n", "---\n---\n"] {
            assert_eq!(parse(text).unwrap(), [], "{text:?}");
        }
    }
}

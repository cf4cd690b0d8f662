//! What a set of policies decides of an image.

use std::collections::HashSet;
use std::time::Duration;

use oci::{ParsePlatformError, Platform, Reference};
use regex::RegexSet;

use crate::document::{BackendChoice, CacheClass, Completion, HermesPolicy, Mode, PolicySpec};
use crate::reason::Reason;
use crate::selector::{BadSelector, Selector};

/// The policies of a node, ready to decide.
#[derive(Debug, Default)]
pub struct PolicySet {
    /// The first that selects an image decides.
    policies: Vec<Policy>,
}

#[derive(Debug)]
struct Policy {
    name: String,
    priority: i32,
    paused: bool,
    mode: Mode,
    selects: RegexSet,
    excludes: RegexSet,
    platforms: Vec<Platform>,
    behaviour: Behaviour,
}

/// How a policy wants its images served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behaviour {
    /// How they are mounted.
    pub backend: BackendChoice,
    /// When the rest is fetched.
    pub completion: Completion,
    /// How long a read waits for bytes that do not come.
    pub deadline: Duration,
    /// When its bytes are given up.
    pub cache_class: CacheClass,
}

impl Default for Behaviour {
    /// What a policy wants that says nothing of it.
    fn default() -> Self {
        let spec = PolicySpec::default();
        Self::of(&spec)
    }
}

impl Behaviour {
    fn of(spec: &PolicySpec) -> Self {
        Self {
            backend: spec.backend,
            completion: spec.completion,
            deadline: Duration::from_secs(spec.read_deadline_seconds.into()),
            cache_class: spec.cache_class,
        }
    }
}

/// A policy decides of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selected<'a> {
    /// The policy's name.
    pub policy: &'a str,
    /// What it wants to become of the image.
    pub mode: Mode,
    /// What it wants.
    pub behaviour: Behaviour,
}

/// A policy that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPolicy {
    /// One of its selectors.
    #[error("policy `{policy}`")]
    Selector {
        /// The policy's name.
        policy: String,
        /// What is wrong.
        source: BadSelector,
    },
    /// One of its platforms.
    #[error("policy `{policy}`")]
    Platform {
        /// The policy's name.
        policy: String,
        /// What is wrong.
        source: ParsePlatformError,
    },
    /// Two policies have its name.
    #[error("there are two policies `{policy}`")]
    Twice {
        /// Their name.
        policy: String,
    },
}

impl PolicySet {
    /// Gets policies ready.
    ///
    /// # Errors
    /// When one of them cannot be used.
    pub fn new(documents: &[HermesPolicy]) -> Result<Self, BadPolicy> {
        let mut policies = documents.iter().map(Policy::new).collect::<Result<Vec<_>, _>>()?;
        let mut names = HashSet::new();
        if let Some(twice) = policies.iter().find(|policy| !names.insert(&policy.name)) {
            return Err(BadPolicy::Twice { policy: twice.name.clone() });
        }
        let order = |policy: &Policy| (std::cmp::Reverse(policy.priority), policy.name.clone());
        policies.sort_by_key(order);
        Ok(Self { policies })
    }

    /// How many policies there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.policies.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// Who decides of an image on a `machine`.
    ///
    /// # Errors
    /// The reason, if nobody does. If several policies would have but for something, it is that of the first,
    /// whose name is given, too.
    pub fn select(
        &self,
        image: &Reference,
        machine: &Platform,
    ) -> Result<Selected<'_>, (Reason, Option<&str>)> {
        let subject = subject(image);
        let mut nearly = None;
        for policy in &self.policies {
            match policy.decide(&subject, machine) {
                None => {}
                Some(Ok(())) => {
                    let Policy { name, mode, behaviour, .. } = policy;
                    return Ok(Selected { policy: name, mode: *mode, behaviour: *behaviour });
                }
                Some(Err(reason)) => {
                    nearly.get_or_insert((reason, Some(policy.name.as_str())));
                }
            }
        }
        Err(nearly.unwrap_or((Reason::NoPolicy, None)))
    }
}

impl Policy {
    fn new(document: &HermesPolicy) -> Result<Self, BadPolicy> {
        let (name, spec) = (document.metadata.name.clone(), &document.spec);
        let regexes = |selectors: &[Selector]| {
            let compile = || {
                let compiled = selectors.iter().map(Selector::compile);
                let compiled = compiled.collect::<Result<Vec<_>, _>>()?;
                let all = RegexSet::new(compiled.iter().map(regex::Regex::as_str));
                // Together they may be too large.
                all.map_err(|err| BadSelector::of_all(&err))
            };
            compile().map_err(|source| BadPolicy::Selector { policy: name.clone(), source })
        };
        let (selects, excludes) = (regexes(&spec.image_selectors)?, regexes(&spec.exclude)?);
        let platform = |text: &String| {
            text.parse().map_err(|source| BadPolicy::Platform { policy: name.clone(), source })
        };
        Ok(Self {
            priority: spec.priority,
            paused: spec.paused,
            mode: spec.mode,
            selects,
            excludes,
            platforms: spec.platforms.iter().map(platform).collect::<Result<_, _>>()?,
            behaviour: Behaviour::of(spec),
            name,
        })
    }

    /// Whether it decides of the image, or why not; nothing if it does not know it.
    fn decide(&self, subject: &str, machine: &Platform) -> Option<Result<(), Reason>> {
        if !self.selects.is_match(subject) {
            return None;
        }
        let in_the_way = if self.excludes.is_match(subject) {
            Some(Reason::Excluded)
        } else if !self.platforms.is_empty()
            && !self.platforms.iter().any(|platform| platform.runs_on(machine))
        {
            Some(Reason::OtherPlatform)
        } else if self.paused {
            Some(Reason::Paused)
        } else {
            None
        };
        Some(in_the_way.map_or(Ok(()), Err))
    }
}

/// What selectors look at: the reference with its tag, or with its digest if it has no tag.
#[must_use]
pub fn subject(image: &Reference) -> String {
    match (image.tag(), image.digest()) {
        (None, Some(digest)) => format!("{}@{digest}", image.name()),
        _ => format!("{}:{}", image.name(), image.tag_or_latest()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::parse;

    fn set(specs: &[(&str, &str)]) -> Result<PolicySet, BadPolicy> {
        let documents = specs.iter().map(|(name, spec)| {
            format!(
                "---\napiVersion: {}\nkind: {}\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n",
                crate::API_VERSION,
                crate::KIND
            )
        });
        PolicySet::new(&parse(&documents.collect::<String>()).unwrap())
    }

    #[test]
    fn one_policy_decides_with_one_reason() {
        let check = |specs: &[(&str, &str)], expected: Result<&str, (Reason, Option<&str>)>| {
            let set = set(specs).unwrap();
            let machine = Platform::new("linux", "amd64");
            let image = "reg.test/app:1".parse().unwrap();
            let found = set.select(&image, &machine);
            let found = found.map(|selected| match selected.mode {
                Mode::Lazy => selected.policy.to_owned(),
                Mode::Eager => format!("{} eagerly", selected.policy),
            });
            let found = found.as_deref().map_err(|reason| *reason);
            assert_eq!(found, expected, "{specs:?}");
        };
        const APP: &str = "imageSelectors: [{glob: 'reg.test/*'}]";
        let with = |more: &str| format!("{APP}, {more}");
        check(&[], Err((Reason::NoPolicy, None)));
        check(&[("a", "")], Err((Reason::NoPolicy, None)));
        check(&[("a", "imageSelectors: [{glob: 'x/*'}]")], Err((Reason::NoPolicy, None)));
        check(&[("a", APP)], Ok("a"));
        check(&[("b", APP), ("a", APP)], Ok("a"));
        check(&[("b", &with("priority: 1")), ("a", APP)], Ok("b"));
        check(&[("a", &with("paused: true"))], Err((Reason::Paused, Some("a"))));
        check(&[("a", &with("paused: true")), ("b", APP)], Ok("b"));
        check(&[("a", &with("mode: eager"))], Ok("a eagerly"));
        check(&[("a", &with("mode: eager")), ("b", APP)], Ok("a eagerly"));
        check(&[("a", &with("mode: eager")), ("b", &with("priority: 1"))], Ok("b"));
        check(&[("a", &with("mode: eager, paused: true")), ("b", APP)], Ok("b"));
        let excluding = with("exclude: [{prefix: reg.test/app}]");
        check(&[("a", &excluding)], Err((Reason::Excluded, Some("a"))));
        check(&[("a", &excluding), ("b", APP)], Ok("b"));
        check(&[("a", &with("exclude: [{glob: '**:2'}]"))], Ok("a"));
        check(&[("a", &with("platforms: [linux/amd64]"))], Ok("a"));
        let arm = with("platforms: [linux/arm64]");
        check(&[("a", &arm)], Err((Reason::OtherPlatform, Some("a"))));
        check(&[("a", &with("paused: true")), ("b", &arm)], Err((Reason::Paused, Some("a"))));
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        let check = |specs: &[(&str, &str)], expected: &str| {
            let err = set(specs).unwrap_err();
            let err = causes::in_full(&err);
            assert!(err.contains(expected), "{specs:?}: {err}");
        };
        check(&[("a", "imageSelectors: [{imageRegex: '('}]")], "policy `a`: the selector `(`");
        check(&[("a", "exclude: [{glob: ''}]")], "it is empty");
        check(&[("a", "platforms: [linux]")], "`linux` is no platform");
        check(&[("a", ""), ("a", "")], "two policies `a`");
    }

    #[test]
    fn selectors_see_normalised_references() {
        let check = |image: &str, expected: &str| {
            assert_eq!(subject(&image.parse().unwrap()), expected);
        };
        let digest = format!("sha256:{}", "0".repeat(64));
        check("nginx", "docker.io/library/nginx:latest");
        check("reg.test:5000/a/b:1", "reg.test:5000/a/b:1");
        check(&format!("nginx@{digest}"), &format!("docker.io/library/nginx@{digest}"));
        check(&format!("nginx:1@{digest}"), "docker.io/library/nginx:1");
    }
}

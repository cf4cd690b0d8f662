//! Which images are meant, by what their references look like.

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Selects images by their whole normalised references, such as `docker.io/library/nginx:1`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Selector {
    /// A regular expression that must match all of the reference
    ImageRegex(String),
    /// `**` stands for anything, `*` for anything without a slash
    Glob(String),
    /// What the reference begins with
    Prefix(String),
}

/// A selector that selects nothing, since it cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the selector `{}` cannot be understood: {why}", text.escape_debug())]
pub struct BadSelector {
    text: String,
    why: String,
}

impl BadSelector {
    /// All selectors of a policy together.
    pub(crate) fn of_all(why: &regex::Error) -> Self {
        Self { text: "all of them".to_owned(), why: why.to_string() }
    }
}

impl Selector {
    /// The regular expression that does the same, for any number of references.
    pub(crate) fn compile(&self) -> Result<Regex, BadSelector> {
        let (text, expression) = match self {
            Self::ImageRegex(text) => (text, text.clone()),
            Self::Glob(text) => (text, glob(text)),
            Self::Prefix(text) => (text, format!("{}.*", regex::escape(text))),
        };
        if text.is_empty() {
            return Err(BadSelector { text: text.clone(), why: "it is empty".to_owned() });
        }
        // One that is unbalanced may have become something else within the brackets.
        let compiled =
            Regex::new(&expression).and_then(|_| Regex::new(&format!("^(?:{expression})$")));
        compiled.map_err(|err| BadSelector { text: text.clone(), why: err.to_string() })
    }
}

fn glob(text: &str) -> String {
    let parts = text.split("**").map(|part| {
        let parts: Vec<String> = part.split('*').map(regex::escape).collect();
        parts.join("[^/]*")
    });
    parts.collect::<Vec<_>>().join(".*")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_is_for_whole_references() {
        let check = |selector: Selector, reference: &str, expected: bool| {
            let found = selector.compile().unwrap().is_match(reference);
            assert_eq!(found, expected, "{selector:?} {reference}");
        };
        let glob = |text: &str| Selector::Glob(text.to_owned());
        check(glob("reg.test/app:1"), "reg.test/app:1", true);
        check(glob("reg.test/app:1"), "regxtest/app:1", false);
        check(glob("reg.test/app"), "reg.test/app:1", false);
        check(glob("reg.test/*"), "reg.test/app:1", true);
        check(glob("reg.test/*"), "reg.test/team/app:1", false);
        check(glob("reg.test/**"), "reg.test/team/app:1", true);
        check(glob("**"), "reg.test:5000/a/b@sha256:0", true);
        check(glob("*/app*"), "reg.test/app:1", true);
        let regex = |text: &str| Selector::ImageRegex(text.to_owned());
        check(regex("reg.test/.*"), "reg.test/app:1", true);
        check(regex("app"), "reg.test/app:1", false);
        check(regex("a|reg.test/app:1"), "reg.test/app:1", true);
        check(regex("a|reg.test/app:1"), "areg.test/app:1", false);
        let prefix = |text: &str| Selector::Prefix(text.to_owned());
        check(prefix("reg.test/a"), "reg.test/app:1", true);
        check(prefix("reg.test/a"), "regxtest/app:1", false);
        check(prefix("eg.test/a"), "reg.test/app:1", false);
    }

    #[test]
    fn what_cannot_be_understood_is_said() {
        for text in ["", "(", "a)(b", "[", "a{99999999}"] {
            let err = Selector::ImageRegex(text.to_owned()).compile().unwrap_err();
            assert!(err.to_string().contains("cannot be understood"), "{err}");
        }
    }
}

//! Which images are meant, by what their references look like.

use std::str::FromStr;

use regex::Regex;

/// Images, by their whole references: `**` stands for anything, `*` for anything without a slash.
#[derive(Debug, Clone)]
pub(crate) struct Pattern {
    text: String,
    expression: Regex,
}

impl FromStr for Pattern {
    type Err = regex::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split("**").map(|part| {
            let parts: Vec<String> = part.split('*').map(regex::escape).collect();
            parts.join("[^/]*")
        });
        let expression = Regex::new(&format!("^{}$", parts.collect::<Vec<_>>().join(".*")))?;
        Ok(Self { text: text.to_owned(), expression })
    }
}

impl Pattern {
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn matches(&self, reference: &str) -> bool {
        self.expression.is_match(reference)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_for_whole_references() {
        let check = |pattern: &str, reference: &str, expected: bool| {
            let found = pattern.parse::<Pattern>().unwrap().matches(reference);
            assert_eq!(found, expected, "{pattern} {reference}");
        };
        check("reg.test/app:1", "reg.test/app:1", true);
        check("reg.test/app:1", "regxtest/app:1", false);
        check("reg.test/app", "reg.test/app:1", false);
        check("reg.test/*", "reg.test/app:1", true);
        check("reg.test/*", "reg.test/team/app:1", false);
        check("reg.test/**", "reg.test/team/app:1", true);
        check("**", "reg.test:5000/a/b@sha256:0", true);
        check("*/app*", "reg.test/app:1", true);
        check("", "a", false);
    }
}

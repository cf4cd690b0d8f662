//! Which images are meant, by what their references look like.

/// Images, by their references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pattern(String);

impl std::str::FromStr for Pattern {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl Pattern {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the whole of `reference` is as the pattern has it: `**` stands for anything, `*` for
    /// anything without a slash.
    pub(crate) fn matches(&self, reference: &str) -> bool {
        matches(self.0.as_bytes(), reference.as_bytes())
    }
}

fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', b'*', rest @ ..] => (0..=text.len()).any(|n| matches(rest, &text[n..])),
        [b'*', rest @ ..] => {
            let most = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
            (0..=most).any(|n| matches(rest, &text[n..]))
        }
        [first, rest @ ..] => {
            text.split_first().is_some_and(|(byte, text)| byte == first && matches(rest, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_for_whole_references() {
        let check = |pattern: &str, reference: &str, expected: bool| {
            assert_eq!(
                Pattern(pattern.to_owned()).matches(reference),
                expected,
                "{pattern} {reference}"
            );
        };
        check("reg.test/app:1", "reg.test/app:1", true);
        check("reg.test/app", "reg.test/app:1", false);
        check("reg.test/*", "reg.test/app:1", true);
        check("reg.test/*", "reg.test/team/app:1", false);
        check("reg.test/**", "reg.test/team/app:1", true);
        check("**", "reg.test:5000/a/b@sha256:0", true);
        check("*/app*", "reg.test/app:1", true);
        check("", "a", false);
    }
}

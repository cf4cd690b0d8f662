//! The filters of `List`, in containerd's language.
//!
//! ```text
//! filter   := selector (',' selector)*
//! selector := field ('.' field)* [operator value]
//! operator := '==' | '!=' | '~='
//! ```
//!
//! A field is an identifier or a Go string; a value is a Go string, or a run of anything but spaces and
//! commas. All selectors of a filter must match. `~=` is a regular expression that may match anywhere.

use regex::Regex;

use crate::store::Info;

/// One filter.
#[derive(Debug)]
pub(crate) struct Filter(Vec<Selector>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
    /// A pattern that is none matches nothing.
    Matches(Option<Regex>),
}

/// A filter that cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?}: at byte {at}: {expected} expected")]
pub(crate) struct ParseFilterError {
    filter: String,
    at: usize,
    expected: &'static str,
}

impl Filter {
    /// Reads a filter; an empty one matches everything.
    pub(crate) fn parse(text: &str) -> Result<Self, ParseFilterError> {
        let mut parser = Parser { text, at: 0 };
        if text.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let mut selectors = vec![parser.selector()?];
        while parser.take(",") {
            selectors.push(parser.selector()?);
        }
        match parser.rest() {
            "" => Ok(Self(selectors)),
            _ => Err(parser.expected("a comma or the end")),
        }
    }

    pub(crate) fn matches(&self, info: &Info) -> bool {
        self.0.iter().all(|selector| selector.matches(info))
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = self.value(info);
        let text = value.unwrap_or_default();
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::Unequal(unwanted) => text != unwanted,
            Test::Matches(pattern) => {
                pattern.as_ref().is_some_and(|pattern| pattern.is_match(text))
            }
        }
    }

    fn value<'i>(&self, info: &'i Info) -> Option<&'i str> {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        match path.as_slice() {
            ["name"] => Some(&info.name),
            ["parent"] => Some(info.parent.as_deref().unwrap_or_default()),
            ["kind"] => Some(info.kind.name()),
            ["labels", rest @ ..] if !rest.is_empty() => {
                info.labels.get(&rest.join(".")).map(String::as_str)
            }
            _ => None,
        }
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Parser<'t> {
    fn rest(&self) -> &'t str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn expected(&self, expected: &'static str) -> ParseFilterError {
        ParseFilterError { filter: self.text.to_owned(), at: self.at, expected }
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn run(&mut self, belongs: impl Fn(char) -> bool) -> &'t str {
        let rest = self.rest();
        let len = rest.find(|c: char| !belongs(c)).unwrap_or(rest.len());
        self.at += len;
        rest.get(..len).unwrap_or_default()
    }

    fn selector(&mut self) -> Result<Selector, ParseFilterError> {
        let mut path = vec![self.field()?];
        while self.take(".") {
            path.push(self.field()?);
        }
        let test = if self.take("==") {
            Test::Equal(self.value()?)
        } else if self.take("!=") {
            Test::Unequal(self.value()?)
        } else if self.take("~=") {
            Test::Matches(Regex::new(&self.value()?).ok())
        } else {
            Test::Present
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, ParseFilterError> {
        if let Some(quoted) = self.quoted()? {
            return Ok(quoted);
        }
        let starts = |c: char| c.is_ascii_alphabetic() || c == '_';
        if !self.rest().starts_with(starts) {
            return Err(self.expected("the name of a field"));
        }
        Ok(self.run(|c| c.is_ascii_alphanumeric() || c == '_').to_owned())
    }

    fn value(&mut self) -> Result<String, ParseFilterError> {
        if let Some(quoted) = self.quoted()? {
            return Ok(quoted);
        }
        match self.run(|c| !c.is_whitespace() && c != ',') {
            "" => Err(self.expected("a value")),
            bare => Ok(bare.to_owned()),
        }
    }

    /// A Go string, if one begins here: in back quotes as it is, in double quotes with escapes.
    fn quoted(&mut self) -> Result<Option<String>, ParseFilterError> {
        if self.take("`") {
            let raw = self.run(|c| c != '`').to_owned();
            return if self.take("`") { Ok(Some(raw)) } else { Err(self.expected("a back quote")) };
        }
        if !self.take("\"") {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        loop {
            bytes.extend_from_slice(self.run(|c| c != '"' && c != '\\').as_bytes());
            if self.take("\"") {
                let text = String::from_utf8(bytes);
                return text.map(Some).map_err(|_not_text| self.expected("UTF-8 in the quotes"));
            }
            if !self.take("\\") {
                return Err(self.expected("a closing quote"));
            }
            self.escape(&mut bytes)?;
        }
    }

    fn escape(&mut self, out: &mut Vec<u8>) -> Result<(), ParseFilterError> {
        let simple = [
            ("a", 7),
            ("b", 8),
            ("f", 12),
            ("n", b'\n'),
            ("r", b'\r'),
            ("t", b'\t'),
            ("v", 11),
            ("\\", b'\\'),
            ("\"", b'"'),
            ("'", b'\''),
        ];
        if let Some((_, byte)) = simple.into_iter().find(|(name, _)| self.take(name)) {
            out.push(byte);
            return Ok(());
        }
        let (digits, radix) = match self.rest().chars().next() {
            Some('x') => (2, 16),
            Some('u') => (4, 16),
            Some('U') => (8, 16),
            Some('0'..='7') => (3, 8),
            _ => return Err(self.expected("a known escape")),
        };
        let is_character = digits > 3;
        self.at += usize::from(radix == 16);
        let code = self.rest().get(..digits).and_then(|text| u32::from_str_radix(text, radix).ok());
        let Some(code) = code else { return Err(self.expected("digits of an escape")) };
        self.at += digits;
        if !is_character {
            out.push(u8::try_from(code).map_err(|_too_large| self.expected("a byte"))?);
            return Ok(());
        }
        let character = char::from_u32(code).ok_or_else(|| self.expected("a character"))?;
        out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::SystemTime;

    use super::*;
    use crate::store::Kind;

    fn info() -> Info {
        let labels = [("a", "1"), ("b.c/d", "x,y"), ("empty", "")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Info {
            name: "k8s.io/1/top".to_owned(),
            parent: None,
            kind: Kind::Committed,
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            labels: BTreeMap::from(labels),
        }
    }

    #[track_caller]
    fn check(filter: &str, expected: bool) {
        assert_eq!(Filter::parse(filter).unwrap().matches(&info()), expected, "{filter}");
    }

    #[test]
    fn a_filter_matches_what_it_says() {
        for filter in [
            "",
            "name==k8s.io/1/top",
            "name",
            "parent==\"\"",
            "parent",
            "kind==committed",
            "kind!=active,name~=top$",
            "labels.a==1",
            "labels.\"b.c/d\"==\"x,y\"",
            "labels.`a`",
            "labels.none!=1",
            "labels.none~=^$",
            "labels.empty",
            "name~=\"k8s\\\\.io\"",
            "labels.\"\\x61\"==\"\\u0031\"",
        ] {
            check(filter, true);
        }
        for filter in [
            "name==top",
            "parent!=\"\"",
            "kind==active",
            "kind==committed,labels.a==2",
            "labels.none",
            "labels.none==\"\"",
            "labels",
            "size",
            "name~=\"(\"",
        ] {
            check(filter, false);
        }
    }

    #[test]
    fn unquoted_parts_of_a_label_are_joined_with_dots() {
        let labels = BTreeMap::from([("x.y.z".to_owned(), "1".to_owned())]);
        let info = Info { labels, ..info() };
        assert!(Filter::parse("labels.x.y.z==1").unwrap().matches(&info));
    }

    #[test]
    fn what_is_no_filter_is_refused_with_its_place() {
        let check = |filter: &str, at: usize| {
            assert_eq!(Filter::parse(filter).unwrap_err().at, at, "{filter}");
        };
        check("==1", 0);
        check("name==", 6);
        check("name=1", 4);
        check("name==a b", 7);
        check("name,", 5);
        check("labels.\"a", 9);
        check("labels.\"\\q\"", 9);
        check("labels.\"\\xff\"", 13);
        check("labels.\"\\ud800\"", 14);
    }
}

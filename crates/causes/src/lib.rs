//! An error and all its causes in one line, for logs and users.
#![forbid(unsafe_code)]

use std::error::Error;

/// What happened, and why: each cause after a colon, unless the text before ends with it already.
#[must_use]
pub fn in_full(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Told(&'static str, Option<Box<Self>>);

    impl fmt::Display for Told {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Told {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as &dyn Error)
        }
    }

    #[test]
    fn each_cause_is_said_once() {
        let check = |words: &[&'static str], expected: &str| {
            let chain =
                |cause: Option<Box<Told>>, word: &&'static str| Some(Box::new(Told(word, cause)));
            let err = words.iter().rev().fold(None, chain).unwrap();
            assert_eq!(in_full(&*err), expected);
        };
        check(&["mounting"], "mounting");
        check(&["mounting", "reading", "no such file"], "mounting: reading: no such file");
        check(&["reading: no such file", "no such file"], "reading: no such file");
    }
}

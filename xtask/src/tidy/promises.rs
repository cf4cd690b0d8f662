//! Every promise in `SPECIFICATION.md` names the tests that prove it, and they exist.
//!
//! A promise is a numbered list item, `1. Text`, possibly over several indented lines. It ends with
//! ``Proof: `name`, `name` ``, where each name is that of a test function, with or without the path
//! before it.

use std::collections::HashSet;

use super::SourceFile;

const FILE: &str = "SPECIFICATION.md";
const PROOF: &str = "Proof:";

/// Promises without proof, and proofs that do not exist.
pub(super) fn check(files: &[SourceFile]) -> Vec<String> {
    let Some(specification) = files.iter().find(|file| file.path == FILE) else {
        return vec![format!("{FILE}: is missing")];
    };
    let tests: HashSet<&str> = files
        .iter()
        .filter(|file| file.path.ends_with(".rs"))
        .flat_map(|file| test_names(&file.text))
        .collect();
    let promises = promises(&specification.text);
    if promises.is_empty() {
        return vec![format!("{FILE}: promises nothing")];
    }
    promises.iter().flat_map(|promise| check_promise(promise, &tests)).collect()
}

/// The line number and the text of one promise.
#[derive(Debug, PartialEq, Eq)]
struct Promise {
    line: usize,
    text: String,
}

fn promises(text: &str) -> Vec<Promise> {
    let mut promises: Vec<Promise> = Vec::new();
    let mut open = false;
    for (content, line) in text.lines().zip(1..) {
        if is_numbered(content) {
            promises.push(Promise { line, text: content.to_owned() });
            open = true;
        } else if content.is_empty() || !content.starts_with(' ') {
            open = false;
        } else if let (true, Some(last)) = (open, promises.last_mut()) {
            last.text.push(' ');
            last.text.push_str(content.trim());
        }
    }
    promises
}

fn is_numbered(line: &str) -> bool {
    let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
    rest.len() < line.len() && rest.starts_with(". ")
}

fn check_promise(promise: &Promise, tests: &HashSet<&str>) -> Vec<String> {
    let problem = |what: String| format!("{FILE}: line {}: {what}", promise.line);
    let Some((_, proof)) = promise.text.rsplit_once(PROOF) else {
        return vec![problem(format!("the promise does not end with `{PROOF}` and test names"))];
    };
    let names: Vec<&str> = proof.split('`').skip(1).step_by(2).collect();
    if names.is_empty() {
        return vec![problem(format!("no test name in backticks after `{PROOF}`"))];
    }
    let function = |name: &str| name.rsplit("::").next().unwrap_or(name).to_owned();
    names
        .iter()
        .filter(|name| !tests.contains(function(name).as_str()))
        .map(|name| problem(format!("there is no test `{name}`")))
        .collect()
}

/// Functions that carry a test attribute, or stand in a `proptest!` block with one.
fn test_names(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut marked = false;
    for line in text.lines().map(str::trim_start) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            marked = true;
        } else if let Some(name) = function_name(line) {
            if marked {
                names.push(name);
            }
            marked = false;
        }
    }
    names
}

fn function_name(line: &str) -> Option<&str> {
    let line = line.strip_prefix("async ").unwrap_or(line);
    line.strip_prefix("fn ")?.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &str = "//! X.\n#[test]\nfn reads_right() {}\n\nfn helps() {}\n\
        #[tokio::test(flavor = \"x\")]\n#[cfg(y)]\nasync fn waits() {}\n";

    #[track_caller]
    fn check_specification(text: &str, expected: &[&str]) {
        let files = [(FILE, text), ("crates/a/src/lib.rs", CODE)]
            .map(|(path, text)| SourceFile { path: path.into(), text: text.into() });
        let found = check(&files);
        let matches =
            found.len() == expected.len() && found.iter().zip(expected).all(|(f, e)| f.contains(e));
        assert!(matches, "found {found:#?}, expected {expected:#?}");
    }

    #[test]
    fn proofs_are_looked_up() {
        check_specification("# S\n1. Right. Proof: `reads_right`, `a::waits`\n", &[]);
        check_specification("1. Over\n   two lines.\n   Proof: `waits`\n2. B.\n", &["line 4"]);
        check_specification("1. A. Proof: `helps`\n", &["no test `helps`"]);
        check_specification("1. A. Proof: none\n", &["no test name in backticks"]);
        check_specification("# S\n", &["promises nothing"]);
    }

    #[test]
    fn a_missing_specification_is_a_breach() {
        assert_eq!(check(&[]).len(), 1);
    }
}

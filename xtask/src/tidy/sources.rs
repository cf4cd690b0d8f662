//! Rules about single files.

use super::SourceFile;

/// The most lines a file of Rust may have, without its tests.
const MAX_LINES: usize = 1000;

/// Words that say nothing about what a thing is.
const EMPTY_WORDS: &[&str] = &[
    "manager",
    "helper",
    "helpers",
    "util",
    "utils",
    "handler",
    "handlers",
    "processor",
    "common",
    "misc",
];

/// Where such a word is somebody's term: a path's beginning, and the word.
const TERMS: &[(&str, &str)] = &[
    // Docker calls a program that keeps passwords a credential helper.
    ("crates/registry/src/credentials", "Helper"),
];

/// What must not stand in Rust code, and why. Split, so that this file does not contain it.
const FORBIDDEN: &[(&str, &str)] = &[
    (concat!("#[", "ignore"), "a test runs or does not exist"),
    (concat!("should_", "panic"), "assert on the error instead"),
    (concat!("thread::", "sleep"), "wait for a condition"),
    (concat!("todo", "!("), "no stubs"),
    (concat!("unimplemented", "!("), "no stubs"),
    (concat!("dbg", "!("), "a trace of debugging"),
];

/// Folders of the machines that this project is developed on.
const FOREIGN_PATHS: &[&str] =
    &[concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!("/ro", "ot/")];

/// What is wrong with `file`.
pub(super) fn check(file: &SourceFile) -> Vec<String> {
    let mut problems = Vec::new();
    if file.path.ends_with(".rs") {
        check_rust(file, &mut problems);
    }
    if !file.path.ends_with(".lock") && !file.path.ends_with("go.sum") {
        check_paths(file, &mut problems);
    }
    if let Some(name) = file.path.strip_prefix("docs/design/") {
        check_design_note(name, &file.text, &mut problems);
    }
    problems
}

fn check_rust(file: &SourceFile, problems: &mut Vec<String>) {
    let n = n_lines_without_tests(file);
    if n > MAX_LINES {
        problems.push(format!("{n} lines without tests, more than {MAX_LINES}: split it"));
    }
    if !starts_with_its_purpose(&file.text) {
        problems.push("does not open with `//!`: say what the file is, and is not".into());
    }
    for part in file.path.trim_end_matches(".rs").split('/').flat_map(|p| p.split(['_', '-'])) {
        if EMPTY_WORDS.contains(&part) {
            problems.push(format!("`{part}` in the path says nothing"));
        }
    }
    for (line, n) in file.text.lines().zip(1..) {
        let is_term =
            |word: &&str| TERMS.iter().any(|(p, term)| file.path.starts_with(p) && term == word);
        if let Some(word) = defined_type(line).and_then(empty_word).filter(|w| !is_term(w)) {
            problems.push(format!("line {n}: `{word}` in a type's name says nothing"));
        }
        for (forbidden, why) in FORBIDDEN {
            if line.contains(forbidden) {
                problems.push(format!("line {n}: `{forbidden}`: {why}"));
            }
        }
        if line.contains(concat!("TO", "DO")) && !line.contains(concat!("TO", "DO(#")) {
            problems.push(format!("line {n}: an open end without the number of its issue"));
        }
        let opts_out = ["expect(unsafe_code", "allow(unsafe_code"].iter().any(|w| line.contains(w));
        if opts_out && !file.path.starts_with("crates/sys/") && !file.path.starts_with("xtask/") {
            problems.push(format!("line {n}: unsafe code belongs into crates/sys"));
        }
    }
}

/// Lines up to the tests at the end of the file; none in a file that is all tests.
fn n_lines_without_tests(file: &SourceFile) -> usize {
    if file.path.ends_with("tests.rs") || file.path.contains("/tests/") {
        return 0;
    }
    let mut lines = file.text.lines().peekable();
    let mut n = 0;
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]" && lines.peek().is_some_and(|next| next.starts_with("mod ")) {
            break;
        }
        n += 1;
    }
    n
}

/// Whether the first line that is neither empty nor `#![no_main]` is a comment about the file.
fn starts_with_its_purpose(text: &str) -> bool {
    let mut lines = text.lines().filter(|line| !line.is_empty() && *line != "#![no_main]");
    lines.next().is_some_and(|line| line.starts_with("//!"))
}

/// The name of the type or trait that `line` defines.
fn defined_type(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
    matches!(words.next()?, "struct" | "enum" | "trait" | "type" | "union").then_some(())?;
    words.next()?.split(|c: char| !c.is_alphanumeric()).next()
}

/// The first word of a CamelCase name that says nothing.
fn empty_word(name: &str) -> Option<&str> {
    let mut starts: Vec<usize> =
        name.char_indices().filter(|(_, c)| c.is_ascii_uppercase()).map(|(at, _)| at).collect();
    starts.push(name.len());
    let words = starts.windows(2).filter_map(|ends| name.get(ends[0]..ends[1]));
    words.into_iter().find(|word| EMPTY_WORDS.contains(&word.to_lowercase().as_str()))
}

fn check_paths(file: &SourceFile, problems: &mut Vec<String>) {
    for (line, n) in file.text.lines().zip(1..) {
        for foreign in FOREIGN_PATHS {
            // Only where a path starts: below another folder the name is somebody else's.
            let found = line.match_indices(foreign).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                !before.is_some_and(|c| c.is_alphanumeric() || "._-})>~*".contains(c))
            });
            if found {
                problems.push(format!("line {n}: `{foreign}` is a path of one machine"));
            }
        }
    }
}

/// A note is `NNNN-title.md` and says when it was decided.
fn check_design_note(name: &str, text: &str, problems: &mut Vec<String>) {
    let (number, title) = name.split_at(name.len().min(4));
    if !number.chars().all(|c| c.is_ascii_digit()) || !title.starts_with('-') {
        problems.push("a design note is named NNNN-title.md".into());
    }
    let date = text.lines().filter_map(|line| line.strip_prefix("Date: ")).find(|date| {
        let shape = date.bytes().map(|b| if b.is_ascii_digit() { b'0' } else { b });
        shape.eq(*b"0000-00-00")
    });
    if date.is_none() {
        problems.push("a design note has a line `Date: YYYY-MM-DD`".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_file(path: &str, text: &str, expected: &[&str]) {
        let file = SourceFile { path: path.into(), text: text.into() };
        let found = check(&file);
        let matches =
            found.len() == expected.len() && found.iter().zip(expected).all(|(f, e)| f.contains(e));
        assert!(matches, "{path}: found {found:#?}, expected {expected:#?}");
    }

    #[test]
    fn rust_files() {
        check_file("crates/a/src/lib.rs", "//! A.\nfn a() {}\n", &[]);
        check_file("crates/a/src/lib.rs", "fn a() {}\n", &["does not open"]);
        check_file("fuzz/fuzz_targets/a.rs", "#![no_main]\n//! A.\n", &[]);
        check_file("crates/a/src/utils.rs", "//! A.\n", &["`utils` in the path"]);
        check_file("crates/a/src/file_handler.rs", "//! A.\n", &["`handler` in the path"]);
        check_file("crates/a/src/commonwealth.rs", "//! A.\n", &[]);
    }

    #[test]
    fn names_of_types() {
        check_file("a.rs", "//! A.\npub(crate) struct CacheManager<T> {\n", &["line 2: `Manager`"]);
        check_file("a.rs", "//! A.\nenum SpanState {\n", &[]);
        check_file("a.rs", "//! A.\nstruct Handlers;\n", &["`Handlers`"]);
        check_file("a.rs", "//! A.\nstruct Utility;\n", &[]);
        check_file("crates/registry/src/credentials.rs", "//! A.\nenum HelperProblem {\n", &[]);
        check_file("crates/registry/src/client.rs", "//! A.\nenum HelperProblem {\n", &["Helper"]);
    }

    #[test]
    fn forbidden_code() {
        for (forbidden, _) in FORBIDDEN {
            check_file("a.rs", &format!("//! A.\n    {forbidden}\n"), &["line 2"]);
        }
        check_file("a.rs", concat!("//! A.\n// TO", "DO: later\n"), &["line 2"]);
        check_file("a.rs", concat!("//! A.\n// TO", "DO(#7): later\n"), &[]);
        check_file("crates/sys/src/a.rs", "//! A.\n#![expect(unsafe_code)]\n", &[]);
        check_file("crates/a/src/a.rs", "//! A.\n#![expect(unsafe_code)]\n", &["crates/sys"]);
    }

    #[test]
    fn length_without_tests() {
        let long = format!("//! A.\n{}", "x\n".repeat(MAX_LINES));
        check_file("a.rs", &long, &["1001 lines"]);
        check_file("crates/a/tests/a.rs", &long, &[]);
        let tested = format!("//! A.\n#[cfg(test)]\nmod tests {{\n{}", "x\n".repeat(MAX_LINES));
        check_file("a.rs", &tested, &[]);
    }

    #[test]
    fn paths_of_one_machine() {
        check_file("README.md", concat!("see /wo", "rk/main\n"), &["line 1"]);
        check_file("README.md", concat!("`/ro", "ot/.cargo`\n"), &["line 1"]);
        check_file("README.md", concat!("over/wo", "rk/x and /proc/1/ro", "ot/x\n"), &[]);
    }

    #[test]
    fn design_notes() {
        check_file("docs/design/0001-why.md", "# Why\nDate: 2026-11-21\n", &[]);
        check_file("docs/design/why.md", "# Why\nDate: today\n", &["NNNN", "Date"]);
    }
}

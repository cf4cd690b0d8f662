//! Which modules a Python source file imports as it is loaded, from what the file says.
//!
//! Python loads modules one after the other: it opens one, runs it, and meets in it the name of the next. A
//! service that imports a thousand waits for a thousand places of its image in turn, though their names stand
//! in the sources (The Python Language Reference, sections 2.1 and 7.11). What is found is a guess: a name that
//! is put together as the program runs is not found, and one in a branch that is not taken is.

/// An `import`, as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Import {
    /// How many dots are before the name: 0 for a name that is looked for in Python's path, 1 for one in the
    /// file's own package, one more for each package above that.
    pub level: usize,
    /// The names of the module, from the outermost package on; none for `from . import`.
    pub module: Vec<Vec<u8>>,
    /// What is taken out of it, which may be modules, too.
    pub names: Vec<Vec<u8>>,
}

/// What `source` imports when it is loaded, in the order of its lines; `is_main` says that it is the program
/// itself. Not what its functions import when they are called, nor what is there for type checkers only.
#[must_use]
pub fn imports(source: &[u8], is_main: bool) -> Vec<Import> {
    let mut found = Vec::new();
    // Lines that are further to the right than this are skipped.
    let mut skipped = None;
    let mut lines = Lines { rest: source };
    while let Some(Line { indent, text }) = lines.next_line() {
        let is_blank = text.trim_ascii().is_empty();
        if is_blank || skipped.is_some_and(|column| indent > column) {
            continue;
        }
        skipped = None;
        for statement in text.split(|byte| *byte == b';') {
            match statement_of(statement, is_main) {
                Statement::Skipped => skipped = Some(indent),
                Statement::Imports(imports) => found.extend(imports),
            }
            if found.len() >= MOST_IMPORTS {
                return found;
            }
        }
    }
    found
}

/// The modules that a compiled module may import, by its constants: all names with a dot that stand there as C
/// strings, in their order. Cython writes an import so; what else has that form is mostly no module's name.
#[must_use]
pub fn named(constants: &[u8]) -> Vec<Import> {
    let strings = constants.split(|byte| *byte == 0);
    let modules = strings.filter_map(|string| {
        if string.len() > LONGEST_NAME || string.first().is_none_or(u8::is_ascii_digit) {
            return None;
        }
        let (module, rest) = dotted(string);
        let dots = module.len().checked_sub(1)?;
        let written = module.iter().map(Vec::len).sum::<usize>() + dots;
        let is_name = dots > 0 && rest.is_empty() && written == string.len();
        is_name.then_some(Import { module, ..Import::default() })
    });
    modules.take(MOST_IMPORTS).collect()
}

/// A statement on one line, or the first line of one.
enum Statement {
    /// What is in it does not run when the file is loaded.
    Skipped,
    Imports(Vec<Import>),
}

fn statement_of(text: &[u8], is_main: bool) -> Statement {
    let text = text.trim_ascii();
    let (first, rest) = word(text);
    match first {
        b"def" | b"async" => Statement::Skipped,
        b"if" => {
            let condition =
                rest.split(|byte| *byte == b':').next().unwrap_or_default().trim_ascii();
            let is_program = condition.starts_with(b"__name__");
            match is_program && !is_main || condition.ends_with(b"TYPE_CHECKING") {
                true => Statement::Skipped,
                false => Statement::Imports(Vec::new()),
            }
        }
        b"try" | b"else" | b"finally" => match rest.trim_ascii_start().strip_prefix(b":") {
            Some(rest) if !rest.trim_ascii().is_empty() => statement_of(rest, is_main),
            _ => Statement::Imports(Vec::new()),
        },
        b"import" => {
            let modules = rest.split(|byte| *byte == b',').map(|part| dotted(part).0);
            let modules = modules.filter(|module| !module.is_empty());
            Statement::Imports(
                modules.map(|module| Import { module, ..Import::default() }).collect(),
            )
        }
        b"from" => Statement::Imports(from(rest).into_iter().collect()),
        _ => Statement::Imports(Vec::new()),
    }
}

/// What stands behind `from`.
fn from(text: &[u8]) -> Option<Import> {
    let text = text.trim_ascii_start();
    let is_dot = |byte: &u8| *byte == b'.' || byte.is_ascii_whitespace();
    let dots = text.iter().take_while(|byte| is_dot(byte)).count();
    let (dots, text) = text.split_at_checked(dots)?;
    let level = dots.iter().filter(|byte| **byte == b'.').count();
    let (module, rest) = match word(text).0 {
        b"import" => (Vec::new(), text),
        _ => dotted(text),
    };
    if module.is_empty() && level == 0 {
        return None;
    }
    let (b"import", names) = word(rest.trim_ascii_start()) else { return None };
    let names = names.split(|byte| matches!(*byte, b',' | b'(' | b')'));
    let names = names.map(|name| word(name.trim_ascii()).0).filter(|name| !name.is_empty());
    Some(Import { level, module, names: names.map(<[u8]>::to_vec).collect() })
}

/// The names before and between dots, and what follows them.
fn dotted(text: &[u8]) -> (Vec<Vec<u8>>, &[u8]) {
    let mut rest = text.trim_ascii_start();
    let mut names = Vec::new();
    loop {
        let (name, after) = word(rest);
        if name.is_empty() {
            return (names, rest);
        }
        names.push(name.to_vec());
        match after.trim_ascii_start().strip_prefix(b".") {
            Some(next) => rest = next.trim_ascii_start(),
            None => return (names, after),
        }
    }
}

/// The name at the beginning of `text`, and what follows it.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || !byte.is_ascii();
    text.split_at(text.iter().take_while(|byte| is_name(byte)).count())
}

/// A logical line: without comments, strings as `"`, on one line whatever it is on in the file.
struct Line {
    /// How many columns it is to the right.
    indent: usize,
    text: Vec<u8>,
}

struct Lines<'a> {
    rest: &'a [u8],
}

impl Lines<'_> {
    fn next_line(&mut self) -> Option<Line> {
        let indent = self.indent();
        let (mut text, mut depth) = (Vec::new(), 0_usize);
        let mut byte = self.take()?;
        loop {
            match byte {
                b'\n' if depth == 0 => break,
                b'#' => {
                    let end = self.rest.iter().position(|byte| *byte == b'\n');
                    self.skip(end.unwrap_or(self.rest.len()));
                }
                b'"' | b'\'' => {
                    self.skip_string(byte);
                    push(&mut text, b'"');
                }
                b'\\' => {
                    let end = [b"\n".as_slice(), b"\r\n"].into_iter();
                    let end = end.filter(|end| self.rest.starts_with(end)).map(<[u8]>::len).max();
                    self.skip(end.unwrap_or_default());
                    push(&mut text, b' ');
                }
                _ => {
                    match byte {
                        b'(' | b'[' | b'{' => depth += 1,
                        b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    push(&mut text, byte);
                }
            }
            match self.take() {
                Some(next) => byte = next,
                None => break,
            }
        }
        Some(Line { indent, text })
    }

    /// The columns before the line's first character.
    fn indent(&mut self) -> usize {
        let mut columns = 0;
        while let Some((byte, rest)) = self.rest.split_first() {
            columns = match byte {
                b' ' => columns + 1,
                b'\t' => columns / TAB * TAB + TAB,
                _ => break,
            };
            self.rest = rest;
        }
        columns
    }

    /// Passes a string whose first quotation mark was taken.
    fn skip_string(&mut self, quote: u8) {
        let triple = [quote; 2];
        let is_long = self.rest.starts_with(&triple);
        self.skip(if is_long { triple.len() } else { 0 });
        // One that is not closed ends with its line all the same.
        while !self.rest.starts_with(b"\n") || is_long {
            let Some(byte) = self.take() else { return };
            match byte {
                b'\\' => self.skip(1),
                _ if byte == quote && !is_long => return,
                _ if byte == quote && self.rest.starts_with(&triple) => {
                    self.skip(triple.len());
                    return;
                }
                _ => {}
            }
        }
    }

    fn take(&mut self) -> Option<u8> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*byte)
    }

    fn skip(&mut self, bytes: usize) {
        self.rest = self.rest.get(bytes..).unwrap_or_default();
    }
}

/// What is longer is no import, but data.
fn push(text: &mut Vec<u8>, byte: u8) {
    if text.len() < LONGEST_LINE {
        text.push(byte);
    }
}

/// More imports of one file are not looked at.
const MOST_IMPORTS: usize = 4096;

/// Longer names of modules are not looked at, in bytes.
const LONGEST_NAME: usize = 256;

/// Bytes of a logical line that are looked at.
const LONGEST_LINE: usize = 64 << 10;

/// Columns from one stop to the next.
const TAB: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// Imports as they would be written on one line each.
    fn written(source: &str, is_main: bool) -> Vec<String> {
        let text = |name: &Vec<u8>| String::from_utf8(name.clone()).unwrap();
        let write = |import: Import| {
            let module: Vec<String> = import.module.iter().map(text).collect();
            let names: Vec<String> = import.names.iter().map(text).collect();
            let module = format!("{}{}", ".".repeat(import.level), module.join("."));
            if names.is_empty() { module } else { format!("{module}: {}", names.join(" ")) }
        };
        imports(source.as_bytes(), is_main).into_iter().map(write).collect()
    }

    #[track_caller]
    fn check(source: &str, expected: &[&str]) {
        assert_eq!(written(source, false), expected, "{source:?}");
    }

    #[test]
    fn imports_are_found_in_all_their_forms() {
        check("import os", &["os"]);
        check("import os, a.b.c as d ; import e", &["os", "a.b.c", "e"]);
        check("from a.b import c as d, e\n", &["a.b: c e"]);
        check("from . import x", &[".: x"]);
        check("from.x import y", &[".x: y"]);
        check("from .. a . b import y", &["..a.b: y"]);
        check("from ...x import(y,\n  # one\n  z)\nimport k", &["...x: y z", "k"]);
        check("from a import *", &["a"]);
        check("from a import \\\n  b, \\\r\n  c", &["a: b c"]);
        check(
            "try: import a\nexcept ImportError:\n  import b\nelse:\n\timport c",
            &["a", "b", "c"],
        );
        check("class A:\n  import a", &["a"]);
        check("if sys.platform == 'linux':\n  import a\nelse:\n  import b", &["a", "b"]);
        check("import é", &["é"]);
        check("", &[]);
    }

    #[test]
    fn a_compiled_module_names_modules_in_strings_of_their_own() {
        let names = |constants: &str| -> Vec<String> {
            let modules = named(constants.as_bytes()).into_iter();
            let parts = modules.map(|import| import.module.join(b".".as_slice()));
            parts.map(|name| String::from_utf8(name).unwrap()).collect()
        };
        assert_eq!(names("x\0a.b\0init a.b\0é._c.d1\0"), ["a.b", "é._c.d1"]);
        let others = "a\0.b\0a.\0a..b\0 a.b\0a .b\x001.5\0a.b()\0see a.b\0\0.\0";
        assert_eq!(names(others), [""; 0]);
        assert_eq!(names(&format!("a.{}", "b".repeat(LONGEST_NAME))), [""; 0]);
    }

    #[test]
    fn what_does_not_run_is_passed_over() {
        check("def f():\n  import a\n\n  def g():\n      import b\nimport c", &["c"]);
        check("async def f():\n\timport a\n    \nimport c", &["c"]);
        check("def f(): import a\nimport b", &["b"]);
        check("def f():\n  import a\n# a remark\n  import b\nimport c", &["c"]);
        check("class A:\n  def f(\n self):\n    import a\n  import b", &["b"]);
        check("if TYPE_CHECKING:\n  import a\nelse:\n  import b", &["b"]);
        check("if typing.TYPE_CHECKING:\n  import a", &[]);
        check("if __name__ == '__main__':\n  import a\nimport b", &["b"]);
        assert_eq!(written("if __name__ == '__main__':\n  import a", true), ["a"]);
    }

    #[test]
    fn strings_and_comments_are_no_imports() {
        check("'''\nimport a\n'''\nimport b", &["b"]);
        check("x = \"\"\"\n\\\"\"\"\nimport a\n\"\"\"; import b", &["b"]);
        check("# import a\nx = 'import a' # '\nimport b", &["b"]);
        check("x = 'not closed\nimport b", &["b"]);
        check("x = (\nimport_a,\n)\nimport b", &["b"]);
        check("important = 1\nfromage = 2\nimport_x = 3", &[]);
        check("from x import", &["x"]);
        check("from import y\nimport\nfrom", &[]);
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let long = format!("x = ({})\nimport a", "1,\n".repeat(1 << 20));
        assert_eq!(written(&long, false), ["a"]);
    }
}

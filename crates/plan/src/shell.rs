//! Which commands a shell script may run, from what it says.
//!
//! Many images start through a script that ends in `exec` of something. The script is read as the shell would
//! (POSIX.1-2017, volume 3, chapter 2) but for its flow of control: all branches are taken, once, in the order
//! of their lines. What is found is a guess.

use std::collections::HashMap;

/// What a script is started with.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// The script's own path.
    pub path: &'a [u8],
    /// What follows it on its command line.
    pub arguments: &'a [Vec<u8>],
    /// `NAME=value`. What the script sets itself only where it is not set yet is taken from here.
    pub environment: &'a [String],
}

/// A command of a script: its words, after expansion; the value only, where one is assigned.
pub type Words = Vec<Vec<u8>>;

/// What a script says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Script {
    /// Its commands.
    pub commands: Vec<Words>,
    /// What it sets `PATH` to.
    pub path: Option<Vec<u8>>,
}

/// Reads a script.
#[must_use]
pub fn read(source: &[u8], start: &Start<'_>) -> Script {
    let environment = start.environment.iter().filter_map(|set| set.split_once('='));
    let set = environment.filter(|(_, value)| (1..=LONGEST_WORD).contains(&value.len()));
    let set = set.map(|(name, value)| (name.into(), value.into())).collect();
    let arguments = start.arguments.get(..MOST_ARGUMENTS).unwrap_or(start.arguments);
    let start = Start { arguments, ..*start };
    let (assigned, commands) = (HashMap::new(), Vec::new());
    let mut reader = Reader { start, set, assigned, commands, words: 0, bytes: 0 };
    reader.script(source, MOST_DEPTH);
    Script { path: reader.assigned.remove(b"PATH".as_slice()), commands: reader.commands }
}

struct Reader<'a> {
    start: Start<'a>,
    /// By the environment.
    set: HashMap<Vec<u8>, Vec<u8>>,
    /// By the script.
    assigned: HashMap<Vec<u8>, Vec<u8>>,
    commands: Vec<Words>,
    /// How many words there were, and of how many bytes.
    words: usize,
    bytes: usize,
}

/// A word that is being read.
#[derive(Default)]
struct Word {
    text: Vec<u8>,
    /// Whether it is one though it may be empty.
    is_quoted: bool,
}

impl Reader<'_> {
    fn script(&mut self, source: &[u8], depth: usize) {
        let mut command = Vec::new();
        let (mut word, mut rest) = (Word::default(), source);
        while let Some((&byte, after)) = rest.split_first().filter(|_| !self.is_enough()) {
            rest = after;
            match byte {
                b'#' if word.text.is_empty() && !word.is_quoted => {
                    let end = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
                    rest = rest.get(end..).unwrap_or_default();
                }
                b' ' | b'\t' | b'\r' => self.end_word(&mut word, &mut command),
                b'\n' | b';' | b'&' | b'|' | b'(' | b')' | b'<' | b'>' => {
                    self.end_word(&mut word, &mut command);
                    self.end_command(&mut command);
                }
                b'\'' => {
                    let (text, after) = until(rest, b'\'');
                    word.extend(text);
                    word.is_quoted = true;
                    rest = after;
                }
                b'"' => rest = self.quoted(rest, &mut word, &mut command, depth),
                b'\\' => rest = escaped(rest, &mut word),
                b'$' | b'`' => rest = self.expansion(byte, rest, &mut word, depth),
                _ => word.extend(&[byte]),
            }
        }
        self.end_word(&mut word, &mut command);
        self.end_command(&mut command);
    }

    /// What stands between double quotes, of which the first was taken.
    fn quoted<'t>(
        &mut self,
        mut rest: &'t [u8],
        word: &mut Word,
        command: &mut Words,
        depth: usize,
    ) -> &'t [u8] {
        word.is_quoted = true;
        if let Some(after) = rest.strip_prefix(b"$@\"") {
            // The only one that is several words.
            for argument in self.start.arguments {
                word.extend(argument);
                self.end_word(word, command);
            }
            return after;
        }
        while let Some((&byte, after)) = rest.split_first() {
            rest = match byte {
                b'"' => return after,
                b'\\' => escaped(after, word),
                b'$' | b'`' => self.expansion(byte, after, word, depth),
                _ => {
                    word.extend(&[byte]);
                    after
                }
            };
        }
        rest
    }

    /// What `$` or a backquote stands for; returns what follows it.
    fn expansion<'t>(
        &mut self,
        byte: u8,
        rest: &'t [u8],
        word: &mut Word,
        depth: usize,
    ) -> &'t [u8] {
        if byte == b'`' {
            let (inner, after) = until(rest, b'`');
            word.extend(&self.output(inner, depth));
            return after;
        }
        match rest.first() {
            Some(b'(') => {
                let (inner, after) = closed(rest, b'(', b')');
                word.extend(&self.output(inner, depth));
                after
            }
            Some(b'{') => {
                let (inner, after) = closed(rest, b'{', b'}');
                word.extend(&self.parameter(inner, depth));
                after
            }
            Some(b'@' | b'*') => {
                for argument in self.start.arguments {
                    word.extend(if word.text.is_empty() { b"" } else { b" " });
                    word.extend(argument);
                }
                rest.get(1..).unwrap_or_default()
            }
            Some(byte) if byte.is_ascii_digit() => {
                let (name, after) = rest.split_at(1);
                word.extend(self.value(name));
                after
            }
            _ => {
                let (name, after) = name(rest);
                word.extend(self.value(name));
                after
            }
        }
    }

    /// What `${...}` stands for.
    fn parameter(&mut self, text: &[u8], depth: usize) -> Vec<u8> {
        let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (name, operation) = if digits > 0 { text.split_at(digits) } else { name(text) };
        let value = self.value(name).to_vec();
        match operation {
            [b'%', b'/', b'*'] | [b'%', b'%', b'/', b'*'] => parent(&value),
            [b':', b'-' | b'=', default @ ..] | [b'-' | b'=', default @ ..] if value.is_empty() => {
                let mut word = Word::default();
                let mut rest = default;
                while let Some((&byte, after)) = rest.split_first() {
                    rest = match byte {
                        b'$' | b'`' if depth > 0 => {
                            self.expansion(byte, after, &mut word, depth - 1)
                        }
                        b'"' | b'\'' => after,
                        _ => {
                            word.extend(&[byte]);
                            after
                        }
                    };
                }
                word.text
            }
            _ => value,
        }
    }

    /// What a command prints, where that is the name of a folder; its commands are among the script's.
    fn output(&mut self, inner: &[u8], depth: usize) -> Vec<u8> {
        let first = self.commands.len();
        if depth > 0 {
            self.script(inner, depth - 1);
        }
        let inner = self.commands.get(first..).unwrap_or_default();
        let printed = inner.iter().rev().find_map(|words| match words.as_slice() {
            [program, .., path] if program == b"dirname" => Some(parent(path)),
            [program, .., path] if program == b"cd" => Some(path.clone()),
            _ => None,
        });
        printed.unwrap_or_default()
    }

    fn value(&self, name: &[u8]) -> &[u8] {
        if let Ok([digit]) = <[u8; 1]>::try_from(name)
            && digit.is_ascii_digit()
        {
            return match usize::from(digit - b'0').checked_sub(1) {
                None => self.start.path,
                Some(place) => self.start.arguments.get(place).map_or(b"", Vec::as_slice),
            };
        }
        let value = self.set.get(name).or_else(|| self.assigned.get(name));
        value.map_or(b"", Vec::as_slice)
    }

    const fn is_enough(&self) -> bool {
        self.words >= MOST_WORDS || self.bytes >= MOST_BYTES
    }

    fn end_word(&mut self, word: &mut Word, command: &mut Words) {
        let Word { text, is_quoted } = std::mem::take(word);
        if text.is_empty() && !is_quoted || self.is_enough() {
            return;
        }
        self.words += 1;
        self.bytes += text.len();
        let (name, rest) = name(&text);
        match rest.strip_prefix(b"=") {
            Some(value) if !name.is_empty() => {
                self.assigned.insert(name.to_vec(), value.to_vec());
                // What only an environment can be meant to change, and this script does.
                if name == b"PATH" {
                    self.set.insert(name.to_vec(), value.to_vec());
                }
                command.push(value.to_vec());
            }
            _ => command.push(text),
        }
    }

    fn end_command(&mut self, command: &mut Words) {
        if !command.is_empty() {
            self.commands.push(std::mem::take(command));
        }
    }
}

impl Word {
    fn extend(&mut self, text: &[u8]) {
        if self.text.len() + text.len() <= LONGEST_WORD {
            self.text.extend_from_slice(text);
        }
    }
}

/// The character behind a backslash; at the end of a line there is none.
fn escaped<'t>(rest: &'t [u8], word: &mut Word) -> &'t [u8] {
    let Some((&byte, after)) = rest.split_first() else { return rest };
    if byte != b'\n' {
        word.extend(&[byte]);
    }
    after
}

/// The name of a variable at the beginning of `text`, and what follows it.
fn name(text: &[u8]) -> (&[u8], &[u8]) {
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let len = text.iter().take_while(|byte| is_name(byte)).count();
    let starts_well = text.first().is_some_and(|byte| !byte.is_ascii_digit());
    text.split_at(if starts_well { len } else { 0 })
}

fn until(text: &[u8], end: u8) -> (&[u8], &[u8]) {
    let at = text.iter().position(|byte| *byte == end).unwrap_or(text.len());
    let (inner, rest) = text.split_at(at);
    (inner, rest.get(1..).unwrap_or_default())
}

/// What lies between the bracket at the beginning of `text` and the one that closes it, and what follows.
fn closed(text: &[u8], opening: u8, closing: u8) -> (&[u8], &[u8]) {
    let mut depth = 0_usize;
    let end = text.iter().position(|byte| {
        depth += usize::from(*byte == opening);
        depth -= usize::from(*byte == closing);
        depth == 0
    });
    let end = end.unwrap_or(text.len());
    (text.get(1..end).unwrap_or_default(), text.get(end + 1..).unwrap_or_default())
}

fn parent(path: &[u8]) -> Vec<u8> {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(0) => b"/".to_vec(),
        Some(end) => path.get(..end).unwrap_or_default().to_vec(),
        None => b".".to_vec(),
    }
}

/// More words of a script are not looked at.
const MOST_WORDS: usize = 1 << 14;

/// Bytes of all words of a script that are looked at, so that it takes no more than a few times this.
const MOST_BYTES: usize = 1 << 20;

/// Bytes of a word that are kept.
const LONGEST_WORD: usize = 4096;

/// Of a script, the others are as if they were not there.
const MOST_ARGUMENTS: usize = 256;

/// Commands within commands.
const MOST_DEPTH: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn read_with(source: &str, environment: &[&str], arguments: &[&str]) -> Script {
        let environment: Vec<String> = environment.iter().map(ToString::to_string).collect();
        let arguments: Vec<Vec<u8>> = arguments.iter().map(|word| word.as_bytes().into()).collect();
        let (path, environment) = (b"/opt/app/bin/start".as_slice(), environment.as_slice());
        read(source.as_bytes(), &Start { path, arguments: &arguments, environment })
    }

    fn check(source: &str, expected: &[&[&str]]) {
        let script = read_with(source, &["HOME=/home", "EMPTY="], &["serve", "a b"]);
        let text = |word: &Vec<u8>| String::from_utf8(word.clone()).unwrap();
        let found: Vec<Vec<String>> =
            script.commands.iter().map(|words| words.iter().map(text).collect()).collect();
        assert_eq!(found, expected, "{source:?}");
    }

    #[test]
    fn commands_are_divided_into_words() {
        check("exec nginx -g 'daemon off;' # all\n", &[&["exec", "nginx", "-g", "daemon off;"]]);
        check("a && b || c | d; e & f", &[&["a"], &["b"], &["c"], &["d"], &["e"], &["f"]]);
        check("a \\\n  b\\ c \"d \\\"e\"", &[&["a", "b c", "d \"e"]]);
        check("a '' \"\" b#c", &[&["a", "", "", "b#c"]]);
        check("a > /tmp/x", &[&["a"], &["/tmp/x"]]);
        check("", &[]);
    }

    #[test]
    fn variables_are_expanded() {
        check("a $HOME/b \"${HOME}/c\" '$HOME'", &[&["a", "/home/b", "/home/c", "$HOME"]]);
        check("b=/x\na $b ${b}y", &[&["/x"], &["a", "/x", "/xy"]]);
        check("HOME=/other\na $HOME", &[&["/other"], &["a", "/home"]]);
        check("a ${c:-/d} ${EMPTY:-$HOME} ${HOME:-/e}", &[&["a", "/d", "/home", "/home"]]);
        check("export p=1 q=$p", &[&["export", "1", "1"]]);
        check("a $none b", &[&["a", "b"]]);
    }

    #[test]
    fn a_script_knows_its_arguments_and_its_place() {
        check("exec \"$@\"", &[&["exec", "serve", "a b"]]);
        check("exec java $1 $9", &[&["exec", "java", "serve"]]);
        check(
            "d=$(dirname \"$0\")\na $d/../lib",
            &[&["dirname", "/opt/app/bin/start"], &["/opt/app/bin"], &["a", "/opt/app/bin/../lib"]],
        );
        check("a ${0%/*}/x", &[&["a", "/opt/app/bin/x"]]);
        check("a `cd $HOME; pwd`", &[&["cd", "/home"], &["pwd"], &["a", "/home"]]);
    }

    #[test]
    fn a_path_that_is_set_is_known() {
        let script = read_with("PATH=/a:$PATH\nexport PATH\n", &["PATH=/bin"], &[]);
        assert_eq!(script.path.as_deref(), Some(b"/a:/bin".as_slice()));
        assert_eq!(read_with("a=b", &["PATH=/bin"], &[]).path, None);
    }

    #[test]
    fn what_is_not_closed_ends_with_the_script() {
        for source in ["a '", "a \"", "a $(", "a ${", "a `", "a \\", "$", "a $(b", "}${)}"] {
            read_with(source, &[], &[]);
        }
        let deep = "$(".repeat(10_000);
        assert!(read_with(&deep, &[], &[]).commands.is_empty());
        let many = read_with(
            &"a=$PATH$PATH$PATH$PATH\n".repeat(1 << 16),
            &[&format!("PATH={}", "x".repeat(1000))],
            &[],
        );
        let bytes: usize = many.commands.iter().flatten().map(Vec::len).sum();
        assert!(bytes <= MOST_BYTES + LONGEST_WORD, "{bytes}");
        // Neither is what it is started with.
        let long = "x".repeat(LONGEST_WORD + 1);
        let script = read_with("a $LONG $1 \"$@\" $@", &[&format!("LONG={long}")], &[&long, "b"]);
        assert_eq!(script.commands, [[b"a".to_vec(), vec![], b"b".to_vec(), b"b".to_vec()]]);
        let growing = format!("a=xx\n{}", "a=$a$a\n".repeat(64));
        let longest =
            read_with(&growing, &[], &[]).commands.iter().map(|words| words[0].len()).max();
        assert_eq!(longest, Some(LONGEST_WORD / 2), "and the name of the variable");
    }
}

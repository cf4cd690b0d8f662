//! The files that a program needs to start: itself, its interpreter and their shared libraries, what a script
//! runs, what a JVM and a Python service load, all known from the image; and those that a library needs which is
//! loaded later. Without this they are asked for one after the other, and large ones one part after the other, a
//! round trip or more to the registry each.

mod java;
mod python;

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use object::read::ReadCache;
use oci::ImageConfig;
use parking_lot::Mutex;
use plan::elf::{self, Elf, Needs};
use plan::shell::{self, Script, Words};
use tree::{FileData, NodeId, Tree};

use crate::at_once::at_once;

/// What an image runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Command {
    /// The program and its arguments.
    pub(crate) arguments: Vec<String>,
    /// `NAME=value`.
    pub(crate) environment: Vec<String>,
    /// Where relative paths begin.
    pub(crate) working_dir: String,
}

impl Command {
    /// The image's own.
    pub(crate) fn of(image: &ImageConfig) -> Self {
        let config = &image.config;
        Self {
            arguments: [config.entrypoint.as_slice(), &config.cmd].concat(),
            environment: config.env.clone(),
            working_dir: config.working_dir.clone(),
        }
    }
}

/// The layers of an image. All ranges are of a layer's tar, in bytes, and within it.
pub(crate) trait Layers: Sync {
    /// Notes that `range` is needed.
    fn want(&self, layer: u32, range: Range<u64>);

    /// Reads what begins at `at`; blocks until it is there.
    fn read_exact_at(&self, layer: u32, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

/// What was asked for of an image so far.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    files: Mutex<HashSet<NodeId>>,
    /// The names by which libraries were found: one of a name that is loaded is not looked for again.
    libraries: Mutex<HashSet<Vec<u8>>>,
    /// How many paths were looked at: an image may name any number of them, and folders for each.
    paths: AtomicUsize,
}

impl Asked {
    /// Notes a file; returns whether it is a new one.
    fn add(&self, node: NodeId) -> bool {
        let mut files = self.files.lock();
        files.len() < MOST_FILES && files.insert(node)
    }

    fn has(&self, node: NodeId) -> bool {
        self.files.lock().contains(&node)
    }

    /// Whether one more path may be looked at.
    fn may_look(&self) -> bool {
        self.paths.fetch_add(1, Ordering::Relaxed) < MOST_PATHS
    }
}

/// The files of an image, as its command sees them.
pub(crate) struct ProgramFiles<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) layers: &'a dyn Layers,
    pub(crate) command: &'a Command,
    pub(crate) asked: &'a Asked,
}

/// How far it is looked what a command needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reach {
    /// The program, its interpreter, and their libraries.
    Program,
    /// What a script runs, too, and what a JVM reads.
    Scripts,
    /// What Python imports, too, for which the sources are read.
    Imports,
}

/// What is known of what a command runs.
#[derive(Debug, Default)]
struct Known {
    /// The image's own, and those of scripts.
    commands: Vec<Words>,
    /// What follows `#!` in scripts.
    interpreters: HashMap<NodeId, Words>,
    /// How many scripts were read.
    scripts: usize,
    /// The launchers of JVMs.
    launchers: Vec<NodeId>,
}

/// What a file says of itself.
#[derive(Debug, Default)]
struct Said {
    elf: Option<Elf>,
    needs: Needs,
    /// Whether it is for a shell.
    is_script: bool,
}

impl<'a> ProgramFiles<'a> {
    /// Asks for what the command needs, as far as is wanted. Blocks until all of it is known; what cannot be had
    /// or understood is left to the program's own reads. Returns the number of files.
    pub(crate) fn find(&self, reach: Reach) -> usize {
        let command: Words =
            self.command.arguments.iter().map(|word| word.as_bytes().into()).collect();
        let mut known = Known { commands: vec![command], ..Known::default() };
        let mut first = self.named();
        if reach >= Reach::Scripts {
            first.extend(self.told_to_a_shell(&mut known));
        }
        let mut files = self.load(first, &mut known, reach);
        if reach >= Reach::Scripts {
            files += java::find(self, &mut known);
        }
        if reach >= Reach::Imports {
            files += python::find(self, &known);
        }
        files
    }

    /// The same as [`find`](Self::find) for a library that the program is about to load. Asks for nothing if it
    /// is no ELF file, or was asked for before. Returns the number of files.
    pub(crate) fn follow(&self, node: NodeId) -> usize {
        let begun = || {
            let data = self.file(node).filter(|_| !self.asked.has(node))?;
            let mut magic = [0; elf::MAGIC.len()];
            self.read_part(node, &mut magic, 0).ok()?;
            if magic == elf::MAGIC { self.want_node(node, data, WHOLE) } else { None }
        };
        begun().map_or(0, |node| self.load(vec![node], &mut Known::default(), Reach::Program))
    }

    /// Asks for what the files of `first` need, and what that needs; then for the parts of all of them that
    /// the loader works on, in the order in which it gets to know them. Returns how many files they are.
    fn load(&self, first: Vec<NodeId>, known: &mut Known, reach: Reach) -> usize {
        let (mut generation, mut found, mut elves) = (first, 0, Vec::new());
        let mut folders = HashMap::new();
        let mut scripts = Vec::new();
        for _ in 0..MOST_GENERATIONS {
            found += generation.len();
            // All at once: what they need in turn is known only when they are here.
            let read =
                at_once(&generation, MOST_THREADS, |node| self.read(*node).unwrap_or_default());
            let mut next = Vec::new();
            for (&node, said) in generation.iter().zip(read) {
                next.extend(self.needed_by(node, &said.needs, &mut folders));
                scripts.extend((said.is_script && reach >= Reach::Scripts).then_some(node));
                let is_elf = said.elf.is_some();
                if is_elf && java::is_launcher(self.tree, node) {
                    known.launchers.push(node);
                }
                if !is_elf && !said.needs.interpreter.is_empty() {
                    known.interpreters.insert(node, said.needs.interpreter);
                }
                elves.extend(said.elf.map(|elf| (node, elf)));
            }
            if next.is_empty() {
                // The shell has all that it needs; now what it will run.
                for node in scripts.drain(..) {
                    let Some(script) = self.script_at(node, known) else { continue };
                    next.extend(self.run_by(&script));
                    known.commands.extend(script.commands);
                }
            }
            generation = next;
            if generation.is_empty() {
                break;
            }
        }
        for (node, elf) in &elves {
            self.want_parts(*node, elf.tables());
            self.want_parts(*node, vec![elf.constants()]);
        }
        at_once(&elves, MOST_THREADS, |(node, elf)| {
            let touched = elf.touched(|buffer, at| self.read_part(*node, buffer, at));
            self.want_parts(*node, touched.unwrap_or_default());
        });
        found
    }

    /// The program, and the arguments that are files.
    fn named(&self) -> Vec<NodeId> {
        let mut found = Vec::new();
        for (place, argument) in self.command.arguments.iter().enumerate() {
            let argument = argument.as_bytes();
            let path = match place {
                0 => self.program(argument, self.path()),
                _ => Some(self.absolute(argument)),
            };
            found.extend(path.and_then(|path| self.want(&path)));
        }
        for path in READ_BY_EVERYBODY {
            found.extend(self.want(path.as_bytes()));
        }
        found
    }

    /// What the command itself tells a shell to run: `sh -c ...`.
    fn told_to_a_shell(&self, known: &mut Known) -> Vec<NodeId> {
        let [program, option, text, arguments @ ..] = self.command.arguments.as_slice() else {
            return Vec::new();
        };
        if option != "-c" || !is_shell(program.as_bytes()) {
            return Vec::new();
        }
        let arguments: Words =
            arguments.iter().skip(1).map(|word| word.as_bytes().into()).collect();
        let script = self.script(text.as_bytes(), program.as_bytes(), &arguments);
        let found = self.run_by(&script);
        known.commands.extend(script.commands);
        found
    }

    fn script(&self, source: &[u8], path: &[u8], arguments: &[Vec<u8>]) -> Script {
        let environment = &self.command.environment;
        shell::read(source, &shell::Start { path, arguments, environment })
    }

    /// Asks for the files that a script names: programs, and whatever else has a path.
    fn run_by(&self, script: &Script) -> Vec<NodeId> {
        let folders = script.path.as_deref().unwrap_or_else(|| self.path());
        let mut found = Vec::new();
        for command in &script.commands {
            for (place, word) in command.iter().enumerate() {
                let is_program = place < PROGRAM_PLACES && !BUILT_IN.contains(&word.as_slice());
                if is_program && !word.contains(&b'/') {
                    let path = self.program(word, folders);
                    found.extend(path.and_then(|path| self.want(&path)));
                }
                // As in `-cp A:B` and `--config=A`.
                let parts = word.split(|byte| matches!(*byte, b':' | b'=' | b','));
                let paths = parts.filter(|part| part.contains(&b'/'));
                found.extend(paths.filter_map(|path| self.want(&self.absolute(path))));
            }
            if found.len() >= MOST_OF_A_SCRIPT {
                break;
            }
        }
        found
    }

    /// The path of a program, as a shell finds it.
    fn program(&self, name: &[u8], folders: &[u8]) -> Option<Vec<u8>> {
        if name.contains(&b'/') {
            return Some(self.absolute(name));
        }
        let mut paths =
            folders.split(|byte| *byte == b':').map(|folder| [folder, b"/", name].concat());
        paths.find(|path| !name.is_empty() && self.resolve(path).is_some())
    }

    /// The folders in which programs are looked for.
    fn path(&self) -> &'a [u8] {
        self.variable("PATH").unwrap_or(DEFAULT_PATH).as_bytes()
    }

    /// A path that the command may mean relative to its folder.
    fn absolute(&self, path: &[u8]) -> Vec<u8> {
        match path.starts_with(b"/") {
            true => path.to_vec(),
            false => [self.command.working_dir.as_bytes(), b"/", path].concat(),
        }
    }

    fn variable(&self, name: &str) -> Option<&'a str> {
        let command: &'a Command = self.command;
        let set = command.environment.iter().find_map(|set| set.strip_prefix(name));
        set?.strip_prefix('=')
    }

    /// Asks for the file at `path`; returns it if it is there and was not asked for before.
    fn want(&self, path: &[u8]) -> Option<NodeId> {
        self.want_up_to(path, WHOLE)
    }

    /// The same for a file that is wanted whole if it has no more bytes than `whole`.
    fn want_up_to(&self, path: &[u8], whole: u64) -> Option<NodeId> {
        let (node, data) = self.resolve(path)?;
        self.want_node(node, data, whole)
    }

    fn want_node(&self, node: NodeId, data: &FileData, whole: u64) -> Option<NodeId> {
        if !self.asked.add(node) {
            return None;
        }
        let stored = data.stored_bytes();
        let wanted = if stored <= whole { stored } else { HEAD };
        self.layers.want(data.layer, data.offset..data.offset + wanted);
        Some(node)
    }

    /// Asks for parts of a file.
    fn want_parts(&self, node: NodeId, parts: Vec<Range<u64>>) {
        let Some(data) = self.file(node) else { return };
        for part in parts {
            let end = part.end.min(data.size);
            if part.start < end {
                self.layers.want(data.layer, data.offset + part.start..data.offset + end);
            }
        }
    }

    /// Asks for what the file at `node` needs. `inherited` has the folders where that is looked for because of
    /// what needs the file.
    fn needed_by(
        &self,
        node: NodeId,
        needs: &Needs,
        inherited: &mut HashMap<NodeId, Vec<Vec<u8>>>,
    ) -> Vec<NodeId> {
        let mut found = Vec::new();
        for path in &needs.interpreter {
            let path = self.program(path, self.path());
            found.extend(path.and_then(|path| self.want(&path)));
        }
        let origin = self.tree.path_of(self.tree.parent(node));
        let mut folders: Vec<Vec<u8>> = Vec::new();
        folders.extend(needs.folders.iter().map(|folder| at_origin(folder, &origin)));
        let before = inherited.remove(&node).unwrap_or_default();
        let mut passed_on = if needs.passes_folders_on { folders.clone() } else { Vec::new() };
        passed_on.extend(before.iter().cloned());
        passed_on.truncate(MOST_INHERITED);
        folders.extend(before);
        let more = self.variable("LD_LIBRARY_PATH").unwrap_or_default().split(':');
        folders.extend(more.filter(|folder| !folder.is_empty()).map(Into::into));
        folders.extend(LIBRARY_FOLDERS.iter().map(|folder| folder.as_bytes().to_vec()));
        for library in &needs.libraries {
            if self.asked.libraries.lock().contains(library) {
                continue;
            }
            let candidates =
                folders.iter().map(|folder| [folder, b"/".as_slice(), library].concat());
            let exists = |path: &Vec<u8>| self.resolve(path).is_some();
            if let Some(path) = candidates.into_iter().find(exists) {
                self.asked.libraries.lock().insert(library.clone());
                if let Some(library) = self.want(&path) {
                    found.push(library);
                    inherited.insert(library, passed_on.clone());
                }
            }
        }
        found
    }

    /// What a script or an ELF file says of itself.
    fn read(&self, node: NodeId) -> Option<Said> {
        let head = self.text(node, SCRIPT_HEAD)?;
        if head.starts_with(&elf::MAGIC) {
            let data = self.file(node)?;
            let file = LayerPart { layers: self.layers, data, at: 0, left: MOST_READ };
            let (elf, needs) = Elf::parse(&ReadCache::new(file))?;
            return Some(Said { elf: Some(elf), needs, is_script: false });
        }
        let interpreter = script_interpreter(&head);
        let is_script = interpreter.iter().any(|program| is_shell(program))
            || self.tree.path_of(node).ends_with(b".sh");
        Some(Said { elf: None, needs: Needs { interpreter, ..Needs::default() }, is_script })
    }

    /// What a script says; of some that are too many nothing, as each takes a MiB or two of memory.
    fn script_at(&self, node: NodeId, known: &mut Known) -> Option<Script> {
        if known.scripts >= MOST_SCRIPTS {
            return None;
        }
        known.scripts += 1;
        let source = self.text(node, MOST_OF_SOURCE)?;
        let path = [b"/", self.tree.path_of(node).as_slice()].concat();
        Some(self.script(&source, &path, &self.arguments_of(node)))
    }

    /// The first bytes of a file.
    fn text(&self, node: NodeId, most: u64) -> Option<Vec<u8>> {
        let file =
            LayerPart { layers: self.layers, data: self.file(node)?, at: 0, left: MOST_READ };
        let mut text = Vec::new();
        Read::take(file, most).read_to_end(&mut text).ok()?;
        Some(text)
    }

    /// What follows a file on the command line.
    fn arguments_of(&self, node: NodeId) -> Words {
        let arguments = &self.command.arguments;
        let is_named = |argument: &String| {
            let path = self.program(argument.as_bytes(), self.path());
            path.is_some_and(|path| self.resolve(&path).is_some_and(|(found, _)| found == node))
        };
        let place = arguments.iter().position(is_named).unwrap_or(arguments.len());
        arguments.iter().skip(place + 1).map(|word| word.as_bytes().into()).collect()
    }

    fn read_part(&self, node: NodeId, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let end = at.checked_add(buffer.len() as u64);
        match self.file(node) {
            Some(data) if end.is_some_and(|end| end <= data.size) => {
                self.layers.read_exact_at(data.layer, buffer, data.offset + at)
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// The regular file at a path.
    fn resolve(&self, path: &[u8]) -> Option<(NodeId, &'a FileData)> {
        let tree: &'a Tree = self.tree;
        if self.asked.may_look() { tree.resolve(path).ok() } else { None }
    }

    /// A file whose bytes lie in a layer as they are.
    fn file(&self, node: NodeId) -> Option<&'a FileData> {
        let tree: &'a Tree = self.tree;
        match &tree.node(node).kind {
            tree::NodeKind::File(data) if data.sparse.is_none() => Some(data),
            _ => None,
        }
    }
}

/// The words after `#!`: a path, and for `env` what it looks for.
fn script_interpreter(head: &[u8]) -> Words {
    if !head.starts_with(b"#!") {
        return Words::new();
    }
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let words = line.get(2..).unwrap_or_default().split(u8::is_ascii_whitespace);
    let words = words.filter(|word| !word.is_empty() && !word.starts_with(b"-"));
    words.take(2).map(<[u8]>::to_vec).collect()
}

fn is_shell(program: &[u8]) -> bool {
    let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    [b"sh".as_slice(), b"bash", b"dash", b"ash"].contains(&name)
}

/// `$ORIGIN` is the folder of the file that needs the library.
fn at_origin(folder: &[u8], origin: &[u8]) -> Vec<u8> {
    let rest = folder.strip_prefix(b"$ORIGIN").or_else(|| folder.strip_prefix(b"${ORIGIN}"));
    match rest {
        Some(rest) => [b"/", origin, rest].concat(),
        None => folder.to_vec(),
    }
}

/// A file whose bytes are fetched as they are read; it is not sparse.
struct LayerPart<'a> {
    layers: &'a dyn Layers,
    data: &'a FileData,
    at: u64,
    /// How much may still be read: a file that sends its reader round and round ends here.
    left: u64,
}

impl Read for LayerPart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.data.size.saturating_sub(self.at).min(buffer.len() as u64);
        if len == 0 {
            return Ok(0);
        }
        if len > self.left {
            return Err(io::Error::other("more than a loader would read"));
        }
        let FileData { layer, offset, .. } = *self.data;
        let len = usize::try_from(len).unwrap_or(buffer.len());
        self.layers.read_exact_at(layer, &mut buffer[..len], offset + self.at)?;
        self.at += len as u64;
        self.left -= len as u64;
        Ok(len)
    }
}

impl Seek for LayerPart<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(back) => self.data.size.checked_add_signed(back),
            SeekFrom::Current(step) => self.at.checked_add_signed(step),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

/// Files up to this many bytes are fetched whole.
const WHOLE: u64 = 16 << 20;

/// What is fetched of longer ones: their headers and symbols.
const HEAD: u64 = 1 << 20;

const SCRIPT_HEAD: u64 = 256;
const MOST_READ: u64 = 4 << 20;
/// Some thousand libraries with ten folders each, and as much again.
const MOST_PATHS: usize = 1 << 17;
/// Of a script, or of a module of Python, in bytes.
const MOST_OF_SOURCE: u64 = 1 << 20;
/// More than vLLM loads of Python, and each takes a few bytes.
const MOST_FILES: usize = 16_384;
const MOST_SCRIPTS: usize = 32;
/// Folders that a file has from what needs it: `DT_RPATH` names one, seldom two.
const MOST_INHERITED: usize = 16;
/// Files that a script names.
const MOST_OF_A_SCRIPT: usize = 256;
/// A program is among so many words of a command: behind `if`, `exec` and `gosu USER`.
const PROGRAM_PLACES: usize = 4;
/// At a time; each waits for one file.
const MOST_THREADS: usize = 16;
const MOST_GENERATIONS: usize = 16;

/// What the loader reads, whoever looks for the image's user, and the C library for its locale, names and time.
const READ_BY_EVERYBODY: &[&str] = &[
    "/etc/ld.so.cache",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    "/usr/lib/locale/C.utf8/LC_CTYPE",
    "/usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache",
    "/usr/lib/aarch64-linux-gnu/gconv/gconv-modules.cache",
];

/// As `execvp` has it when the image sets none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is in a folder of programs too, but which shells do themselves.
const BUILT_IN: &[&[u8]] =
    &[b"[", b"echo", b"printf", b"test", b"true", b"false", b"kill", b"pwd", b"time", b"sh"];

/// Where loaders of glibc and musl look by themselves.
const LIBRARY_FOLDERS: &[&str] = &[
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/local/lib",
    "/lib",
    "/usr/lib",
];

#[cfg(test)]
mod tests;

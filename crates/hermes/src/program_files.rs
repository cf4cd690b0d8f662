//! The files that a program needs before its first instruction: itself, its interpreter and their
//! shared libraries, all known from the image; and those that a library needs which it loads later. Without
//! this the loader asks for them one after the other, and in large ones for one part after the other, a
//! round trip or more to the registry each.

use std::collections::HashSet;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use object::read::ReadCache;
use oci::ImageConfig;
use parking_lot::Mutex;
use plan::elf::{self, Elf, Needs};
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
pub(crate) struct Asked(Mutex<HashSet<NodeId>>);

impl Asked {
    /// Notes a file; returns whether it is a new one.
    fn add(&self, node: NodeId) -> bool {
        let mut files = self.0.lock();
        files.len() < MOST_FILES && files.insert(node)
    }

    fn has(&self, node: NodeId) -> bool {
        self.0.lock().contains(&node)
    }
}

/// The files of an image, as its command sees them.
pub(crate) struct ProgramFiles<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) layers: &'a dyn Layers,
    pub(crate) command: &'a Command,
    pub(crate) asked: &'a Asked,
}

impl<'a> ProgramFiles<'a> {
    /// Asks for what the command needs. Blocks until all of it is known; what cannot be had or understood
    /// is left to the program's own reads. Returns the number of files.
    pub(crate) fn find(&self) -> usize {
        self.load(self.named())
    }

    /// The same for a library that the program is about to load. Asks for nothing if it is no ELF file, or
    /// was asked for before. Returns the number of files.
    pub(crate) fn follow(&self, node: NodeId) -> usize {
        let begun = || {
            let data = self.file(node).filter(|_| !self.asked.has(node))?;
            let mut magic = [0; elf::MAGIC.len()];
            self.read_part(node, &mut magic, 0).ok()?;
            if magic == elf::MAGIC { self.want_node(node, data) } else { None }
        };
        begun().map_or(0, |node| self.load(vec![node]))
    }

    /// Asks for what the files of `first` need, and what that needs; then for the parts of all of them that
    /// the loader works on, in the order in which it gets to know them. Returns how many files they are.
    fn load(&self, first: Vec<NodeId>) -> usize {
        let (mut generation, mut found, mut elves) = (first, 0, Vec::new());
        for _ in 0..MOST_GENERATIONS {
            found += generation.len();
            // All at once: what they need in turn is known only when they are here.
            let read =
                at_once(&generation, MOST_THREADS, |node| self.read(*node).unwrap_or_default());
            let mut next = Vec::new();
            for (node, (elf, needs)) in generation.iter().zip(read) {
                next.extend(self.needed_by(*node, &needs));
                elves.extend(elf.map(|elf| (*node, elf)));
            }
            generation = next;
            if generation.is_empty() {
                break;
            }
        }
        for (node, elf) in &elves {
            self.want_parts(*node, elf.tables());
        }
        at_once(&elves, MOST_THREADS, |(node, elf)| {
            let touched = elf.touched(|buffer, at| self.read_part(*node, buffer, at));
            self.want_parts(*node, touched.unwrap_or_default());
        });
        found
    }

    /// The program, and the arguments that are files.
    fn named(&self) -> Vec<NodeId> {
        let command = self.command;
        let mut found = Vec::new();
        for (place, argument) in command.arguments.iter().enumerate() {
            let path = argument.as_bytes();
            if place == 0 && !argument.contains('/') {
                found.extend(self.in_path(path));
            } else {
                let path = [command.working_dir.as_bytes(), b"/", path].concat();
                found.extend(self.want(if argument.starts_with('/') {
                    argument.as_bytes()
                } else {
                    &path
                }));
            }
        }
        for path in READ_BY_EVERYBODY {
            found.extend(self.want(path.as_bytes()));
        }
        found
    }

    fn in_path(&self, name: &[u8]) -> Option<NodeId> {
        let path = self.variable("PATH").unwrap_or(DEFAULT_PATH);
        path.split(':').find_map(|folder| self.want(&[folder.as_bytes(), b"/", name].concat()))
    }

    fn variable(&self, name: &str) -> Option<&'a str> {
        let command: &'a Command = self.command;
        let set = command.environment.iter().find_map(|set| set.strip_prefix(name));
        set?.strip_prefix('=')
    }

    /// Asks for the file at `path`; returns it if it is there and was not asked for before.
    fn want(&self, path: &[u8]) -> Option<NodeId> {
        let (node, data) = self.tree.resolve(path).ok()?;
        self.want_node(node, data)
    }

    fn want_node(&self, node: NodeId, data: &FileData) -> Option<NodeId> {
        if !self.asked.add(node) {
            return None;
        }
        let stored = data.stored_bytes();
        let wanted = if stored <= WHOLE { stored } else { HEAD };
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

    /// Asks for what the file at `node` needs.
    fn needed_by(&self, node: NodeId, needs: &Needs) -> Vec<NodeId> {
        let mut found = Vec::new();
        for path in &needs.interpreter {
            found.extend(if path.contains(&b'/') { self.want(path) } else { self.in_path(path) });
        }
        let origin = self.tree.path_of(self.tree.parent(node));
        let mut folders: Vec<Vec<u8>> = Vec::new();
        folders.extend(needs.folders.iter().map(|folder| at_origin(folder, &origin)));
        let more = self.variable("LD_LIBRARY_PATH").unwrap_or_default().split(':');
        folders.extend(more.filter(|folder| !folder.is_empty()).map(Into::into));
        folders.extend(LIBRARY_FOLDERS.iter().map(|folder| folder.as_bytes().to_vec()));
        for library in &needs.libraries {
            let candidates =
                folders.iter().map(|folder| [folder, b"/".as_slice(), library].concat());
            let exists = |path: &Vec<u8>| self.tree.resolve(path).is_ok();
            if let Some(path) = candidates.into_iter().find(exists) {
                found.extend(self.want(&path));
            }
        }
        found
    }

    /// What a script or an ELF file says of itself.
    fn read(&self, node: NodeId) -> Option<(Option<Elf>, Needs)> {
        let data = self.file(node)?;
        let mut file = LayerPart { layers: self.layers, data, at: 0, left: MOST_READ };
        let mut head = Vec::new();
        Read::take(&mut file, SCRIPT_HEAD).read_to_end(&mut head).ok()?;
        if head.starts_with(b"#!") {
            let interpreter = script_interpreter(&head);
            return Some((None, Needs { interpreter, ..Needs::default() }));
        }
        if !head.starts_with(&elf::MAGIC) {
            return None;
        }
        let (elf, needs) = Elf::parse(&ReadCache::new(file))?;
        Some((Some(elf), needs))
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
fn script_interpreter(head: &[u8]) -> Vec<Vec<u8>> {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let words = line.get(2..).unwrap_or_default().split(u8::is_ascii_whitespace);
    let words = words.filter(|word| !word.is_empty() && !word.starts_with(b"-"));
    words.take(2).map(<[u8]>::to_vec).collect()
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
const MOST_FILES: usize = 4096;
/// At a time; each waits for one file.
const MOST_THREADS: usize = 16;
const MOST_GENERATIONS: usize = 16;

/// What the loader, and whoever looks for the image's user, read first.
const READ_BY_EVERYBODY: &[&str] = &["/etc/ld.so.cache", "/etc/passwd", "/etc/group"];

/// As `execvp` has it when the image sets none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
mod tests {
    use super::*;

    #[test]
    fn scripts_name_their_interpreters() {
        let check = |head: &str, expected: &[&str]| {
            let found = script_interpreter(head.as_bytes());
            assert_eq!(
                found,
                expected.iter().map(|path| path.as_bytes().to_vec()).collect::<Vec<_>>()
            );
        };
        check("#!/bin/sh\nexit", &["/bin/sh"]);
        check("#! /usr/bin/env python3\n", &["/usr/bin/env", "python3"]);
        check("#!/bin/sh -e\n", &["/bin/sh"]);
        check("#!", &[]);
    }

    #[test]
    fn an_origin_is_the_folder_of_the_file() {
        assert_eq!(at_origin(b"$ORIGIN/../lib", b"opt/a/bin"), b"/opt/a/bin/../lib");
        assert_eq!(at_origin(b"/lib", b"opt"), b"/lib");
    }
}

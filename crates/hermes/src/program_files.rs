//! The files that a program needs before its first instruction: itself, its interpreter and their
//! shared libraries, all known from the image. Without this the loader asks for them one after the
//! other, a round trip or more to the registry each.

use std::collections::HashSet;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use object::read::ReadCache;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, ReadRef, elf};
use oci::ImageConfig;
use tree::{FileData, NodeId, Tree};

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
pub(crate) trait Layers {
    /// Notes that `range` is needed.
    fn want(&self, layer: u32, range: Range<u64>);

    /// Reads what begins at `at`; blocks until it is there.
    fn read_exact_at(&self, layer: u32, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

/// Tells `layers` what `command` needs. Blocks until all of it is known; what cannot be had or understood
/// is left to the program's own reads. Returns the number of files.
pub(crate) fn find(tree: &Tree, layers: &dyn Layers, command: &Command) -> usize {
    let mut files = ProgramFiles { tree, layers, command, seen: HashSet::new() };
    let mut generation = files.named();
    for _ in 0..MOST_GENERATIONS {
        // All at once first: what they need in turn is known only when they are here.
        let next: Vec<NodeId> = generation.iter().flat_map(|node| files.needed_by(*node)).collect();
        if next.is_empty() {
            break;
        }
        generation = next;
    }
    files.seen.len()
}

struct ProgramFiles<'a> {
    tree: &'a Tree,
    layers: &'a dyn Layers,
    command: &'a Command,
    seen: HashSet<NodeId>,
}

/// What a file says that it needs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    /// Path of its interpreter, and for a script what the interpreter is told.
    interpreter: Vec<Vec<u8>>,
    /// Names of shared libraries.
    libraries: Vec<Vec<u8>>,
    /// Folders where these are looked for first.
    folders: Vec<Vec<u8>>,
}

impl<'a> ProgramFiles<'a> {
    /// The program, and the arguments that are files.
    fn named(&mut self) -> Vec<NodeId> {
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

    fn in_path(&mut self, name: &[u8]) -> Option<NodeId> {
        let path = self.variable("PATH").unwrap_or(DEFAULT_PATH);
        path.split(':').find_map(|folder| self.want(&[folder.as_bytes(), b"/", name].concat()))
    }

    fn variable(&self, name: &str) -> Option<&'a str> {
        let command: &'a Command = self.command;
        let set = command.environment.iter().find_map(|set| set.strip_prefix(name));
        set?.strip_prefix('=')
    }

    /// Asks for the file at `path`; returns it if it is there and was not asked for before.
    fn want(&mut self, path: &[u8]) -> Option<NodeId> {
        let (node, data) = self.tree.resolve(path).ok()?;
        if self.seen.len() >= MOST_FILES || !self.seen.insert(node) {
            return None;
        }
        let stored = data.stored_bytes();
        let wanted = if stored <= WHOLE { stored } else { HEAD };
        self.layers.want(data.layer, data.offset..data.offset + wanted);
        Some(node)
    }

    /// Asks for what the file at `node` needs, once that is known.
    fn needed_by(&mut self, node: NodeId) -> Vec<NodeId> {
        let needs = self.read(node).unwrap_or_default();
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

    fn read(&self, node: NodeId) -> Option<Needs> {
        let tree::NodeKind::File(data) = &self.tree.node(node).kind else { return None };
        if data.sparse.is_some() {
            return None;
        }
        let mut file = LayerPart { layers: self.layers, data, at: 0, left: MOST_READ };
        let mut head = Vec::new();
        Read::take(&mut file, SCRIPT_HEAD).read_to_end(&mut head).ok()?;
        if head.starts_with(b"#!") {
            return Some(Needs { interpreter: script_interpreter(&head), ..Needs::default() });
        }
        if head.starts_with(&elf::ELFMAG) { needs_of_elf(&ReadCache::new(file)) } else { None }
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

/// The interpreter and the shared libraries of an ELF file, by its program headers: what the dynamic
/// loader reads too, so nothing is fetched for this alone.
fn needs_of_elf<'d>(data: impl ReadRef<'d>) -> Option<Needs> {
    let header = elf::FileHeader64::<Endianness>::parse(data).ok()?;
    let endian = header.endian().ok()?;
    let segments = header.program_headers(endian, data).ok()?;
    let (mut needs, mut dynamic) = (Needs::default(), None);
    for segment in segments {
        if let Ok(Some(path)) = segment.interpreter(endian, data) {
            needs.interpreter.push(path.to_vec());
        }
        dynamic = dynamic.or_else(|| segment.dynamic(endian, data).ok().flatten());
    }
    let Some(dynamic) = dynamic else { return Some(needs) };
    let value = |tag| {
        dynamic.iter().find(|entry| entry.d_tag(endian) == tag).map(|entry| entry.d_val(endian))
    };
    let strings = value(elf::DT_STRTAB).and_then(|address| {
        let holds = |segment: &&elf::ProgramHeader64<Endianness>| {
            let start = segment.p_vaddr(endian);
            segment.p_type(endian) == elf::PT_LOAD
                && address.checked_sub(start).is_some_and(|at| at < segment.p_filesz(endian))
        };
        let segment = segments.iter().find(holds)?;
        segment.p_offset(endian).checked_add(address - segment.p_vaddr(endian))
    });
    let Some(strings) = strings else { return Some(needs) };
    let size = value(elf::DT_STRSZ).unwrap_or_default().min(MOST_READ);
    for entry in dynamic.iter().take(MOST_ENTRIES) {
        let text = || {
            let start = strings.checked_add(entry.d_val(endian))?;
            let text = data.read_bytes_at_until(start..strings.checked_add(size)?, 0).ok()?;
            Some(text.to_vec())
        };
        match entry.d_tag(endian) {
            elf::DT_NULL => break,
            elf::DT_NEEDED => needs.libraries.extend(text()),
            elf::DT_RPATH | elf::DT_RUNPATH => {
                let folders = text().unwrap_or_default();
                needs.folders.extend(folders.split(|byte| *byte == b':').map(<[u8]>::to_vec));
            }
            _ => {}
        }
    }
    Some(needs)
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
const MOST_ENTRIES: usize = 4096;
const MOST_FILES: usize = 512;
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
    fn our_own_program_needs_its_loader_and_libc() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let needs = needs_of_elf(bytes.as_slice()).unwrap();
        let interpreter = needs.interpreter.concat();
        assert!(interpreter.windows(3).any(|part| part == b"ld-"), "{needs:?}");
        assert!(needs.libraries.iter().any(|name| name.starts_with(b"libc.so")), "{needs:?}");
    }

    #[test]
    fn damaged_programs_need_nothing_and_panic_nobody() {
        let whole = std::fs::read("/proc/self/exe").unwrap();
        for len in [0, 4, 63, 64, 200, 4096] {
            needs_of_elf(&whole[..len]);
        }
        let head = &whole[..whole.len().min(1 << 16)];
        for at in 0..512 {
            let mut bytes = head.to_vec();
            bytes[at] ^= 0xff;
            needs_of_elf(bytes.as_slice());
        }
    }

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

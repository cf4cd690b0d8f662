//! What a Python program imports as it starts, and what that imports, found in the sources; of each module what
//! the interpreter will read: the compiled one where there is one.

use std::collections::{HashMap, HashSet};

use plan::python::{self, Import};
use plan::shell::Words;
use tree::{NodeId, NodeKind};

use super::{Known, MOST_FILES, MOST_OF_SOURCE, MOST_THREADS, ProgramFiles, Reach};
use crate::at_once::at_once;

/// Asks for the modules of the first Python program among the commands. Returns the number of files.
pub(super) fn find(files: &ProgramFiles<'_>, known: &Known) -> usize {
    let program = known.commands.iter().find_map(|command| Program::of(files, known, command));
    program.map_or(0, |program| Modules { files, program: &program }.find())
}

/// A Python program.
#[derive(Debug)]
struct Program {
    /// Where modules are looked for, in that order.
    folders: Vec<NodeId>,
    /// What compiled modules have in their names: `cpython-311`.
    tag: Vec<u8>,
    /// Its source, if that is a file.
    script: Option<NodeId>,
    /// Its source, if the command line holds it.
    text: Vec<u8>,
    /// Modules that the command line names, to be run or to be served.
    modules: Vec<Vec<u8>>,
}

impl Program {
    /// The one that a command starts: `python FILE`, `python -m MODULE`, `python -c TEXT`, or a script.
    fn of(files: &ProgramFiles<'_>, known: &Known, command: &Words) -> Option<Self> {
        for (place, word) in command.iter().enumerate() {
            let Some(path) = files.program(word, files.path()) else { continue };
            let Some((node, _)) = files.resolve(&path) else { continue };
            let rest = command.get(place + 1..).unwrap_or_default();
            if let Some(version) = version_of(files, node) {
                return Self::with(files, (&path, node, version), rest);
            }
            if let Some(interpreter) = known.interpreters.get(&node) {
                let names = interpreter.iter().filter_map(|name| files.program(name, files.path()));
                let found = names.filter_map(|path| Some((files.resolve(&path)?.0, path)));
                let mut found =
                    found.filter_map(|(node, path)| Some((version_of(files, node)?, node, path)));
                if let Some((version, interpreter, at)) = found.next() {
                    let rest = [std::slice::from_ref(&path), rest].concat();
                    return Self::with(files, (&at, interpreter, version), &rest);
                }
            }
        }
        None
    }

    /// The one that an interpreter runs, which was found at a path, when it is given `arguments`.
    fn with(
        files: &ProgramFiles<'_>,
        (path, interpreter, version): (&[u8], NodeId, u32),
        arguments: &[Vec<u8>],
    ) -> Option<Self> {
        let tree = files.tree;
        let mut program = Self {
            folders: Vec::new(),
            tag: format!("cpython-3{version}").into(),
            script: None,
            text: Vec::new(),
            modules: Vec::new(),
        };
        let mut first = tree.lookup(files.command.working_dir.as_bytes());
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_slice() {
                b"-m" => program.modules.extend(arguments.next().cloned()),
                b"-c" => program.text = arguments.next().cloned().unwrap_or_default(),
                b"-W" | b"-X" => _ = arguments.next(),
                option if option.starts_with(b"-") => continue,
                script => {
                    program.script = Some(files.resolve(&files.absolute(script))?.0);
                    first = program.script.map(|script| tree.parent(script));
                }
            }
            if program.script.is_some() || !program.text.is_empty() || !program.modules.is_empty() {
                break;
            }
        }
        // As in `uvicorn package.module:name`.
        program.modules.extend(
            arguments
                .map(|word| word.split(|byte| *byte == b':').next().unwrap_or_default().to_vec()),
        );
        program.folders.extend(first);
        // A server looks for what it is to serve there, too.
        program.folders.extend(tree.lookup(files.command.working_dir.as_bytes()));
        let python_path = files.variable("PYTHONPATH").unwrap_or_default().split(':');
        let python_path = python_path.filter(|folder| !folder.is_empty());
        program.folders.extend(
            python_path.filter_map(|folder| tree.lookup(&files.absolute(folder.as_bytes()))),
        );
        let real = tree.path_of(tree.parent(tree.parent(interpreter)));
        let link = path.rsplitn(3, |byte| *byte == b'/').nth(2).unwrap_or_default();
        let found = folders(&real, link, version);
        program.folders.extend(found.iter().filter_map(|folder| tree.lookup(folder)));
        let mut seen = HashSet::new();
        program.folders.retain(|folder| seen.insert(*folder));
        Some(program)
    }
}

/// Where an interpreter looks for modules, with its prefix, and with that of the link by which it was started,
/// which may be of an environment of its own (PEP 405); and Debian's folders.
fn folders(real: &[u8], link: &[u8], version: u32) -> Vec<Vec<u8>> {
    let lib = format!("/lib/python3.{version}");
    let own = ["", "/lib-dynload"].map(|rest| [real, lib.as_bytes(), rest.as_bytes()].concat());
    let site = [link, real].map(|prefix| [prefix, lib.as_bytes(), b"/site-packages"].concat());
    let debian =
        [format!("/usr/local{lib}/dist-packages"), "/usr/lib/python3/dist-packages".to_owned()];
    let debian = debian.map(String::into_bytes);
    own.into_iter().chain(site).chain(debian).collect()
}

/// The minor version, for an interpreter of Python 3.
fn version_of(files: &ProgramFiles<'_>, node: NodeId) -> Option<u32> {
    let path = files.tree.path_of(node);
    let name = path.rsplit(|byte| *byte == b'/').next()?;
    let version = std::str::from_utf8(name).ok()?.strip_prefix("python3.")?;
    version.parse().ok()
}

struct Modules<'a> {
    files: &'a ProgramFiles<'a>,
    program: &'a Program,
}

impl Modules<'_> {
    fn find(&self) -> usize {
        let program = self.program;
        let mut first = self.of_the_interpreter();
        first.extend(program.script);
        for import in python::imports(&program.text, true) {
            first.extend(self.files_of(&import, None));
        }
        for module in &program.modules {
            let module: Words = module.split(|byte| *byte == b'.').map(<[u8]>::to_vec).collect();
            let names = vec![b"__main__".to_vec()];
            first.extend(self.files_of(&Import { level: 0, module, names }, None));
        }
        let known = self.imports_from(&first);
        self.want(&in_order(&first, &known))
    }

    /// What it imports before the program, whichever that is; and files that say where more modules are.
    fn of_the_interpreter(&self) -> Vec<NodeId> {
        let import = |name: &&str| {
            let module = name.split('.').map(|name| name.as_bytes().to_vec()).collect();
            self.files_of(&Import { module, ..Import::default() }, None)
        };
        let mut found: Vec<NodeId> = AT_EVERY_START.iter().flat_map(import).collect();
        for folder in &self.program.folders {
            let names = self.files.tree.children(*folder);
            let paths = names.filter(|(name, _)| name.ends_with(b".pth")).map(|(_, file)| file);
            found.extend(paths.take(MOST_PATHS).filter_map(|file| self.file(file)));
        }
        found
    }

    /// What each of `first` imports, and each of those, and so on.
    fn imports_from(&self, first: &[NodeId]) -> HashMap<NodeId, Vec<NodeId>> {
        let mut known = HashMap::new();
        let mut generation = first.to_vec();
        for _ in 0..MOST_IMPORTS_DEEP {
            let mut seen = HashSet::new();
            generation.retain(|file| !known.contains_key(file) && seen.insert(*file));
            generation.truncate(MOST_FILES.saturating_sub(known.len()));
            if generation.is_empty() {
                break;
            }
            let imports = at_once(&generation, MOST_THREADS, |file| self.imports_of(*file));
            let next: Vec<NodeId> = imports.iter().flatten().copied().collect();
            known.extend(generation.into_iter().zip(imports));
            generation = next;
        }
        known
    }

    fn imports_of(&self, file: NodeId) -> Vec<NodeId> {
        let path = self.files.tree.path_of(file);
        if path.ends_with(b".so") {
            return self.named_in(file);
        }
        if !path.ends_with(b".py") && !path.ends_with(b".pth") && self.program.script != Some(file)
        {
            return Vec::new();
        }
        let source = self.files.text(file, MOST_OF_SOURCE).unwrap_or_default();
        let imports = python::imports(&source, self.program.script == Some(file));
        imports.iter().flat_map(|import| self.files_of(import, Some(file))).collect()
    }

    /// What a native module imports, by the names that are among its constants: only modules that are there.
    fn named_in(&self, library: NodeId) -> Vec<NodeId> {
        let elf = self.files.read(library).unwrap_or_default().elf;
        let constants = elf.map(|elf| elf.constants()).unwrap_or_default();
        let len = usize::try_from(constants.end - constants.start).unwrap_or_default();
        let mut text = vec![0; len];
        if self.files.read_part(library, &mut text, constants.start).is_err() {
            return Vec::new();
        }
        let mut found = Vec::new();
        for import in python::named(&text) {
            let loaded = self.files_of(&import, None);
            if loaded.len() == import.module.len() && import.module != BY_THE_WAY {
                found.extend(loaded);
            }
        }
        found
    }

    /// The files that are loaded for an import in the module `by`, in their order.
    fn files_of(&self, import: &Import, by: Option<NodeId>) -> Vec<NodeId> {
        let tree = self.files.tree;
        let mut loaded = Vec::new();
        let package = match import.level {
            0 => None,
            level => {
                let Some(by) = by else { return loaded };
                // A package's own module lies in its folder, as its other modules do.
                Some((1..level).fold(tree.parent(by), |folder, _| tree.parent(folder)))
            }
        };
        let mut names = import.module.iter();
        let mut at = match (package, names.next()) {
            (Some(package), None) => Some(package),
            (Some(package), Some(name)) => self.enter(package, name, &mut loaded),
            (None, Some(name)) => {
                let mut folders = self.program.folders.iter();
                let has = |folder: &&NodeId| self.module(**folder, name).is_some();
                folders.find(has).and_then(|folder| self.enter(*folder, name, &mut loaded))
            }
            (None, None) => None,
        };
        for name in names {
            at = at.and_then(|folder| self.enter(folder, name, &mut loaded));
        }
        if let Some(package) = at {
            for name in &import.names {
                self.enter(package, name, &mut loaded);
            }
        }
        loaded
    }

    /// Loads the module `name` of a folder; returns its own folder, if it has one.
    fn enter(&self, folder: NodeId, name: &[u8], loaded: &mut Vec<NodeId>) -> Option<NodeId> {
        let (file, own) = self.module(folder, name)?;
        loaded.extend(file);
        own
    }

    /// The file of a module, and its folder if it is a package; one of both is there.
    fn module(&self, folder: NodeId, name: &[u8]) -> Option<(Option<NodeId>, Option<NodeId>)> {
        let tree = self.files.tree;
        let package = tree.child(folder, name).filter(|child| tree.node(*child).is_directory());
        let initial = package.and_then(|package| self.file(tree.child(package, b"__init__.py")?));
        if initial.is_some() {
            return Some((initial, package));
        }
        let tag = self.program.tag.as_slice();
        let native = NATIVE.iter().map(|machine| [b".", tag, machine.as_bytes()].concat());
        let suffixes = native.chain(OTHERS.iter().map(|suffix| suffix.as_bytes().to_vec()));
        let mut files = suffixes.filter_map(|suffix| {
            self.file(tree.child(folder, &[name, suffix.as_slice()].concat())?)
        });
        let file = files.next();
        (file.is_some() || package.is_some()).then_some((file, package))
    }

    /// A regular file, perhaps behind a symbolic link.
    fn file(&self, node: NodeId) -> Option<NodeId> {
        let tree = self.files.tree;
        match &tree.node(node).kind {
            NodeKind::File(_) => Some(node),
            NodeKind::Symlink(_) => Some(self.files.resolve(&tree.path_of(node))?.0),
            _ => None,
        }
    }

    /// Asks for what the interpreter reads of modules. Returns the number of files.
    fn want(&self, modules: &[NodeId]) -> usize {
        let mut count = 0;
        // In parts, so that the libraries that some of them need come before the rest of them.
        for modules in modules.chunks(AT_A_TIME) {
            let mut libraries = Vec::new();
            for &module in modules {
                let node = self.compiled(module).unwrap_or(module);
                let Some(data) = self.files.file(node) else { continue };
                let Some(node) = self.files.want_node(node, data, WHOLE_LIBRARY) else { continue };
                match self.files.tree.path_of(node).ends_with(b".so") {
                    true => libraries.push(node),
                    false => count += 1,
                }
            }
            count += self.files.load(libraries, &mut Known::default(), Reach::Program);
        }
        count
    }

    /// What a source was compiled to (PEP 3147).
    fn compiled(&self, source: NodeId) -> Option<NodeId> {
        let tree = self.files.tree;
        let path = tree.path_of(source);
        let name = path.rsplit(|byte| *byte == b'/').next()?.strip_suffix(b".py")?;
        let folder = tree.child(tree.parent(source), b"__pycache__")?;
        let name = [name, b".", self.program.tag.as_slice(), b".pyc"].concat();
        self.file(tree.child(folder, &name)?)
    }
}

/// All modules in the order in which they are loaded: each before those that it imports.
fn in_order(first: &[NodeId], imports: &HashMap<NodeId, Vec<NodeId>>) -> Vec<NodeId> {
    let (mut order, mut seen) = (Vec::new(), HashSet::new());
    let mut ahead: Vec<NodeId> = first.iter().rev().copied().collect();
    while let Some(module) = ahead.pop() {
        if seen.insert(module) {
            order.push(module);
            ahead.extend(imports.get(&module).into_iter().flatten().rev());
        }
    }
    order
}

/// What the interpreter imports by itself (CPython 3.8 to 3.14).
const AT_EVERY_START: &[&str] = &[
    "encodings.utf_8",
    "encodings.aliases",
    "io",
    "abc",
    "site",
    "sitecustomize",
    "usercustomize",
];

/// What Cython's own part of each module names, and imports only for coroutines.
const BY_THE_WAY: [&[u8]; 2] = [b"asyncio", b"coroutines"];

/// What follows the tag in the name of a native module, by machine.
const NATIVE: &[&str] = &[
    "-x86_64-linux-gnu.so",
    "-aarch64-linux-gnu.so",
    "-x86_64-linux-musl.so",
    "-aarch64-linux-musl.so",
];

/// What other modules end with, the ones that come first included.
const OTHERS: &[&str] = &[".abi3.so", ".so", ".py"];

/// Longer libraries are wanted as far as their loader reads them, in bytes: little else of them runs at a start.
const WHOLE_LIBRARY: u64 = 2 << 20;

/// From the program to the last module that is found, each imported by the one before.
const MOST_IMPORTS_DEEP: usize = 256;

/// Modules that are asked for before what they need in turn.
const AT_A_TIME: usize = 32;

/// Files of one folder that name others.
const MOST_PATHS: usize = 64;

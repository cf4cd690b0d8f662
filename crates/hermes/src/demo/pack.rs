//! An image of several layers out of this machine's own `/usr`.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use oci::Platform;
use rustix::fs::{Access, access};
use testkit::image::{
    Compression, Image, ImageBuilder, LayerBuilder, PackedLayer, TarEntry, pack_directory,
};

use super::play::files_below;
use super::stop::Stop;

/// Packs layers into `work` until they have `size` compressed bytes, or `/usr` has no more.
pub(super) fn pack(work: &Path, size: u64, stop: &Stop) -> Result<Image> {
    let dir = work.join("layers");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let interpreter = Interpreter::find()?;
    let base = base(&interpreter)?;
    let first = [base.clone(), interpreter.files.clone()];
    let mut layers = pack_all(&dir, 0, &first, stop)?;
    let mut packed: HashSet<PathBuf> = first.into_iter().flatten().collect();
    let mut candidates =
        candidates(&interpreter)?.into_iter().filter(|path| packed.insert(path.clone()));
    loop {
        let done: u64 = layers.iter().map(|layer| layer.size).sum();
        let missing = size.saturating_sub(done);
        if missing == 0 {
            break;
        }
        let batches = take(&mut candidates, missing);
        if batches.iter().all(Vec::is_empty) {
            tracing::warn!(bytes = done, "this machine's /usr has no more for the image");
            break;
        }
        let more = pack_all(&dir, layers.len(), &batches, stop)?;
        layers.extend(more);
    }
    let platform = Platform::host();
    let builder = layers.iter().fold(ImageBuilder::new(), ImageBuilder::packed_layer);
    let arguments: Vec<&str> = interpreter.command.iter().map(String::as_str).collect();
    Ok(builder
        .layer(application(interpreter.program), Compression::Gzip { level: 6 })
        .platform(&platform.architecture, &platform.os)
        .entrypoint(&arguments)
        .environment(&[
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG=C.UTF-8",
            "PYTHONDONTWRITEBYTECODE=1",
        ])
        .build())
}

/// A language that this machine has.
struct Interpreter {
    /// How the program is started, but for its arguments.
    command: Vec<String>,
    /// The interpreter and its library.
    files: Vec<PathBuf>,
    /// The program.
    program: &'static str,
}

impl Interpreter {
    fn find() -> Result<Self> {
        let python = Path::new("/usr/bin/python3");
        if python.exists() {
            let program = python.canonicalize().context("looking for Python")?;
            let name =
                program.file_name().and_then(|name| name.to_str()).unwrap_or("python3").to_owned();
            let library = Path::new("/usr/lib").join(&name);
            if library.is_dir() {
                let mut files = vec![python.to_owned(), program.clone()];
                files.extend(readable_below(&library)?);
                let program = program.to_string_lossy().into_owned();
                let command = vec![program, APPLICATION.to_owned()];
                return Ok(Self { command, files, program: include_str!("program.py") });
            }
        }
        let perl = Path::new("/usr/bin/perl");
        let listed =
            Command::new(perl).args(["-e", r#"print join "\n", grep m{^/usr/}, @INC"#]).output();
        let listed = listed
            .context("the demo needs /usr/bin/python3 or /usr/bin/perl; Debian has perl-base")?;
        let mut files = vec![perl.to_owned()];
        for folder in String::from_utf8_lossy(&listed.stdout).lines() {
            // Perl also names folders that nobody has made.
            if let Ok(target) = Path::new(folder).canonicalize() {
                files.extend(Some(PathBuf::from(folder)).filter(|folder| folder.is_symlink()));
                files.extend(readable_below(&target)?);
            }
        }
        let command = vec![perl.to_string_lossy().into_owned(), APPLICATION.to_owned()];
        Ok(Self { command, files, program: include_str!("program.pl") })
    }
}

/// A shell, some tools, and the libraries that they and the interpreter load.
fn base(interpreter: &Interpreter) -> Result<Vec<PathBuf>> {
    let tools = [
        "/bin/sh",
        "/usr/bin/env",
        "/usr/bin/cat",
        "/usr/bin/ls",
        "/usr/bin/sha256sum",
        "/usr/bin/true",
    ];
    let mut programs: Vec<PathBuf> =
        tools.iter().map(PathBuf::from).filter(|tool| tool.exists()).collect();
    let mut files: BTreeSet<PathBuf> =
        programs.iter().flat_map(|program| with_target(program)).collect();
    let loads = |path: &&PathBuf| {
        path.extension().is_some_and(|extension| extension == "so")
            || path.parent() == Some(Path::new("/usr/bin"))
    };
    programs.extend(interpreter.files.iter().filter(loads).cloned());
    for library in libraries(&programs)? {
        files.extend(with_target(&library));
    }
    files.extend(with_target(Path::new("/usr/lib/locale/C.utf8")));
    // They bring the links that lead to /usr.
    files.extend(
        ["/bin", "/sbin", "/lib", "/lib64"]
            .iter()
            .map(PathBuf::from)
            .filter(|path| path.is_symlink()),
    );
    Ok(files.into_iter().filter(|path| path.symlink_metadata().is_ok()).collect())
}

/// What the dynamic linker would load for `programs`.
fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut command = Command::new("ldd");
    let output =
        command.args(programs).env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD").output();
    let output = output.context("asking ldd for libraries; Debian has it in libc-bin")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // `\tname => /path (address)` or `\t/path (address)`; a program's own line is not indented.
    let indented = text.lines().filter(|line| line.starts_with('\t'));
    let paths = indented
        .filter_map(|line| line.split_ascii_whitespace().find(|word| word.starts_with('/')));
    let found: BTreeSet<PathBuf> = paths.map(PathBuf::from).collect();
    if found.is_empty() {
        bail!("ldd found no libraries: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(found)
}

/// A path, and what it leads to.
fn with_target(path: &Path) -> Vec<PathBuf> {
    let mut both = vec![path.to_owned()];
    both.extend(path.canonicalize().ok().filter(|target| target != path));
    both
}

/// More of `/usr`, as other images have it.
fn candidates(interpreter: &Interpreter) -> Result<Vec<PathBuf>> {
    let known: HashSet<&PathBuf> = interpreter.files.iter().collect();
    let mut found = Vec::new();
    for folder in
        ["/usr/lib/python3", "/usr/lib/gcc", "/usr/lib", "/usr/share", "/usr/bin", "/usr/include"]
    {
        let files = readable_below(Path::new(folder))?;
        found.extend(files.into_iter().filter(|path| !known.contains(path)));
    }
    Ok(found)
}

fn readable_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = files_below(dir)?;
    files.retain(|path| access(path, Access::READ_OK).is_ok());
    Ok(files)
}

/// Two lists of files that come to some of the `missing` compressed bytes: rather too few, for more can
/// follow.
fn take(candidates: &mut impl Iterator<Item = PathBuf>, missing: u64) -> [Vec<PathBuf>; 2] {
    let mut lists = [Vec::new(), Vec::new()];
    // Files shrink to a third to a half.
    let mut left = (missing * 2).max(LEAST);
    for list in &mut lists {
        let enough = left / 2;
        let mut taken = 0;
        for path in candidates.by_ref() {
            taken += path.symlink_metadata().map_or(0, |metadata| metadata.len());
            list.push(path);
            if taken >= enough {
                break;
            }
        }
        left = left.saturating_sub(taken).max(LEAST / 2) * 2;
    }
    lists
}

/// Packs several layers at a time.
fn pack_all(
    dir: &Path,
    first: usize,
    lists: &[Vec<PathBuf>],
    stop: &Stop,
) -> Result<Vec<PackedLayer>> {
    let lists = lists.iter().filter(|list| !list.is_empty());
    let layers = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, list) in lists.enumerate() {
            let blob = dir.join(format!("{}.tar.gz", first + number));
            threads.push(scope.spawn(move || pack_directory(list, blob, &mut |_| {})));
        }
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(packed) => packed.context("packing a layer"),
            Err(_panic) => bail!("packing a layer failed"),
        });
        joined.collect::<Result<Vec<_>>>()
    });
    stop.check()?;
    layers
}

/// The uppermost layer: the program, and the folders that every image has.
fn application(program: &str) -> Vec<u8> {
    let folders = ["app", "dev", "etc", "proc", "root", "sys", "tmp"];
    let layer = folders.iter().fold(LayerBuilder::new(), |layer, folder| {
        let entry = TarEntry::directory(*folder);
        layer.entry(if *folder == "tmp" { entry.mode(0o1777) } else { entry })
    });
    layer.file(APPLICATION.trim_start_matches('/'), program).build()
}

const APPLICATION: &str = "/app/program";
/// The least that a further pair of layers takes.
const LEAST: u64 = 8 << 20;

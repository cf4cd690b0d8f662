//! The containerd of this machine: which it is, and what it makes of its configuration.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use toml::{Table, Value};
use toml_edit::{Array, DocumentMut};

use super::calls::Peer;
use super::settings::{Version, get};
use crate::args::NodeArguments;
use crate::failure::in_full;

/// Where it is unless somebody says otherwise.
const USUAL_CONFIG: &str = "/etc/containerd/config.toml";

/// The containerd of this machine.
#[derive(Debug)]
pub(super) struct Containerd {
    pub(super) version: Version,
    /// What it calls itself.
    pub(super) full_version: String,
    /// Its configuration; there may be no such file.
    pub(super) config: PathBuf,
    /// A name to run its program by.
    program: PathBuf,
}

impl Containerd {
    /// Finds the one that runs, or the one that is installed.
    pub(super) fn find(arguments: &NodeArguments) -> Result<Self> {
        let socket = &arguments.containerd_socket;
        let process = process_behind(socket);
        let program = process.as_ref().map(|process| process.join("exe"));
        let program = program.filter(|exe| exe.exists()).unwrap_or_else(|| "containerd".into());
        let asked = Peer::connect(socket).and_then(|mut peer| peer.version());
        let full_version = match asked {
            Ok(version) => version,
            Err(err) => version_of(&program).map_err(|other| {
                anyhow!(
                    "no containerd is here: {}; {}; install it, or say --containerd-socket",
                    in_full(&err),
                    in_full(&other)
                )
            })?,
        };
        let version = full_version.parse().map_err(anyhow::Error::msg)?;
        let given = arguments.containerd_config.clone();
        let config = given.or_else(|| config_of(&process?)).unwrap_or_else(|| USUAL_CONFIG.into());
        Ok(Self { version, full_version, config: std::path::absolute(config)?, program })
    }

    /// What its configuration says now; empty if there is none.
    pub(super) fn text(&self) -> Result<String> {
        match fs::read_to_string(&self.config) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            other => other.with_context(|| format!("reading {}", self.config.display())),
        }
    }

    /// What it would make of a configuration: every key, with its default where it is not given. With
    /// `drop_in`, of one that imports such a file after all others.
    pub(super) fn effective(&self, text: &str, drop_in: Option<&str>) -> Result<Table> {
        let folder = tempfile::tempdir().context("making a folder for a trial")?;
        let mut document: DocumentMut = text.parse()?;
        let mut imports = self.imports(text)?;
        if let Some(text) = drop_in {
            let path = folder.path().join("drop-in.toml");
            fs::write(&path, text).context("writing a drop-in for a trial")?;
            imports.push(path);
        }
        if !imports.is_empty() {
            let imports = imports.iter().map(|path| path.to_string_lossy().into_owned());
            document["imports"] = toml_edit::value(imports.collect::<Array>());
        }
        let path = folder.path().join("config.toml");
        fs::write(&path, document.to_string()).context("writing a configuration for a trial")?;
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&path).args(["config", "dump"]);
        let dump = output(&mut command).context(
            "asking containerd what it makes of its configuration, with `containerd config dump`",
        )?;
        toml::from_str(&dump).context("reading what `containerd config dump` printed")
    }

    /// The files and patterns that a configuration imports, as absolute paths.
    pub(super) fn imports(&self, text: &str) -> Result<Vec<PathBuf>> {
        let written: Table = toml::from_str(text)
            .with_context(|| format!("{} cannot be used", self.config.display()))?;
        let imports = get(&written, &["imports"]).and_then(Value::as_array);
        let folder = self.config.parent().unwrap_or_else(|| Path::new("/"));
        let paths = imports.into_iter().flatten().filter_map(Value::as_str);
        Ok(paths.map(|path| folder.join(path)).collect())
    }

    /// The folder of which every `.toml` file is imported, if there is one.
    pub(super) fn drop_in_folder(&self, text: &str) -> Result<Option<PathBuf>> {
        let is_all = |path: &PathBuf| path.file_name().is_some_and(|name| name == "*.toml");
        let pattern = self.imports(text)?.into_iter().rfind(is_all);
        let folder = pattern.and_then(|pattern| pattern.parent().map(Path::to_owned));
        Ok(folder.filter(|folder| !folder.as_os_str().as_encoded_bytes().contains(&b'*')))
    }
}

/// The folder in `/proc` of the process that listens on a socket, if it can be seen from here.
fn process_behind(socket: &Path) -> Option<PathBuf> {
    let stream = UnixStream::connect(socket).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
    let folder = PathBuf::from(format!("/proc/{}", peer.pid));
    folder.is_dir().then_some(folder)
}

/// What its command line says of its configuration.
fn config_of(process: &Path) -> Option<PathBuf> {
    let line = fs::read(process.join("cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line).into_owned();
    let words: Vec<&str> = line.split('\0').collect();
    let next = words.windows(2).find(|pair| matches!(pair[0], "--config" | "-config" | "-c"));
    let joined = words.iter().find_map(|word| word.trim_start_matches('-').strip_prefix("config="));
    let path = next.map(|pair| pair[1]).or(joined)?;
    let working_dir = fs::read_link(process.join("cwd")).unwrap_or_default();
    Some(working_dir.join(path))
}

/// What a program says of its version: `containerd github.com/containerd/containerd v2.1.0 1234`.
fn version_of(program: &Path) -> Result<String> {
    let text = output(Command::new(program).arg("--version"))?;
    let version = text.split_whitespace().nth(2).map(str::to_owned);
    version.with_context(|| format!("`{} --version` says `{text}`", program.display()))
}

/// Runs a program and returns what it wrote to standard output.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let shown = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let output = command.output().with_context(|| format!("running `{shown}`"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let last = complaint.lines().last().unwrap_or_default();
        bail!("`{shown}` failed, {}: {last}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

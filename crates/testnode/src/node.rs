//! The node: its namespaces, its folder, and its end.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tempfile::TempDir;

use crate::cache::Cache;
use crate::cgroups::{self, Hierarchy, UnifiedCgroup};

/// Run on the host, in the node's cgroups to be.
const ENTER: &str = include_str!("enter.sh");
/// Run as the first process in the node.
const INSIDE: &str = include_str!("inside.sh");
/// Where programs in the node are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where the peers built from source appear in the node.
pub(crate) const PEERS: &str = "/opt/peers";
/// How much of each log is shown when a test fails.
const LOG_TAIL_LINES: usize = 40;
/// How much of each line.
const LOG_LINE_CHARS: usize = 240;

/// A command that runs a program of the nodes' Debian root on the host, on the host's files: for tools
/// of which the host has an older version or none.
///
/// # Errors
/// When `cargo xtask setup` has not run, or no package of the root has the program.
pub fn packaged(program: &str) -> Result<Command> {
    let root = Cache::locate().existing_root()?;
    let path = root.join("usr/bin").join(program);
    if !path.exists() {
        bail!("the Debian root of test nodes has no {program}: add its package to root.sh");
    }
    // Its own loader finds its own libraries; neither needs to be where Debian has it.
    let library = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let name = match std::env::consts::ARCH {
        "aarch64" => "ld-linux-aarch64.so.1",
        _ => "ld-linux-x86-64.so.2",
    };
    let mut command = Command::new(root.join(&library).join(name));
    command.arg("--library-path").arg(root.join(library)).arg(path);
    Ok(command)
}

/// Whose network a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// Its own, with nothing but loopback: ports never clash between nodes.
    #[default]
    Own,
    /// The host's, for a test whose registry runs in the test process. Ports must be free ones.
    Host,
}

/// What a node is made of.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    /// Whose network it has.
    pub network: Network,
    /// Files and folders of the host and the absolute path at which each appears in the node.
    pub binds: Vec<(PathBuf, String)>,
}

/// A running node. Clones are the same node; it ends when the last of them, and of the daemons that
/// were started in it, is dropped.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// As the host counts.
    pid1: u32,
    unshare: Child,
    /// Closing it ends the node.
    lifeline: Option<ChildStdin>,
    /// Its changes, its disk and its logs.
    folder: TempDir,
    hierarchies: Vec<Hierarchy>,
    /// Tells other test processes that the folder is in use.
    _lock: File,
}

impl Node {
    /// Starts a node with a network of its own and the peers at `/opt/peers`.
    ///
    /// # Errors
    /// When `cargo xtask setup` has not run, the caller is not root, or the kernel refuses.
    pub fn start() -> Result<Self> {
        Self::start_and_bind(Vec::new())
    }

    /// As [`Node::start`], with more paths of the host, and where each is in the node.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_and_bind(more: Vec<(PathBuf, String)>) -> Result<Self> {
        let mut binds = vec![(Cache::locate().existing_peers()?, PEERS.to_owned())];
        binds.extend(more);
        Self::start_with(&NodeOptions { binds, ..NodeOptions::default() })
    }

    /// Starts a node as `options` say, without the peers.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_with(options: &NodeOptions) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("test nodes need root");
        }
        let cache = Cache::locate();
        let root = cache.existing_root()?;
        let hierarchies = cgroups::hierarchies()?;
        let (folder, lock) = claim_folder(&cache.nodes(), &hierarchies)?;
        for part in ["upper", "work", "merged", "disk", "logs"] {
            fs::create_dir(folder.path().join(part)).context("preparing a node's folder")?;
        }
        let groups = cgroups::create(&hierarchies, cgroup_name(folder.path()))?;

        let mut command = Command::new("bash");
        command.args(["-c", ENTER, "enter", INSIDE, namespaces(options.network)]);
        command.arg(groups.len().to_string()).args(&groups);
        command.arg(&root).arg(folder.path()).arg(hierarchies.len().to_string());
        for h in &hierarchies {
            command.arg(&h.mount_point).args([&h.fs_type, &h.options]);
        }
        for (from, to) in &options.binds {
            command.arg(from).arg(to);
        }
        let log = File::create(folder.path().join("logs/node.log")).context("making a log")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut unshare = command.spawn().context("running bash")?;
        let lifeline = unshare.stdin.take();
        let first_line = unshare.stdout.take().map(BufReader::new).and_then(|out| {
            // The line comes when all is set up; the end of the stream without it is a failure.
            out.lines().next()?.ok()?.parse().ok()
        });
        let mut inner = Inner { pid1: 0, unshare, lifeline, folder, hierarchies, _lock: lock };
        inner.pid1 = first_line.with_context(|| {
            format!("starting a node:\n{}", read_log(inner.folder.path(), "node"))
        })?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The first process of the node, as the host counts.
    #[must_use]
    pub fn pid1(&self) -> u32 {
        self.inner.pid1
    }

    /// Lets what runs in the node have processors before what else runs on the host: for measurements on
    /// a machine that is not theirs alone.
    ///
    /// # Errors
    /// When the node's cgroup does not take it.
    pub fn precede_others(&self) -> Result<()> {
        cgroups::raise_share(&self.inner.hierarchies, cgroup_name(self.inner.folder.path()))
    }

    /// Where the host sees the absolute path `inside` of the node.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.pid1())).join(inside.trim_start_matches('/'))
    }

    /// A command that will run in the node, as root, with a clean environment.
    ///
    /// Its process on the host is `nsenter`. Killing that does not end the command; use
    /// [`Node::spawn`] for what must be killed.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.pid1()));
        command.args(["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--root", "--wd"]);
        command.args(["env", "-i", "HOME=/root", "LANG=C.UTF-8"]).arg(format!("PATH={PATH}"));
        command.arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a program in the node and returns what it wrote to stdout.
    ///
    /// # Errors
    /// When it cannot be run or fails, with what it wrote to stderr.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        output(self.command(program).args(args))
    }

    /// Runs lines of bash in the node and returns what they wrote to stdout. They stop at the first
    /// command that fails.
    ///
    /// # Errors
    /// As [`Node::run`].
    pub fn bash(&self, lines: &str) -> Result<String> {
        self.run("bash", &["-euo", "pipefail", "-c", lines])
    }

    /// Calls `work` on a thread whose sockets and network devices are the node's.
    ///
    /// # Errors
    /// When the network cannot be entered, or `work` panics.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let place = format!("/proc/{}/ns/net", self.pid1());
        let namespace = File::open(&place).with_context(|| format!("opening {place}"))?;
        // A namespace is a thread's, and the caller's own must not stay there.
        let done = std::thread::scope(|scope| {
            let enter = || -> rustix::io::Result<T> {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            };
            scope.spawn(enter).join()
        });
        let Ok(done) = done else { bail!("a thread in the network of a node panicked") };
        done.context("entering the network of a node")
    }

    /// Writes a file in the node, with the folders above it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, inside: &str, content: impl AsRef<[u8]>) -> Result<()> {
        let path = self.path(inside);
        make_parents(&path)?;
        fs::write(&path, content).with_context(|| format!("writing {inside} in the node"))
    }

    /// Copies a file or a folder of the host into the node, with the folders above it. `inside` must
    /// not exist yet if `from` is a folder.
    ///
    /// # Errors
    /// When anything cannot be copied.
    pub fn install(&self, from: &Path, inside: &str) -> Result<()> {
        let path = self.path(inside);
        make_parents(&path)?;
        output(Command::new("cp").args(["-a", "--"]).arg(from).arg(&path)).map(drop)
    }

    /// What a program in a container wrote that `ctr` runs with the option that `run` is given, which makes it a file
    /// here. Of its pipes `ctr` may miss the end: it stops to read when the program has ended (containerd's pull
    /// request 13931).
    ///
    /// # Errors
    /// When `run` fails, with what the program wrote.
    pub fn written(&self, run: impl FnOnce(&str) -> Result<String>) -> Result<String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let file = format!("/srv/output-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let ran = run(&format!("--log-uri=file://{file}"));
        let written = fs::read_to_string(self.path(&file));
        ran.with_context(|| written.as_deref().unwrap_or_default().to_owned())?;
        written.context("reading what a container wrote")
    }

    /// What the daemon `name` has written so far, or an empty string.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        read_log(self.inner.folder.path(), name)
    }

    /// The node's own cgroup of version 2, if the host has that version.
    pub(crate) fn unified_cgroup(&self) -> Option<UnifiedCgroup> {
        cgroups::unified(&self.inner.hierarchies, cgroup_name(self.inner.folder.path()))
    }

    /// Where the host keeps the log of the daemon `name`.
    pub(crate) fn log_path(&self, name: &str) -> PathBuf {
        log_path(self.inner.folder.path(), name)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_logs(self.folder.path());
        }
        drop(self.lifeline.take());
        // `unshare` ends after the last process of the node: nothing writes to the folder any more.
        let ended = self.unshare.wait().map(drop).map_err(anyhow::Error::from);
        let removed = cgroups::remove(&self.hierarchies, cgroup_name(self.folder.path()));
        for error in [ended, removed].into_iter().filter_map(Result::err) {
            complain(&format!("a test node left something behind: {error:#}"));
        }
    }
}

/// Runs `command` to its end and returns what it wrote to stdout.
///
/// # Errors
/// When it cannot be run or fails, with what it wrote to stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command.output().with_context(|| format!("running {shown}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{shown}: {}\n{text}{complaint}", output.status);
    }
    Ok(text)
}

fn make_parents(path: &Path) -> Result<()> {
    let parent = path.parent().context("a path in the node has a parent")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))
}

fn namespaces(network: Network) -> &'static str {
    match network {
        Network::Own => "--mount --pid --net --uts --ipc --cgroup",
        Network::Host => "--mount --pid --uts --ipc --cgroup",
    }
}

/// Makes a folder for a node below `nodes`, and holds it; removes those that nobody holds.
fn claim_folder(nodes: &Path, hierarchies: &[Hierarchy]) -> Result<(TempDir, File)> {
    fs::create_dir_all(nodes).with_context(|| format!("making {}", nodes.display()))?;
    // Held until the new folder is held, lest another process takes it for an abandoned one.
    let all = File::open(nodes).context("opening the folder of nodes")?;
    flock(all.as_fd(), FlockOperation::LockExclusive).context("locking the folder of nodes")?;
    for entry in fs::read_dir(nodes).context("reading the folder of nodes")? {
        let path = entry.context("reading the folder of nodes")?.path();
        remove_abandoned(&path, hierarchies)?;
    }
    let folder = tempfile::Builder::new()
        .prefix("hermes-node-")
        .tempdir_in(nodes)
        .context("making a node's folder")?;
    let lock = File::open(folder.path()).context("opening a node's folder")?;
    flock(lock.as_fd(), FlockOperation::LockExclusive).context("locking a node's folder")?;
    Ok((folder, lock))
}

/// Removes the folder and the cgroups of a node whose test process was killed. Its processes and
/// mounts went with that process.
fn remove_abandoned(path: &Path, hierarchies: &[Hierarchy]) -> Result<()> {
    let gone = |e: &std::io::Error| e.kind() == ErrorKind::NotFound;
    let folder = match File::open(path) {
        Err(e) if gone(&e) => return Ok(()),
        other => other.with_context(|| format!("opening {}", path.display()))?,
    };
    if flock(folder.as_fd(), FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    cgroups::remove(hierarchies, cgroup_name(path))?;
    match fs::remove_dir_all(path) {
        Err(e) if !gone(&e) => Err(e).with_context(|| format!("removing {}", path.display())),
        _ => Ok(()),
    }
}

/// The cgroup of the node in `folder`: named alike, so that one leads to the other.
fn cgroup_name(folder: &Path) -> &str {
    folder.file_name().and_then(OsStr::to_str).expect("tempfile makes names of ASCII letters")
}

fn log_path(folder: &Path, name: &str) -> PathBuf {
    folder.join("logs").join(format!("{name}.log"))
}

fn read_log(folder: &Path, name: &str) -> String {
    fs::read(log_path(folder, name))
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// Shows the end of each log in the output of a test that fails.
fn show_logs(folder: &Path) {
    for entry in fs::read_dir(folder.join("logs")).into_iter().flatten().flatten() {
        let text = fs::read(entry.path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let cut = |line: &str| line.chars().take(LOG_LINE_CHARS).collect::<String>();
        let lines: Vec<String> = text.lines().map(cut).collect();
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
        complain(&format!("--- {} ---\n{}", entry.path().display(), tail.join("\n")));
    }
}

#[expect(clippy::print_stderr, reason = "the test harness shows it with the failed test")]
fn complain(text: &str) {
    eprintln!("{text}");
}

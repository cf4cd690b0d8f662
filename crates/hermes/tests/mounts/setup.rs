//! A set-up of its own for each test: registry, root folder, daemon, and an end that leaves nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;
use testkit::disk::SmallDisk;
use testkit::image::{Compression, Content, ImageBuilder, LayerBuilder, Texture};
use testkit::registry::{Options, Registry};

/// Everything that a test needs; undone when dropped.
pub(crate) struct Setup {
    dir: TempDir,
    root: PathBuf,
    pub(crate) registry: Registry,
    /// Where the root folder is, if it is on a disk of its own.
    pub(crate) disk: Option<SmallDisk>,
    /// Arguments before each command. The last counts, where one comes twice.
    pub(crate) global: Vec<String>,
    /// What runs `hermes`, with its arguments; empty for this process itself.
    pub(crate) through: Vec<String>,
}

impl Setup {
    pub(crate) fn new() -> Self {
        Self::with_root(None)
    }

    /// With its root folder on `disk`.
    pub(crate) fn on(disk: SmallDisk) -> Self {
        Self::with_root(Some(disk))
    }

    fn with_root(disk: Option<SmallDisk>) -> Self {
        let dir = tempfile::Builder::new().prefix("hermes-test-").tempdir().unwrap();
        let folder = disk.as_ref().map_or_else(|| dir.path().to_owned(), SmallDisk::path);
        let registry = Registry::start(Options::default()).unwrap();
        let global = ["--log", "info", "--output", "json", "--docker-config", "/nonexistent"];
        let global = global.map(str::to_owned).to_vec();
        Self { dir, root: folder.join("root"), registry, disk, global, through: Vec::new() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path below the root folder.
    pub(crate) fn in_root(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Runs `hermes` with this set-up's root.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.run_in(&self.root, arguments)
    }

    /// As [`run`](Self::run), with another root folder.
    pub(crate) fn run_at(&self, root: &str, arguments: &[&str]) -> Output {
        self.run_in(&self.path(root), arguments)
    }

    /// As [`run`](Self::run), with what people read.
    pub(crate) fn run_plain(&self, arguments: &[&str]) -> Output {
        self.run(&[arguments, &["--output", "text"]].concat())
    }

    fn run_in(&self, root: &Path, arguments: &[&str]) -> Output {
        let hermes = env!("CARGO_BIN_EXE_hermes").to_owned();
        let mut words = self.through.iter().cloned().chain([hermes]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg("--root").arg(root);
        command.args(&self.global).args(arguments).output().unwrap()
    }

    /// Ends the daemon, and the keeper with it unless it is needed.
    #[track_caller]
    pub(crate) fn end_daemon(&self) {
        let pid = self.daemon_pid().unwrap();
        assert!(end(pid, Signal::TERM), "daemon {pid} does not end");
    }

    /// As [`run`](Self::run); it must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {}\n{err}\n{}", output.status, self.log());
        serde_json::from_str(&out).unwrap_or(Value::Null)
    }

    /// As [`run`](Self::run); it must end with `code`, and say something. Returns what it says.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {err}");
        assert!(err.trim().lines().count() == 1, "not one sentence: {err}");
        err
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.in_root("daemon.log")).unwrap_or_default()
    }

    /// Mounts `image` on the folder `name`; more arguments may follow.
    #[track_caller]
    pub(crate) fn mount(&self, image: &str, name: &str, more: &[&str]) -> PathBuf {
        let dir = self.path(name);
        let mut arguments = vec!["mount", image, dir.to_str().unwrap()];
        arguments.extend(more);
        self.ok(&arguments);
        dir
    }

    /// Has the image streamed and indexed, and its layers thrown away again.
    #[track_caller]
    pub(crate) fn index(&self, image: &str) {
        let before = self.cached();
        let dir = self.mount(image, "indexing", &[]);
        self.ok(&["umount", dir.to_str().unwrap()]);
        // Whoever looks after the cache may have one of them open for a moment, and then it stays.
        self.until("the layers have gone", || {
            self.ok(&["cache", "prune"]);
            self.cached().is_subset(&before).then_some(())
        });
    }

    /// The layers of which the cache has something, if there is one.
    fn cached(&self) -> BTreeSet<String> {
        let listed = self.run(&["cache", "ls"]).stdout;
        let listed: Value = serde_json::from_slice(&listed).unwrap_or_default();
        let layers = listed["layers"].as_array().into_iter().flatten();
        layers.map(|layer| layer["digest"].to_string()).collect()
    }

    pub(crate) fn status(&self) -> Value {
        self.ok(&["status"])
    }

    pub(crate) fn daemon_pid(&self) -> Option<i32> {
        pid_of(&self.status(), "daemon")
    }

    /// As [`daemon_pid`](Self::daemon_pid), of a daemon that may be dying.
    pub(crate) fn daemon_pid_if_any(&self) -> Option<i32> {
        let status = self.run(&["status"]);
        pid_of(&serde_json::from_slice(&status.stdout).ok()?, "daemon")
    }

    pub(crate) fn keeper_pid(&self) -> Option<i32> {
        pid_of(&self.status(), "keeper")
    }

    /// Kills the daemon and waits until another one answers. Returns its process id.
    #[track_caller]
    pub(crate) fn kill_daemon(&self) -> i32 {
        let pid = self.until("a daemon answers", || self.daemon_pid());
        kill(pid);
        self.until("another daemon answers", || self.daemon_pid().filter(|other| *other != pid))
    }

    /// Asks again and again, for a minute, until there is an answer.
    #[track_caller]
    pub(crate) fn until<T>(&self, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(60) {
            if let Some(answer) = ask() {
                return answer;
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        panic!("waited a minute in vain: {what}\n{}\n{}", self.log(), self.status());
    }

    /// Waits until an attempt fails while a read waits.
    #[track_caller]
    pub(crate) fn until_a_failure(&self) {
        self.until("an attempt fails while a read waits", || {
            let status = self.status();
            let waits = status["mounts"][0]["waiting_reads"].as_u64()? > 0;
            (waits && status["failed_spans"].as_u64()? > 1).then_some(())
        });
    }

    #[track_caller]
    pub(crate) fn until_sealed(&self) {
        self.until("all mounts are sealed", || {
            let status = self.status();
            let mounts = status["mounts"].as_array()?;
            mounts.iter().all(|mount| mount["sealed"] == true).then_some(())
        });
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        self.registry.faults().restore();
        let status = self.run(&["status"]);
        let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        for mount in status["mounts"].as_array().into_iter().flatten() {
            self.run(&["umount", "--lazy", mount["dir"].as_str().unwrap_or_default()]);
        }
        if let Some(pid) = pid_of(&status, "daemon") {
            end(pid, Signal::TERM);
        }
        // Each starts the other again, and one that was just started may not answer yet. The run's look
        // for leftovers finds what comes back all the same.
        for pid in std::iter::from_fn(|| process_of(&self.root)).take(20) {
            end(pid, Signal::KILL);
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
        let ours =
            |point: &&Path| point.starts_with(self.dir.path()) || point.starts_with(&self.root);
        for point in points.filter(ours) {
            Command::new("umount").arg("-l").arg(point).status().ok();
        }
    }
}

/// Says that something is over, also when the test fails meanwhile.
pub(crate) struct SetWhenDropped<'a>(pub(crate) &'a std::sync::atomic::AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A process of ours that serves `root`: a keeper, if there is one, as those start the others.
fn process_of(root: &Path) -> Option<i32> {
    let root = root.to_str().unwrap();
    let (mut keeper, mut other) = (None, None);
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let read = |name: &str| std::fs::read_to_string(process.path().join(name));
        // Nobody else is asked for its arguments: a process that waits for a page holds up who asks.
        let is_hermes =
            read("comm").is_ok_and(|name| ["hermes\n", "exe\n"].contains(&name.as_str()));
        if !is_hermes {
            continue;
        }
        let arguments = read("cmdline").unwrap_or_default();
        let arguments: Vec<&str> = arguments.split('\0').collect();
        if arguments.contains(&root) {
            let place = if arguments.contains(&"keeper") { &mut keeper } else { &mut other };
            *place = process.file_name().to_str().unwrap().parse().ok();
        }
    }
    keeper.or(other)
}

fn pid_of(status: &Value, process: &str) -> Option<i32> {
    i32::try_from(status[process]["pid"].as_i64()?).ok()
}

/// Asks a process to end, and waits until it has.
#[track_caller]
pub(crate) fn terminate(pid: i32) {
    assert!(end(pid, Signal::TERM), "process {pid} does not end");
}

/// Kills a process and waits until it is dead.
#[track_caller]
pub(crate) fn kill(pid: i32) {
    assert!(end(pid, Signal::KILL), "process {pid} does not end");
}

/// Sends `signal` and waits for the end, 20 seconds at most.
fn end(pid: i32, signal: Signal) -> bool {
    let Some(pid) = Pid::from_raw(pid) else { return true };
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    if kill_process(pid, signal).is_err() {
        return true;
    }
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let patience = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&patience)).is_ok_and(|ready| ready == 1)
}

/// An image of two layers with `files` files of `len` random bytes in the upper one. Returns its
/// name and what each file holds. Images of the same size have the same layers.
pub(crate) fn image(
    setup: &Setup,
    name: &str,
    files: u64,
    len: u64,
) -> (String, Vec<(String, Vec<u8>)>) {
    image_as(setup, name, (files, len), Compression::Gzip { level: 1 })
}

/// As [`image`], with the upper layer compressed otherwise.
pub(crate) fn image_as(
    setup: &Setup,
    name: &str,
    size: (u64, u64),
    compression: Compression,
) -> (String, Vec<(String, Vec<u8>)>) {
    image_in(&setup.registry, name, size, compression)
}

/// As [`image_as`], in any registry.
pub(crate) fn image_in(
    registry: &Registry,
    name: &str,
    (files, len): (u64, u64),
    compression: Compression,
) -> (String, Vec<(String, Vec<u8>)>) {
    pack(registry, name, (0..files, len), compression)
}

/// As [`image`], with a file for each of the seeds, and compressed so that there are many spans.
pub(crate) fn image_from(
    setup: &Setup,
    name: &str,
    seeds: std::ops::Range<u64>,
    len: u64,
) -> (String, Vec<(String, Vec<u8>)>) {
    pack(&setup.registry, name, (seeds, len), Compression::Gzip { level: 6 })
}

fn pack(
    registry: &Registry,
    name: &str,
    (seeds, len): (std::ops::Range<u64>, u64),
    compression: Compression,
) -> (String, Vec<(String, Vec<u8>)>) {
    let mut layer = LayerBuilder::new().dir("data");
    let mut contents = Vec::new();
    for seed in seeds {
        let content = Content::generated(seed, len, Texture::Random);
        let path = format!("data/{seed:04}");
        contents.push((path.clone(), content.to_bytes()));
        layer = layer.file(path, content);
    }
    let base = LayerBuilder::new().dir("etc").file("etc/name", b"base".to_vec());
    let gzip = Compression::Gzip { level: 1 };
    let image =
        ImageBuilder::new().layer(base.build(), gzip).layer(layer.build(), compression).build();
    let refs = image.push_to(registry, name, "1").unwrap();
    (refs.reference, contents)
}

/// Nothing stays in the page cache, so that every read comes to the cache of layers.
pub(crate) fn forget_pages() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// Reads every file below `dir` and compares it.
#[track_caller]
pub(crate) fn check(dir: &Path, contents: &[(String, Vec<u8>)]) {
    for (path, expected) in contents {
        let found = std::fs::read(dir.join(path)).unwrap_or_else(|err| panic!("{path}: {err}"));
        assert!(found == *expected, "{path}: wrong bytes");
    }
}

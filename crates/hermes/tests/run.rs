//! `hermes run` of an image with a shell and libraries of this machine.

#![expect(clippy::unwrap_used, reason = "shared parts of tests, which fail by panicking")]

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use testkit::image::{Compression, ImageBuilder, LayerBuilder, TarEntry, pack_directory};

const HERMES: &str = env!("CARGO_BIN_EXE_hermes");

/// A set-up of its own with the image `app`; its daemon and keeper end with it.
struct Setup {
    dir: TempDir,
}

impl Setup {
    fn new() -> Self {
        let dir =
            tempfile::Builder::new().prefix("run-test-").tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        let dir = dir.unwrap();
        let packed =
            pack_directory(&tools(), dir.path().join("tools.tar.gz"), &mut |_| {}).unwrap();
        let files = LayerBuilder::new()
            .dir("etc")
            .file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/sh\n")
            .entry(TarEntry::directory("tmp").mode(0o1777))
            .file("etc/group", "root:x:0:\nstaff:x:50:web\nwww:x:52:other,web\n")
            .dir("root")
            .build();
        let image = ImageBuilder::new()
            .packed_layer(&packed)
            .layer(files, Compression::Gzip { level: 6 })
            .platform(&oci::Platform::host().architecture, "linux")
            .entrypoint(&["/bin/sh", "-c", "echo own $GREETING in $PWD"])
            .environment(&["GREETING=hello world", "PATH=/usr/bin:/bin"])
            .working_directory("/srv/app")
            .build();
        image.write_layout(dir.path().join("layout"), "app").unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn hermes(&self) -> Command {
        let mut command = Command::new(HERMES);
        command.arg("--root").arg(self.root());
        command
    }

    fn run(&self) -> Command {
        let mut command = self.hermes();
        command.args(["run", "--runtime", "chroot"]);
        command.arg(format!("oci:{}:app", self.dir.path().join("layout").display()));
        command
    }

    fn shell(&self, script: &str) -> Output {
        self.run().args(["--", "/bin/sh", "-c", script]).output().unwrap()
    }

    #[track_caller]
    fn check(&self, script: &str, code: i32, stdout: &str) {
        let output = self.shell(script);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), stdout, "{script}: {stderr}");
        assert_eq!(output.status.code(), Some(code), "{script}: {stderr}");
    }

    /// How many runs have a folder.
    fn folders(&self) -> usize {
        let entries = std::fs::read_dir(self.root().join("run")).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
    }

    /// Starts a shell in the image that says something every moment, and waits for its first word.
    fn talk(&self) -> Talker {
        let script = "while echo word; do sleep 0.05; done";
        let mut run = self.run();
        run.args(["--", "/bin/sh", "-c", script]).stdout(Stdio::piped());
        let mut child = run.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "word");
        Talker { child, lines }
    }

    fn status(&self) -> Value {
        let status = self.hermes().args(["status", "--output", "json"]).output().unwrap();
        // Without an answer where the daemon dies just then.
        serde_json::from_slice(&status.stdout).unwrap_or_default()
    }

    /// Nothing of a run is left, and the daemon serves no mount.
    #[track_caller]
    fn is_clean(&self) {
        assert_eq!(self.folders(), 0);
        assert_eq!(self.status()["mounts"], Value::Array(Vec::new()));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let runs = self.root().join("run");
        assert!(!mounts.contains(runs.to_str().unwrap()), "{mounts}");
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let pid = |text: &str| text.trim().parse().ok().and_then(Pid::from_raw);
        if let Ok(status) = self.hermes().args(["status", "--output", "json"]).output() {
            let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
            // Each would start the other again.
            let steps =
                [("daemon", Signal::STOP), ("keeper", Signal::KILL), ("daemon", Signal::KILL)];
            for (process, signal) in steps {
                if let Some(pid) =
                    status[process]["pid"].as_i64().and_then(|number| pid(&number.to_string()))
                {
                    kill_process(pid, signal).ok();
                }
            }
        }
        // A test that fails in the middle of a run leaves its mounts to this.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let ours = |line: &str| {
            line.split(' ')
                .nth(4)
                .filter(|dir| Path::new(dir).starts_with(self.dir.path()))
                .map(str::to_owned)
        };
        for dir in mounts.lines().rev().filter_map(ours) {
            rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH).ok();
        }
    }
}

/// A run that says something every moment; killed when dropped.
struct Talker {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Drop for Talker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A shell, some tools and their libraries.
fn tools() -> Vec<PathBuf> {
    let tools = ["/bin/sh", "/bin/cat", "/bin/sleep", "/usr/bin/id", "/bin/ls", "/usr/bin/env"];
    let output = Command::new("ldd").args(tools).output().expect("ldd, of libc-bin");
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.lines().filter(|line| line.starts_with('\t')).flat_map(str::split_whitespace);
    let libraries = words.filter(|word| word.starts_with('/'));
    let mut paths: Vec<PathBuf> = tools.into_iter().chain(libraries).map(PathBuf::from).collect();
    let targets: Vec<PathBuf> = paths.iter().map(|path| path.canonicalize().unwrap()).collect();
    paths.extend(targets);
    paths
}

#[test]
fn a_program_sees_its_image_and_its_end_is_ours() {
    let setup = Setup::new();
    setup.check("exit 7", 7, "");
    setup.check("kill -9 $$; exit 1", 1, "");
    setup.check("sh -c 'kill -9 $$'; exit $?", 137, "");
    setup.check("echo \"$GREETING\" $HOME $PWD $#", 0, "hello world /root /srv/app 0\n");
    setup.check("id -u; id -g; echo $$; cat /proc/sys/kernel/hostname", 0, "0\n0\n1\nhermes\n");
    setup.check("echo x > /dev/null; ls /dev", 0, DEVICES);
    setup.check("echo new > /etc/new && cat /etc/new", 0, "new\n");
    setup.check("cat /etc/new 2>&1 || exit 3", 3, "cat: /etc/new: No such file or directory\n");
    setup.check("ls /proc/1/exe > /dev/null && ls -d /sys/kernel", 0, "/sys/kernel\n");

    let own = setup.run().output().unwrap();
    assert_eq!(String::from_utf8_lossy(&own.stdout), "own hello world in /srv/app\n");
    let missing = setup.run().args(["--", "/nonexistent"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(127));
    let path = setup.run().args(["--", "env"]).output().unwrap();
    let environment = "GREETING=hello world\nHOME=/root\nPATH=/usr/bin:/bin\n";
    let mut lines: Vec<&str> = std::str::from_utf8(&path.stdout).unwrap().lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.join("\n") + "\n", environment);
    setup.is_clean();
}

#[test]
fn a_signal_ends_the_program_and_everything_is_put_away() {
    let setup = Setup::new();
    let script = "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child =
        setup.run().args(["--", "/bin/sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "told");
    assert_eq!(child.wait().unwrap().code(), Some(9));
    setup.is_clean();

    // One that does not heed it is killed.
    let script = "trap '' INT; echo ready; while :; do sleep 0.05; done";
    let mut child =
        setup.run().args(["--", "/bin/sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 9));
    setup.is_clean();
}

#[test]
fn what_a_killed_run_leaves_is_put_away_by_the_next_daemon() {
    let setup = Setup::new();
    let mut living = setup.talk();
    drop(setup.talk());
    assert_eq!(setup.folders(), 2);
    let daemon = |setup: &Setup| setup.status()["daemon"]["pid"].as_i64();
    let before = daemon(&setup).unwrap();
    kill_process(Pid::from_raw(i32::try_from(before).unwrap()).unwrap(), Signal::KILL).unwrap();
    let begin = Instant::now();
    while daemon(&setup).is_none_or(|pid| pid == before) || setup.folders() > 1 {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", setup.status());
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let status = setup.status();
    assert_eq!(status["mounts"].as_array().unwrap().len(), 1, "{status}");
    // The other run goes on, and puts its own things away.
    assert_eq!(living.lines.next().unwrap().unwrap(), "word");
    let pid = Pid::from_raw(i32::try_from(living.child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    living.child.wait().unwrap();
    setup.is_clean();
}

#[test]
fn a_user_of_the_image_has_its_groups() {
    let setup = Setup::new();
    setup.check("id -G", 0, "0\n");
    let of_user = |user: &str| {
        let layout = setup.dir.path().join(user);
        let tools = pack_directory(&tools(), setup.dir.path().join("t.tar.gz"), &mut |_| {});
        let files = LayerBuilder::new()
            .file("etc/passwd", "web:x:33:34:web:/:/bin/sh\n")
            .file("etc/group", "staff:x:50:web\nwww:x:52:other,web\n")
            .build();
        let image = ImageBuilder::new()
            .packed_layer(&tools.unwrap())
            .layer(files, Compression::None)
            .platform(&oci::Platform::host().architecture, "linux")
            .process("User", user.into());
        image.build().write_layout(&layout, "app").unwrap();
        let mut command = setup.hermes();
        command.args(["run", "--runtime", "chroot"]);
        let output = command.arg(format!("oci:{}:app", layout.display()));
        let output = output.args(["--", "/usr/bin/id", "-G"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(of_user("web"), "34 50 52\n");
    assert_eq!(of_user("33:50"), "50\n");
}

const DEVICES: &str =
    "fd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n";

#[test]
fn the_demo_takes_any_image() {
    let setup = Setup::new();
    let image = format!("oci:{}:app", setup.dir.path().join("layout").display());
    let output = Command::new(HERMES)
        .env("TMPDIR", setup.dir.path())
        .args(["demo", "--output", "json", "--kills", "1", "--image", &image])
        .args(["--", "/bin/sh", "-c", "echo ready; while :; do sleep 0.1; done"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["wrong_bytes"], 0, "{report} {stderr}");
    assert_eq!(report["daemon_kills"], 1, "{report}");
    assert_eq!(report["link"], Value::Null, "{report}");
    assert!(report["files_compared"].as_u64().unwrap() > 8, "{report}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(setup.dir.path().to_str().unwrap()), "{mounts}");
}

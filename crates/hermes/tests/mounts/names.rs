//! Names of registries that are resolved, or not, while an image is mounted.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use testkit::registry::Outage;

use crate::setup::{Setup, check, image};

/// A mount namespace whose table of hosts is ours to change.
struct Hosts {
    keeper: Child,
    file: PathBuf,
    _dir: TempDir,
}

impl Hosts {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, resolver) = (dir.path().join("hosts"), dir.path().join("resolv.conf"));
        std::fs::write(&file, "").unwrap();
        // No name server but a port of this machine where nobody listens.
        std::fs::write(&resolver, "nameserver 127.0.0.1\noptions attempts:1 timeout:1\n").unwrap();
        let script = "mount --bind \"$1\" /etc/hosts && \
            mount --bind \"$2\" \"$(readlink -f /etc/resolv.conf)\" && echo ready && exec cat";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
        command.arg(&file).arg(&resolver).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut keeper = command.spawn().unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(keeper.stdout.as_mut().unwrap(), &mut ready).unwrap();
        Self { keeper, file, _dir: dir }
    }

    fn set(&self, text: &str) {
        std::fs::write(&self.file, text).unwrap();
    }

    /// What runs a program in the namespace.
    fn through(&self) -> Vec<String> {
        let namespace = format!("--mount=/proc/{}/ns/mnt", self.keeper.id());
        vec!["nsenter".to_owned(), namespace, "--".to_owned()]
    }

    /// A folder as programs in the namespace see it.
    fn seen(&self, dir: &Path) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.keeper.id())).join(dir.strip_prefix("/").unwrap())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.keeper.kill().ok();
        self.keeper.wait().ok();
    }
}

#[test]
fn a_name_that_is_not_resolved_is_refused_or_waited_for() {
    // Made first, so that it goes last: the daemon is asked and ended through it.
    let hosts = Hosts::new();
    let mut setup = Setup::new();
    let (name, contents) = image(&setup, "named", 8, 1 << 20);
    let port = setup.registry.address().port();
    let folder = setup.path("hosts").join(format!("registry.test_{port}_"));
    std::fs::create_dir_all(&folder).unwrap();
    let server = format!("server = 'http://registry.test:{port}'\n");
    std::fs::write(folder.join("hosts.toml"), server).unwrap();
    let hosts_dir = setup.path("hosts").to_str().unwrap().to_owned();
    setup.global.extend(["--hosts-dir".to_owned(), hosts_dir]);
    setup.through = hosts.through();
    let name = format!("registry.test:{port}/{}", name.split_once('/').unwrap().1);

    let said = setup.fails(1, &["mount", &name, setup.path("mnt").to_str().unwrap()]);
    assert!(said.contains("registry.test") && said.contains("not available"), "{said}");

    hosts.set("127.0.0.1 registry.test\n");
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    let dir = hosts.seen(&dir);
    // Connections that live need no name.
    setup.registry.faults().cut(Outage::Refuse);
    hosts.set("");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| check(&dir, &contents));
        setup.until_a_failure();
        setup.registry.faults().restore();
        // From here on it is the name alone that is missing.
        let failures = || setup.status()["failed_spans"].as_u64();
        let before = failures().unwrap();
        setup.until("more attempts fail", || (failures()? > before + 1).then_some(()));
        hosts.set("127.0.0.1 registry.test\n");
        reader.join().unwrap();
    });
}

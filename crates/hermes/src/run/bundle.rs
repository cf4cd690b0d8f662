//! An OCI bundle: what runc and crun read (runtime-spec 1.0).

use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::container::Streams;
use super::program::Program;

/// A bundle in a folder of ours.
#[derive(Debug)]
pub(super) struct Bundle {
    dir: PathBuf,
    id: OsString,
}

/// Writes `config.json` to `dir`, whose name becomes the container's.
pub(super) fn write(
    dir: &Path,
    rootfs: &Path,
    program: &Program,
    streams: Streams,
) -> Result<Bundle> {
    let terminal =
        streams == Streams::Inherited && io::stdin().is_terminal() && io::stdout().is_terminal();
    let file = dir.join("config.json");
    let config = serde_json::to_vec(&config(rootfs, program, terminal))?;
    fs::write(&file, config).with_context(|| format!("writing {}", file.display()))?;
    let id = dir.file_name().context("a bundle needs a folder with a name")?.to_owned();
    Ok(Bundle { dir: dir.to_owned(), id })
}

impl Bundle {
    /// Runs the container and ends as it does.
    pub(super) fn run(&self, runtime: &Path) -> Command {
        let mut command = self.command(runtime);
        command.arg("run").arg("--bundle").arg(&self.dir).arg(&self.id);
        command
    }

    /// Ends and removes the container, if there is one.
    pub(super) fn delete(&self, runtime: &Path) -> Command {
        let mut command = self.command(runtime);
        command.arg("delete").arg("--force").arg(&self.id);
        command
    }

    fn command(&self, runtime: &Path) -> Command {
        let mut command = Command::new(runtime);
        command.arg("--root").arg(self.dir.join("runtime"));
        command
    }
}

fn config(rootfs: &Path, program: &Program, terminal: bool) -> Value {
    let Program { arguments, environment, working_dir, uid, gid, groups } = program;
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": { "uid": uid, "gid": gid, "additionalGids": groups },
            "args": arguments,
            "env": environment,
            "cwd": working_dir,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
        },
        "root": { "path": rootfs },
        "hostname": "hermes",
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            // Of the machine's: with the machine's network no new one can be made.
            bind("/sys", &["rbind", "ro", "nosuid", "noexec", "nodev"]),
            bind("/etc/resolv.conf", &["rbind", "ro"]),
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

fn mount(target: &str, kind: &str, options: &[&str]) -> Value {
    json!({ "destination": target, "type": kind, "source": kind, "options": options })
}

fn bind(path: &str, options: &[&str]) -> Value {
    json!({ "destination": path, "type": "bind", "source": path, "options": options })
}

/// Those that containerd gives by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

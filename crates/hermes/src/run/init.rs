//! The first process of a container of our own: makes the view of the machine that the program gets, and
//! becomes the program. It is in its namespaces already.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::process::{Gid, Signal, Uid, set_parent_process_death_signal};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use sys::mount::{FsContext, MountAttrFlags, MountError, Unmount};

use super::program::Program;
use super::rootfs::{in_user_namespace, mount_tmpfs};

/// Becomes the program described in the file `program`, with `rootfs` as its root. Returns only when that
/// fails.
pub(crate) fn init(rootfs: &Path, program: &Path) -> Result<ExitCode> {
    // Who started us waits for us, and nobody else would end us.
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("tying the container to its starter")?;
    let bytes = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    let program: Program = serde_json::from_slice(&bytes)?;
    sys::mount::make_private(Path::new("/")).context("separating our mounts from the machine's")?;
    // A root must be a mount of its own, which an unpacked folder is not.
    sys::mount::bind(rootfs, rootfs).with_context(|| format!("binding {}", rootfs.display()))?;
    mount_machine(rootfs)?;
    if let Err(err) = fs::write("/proc/sys/kernel/hostname", "hermes") {
        tracing::debug!(error = %err, "the container has the machine's name");
    }
    enter(rootfs).with_context(|| format!("entering {}", rootfs.display()))?;
    let Program { arguments, environment, working_dir, uid, gid, groups } = program;
    fs::create_dir_all(&working_dir)
        .with_context(|| format!("making {}", working_dir.display()))?;
    let Some((name, arguments)) = arguments.split_first() else { bail!("no program") };
    let mut command = Command::new(name);
    command.args(arguments).env_clear().current_dir(&working_dir);
    command.envs(environment.iter().filter_map(|variable| variable.split_once('=')));
    become_user(uid, gid, &groups).context("becoming the image's user")?;
    let err = command.exec();
    // As shells do.
    let code = if err.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    tracing::error!(program = name, error = %err, "the program cannot be started");
    Ok(ExitCode::from(code))
}

/// Changes who this thread is, and with it the program that it becomes. (The standard library's way
/// would drop the groups.)
fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    let groups: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    match set_thread_groups(&groups) {
        // In a user namespace there may be no other groups than one's own.
        Err(Errno::PERM) if in_user_namespace() => {}
        set => set?,
    }
    if (uid, gid) != (0, 0) {
        set_thread_gid(Gid::from_raw(gid))?;
        set_thread_uid(Uid::from_raw(uid))?;
    }
    Ok(())
}

/// Mounts `/proc`, `/sys` and `/dev`.
fn mount_machine(rootfs: &Path) -> Result<()> {
    let proc = mount_point(rootfs, "proc")?;
    mount_new("proc", &proc, &[])
        // In some sandboxes only the machine's own may be shown.
        .or_else(|_| sys::mount::bind(Path::new("/proc"), &proc))
        .context("mounting /proc")?;
    let sys = mount_point(rootfs, "sys")?;
    let shown = sys::mount::bind_read_only(Path::new("/sys"), &sys);
    if let Err(err) = shown.or_else(|_| sys::mount::bind(Path::new("/sys"), &sys)) {
        tracing::debug!(error = %err, "the container has no /sys");
    }
    let dev = mount_point(rootfs, "dev")?;
    mount_tmpfs(&dev, "0755").context("mounting /dev")?;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let (source, target) = (Path::new("/dev").join(name), dev.join(name));
        if source.exists() {
            File::create(&target)?;
            sys::mount::bind(&source, &target)
                .with_context(|| format!("showing {}", source.display()))?;
        }
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlink(target, dev.join(name)).with_context(|| format!("making /dev/{name}"))?;
    }
    fs::create_dir(dev.join("shm"))?;
    mount_tmpfs(&dev.join("shm"), "1777").context("mounting /dev/shm")?;
    fs::create_dir(dev.join("pts"))?;
    let options = [("ptmxmode", "0666"), ("mode", "0620")];
    if let Err(err) = mount_new("devpts", &dev.join("pts"), &options) {
        tracing::debug!(error = %err, "the container has no terminals of its own");
    }
    show_resolver(rootfs);
    Ok(())
}

fn mount_new(fstype: &str, target: &Path, options: &[(&str, &str)]) -> Result<(), MountError> {
    let context = FsContext::open(fstype)?;
    for (key, value) in options {
        context.set_string(key, value)?;
    }
    context.create()?;
    context.mount_at(target, MountAttrFlags::empty())
}

/// A folder of the image to mount on. The image must not lead us out of itself.
fn mount_point(rootfs: &Path, name: &str) -> Result<std::path::PathBuf> {
    let path = rootfs.join(name);
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => bail!("/{name} of the image is not a folder"),
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            fs::create_dir(&path).with_context(|| format!("making /{name}"))?;
            Ok(path)
        }
        Err(err) => Err(err).with_context(|| format!("looking at /{name} of the image")),
    }
}

/// The network is the machine's, so its resolver is too, unless the image brings links of its own.
fn show_resolver(rootfs: &Path) {
    let etc = rootfs.join("etc");
    if !fs::symlink_metadata(&etc).is_ok_and(|etc| etc.is_dir()) {
        return;
    }
    for name in ["resolv.conf", "hosts"] {
        let (source, target) = (Path::new("/etc").join(name), etc.join(name));
        let is_file = match fs::symlink_metadata(&target) {
            Ok(metadata) => metadata.is_file(),
            Err(_missing) => File::create_new(&target).is_ok(),
        };
        if is_file && let Err(err) = sys::mount::bind(&source, &target) {
            tracing::debug!(file = name, error = %err, "the container does not see the machine's");
        }
    }
}

/// Makes `rootfs` our root, and lets go of the old one.
fn enter(rootfs: &Path) -> io::Result<()> {
    rustix::process::chdir(rootfs)?;
    // The old root comes to lie over the new one, and is taken off (pivot_root(2), NOTES).
    rustix::process::pivot_root(".", ".")?;
    sys::mount::unmount(Path::new("."), Unmount::Detach)?;
    Ok(rustix::process::chdir("/")?)
}

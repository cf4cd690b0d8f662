//! `hermes node uninstall`: the way back. What is left of it is said.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use sys::mount::{Unmount, unmount};

use super::calls::Peer;
use super::files::Files;
use super::record::Record;
use super::steps::Steps;
use super::{service, settings};
use crate::args::{GlobalArguments, UninstallArguments};
use crate::client;
use crate::daemon::StatusReport;
use crate::failure::{Exit, Failure, in_full};
use crate::output::Output;
use crate::protocol::Request;

/// Takes everything back.
pub(super) fn run(
    common: &GlobalArguments,
    output: Output,
    arguments: &UninstallArguments,
) -> Result<()> {
    let root = std::path::absolute(&common.root)?;
    let restarts = service::may_restart_containerd(&arguments.restart)?;
    let Some(record) = Record::read(&root)? else {
        bail!(
            "{} says of nothing that was installed here, so nothing is taken back",
            root.display()
        );
    };
    if !arguments.force {
        refuse_if_used(&arguments.node.containerd_socket, &root)?;
    }
    let mut files = Files { root: &root, record, steps: Steps::new(output, false) };
    let units = [service::NAME, service::SOCKET].map(service::place);
    let written = files.record.files.clone();
    let (of_service, others): (Vec<_>, Vec<_>) =
        written.into_iter().partition(|file| units.contains(&file.path));
    // Hermes' own configuration, which was written first, is needed by nobody then.
    let mut changed = false;
    for file in others.iter().rev() {
        let of_hermes = file.path == Path::new(crate::config::USUAL_PLACE);
        changed |= files.undo(file)? && !of_hermes;
    }
    if changed {
        super::install::tell_of_restart(&mut files.steps, &arguments.restart)?;
    }
    stop(common, &mut files, output)?;
    for file in &of_service {
        files.undo(file)?;
    }
    if service::is_there() && !of_service.is_empty() {
        service::control(&["daemon-reload"])?;
    }
    remove_folders(&mut files, arguments.purge)?;
    files.steps.note(
        "images that were pulled lazily have no layers in containerd: remove them there, so that they are pulled again",
    )?;
    files.steps.end(changed && !restarts)
}

/// Fails while containers run on images of Hermes.
fn refuse_if_used(socket: &Path, root: &Path) -> Result<()> {
    let asked = Peer::connect(socket).and_then(|mut peer| peer.containers_on(settings::NAME));
    let users: Vec<String> = match asked {
        Ok(containers) => containers
            .iter()
            .map(|(namespace, container)| {
                format!("{namespace}/{} ({})", container.id, container.image)
            })
            .collect(),
        Err(err) => {
            tracing::warn!(
                error = in_full(&err),
                "containerd cannot be asked; mounts are looked at"
            );
            mounts_on(&root.join("snapshots"))?
        }
    };
    if users.is_empty() {
        return Ok(());
    }
    let message = format!(
        "{} use images of Hermes: remove them first, or say --force, and they cannot read what is not here yet: {}",
        if users.len() == 1 {
            "1 container".to_owned()
        } else {
            format!("{} containers", users.len())
        },
        users.join(", ")
    );
    Err(Failure { exit: Exit::Busy, message }.into())
}

/// Where root file systems of containers are mounted whose layers lie in a folder.
fn mounts_on(folder: &Path) -> Result<Vec<String>> {
    let folder = folder.to_string_lossy().into_owned();
    let mounts = sys::mount::mountinfo().context("looking at mounts")?;
    let on = mounts.iter().filter(|mount| mount.super_options.contains(&folder));
    Ok(on.map(|mount| mount.point.display().to_string()).collect())
}

/// Unmounts what is mounted, and ends the daemon; the keeper ends with it.
fn stop(common: &GlobalArguments, files: &mut Files<'_>, output: Output) -> Result<()> {
    let snapshots = files.root.join("snapshots");
    let status = client::ask::<StatusReport>(common, &output, &Request::Status)?;
    for mount in status.iter().flat_map(|status| &status.mounts) {
        if mount.dir.starts_with(&snapshots) {
            let request = Request::Umount { dir: mount.dir.clone(), lazy: false };
            if let Err(err) = client::ask::<Value>(common, &output, &request) {
                files.steps.note(format!("{} stays mounted: {}", mount.image, in_full(&err)))?;
            }
        }
    }
    // Containers that were shown something have it without these.
    let mapped = snapshots.with_file_name("mapped");
    for mount in sys::mount::mountinfo().context("looking at mounts")? {
        if mount.point.starts_with(&mapped) {
            unmount(&mount.point, Unmount::Detach)
                .with_context(|| format!("unmounting {}", mount.point.display()))?;
        }
    }
    let processes = status.iter().flat_map(|status| [status.daemon.pid, status.keeper.pid]);
    let processes: Vec<Process> = processes.flatten().filter_map(Process::find).collect();
    if service::is_there() && service::control(&["cat", service::NAME]).is_ok() {
        files.steps.tell("stop hermes.service")?;
        // Together: whoever connects to the socket starts the service.
        let has_socket = service::control(&["cat", service::SOCKET]).is_ok();
        let units = [service::NAME, service::SOCKET];
        let units = if has_socket { &units[..] } else { &units[..1] };
        service::control(&[&["stop"], units].concat())?;
        if files.record.enabled_service {
            service::control(&["disable", service::NAME])?;
        }
        // What it holds for a next start keeps mounts alive. systemd before 254 has let go of it already.
        if let Err(err) = service::control(&["clean", "--what=fdstore", service::NAME]) {
            tracing::debug!(error = in_full(&err), "the descriptor store is not cleaned");
        }
    } else if let Some(pid) = status.and_then(|status| status.daemon.pid) {
        files.steps.tell(format!("end the daemon, process {pid}"))?;
        let daemon = processes.first().context("the daemon has ended by itself")?;
        pidfd_send_signal(&daemon.0, Signal::TERM).context("ending the daemon")?;
    }
    for process in processes {
        process.wait().context("waiting for the end of the daemon and its keeper")?;
    }
    Ok(())
}

/// A process that is about to end.
struct Process(OwnedFd);

impl Process {
    fn find(pid: u32) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        pidfd_open(pid, PidfdFlags::empty()).ok().map(Self)
    }

    /// Waits for its end, but not for ever: a keeper stays while something is still mounted.
    fn wait(self) -> Result<()> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, Some(&PATIENCE)))?;
        Ok(())
    }
}

fn remove_folders(files: &mut Files<'_>, purge: bool) -> Result<()> {
    let root = files.root.to_owned();
    if purge {
        let mounts = sys::mount::mountinfo().context("looking at mounts")?;
        let below =
            mounts.iter().find(|mount| mount.point.starts_with(&root) && mount.point != root);
        if let Some(mount) = below {
            bail!(
                "{} stays: {} is still mounted; unmount it, and remove the folder",
                root.display(),
                mount.point.display()
            );
        }
        files.steps.tell(format!("remove {} with all that is in it", root.display()))?;
        for entry in fs::read_dir(&root).with_context(|| format!("reading {}", root.display()))? {
            let path = entry.with_context(|| format!("reading {}", root.display()))?.path();
            let removed = if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.with_context(|| format!("removing {}", path.display()))?;
        }
    } else {
        Record::remove(&root)?;
        files.steps.note(format!("{} stays; `--purge` removes it", root.display()))?;
    }
    let folders = files.record.folders.clone();
    for folder in folders.iter().rev().filter(|folder| purge || !root.starts_with(folder)) {
        // What others put there stays.
        if fs::remove_dir(folder).is_ok() {
            files.steps.tell(format!("remove {}", folder.display()))?;
        }
    }
    Ok(())
}

/// The daemon makes the cache durable before it ends.
const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

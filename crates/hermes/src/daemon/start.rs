//! How a daemon starts, and what it ends with.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mounts::{FrontEnds, Holding};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use snapshotter::{ImageCalls, Images};
use tokio::runtime::{Handle, Runtime};

use super::credentials::NodeCredentials;
use super::traces::Traces;
use super::{Daemon, follow, lazy, metrics, server, service};
use crate::args::{DaemonArguments, DaemonTuning, GlobalArguments};
use crate::config::Config;
use crate::policies::Policies;
use crate::spawn::{LOCK, Restarter, Started};

/// Runs the daemon until it is told to stop.
pub(crate) fn run(common: &GlobalArguments, arguments: &DaemonArguments) -> Result<()> {
    let service::Inherited { store: systemd, listening } = service::inherit(&arguments.service)?;
    crate::registries::get_ready().context("starting a thread")?;
    fs::create_dir_all(&common.root)
        .with_context(|| format!("making {}", common.root.display()))?;
    let root = fs::canonicalize(&common.root)?;
    let taken = if systemd.is_some() { IfTaken::Wait } else { IfTaken::Refuse };
    let locked = lock(&root, taken);
    if arguments.ready_on_stdin && locked.as_ref().is_err_and(anyhow::Error::is::<Taken>) {
        return Started::GaveWay.say();
    }
    let lock = locked?;
    let restarter = match (&systemd, arguments.no_respawn) {
        (Some(_), _) => Restarter::Systemd,
        (None, false) => Restarter::Keeper,
        (None, true) => Restarter::Nobody,
    };
    let respawn = restarter == Restarter::Keeper;
    let config = arguments.config.as_deref().map(|path| Config::read_or_last(path, &root));
    let config = config.transpose()?;
    let options = server::ServerOptions {
        common: common.clone(),
        tuning: arguments.tuning.clone(),
        config: arguments.config.as_ref().map(std::path::absolute).transpose()?,
        respawn,
        watchdog: systemd.clone().zip(service::watchdog(&arguments.service)),
    };
    restarter.write_down(&lock)?;
    let keeper = Arc::new(keep(&root, &options)?);
    let tuning = configured(&arguments.tuning, config.as_ref(), &root)?;
    let holding = Holding::new(Arc::clone(&keeper), systemd.clone());
    let holding = Arc::new(holding.context("asking the keeper what it holds")?);
    let (front_ends, orphans) =
        FrontEnds::start(&root, Arc::clone(&holding)).context("starting")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let from = config.as_ref().map(|config| config.credentials.clone()).unwrap_or_default();
    let credentials = NodeCredentials::new(&from, Arc::clone(&holding));
    let parts = (front_ends, keeper, credentials);
    let traces = traces(config.as_ref(), runtime.handle());
    let (reads, told) = follow::channel();
    let daemon = Daemon::new(&root, parts, (&tuning, traces, reads), runtime.handle())?;
    let daemon = Arc::new(daemon);
    runtime.spawn(follow::run(Arc::downgrade(&daemon), told));
    daemon.adopt_all()?;
    daemon.front_ends.listen(orphans)?;
    daemon.clear_abandoned_runs();
    let ready = || -> Result<()> {
        if arguments.ready_on_stdin {
            Started::Serves.say()?;
        }
        systemd.map_or(Ok(()), |systemd| systemd.ready()).context("telling that the daemon serves")
    };
    let metrics = config.as_ref().and_then(|config| config.metrics.address);
    let metrics = metrics.and_then(|address| runtime.block_on(metrics::listen(address)));
    let calls = runtime_for_calls().context("starting a thread")?;
    let runtimes = (runtime.handle(), calls.handle());
    let containerd = for_containerd(&daemon, (config, listening), runtimes)?;
    // The first mount should not have to wait for it. What fails from here on waits for its end: the process could
    // not go while the kernel asks it about a mount of its own.
    let probing = probe_early(&daemon)?;
    let served = server::serve(Arc::clone(&daemon), holding, (options, containerd, metrics), ready);
    let served = runtime.block_on(served);
    runtime.block_on(daemon.traces.finish(LAST_TRACES));
    // The keeper was told that this is the end.
    let noted = if respawn { Restarter::Nobody.write_down(&lock) } else { Ok(()) };
    // Dropping the engine would fail those who wait. They are for the next daemon to serve, from what the
    // keeper holds.
    std::mem::forget(daemon);
    calls.shutdown_background();
    runtime.shutdown_timeout(Duration::from_secs(1));
    // It has mounts of its own, which must not stay.
    if let Some(Err(_panic)) = probing.map(std::thread::JoinHandle::join) {
        bail!("trying the back ends panicked");
    }
    served.and(noted)
}

/// Tries the back ends while nobody needs to know yet, so that the first mount need not wait for it. A
/// daemon that took over mounts has other things to do.
fn probe_early(daemon: &Arc<Daemon>) -> Result<Option<std::thread::JoinHandle<()>>> {
    if !daemon.front_ends.list().is_empty() {
        return Ok(None);
    }
    let daemon = Arc::clone(daemon);
    let thread = std::thread::Builder::new().name("probe".to_owned());
    let probe = move || {
        let working = daemon.front_ends.probe().working().count();
        tracing::debug!(working, "back ends tried");
    };
    Ok(Some(thread.spawn(probe).context("starting a thread")?))
}

/// What the command line leaves open, a configuration says.
fn configured(tuning: &DaemonTuning, config: Option<&Config>, root: &Path) -> Result<DaemonTuning> {
    let mut tuning = tuning.clone();
    let Some(config) = config else { return Ok(tuning) };
    if tuning.quota.is_none() {
        let disk = crate::config::size_of_disk(root).context("looking at the disk")?;
        tuning.quota = Some(config.cache.quota.bytes(disk));
    }
    tuning.eviction_grace.get_or_insert_with(|| config.eviction_grace());
    Ok(tuning)
}

/// What makes the spans that a configuration wants. Without them everything else goes on.
fn traces(config: Option<&Config>, runtime: &Handle) -> Traces {
    let endpoint = config.and_then(|config| config.tracing.endpoint.as_deref());
    let traces = endpoint.map(|endpoint| Traces::start(endpoint, runtime));
    traces.transpose().map(Option::unwrap_or_default).unwrap_or_else(|err| {
        let error = crate::failure::in_full(&err);
        tracing::error!(error, "there are no traces; `tracing.endpoint` says where they go");
        Traces::default()
    })
}

/// What containerd's calls come in by: one thread, on which most of them are over sooner than a second one would
/// wake up. It may wait for the disk, which readers of mounts need not notice.
fn runtime_for_calls() -> std::io::Result<Runtime> {
    let mut calls = tokio::runtime::Builder::new_multi_thread();
    calls.worker_threads(1).thread_name("calls").enable_all().build()
}

/// Opens what containerd is served with, if it is to be.
fn for_containerd(
    daemon: &Arc<Daemon>,
    (config, listening): (Option<Config>, Vec<UnixListener>),
    (runtime, calls): (&Handle, &Handle),
) -> Result<Option<server::ForContainerd>> {
    let Some(config) = config else { return Ok(None) };
    let socket = config.containerd.socket.clone();
    if let Some(dir) = socket.parent() {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let policies = Policies::open(&config.containerd.policies);
    let policies = Arc::clone(daemon.policies.get_or_init(|| Arc::new(policies)));
    policies.watch().context("starting a thread")?;
    let images =
        lazy::ContainerdImages::new((Arc::clone(daemon), runtime.clone()), &config, policies);
    match snapshotter::Snapshots::open(&daemon.root.join("snapshots"), Some(Arc::new(images))) {
        Ok(snapshots) => {
            let snapshots = Arc::new(snapshots);
            daemon.snapshots.get_or_init(|| Arc::downgrade(&snapshots));
            let _in_runtime = runtime.enter();
            let images = match config.containerd.address {
                Some(address) => Images::Containerd(ImageCalls::new(
                    address,
                    Arc::clone(&daemon.credentials) as _,
                )),
                None => Images::Nobody(Arc::clone(&daemon.kubelet_asks)),
            };
            let activated = service::listening_at(listening, &socket);
            let runtime = calls.clone();
            Ok(Some(server::ForContainerd { snapshots, socket, activated, images, runtime }))
        }
        // Containers that run need this daemon more than new ones do.
        Err(err) if daemon.is_needed() => {
            let error = crate::failure::in_full(&err.into());
            tracing::error!(error, "containerd is not served; mounts are");
            Ok(None)
        }
        Err(err) => Err(err.into()),
    }
}

/// What to do if the root folder has a daemon already.
enum IfTaken {
    Refuse,
    /// A service takes over when the other one ends, as one that a command has started while systemd was
    /// about to start this one.
    Wait,
}

/// A daemon has found another one.
#[derive(Debug, thiserror::Error)]
#[error("another daemon serves {}; `hermes status` shows it", root.display())]
struct Taken {
    root: PathBuf,
}

/// One daemon a root folder.
fn lock(root: &Path, taken: IfTaken) -> Result<File> {
    let path = root.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    let locked = match (rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive), taken) {
        (Err(Errno::WOULDBLOCK), IfTaken::Refuse) => {
            return Err(Taken { root: root.to_owned() }.into());
        }
        (Err(Errno::WOULDBLOCK), IfTaken::Wait) => {
            tracing::warn!(root = %root.display(), "another daemon serves; waiting for its end");
            let wait = || rustix::fs::flock(&file, FlockOperation::LockExclusive);
            rustix::io::retry_on_intr(wait)
        }
        (locked, _) => locked,
    };
    match locked {
        Ok(()) => Ok(file),
        Err(err) => Err(err).with_context(|| format!("locking {}", path.display())),
    }
}

/// Connects to the keeper of `root`, and starts one if there is none.
pub(super) fn keep(root: &Path, options: &server::ServerOptions) -> Result<keeper::Client> {
    let socket = root.join("keeper.sock");
    let server::ServerOptions { common, tuning, config, respawn, .. } = options;
    let respawn = match respawn {
        true => crate::spawn::respawn((common, root), tuning, config.as_deref())?,
        false => Vec::new(),
    };
    let client = match keeper::Client::connect(&socket) {
        Ok(client) => client,
        Err(_nobody) => {
            let mut command = crate::spawn::keeper(common, root, &respawn)?;
            let started = keeper::start(&mut command, &socket);
            // A daemon that has just died may have started one that was not there yet.
            started
                .or_else(|err| keeper::Client::connect(&socket).map_err(|_nobody| err))
                .context("starting the keeper")?
        }
    };
    // One that is there already knows how its first daemon was started.
    if let Err(err) = client.respawn(&respawn) {
        tracing::warn!(error = %err, "if the daemon dies it is started as before");
    }
    client.daemon().context("greeting the keeper")?;
    Ok(client)
}

/// How long the end of a daemon waits for a receiver of traces.
const LAST_TRACES: Duration = Duration::from_secs(1);

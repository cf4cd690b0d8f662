//! The daemon's socket, and the ends that it watches for: signals, and the keeper's death.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use keeper::SystemdStore;
use mounts::Holding;
use serde_json::Value;
use snapshotter::{Images, Snapshots};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::Daemon;
use crate::args::{DaemonTuning, GlobalArguments};
use crate::failure::{exit_of, in_full};
use crate::protocol::{Reply, Request};

/// What the server needs to start another keeper.
pub(super) struct ServerOptions {
    pub(super) common: GlobalArguments,
    pub(super) tuning: DaemonTuning,
    /// The file that it was configured with.
    pub(super) config: Option<PathBuf>,
    pub(super) respawn: bool,
    /// Who wants to hear that the daemon is alive, and how often.
    pub(super) watchdog: Option<(Arc<SystemdStore>, Duration)>,
}

/// What containerd is served with, and where.
pub(super) struct ForContainerd {
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) socket: PathBuf,
    /// The socket, if systemd listens at it: then it is systemd's, before and after this daemon.
    pub(super) activated: Option<std::os::unix::net::UnixListener>,
    /// Who is asked when the kubelet asks for images.
    pub(super) images: Images,
    /// Where calls come in.
    pub(super) runtime: Handle,
}

/// Serves until SIGTERM or SIGINT; calls `ready` when clients can connect.
pub(super) async fn serve(
    daemon: Arc<Daemon>,
    holding: Arc<Holding>,
    (options, containerd, metrics): (ServerOptions, Option<ForContainerd>, Option<TcpListener>),
    ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    // First: whoever sees a socket of ours may end us gracefully from then on.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let path = daemon.root.join("daemon.sock");
    let listener = listen(&path).with_context(|| format!("listening at {}", path.display()))?;
    let mut tasks = JoinSet::new();
    tasks.spawn(super::room::look_after(Arc::clone(&daemon)));
    tasks.spawn(super::room::complete_when_idle(Arc::clone(&daemon)));
    if let Some(listener) = metrics {
        tasks.spawn(super::metrics::serve(Arc::clone(&daemon), listener));
    }
    if let Some((systemd, interval)) = options.watchdog.clone() {
        tasks.spawn(super::service::feed_watchdog(Arc::clone(&daemon), systemd, interval));
    }
    let ending = Arc::new(AtomicBool::new(false));
    let watched =
        watch_keeper(Arc::clone(&daemon), Arc::clone(&holding), options, Arc::clone(&ending));
    tasks.spawn(watched);
    let mut containerd = Containerd::serve(containerd, &holding)?;
    ready()?;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    tasks.spawn(converse(Arc::clone(&daemon), stream));
                }
                Err(err) => tracing::warn!(error = %err, "a client could not connect"),
            },
            _ = term.recv() => break,
            _ = int.recv() => break,
            // Whoever started us has closed the terminal; that is nothing to us.
            _ = hangup.recv() => {}
            Some(_) = tasks.join_next() => {}
            ended = containerd.ended() => {
                tracing::error!(error = in_full(&ended), "containerd is not served any more; ending");
                break;
            }
            // The kernel tells nobody when the last user of a detached mount has gone.
            () = tokio::time::sleep(REAP_AGAIN), if daemon.front_ends.has_detached() => {
                let daemon = Arc::clone(&daemon);
                tokio::task::spawn_blocking(move || daemon.reap()).await?;
            }
        }
    }
    // The watch may be waiting on a thread that cannot be interrupted.
    ending.store(true, Ordering::Release);
    containerd.stop(&holding, daemon.is_needed()).await;
    tasks.shutdown().await;
    std::fs::remove_file(&path).ok();
    finish(daemon, holding).await
}

/// The server of containerd's calls, if there is one.
struct Containerd {
    /// Its only task.
    server: JoinSet<Result<()>>,
    /// What it made itself.
    socket: Option<PathBuf>,
    stop: Arc<Notify>,
}

impl Containerd {
    fn serve(what: Option<ForContainerd>, holding: &Holding) -> Result<Self> {
        let (mut server, stop) = (JoinSet::new(), Arc::new(Notify::new()));
        let Some(ForContainerd { snapshots, socket, activated, images, runtime }) = what else {
            return Ok(Self { server, socket: None, stop });
        };
        let _within = runtime.enter();
        let (kubelet, by_systemd) = (matches!(images, Images::Containerd(_)), activated.is_some());
        let listener = match activated {
            Some(activated) => {
                // One of a daemon before there was a unit for it.
                if holding.get(LISTENER).is_some() {
                    holding.remove(LISTENER);
                }
                from_std(activated)
            }
            None => listen_for_good(&socket, holding),
        };
        let listener = listener.with_context(|| format!("listening at {}", socket.display()))?;
        tracing::info!(socket = %socket.display(), by_systemd, kubelet, "containerd is served");
        let stopped = Arc::clone(&stop);
        let serve = async move {
            snapshotter::serve(listener, snapshots, images, stopped.notified()).await?;
            Ok(())
        };
        server.spawn_on(serve, &runtime);
        Ok(Self { server, socket: (!by_systemd).then_some(socket), stop })
    }

    /// Why it ended, which it should not; waits for ever if there is none.
    async fn ended(&mut self) -> anyhow::Error {
        match self.server.join_next().await {
            None => std::future::pending().await,
            Some(Ok(Ok(()))) => anyhow::anyhow!("it was told to stop"),
            Some(Ok(Err(err))) => err,
            Some(Err(err)) => err.into(),
        }
    }

    /// Lets the calls end that have begun. Where another daemon `is_needed`, further ones wait for it.
    async fn stop(mut self, holding: &Holding, is_needed: bool) {
        if let Some(socket) = self.socket.take().filter(|_| !is_needed) {
            // First, so that nobody connects who would not be answered.
            std::fs::remove_file(&socket).ok();
            holding.remove(LISTENER);
        }
        self.stop.notify_one();
        // At once if containerd is not served.
        if tokio::time::timeout(LAST_CALLS, self.server.join_next()).await.is_err() {
            tracing::warn!("calls of containerd were broken off");
        }
    }
}

/// Commands wait for the socket to appear, so it is there only when it listens.
fn listen(path: &Path) -> io::Result<UnixListener> {
    // Not longer than the name that it gets: the kernel limits the path.
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    std::fs::rename(&new, path)?;
    Ok(listener)
}

/// Listens at a socket that outlives this daemon: whoever connects between two of them waits for the
/// second.
fn listen_for_good(path: &Path, holding: &Holding) -> io::Result<UnixListener> {
    let place = path.as_os_str().as_bytes();
    if let Some((_, held)) = holding.get(LISTENER).filter(|(note, _)| note == place)
        && path.exists()
    {
        return from_std(held.into());
    }
    let listener = listen(path)?;
    holding.put(LISTENER, place, listener.as_fd())?;
    Ok(listener)
}

fn from_std(listener: std::os::unix::net::UnixListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// What the socket for containerd is held as.
pub(super) const LISTENER: &str = "containerd";

async fn finish(daemon: Arc<Daemon>, holding: Arc<Holding>) -> Result<()> {
    // An unmount that was just asked for is not over when umount(2) returns: the kernel lets go of
    // the file system a little later. Then nothing needs to stay.
    let patience = Instant::now() + LET_GO;
    while daemon.front_ends.has_detached() && Instant::now() < patience {
        tokio::time::sleep(SOON).await;
        let daemon = Arc::clone(&daemon);
        tokio::task::spawn_blocking(move || daemon.reap()).await?;
    }
    tokio::task::spawn_blocking(move || {
        daemon.stop();
        if !daemon.is_needed() {
            // Nothing is left to be held.
            holding.clear_systemd();
            let keeper = keeper::Client::connect(&daemon.root.join("keeper.sock"));
            if let Ok(keeper) = keeper {
                keeper.shutdown().ok();
            }
        }
    })
    .await?;
    Ok(())
}

/// Starts another keeper as soon as one dies, and gives it everything.
async fn watch_keeper(
    daemon: Arc<Daemon>,
    holding: Arc<Holding>,
    options: ServerOptions,
    ending: Arc<AtomicBool>,
) {
    let options = Arc::new(options);
    loop {
        let (daemon, holding, options) =
            (Arc::clone(&daemon), Arc::clone(&holding), Arc::clone(&options));
        let ending = Arc::clone(&ending);
        let watched = tokio::task::spawn_blocking(move || -> Result<bool> {
            let keeper = Arc::clone(&daemon.keeper.lock());
            // One that we ourselves have ended needs no successor.
            if !keeper.wait_closed(Some(KEEPER_PATIENCE))? || ending.load(Ordering::Acquire) {
                return Ok(false);
            }
            let another = Arc::new(super::start::keep(&daemon.root, &options)?);
            holding.move_to(Arc::clone(&another))?;
            *daemon.keeper.lock() = another;
            Ok(true)
        })
        .await;
        match watched {
            Ok(Ok(false)) => {}
            Ok(Ok(true)) => tracing::warn!("the keeper died; another one holds the descriptors"),
            Ok(Err(err)) => {
                tracing::error!(error = in_full(&err), "no keeper; trying again");
                tokio::time::sleep(KEEPER_PATIENCE).await;
            }
            Err(_shutting_down) => return,
        }
    }
}

/// One client, one request.
async fn converse(daemon: Arc<Daemon>, stream: UnixStream) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(tokio::io::AsyncReadExt::take(reader, MOST_REQUEST));
    if reader.read_line(&mut line).await.is_err() {
        return;
    }
    let (progress, mut reports) = tokio::sync::mpsc::unbounded_channel();
    let report = move |what: &str, done: u64, total: u64| {
        // The client may be gone; the work goes on.
        progress.send(Reply::Progress { what: what.to_owned(), done, total }).ok();
    };
    let answer = async move {
        match serde_json::from_str::<Request>(&line) {
            Ok(request) => answer(&daemon, request, &report).await,
            Err(err) => Err(anyhow::Error::new(err).context(
                "the daemon does not understand the request; are both of the same version?",
            )),
        }
    };
    tokio::pin!(answer);
    let result = loop {
        tokio::select! {
            result = &mut answer => break result,
            Some(reply) = reports.recv() => {
                // As above.
                send(&mut writer, &reply).await.ok();
            }
        }
    };
    let reply = match result {
        Ok(value) => Reply::Done(value),
        Err(err) => {
            tracing::warn!(error = in_full(&err), "request failed");
            Reply::Failed { exit: exit_of(&err), message: in_full(&err) }
        }
    };
    if let Err(err) = send(&mut writer, &reply).await {
        tracing::debug!(error = %err, "client gone before its answer");
    }
}

async fn answer(
    daemon: &Arc<Daemon>,
    request: Request,
    progress: &(dyn Fn(&str, u64, u64) + Sync),
) -> Result<Value> {
    match request {
        Request::Mount(request) => {
            Ok(serde_json::to_value(daemon.mount(&request, progress).await?)?)
        }
        Request::Umount { dir, lazy } => {
            blocking(daemon, move |daemon| {
                daemon.umount(&dir, lazy)?;
                Ok(Value::Null)
            })
            .await
        }
        Request::Status => {
            blocking(daemon, |daemon| Ok(serde_json::to_value(daemon.status())?)).await
        }
        Request::Explain { what } => {
            blocking(daemon, move |daemon| Ok(serde_json::to_value(daemon.explain(&what)?)?)).await
        }
        Request::Metrics => blocking(daemon, |daemon| Ok(daemon.metrics()?.into())).await,
        Request::CacheList => blocking(daemon, Daemon::cache_list).await,
        Request::CachePrune { keep } => {
            blocking(daemon, move |daemon| daemon.cache_prune(keep)).await
        }
        Request::CacheVerify => blocking(daemon, Daemon::cache_verify).await,
    }
}

async fn blocking(
    daemon: &Arc<Daemon>,
    act: impl FnOnce(&Daemon) -> Result<Value> + Send + 'static,
) -> Result<Value> {
    let daemon = Arc::clone(daemon);
    tokio::task::spawn_blocking(move || act(&daemon)).await?
}

async fn send(writer: &mut OwnedWriteHalf, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    writer.write_all(&line).await
}

/// How long calls that have begun may take when the daemon ends.
const LAST_CALLS: Duration = Duration::from_secs(5);
const REAP_AGAIN: Duration = Duration::from_millis(500);
const LET_GO: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_millis(20);
const KEEPER_PATIENCE: Duration = Duration::from_millis(500);
const MOST_REQUEST: u64 = 1 << 20;

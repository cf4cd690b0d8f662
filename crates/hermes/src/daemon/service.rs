//! The daemon as a service of systemd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use keeper::SystemdStore;
use rustix::net::{AddressFamily, sockopt};
use tokio::time::MissedTickBehavior;

use super::{Daemon, server};
use crate::args::ServiceArguments;

/// What systemd has for this process.
pub(super) struct Inherited {
    /// What holds descriptors beside the keeper, if this process is a service.
    pub(super) store: Option<Arc<SystemdStore>>,
    /// Sockets that systemd listens at for it, as a `.socket` unit says.
    pub(super) listening: Vec<UnixListener>,
}

/// Takes over what systemd has. To be called before anything else is opened.
pub(super) fn inherit(arguments: &ServiceArguments) -> Result<Inherited> {
    let ServiceArguments { notify_socket, listen_pid, listen_fds, listen_fdnames, .. } = arguments;
    let inherited = keeper::inherited(listen_pid, listen_fds, listen_fdnames)
        .context("taking over the descriptors that systemd keeps")?;
    // What the store holds of ours is known by its name, whatever it is.
    let is_activated =
        |(name, fd): &(String, OwnedFd)| name != server::LISTENER && is_listening(fd.as_fd());
    let (activated, stored): (Vec<_>, Vec<_>) = inherited.into_iter().partition(is_activated);
    let store = notify_socket.as_deref().filter(|socket| !socket.is_empty());
    let store = store.map(|socket| SystemdStore::new(socket, stored)).transpose()?;
    let listening = activated.into_iter().map(|(_, fd)| UnixListener::from(fd)).collect();
    Ok(Inherited { store: store.map(Arc::new), listening })
}

/// Whether it is a unix socket that listens.
fn is_listening(fd: BorrowedFd<'_>) -> bool {
    sockopt::socket_acceptconn(fd).is_ok_and(|listens| listens)
        && sockopt::socket_domain(fd).is_ok_and(|domain| domain == AddressFamily::UNIX)
}

/// The one of these sockets that is at `path`. Who connects to another one would not be answered.
pub(super) fn listening_at(listening: Vec<UnixListener>, path: &Path) -> Option<UnixListener> {
    let mut found = None;
    for listener in listening {
        let address = listener.local_addr().ok();
        match address.as_ref().and_then(|address| address.as_pathname()) {
            Some(at) if is_same(at, path) => found = Some(listener),
            at => {
                let configured = path.display();
                tracing::warn!(?at, %configured, "a socket of systemd is not used: ListenStream= and `containerd.socket` differ");
            }
        }
    }
    found
}

fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    one == other || real(one).is_some_and(|one| Some(one) == real(other))
}

/// How often systemd is to be told that this process is alive: twice as often as it wants to hear it.
pub(super) fn watchdog(arguments: &ServiceArguments) -> Option<Duration> {
    let ServiceArguments { watchdog_usec, watchdog_pid, .. } = arguments;
    let is_for_us = watchdog_pid.is_empty() || *watchdog_pid == std::process::id().to_string();
    let micros = watchdog_usec.parse().ok().filter(|micros| is_for_us && *micros > 0)?;
    Some(Duration::from_micros(micros) / 2)
}

/// Tells systemd that the daemon is alive, for as long as it is: its locks can be had.
pub(super) async fn feed_watchdog(
    daemon: Arc<Daemon>,
    systemd: Arc<SystemdStore>,
    interval: Duration,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (daemon, systemd) = (Arc::clone(&daemon), Arc::clone(&systemd));
        let told = tokio::task::spawn_blocking(move || {
            let (images, layers) = (daemon.images.lock(), daemon.layers.lock());
            let known = (images.len(), layers.len(), daemon.front_ends.list().len());
            drop((images, layers));
            systemd.alive().map(|()| known)
        });
        if let Ok(Err(err)) = told.await {
            tracing::warn!(error = %err, "systemd was not told that the daemon is alive");
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Wrapped {
        #[command(flatten)]
        service: ServiceArguments,
    }

    #[test]
    fn the_watchdog_is_fed_twice_as_often_as_it_asks() {
        let check = |usec: &str, pid: &str, expected: Option<u64>| {
            let arguments = ["hermes", "--watchdog-usec", usec, "--watchdog-pid", pid];
            let Wrapped { service } = Wrapped::parse_from(arguments);
            assert_eq!(watchdog(&service), expected.map(Duration::from_micros), "{usec} {pid}");
        };
        let own = std::process::id().to_string();
        check("30000000", "", Some(15_000_000));
        check("30000000", &own, Some(15_000_000));
        check("30000000", "1", None);
        check("", "", None);
        check("0", "", None);
        check("soon", "", None);
    }
}

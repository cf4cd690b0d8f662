//! The daemon as a service of systemd.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use keeper::SystemdStore;
use tokio::time::MissedTickBehavior;

use super::Daemon;
use crate::args::ServiceArguments;

/// What holds descriptors beside the keeper, if this process is a service. To be called before
/// anything else is opened: the descriptors that systemd left are taken over here.
pub(super) fn store(arguments: &ServiceArguments) -> Result<Option<Arc<SystemdStore>>> {
    let ServiceArguments { notify_socket, listen_pid, listen_fds, listen_fdnames, .. } = arguments;
    let Some(socket) = notify_socket.as_deref().filter(|socket| !socket.is_empty()) else {
        return Ok(None);
    };
    let inherited = keeper::inherited(listen_pid, listen_fds, listen_fdnames)
        .context("taking over the descriptors that systemd keeps")?;
    Ok(Some(Arc::new(SystemdStore::new(socket, inherited)?)))
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

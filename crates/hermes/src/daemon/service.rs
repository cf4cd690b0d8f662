//! The daemon as a service of systemd.

use std::sync::Arc;

use anyhow::{Context, Result};
use keeper::SystemdStore;

use crate::args::ServiceArguments;

/// What holds descriptors beside the keeper, if this process is a service. To be called before
/// anything else is opened: the descriptors that systemd left are taken over here.
pub(super) fn store(arguments: &ServiceArguments) -> Result<Option<Arc<SystemdStore>>> {
    let ServiceArguments { notify_socket, listen_pid, listen_fds, listen_fdnames } = arguments;
    let Some(socket) = notify_socket.as_deref().filter(|socket| !socket.is_empty()) else {
        return Ok(None);
    };
    let inherited = keeper::inherited(listen_pid, listen_fds, listen_fdnames)
        .context("taking over the descriptors that systemd keeps")?;
    Ok(Some(Arc::new(SystemdStore::new(socket, inherited)?)))
}

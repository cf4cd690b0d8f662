//! AWS's SOCI snapshotter: 0.4 as Debian packages it, 0.15 as built from its library.

use std::os::unix::net::UnixStream;

use anyhow::Result;

use crate::daemon::Daemon;
use crate::node::{Node, PEERS};

/// The socket of SOCI 0.4 in the node.
pub const SOCI_SOCKET: &str = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock";
/// The socket of SOCI 0.15 in the node.
pub const SOCI15_SOCKET: &str = "/run/soci15/soci15.sock";

impl Node {
    /// Starts SOCI 0.4's snapshotter on its usual paths. `config` is the content of its `config.toml`;
    /// empty is fine. It insists on registries with TLS.
    ///
    /// # Errors
    /// When it does not listen within a minute.
    pub fn soci_snapshotter(&self, config: &str) -> Result<Daemon> {
        let file = "/etc/soci-snapshotter-grpc/config.toml";
        self.write(file, config)?;
        let daemon = self.spawn("soci", "soci-snapshotter-grpc", &["--config", file])?;
        self.listening(daemon, SOCI_SOCKET)
    }

    /// Starts SOCI 0.15's snapshotter. `config` is the content of its `config.toml`. Its root is on
    /// the node's disk, and so is its content store, which it keeps outside of that root.
    ///
    /// # Errors
    /// When it does not listen within a minute.
    pub fn soci15_snapshotter(&self, config: &str) -> Result<Daemon> {
        let file = "/etc/soci15/config.toml";
        self.write(file, config)?;
        self.run("mkdir", &["-p", "/run/soci15", "/var/lib/soci-snapshotter-grpc/soci15"])?;
        let root = "/var/lib/soci-snapshotter-grpc/soci15";
        let args = ["serve", "-config", file, "-root", root, "-address", SOCI15_SOCKET];
        let daemon = self.spawn("soci15", &format!("{PEERS}/soci15"), &args)?;
        self.listening(daemon, SOCI15_SOCKET)
    }

    fn listening(&self, mut daemon: Daemon, socket: &str) -> Result<Daemon> {
        let path = self.path(socket);
        daemon.wait_ready("its socket", || Ok(UnixStream::connect(&path).is_ok()))?;
        Ok(daemon)
    }
}

//! containerd, in each version that Hermes must work with.

use std::os::unix::net::UnixStream;

use anyhow::Result;

use crate::daemon::Daemon;
use crate::node::{Node, PEERS, output};

/// Its configuration file in the node.
const CONFIG: &str = "/etc/containerd/config.toml";
/// Its socket in the node.
const SOCKET: &str = "/run/containerd/containerd.sock";

/// A version of containerd that a node can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ContainerdVersion {
    /// Debian bookworm's.
    V1_6,
    /// Debian trixie's.
    V1_7,
    /// Debian forky's, 2.1.
    Packaged,
    /// Built from source, 2.4.
    Newest,
}

impl ContainerdVersion {
    /// All of them, oldest first.
    pub const ALL: [Self; 4] = [Self::V1_6, Self::V1_7, Self::Packaged, Self::Newest];

    /// The folder of its programs in the node.
    #[must_use]
    pub fn programs(self) -> &'static str {
        match self {
            Self::V1_6 => "/opt/containerd-bookworm/usr/bin",
            Self::V1_7 => "/opt/containerd-trixie/usr/bin",
            Self::Packaged => "/usr/bin",
            Self::Newest => PEERS,
        }
    }
}

/// A running containerd. Dropping it kills it; containers live on until the node ends.
#[derive(Debug)]
pub struct Containerd {
    /// The process.
    pub daemon: Daemon,
    node: Node,
    version: ContainerdVersion,
}

impl Node {
    /// Starts containerd on its usual paths. `config` is the content of its `config.toml`; a
    /// `version = 2` file with sections that only new versions know is fine for all of them.
    ///
    /// # Errors
    /// When it does not answer within a minute.
    pub fn containerd(&self, version: ContainerdVersion, config: &str) -> Result<Containerd> {
        self.containerd_with(version, config, &[])
    }

    /// As [`containerd`](Self::containerd), with additions to its environment.
    ///
    /// # Errors
    /// When it does not answer within a minute.
    pub fn containerd_with(
        &self,
        version: ContainerdVersion,
        config: &str,
        environment: &[(&str, &str)],
    ) -> Result<Containerd> {
        self.write(CONFIG, config)?;
        // The shim is looked for where containerd itself is only if PATH says so.
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", version.programs());
        let program = format!("{}/containerd", version.programs());
        let environment = [&[("PATH", path.as_str())], environment].concat();
        let daemon =
            self.spawn_with("containerd", &program, &["--config", CONFIG], &environment)?;
        let mut containerd = Containerd { daemon, node: self.clone(), version };
        let socket = self.path(SOCKET);
        containerd.daemon.wait_ready("its socket", || Ok(UnixStream::connect(&socket).is_ok()))?;
        containerd.ctr(&["version"])?;
        Ok(containerd)
    }
}

impl Containerd {
    /// Runs the `ctr` of the same version and returns what it wrote to stdout.
    ///
    /// # Errors
    /// When it fails, with what it wrote to stderr.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        output(self.node.command(format!("{}/ctr", self.version.programs())).args(args))
    }

    /// Runs a container to its end, by `ctr run --rm` with these arguments, and returns what it wrote.
    ///
    /// # Errors
    /// When it fails, with what `ctr` and the container wrote.
    pub fn run(&self, snapshotter: &str, args: &[&str]) -> Result<String> {
        self.run_in("default", snapshotter, args)
    }

    /// As [`run`](Self::run), in this namespace of containerd's.
    ///
    /// # Errors
    /// As of [`run`](Self::run).
    pub fn run_in(&self, namespace: &str, snapshotter: &str, args: &[&str]) -> Result<String> {
        let run = ["--namespace", namespace, "run", "--rm", "--snapshotter", snapshotter];
        self.node.written(|log| self.ctr(&[&run[..], &[log], args].concat()))
    }

    /// Runs a program in a container of this name that runs, to its end, and returns what it wrote.
    ///
    /// # Errors
    /// When it fails, with what `ctr` and the program wrote.
    pub fn exec_in(&self, namespace: &str, name: &str, command: &[&str]) -> Result<String> {
        let exec = ["--namespace", namespace, "task", "exec", "--exec-id", "look"];
        self.node.written(|log| self.ctr(&[&exec[..], &[log, name], command].concat()))
    }

    /// Which version this is.
    #[must_use]
    pub fn version(&self) -> ContainerdVersion {
        self.version
    }
}

/// The configuration of a containerd of 1.6 to 2.4 that knows the proxy snapshotter `name` on `socket`.
#[must_use]
pub fn proxy_config(name: &str, socket: &str) -> String {
    format!(
        "version = 2\n[proxy_plugins.{name}]\ntype = \"snapshot\"\naddress = \"{socket}\"\n\
         [proxy_plugins.{name}.exports]\nroot = \"/var/lib/soci-snapshotter-grpc\"\n"
    )
}

/// The configuration of a containerd whose CRI uses the proxy snapshotter `name` on `socket`, and tells it about layers.
/// Pods need the image `PAUSE` and the network of the node.
#[must_use]
pub fn cri_config(version: ContainerdVersion, name: &str, socket: &str, pause: &str) -> String {
    let proxy = proxy_config(name, socket);
    if version < ContainerdVersion::Packaged {
        let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
        return format!(
            "{proxy}[{cri}]\nrestrict_oom_score_adj = true\nsandbox_image = \"{pause}\"\n\
             [{cri}.containerd]\nsnapshotter = \"{name}\"\ndisable_snapshot_annotations = false\n"
        );
    }
    let (images, runtime) =
        ("plugins.\"io.containerd.cri.v1.images\"", "plugins.\"io.containerd.cri.v1.runtime\"");
    format!(
        "{}[{runtime}]\nrestrict_oom_score_adj = true\n[{runtime}.cni]\nbin_dirs = [\"/usr/lib/cni\"]\n\
         [{images}]\nsnapshotter = \"{name}\"\ndisable_snapshot_annotations = false\n\
         [{images}.pinned_images]\nsandbox = \"{pause}\"\n",
        proxy.replace("version = 2", "version = 3")
    )
}

/// The configuration of a containerd of 2.1 or later whose own pulls tell the snapshotter about layers, so that it can be
/// lazy: `ctr` pulls that way.
#[must_use]
pub fn lazy_pull_config(name: &str, socket: &str) -> String {
    let unpack = |snapshotter: &str| {
        format!(
            "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n\
             platform = \"linux\"\nsnapshotter = \"{snapshotter}\"\n"
        )
    };
    format!(
        "{}enable_remote_snapshot_annotations = \"true\"\n{}{}",
        proxy_config(name, socket).replace("version = 2", "version = 3"),
        unpack("overlayfs"),
        unpack(name),
    )
}

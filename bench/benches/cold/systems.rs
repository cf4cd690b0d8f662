//! What is compared: how each is started in a node, and what its user types.

use anyhow::Result;
use serde::Serialize;
use testnode::{Containerd, ContainerdVersion, Daemon, Node, Registry, SOCI_SOCKET, SOCI15_SOCKET};

use crate::images::{Image, reference};

/// Where Hermes keeps everything in a node: on the node's disk.
pub(crate) const HERMES_ROOT: &str = "/var/lib/hermes/cold";

/// Something that starts containers from a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum System {
    /// containerd 2.4 with overlayfs: the whole image first.
    Overlayfs,
    /// SOCI 0.4.1 under containerd 2.1, lazily, with an index of version 1.
    #[value(name = "soci-0.4")]
    Soci04,
    /// SOCI 0.15.0 under containerd 2.4, lazily, with an index of version 2.
    #[value(name = "soci-0.15")]
    Soci15,
    /// Hermes, with an index that it has pushed.
    Hermes,
}

/// How Hermes is told to run.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct HermesTuning {
    /// Arguments of `hermes daemon`.
    pub(crate) daemon: Vec<String>,
    /// Arguments of `hermes run`.
    pub(crate) run: Vec<String>,
    /// Arguments of `hermes index build`.
    pub(crate) index: Vec<String>,
    /// What the daemon logs.
    pub(crate) log: String,
}

/// The daemons of a system in a node; dropping it kills them.
#[derive(Debug)]
pub(crate) struct Running {
    _containerd: Option<Containerd>,
    _other: Option<Daemon>,
}

impl System {
    /// Its name in tables, results and repositories.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Soci04 => "soci-0.4",
            Self::Soci15 => "soci-0.15",
            Self::Hermes => "hermes",
        }
    }

    /// Whether the same image can be started again from what is on disk, as a lower bound.
    pub(crate) fn has_warm_start(self) -> bool {
        matches!(self, Self::Overlayfs | Self::Hermes)
    }

    /// Starts its daemons in `node`, which has none of the image yet.
    pub(crate) fn start(self, node: &Node, tuning: &HermesTuning) -> Result<Running> {
        let (version, config) = match self {
            Self::Overlayfs => (ContainerdVersion::Newest, "version = 2\n".to_owned()),
            Self::Soci04 => (ContainerdVersion::Packaged, proxy_config("soci", SOCI_SOCKET)),
            Self::Soci15 => (ContainerdVersion::Newest, lazy_pull_config("soci15", SOCI15_SOCKET)),
            Self::Hermes => {
                return Ok(Running {
                    _containerd: None,
                    _other: Some(start_hermes(node, tuning)?),
                });
            }
        };
        let other = match self {
            Self::Soci04 => Some(node.soci_snapshotter("")?),
            Self::Soci15 => Some(node.soci15_snapshotter("")?),
            Self::Overlayfs | Self::Hermes => None,
        };
        Ok(Running { _containerd: Some(node.containerd(version, &config)?), _other: other })
    }

    /// What a user types for the first start on a node, as lines of bash. It ends with the container.
    pub(crate) fn cold_start(
        self,
        image: Image,
        registry: &Registry,
        tuning: &HermesTuning,
    ) -> String {
        let name = reference(self, image);
        let user = registry.user();
        let pull = match self {
            Self::Overlayfs => format!("ctr image pull --user {user} {name}"),
            Self::Soci04 => format!("soci image rpull --user {user} {name}"),
            Self::Soci15 => format!("ctr image pull --user {user} --snapshotter soci15 {name}"),
            Self::Hermes => return self.next_start(image, "first", tuning),
        };
        format!("{pull}\n{}", self.next_start(image, "first", tuning))
    }

    /// What a user types for another start of an image that is there.
    pub(crate) fn next_start(self, image: Image, id: &str, tuning: &HermesTuning) -> String {
        let name = reference(self, image);
        let snapshotter = match self {
            Self::Overlayfs => "overlayfs",
            Self::Soci04 => "soci",
            Self::Soci15 => "soci15",
            Self::Hermes => {
                let more = tuning.run.join(" ");
                return format!("exec hermes --root {HERMES_ROOT} run {more} {name}\n");
            }
        };
        format!("exec ctr run --net-host --snapshotter {snapshotter} {name} {id}\n")
    }

    /// Where its programs are looked for.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Soci04 | Self::Hermes => "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            Self::Overlayfs | Self::Soci15 => "/opt/peers:/usr/sbin:/usr/bin:/sbin:/bin",
        }
    }
}

fn start_hermes(node: &Node, tuning: &HermesTuning) -> Result<Daemon> {
    let mut args = vec!["--root", HERMES_ROOT, "--log", &tuning.log, "daemon"];
    args.extend(tuning.daemon.iter().map(String::as_str));
    let mut daemon = node.spawn("hermes", "hermes", &args)?;
    // Without a daemon it answers too, and then knows of none.
    daemon.wait_ready("its answer", || {
        let status = node.run("hermes", &["--root", HERMES_ROOT, "status"]);
        Ok(status.is_ok_and(|status| !status.starts_with("daemon none")))
    })?;
    Ok(daemon)
}

/// A containerd of 1.6 to 2.4 that knows the proxy snapshotter `name` on `socket`.
pub(crate) fn proxy_config(name: &str, socket: &str) -> String {
    format!(
        "version = 2\n[proxy_plugins.{name}]\ntype = \"snapshot\"\naddress = \"{socket}\"\n\
         [proxy_plugins.{name}.exports]\nroot = \"/var/lib/soci-snapshotter-grpc\"\n"
    )
}

/// A containerd of 2.1 or later whose own pulls tell the snapshotter about layers: without that nothing
/// is lazy.
fn lazy_pull_config(name: &str, socket: &str) -> String {
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

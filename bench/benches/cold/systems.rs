//! What is compared: how each is started in a node, and what its user types.

use anyhow::Result;
use serde::Serialize;
use testnode::{
    Containerd, ContainerdVersion, Daemon, Node, Registry, SOCI_SOCKET, SOCI15_SOCKET,
    lazy_pull_config, proxy_config,
};

use crate::images::{Image, reference};

/// Where Hermes keeps everything in a node: on the node's disk.
pub(crate) const HERMES_ROOT: &str = "/var/lib/hermes/cold";

/// Where containerd finds Hermes in a node.
const HERMES_SOCKET: &str = "/run/hermes/containerd.sock";

const HERMES_CONFIG: &str = "/etc/hermes/config.toml";

/// Every image is selected; those without an index are fetched whole.
const CONFIG: &str =
    "containerd.eager = 'stream'\nregistry.docker_config = '/etc/hermes/docker.json'\n";
const POLICY: &str = "
apiVersion: hermes.cloudpilot.ai/v1alpha1
kind: HermesPolicy
metadata: {name: all}
spec:
  imageSelectors:
  - glob: '**'
";

/// SOCI's parallel mode as AWS has set it where it measured it: docs of Karpenter's blueprints.
const PARALLEL: &str = "
[content_store]
type = 'containerd'
[pull_modes.soci_v2]
enable = false
[pull_modes.parallel_pull_unpack]
enable = true
max_concurrent_downloads_per_image = 20
concurrent_download_chunk_size = '16mb'
max_concurrent_unpacks_per_image = 12
discard_unpacked_layers = true
";

/// Something that starts containers from a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum System {
    /// containerd 2.4 with overlayfs: the whole image first.
    Overlayfs,
    /// SOCI 0.4.1 under containerd 2.1, lazily, with an index of version 1.
    #[value(name = "soci-0.4")]
    #[serde(rename = "soci-0.4")]
    Soci04,
    /// SOCI 0.15.0 under containerd 2.4, lazily, with an index of version 2.
    #[value(name = "soci-0.15")]
    #[serde(rename = "soci-0.15")]
    Soci15,
    /// SOCI 0.15.0 under containerd 2.4 with its parallel mode: the whole image, by ranges.
    #[value(name = "soci-0.15-parallel")]
    #[serde(rename = "soci-0.15-parallel")]
    Soci15Parallel,
    /// Hermes, with an index that it has pushed.
    Hermes,
    /// The same as the snapshotter of containerd 2.4.
    #[value(name = "hermes-containerd")]
    #[serde(rename = "hermes-containerd")]
    HermesContainerd,
    /// Hermes as the snapshotter of containerd 2.4, where the image has no index and is fetched whole.
    #[value(name = "hermes-eager")]
    #[serde(rename = "hermes-eager")]
    HermesEager,
    /// Hermes as the snapshotter of containerd 2.4, where no policy selects the image.
    #[value(name = "hermes-unselected")]
    #[serde(rename = "hermes-unselected")]
    HermesUnselected,
}

/// A system as it takes part: Hermes may do so several times.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Contestant {
    /// Its name in tables and results.
    pub(crate) name: String,
    pub(crate) system: System,
    /// How Hermes is told to run.
    pub(crate) hermes: HermesTuning,
}

/// How Hermes is told to run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct HermesTuning {
    /// The folder of the program in a node.
    pub(crate) folder: String,
    /// Arguments of `hermes daemon`.
    pub(crate) daemon: Vec<String>,
    /// Arguments of `hermes run`.
    pub(crate) run: Vec<String>,
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
            Self::Soci15Parallel => "soci-0.15-parallel",
            Self::Hermes => "hermes",
            Self::HermesContainerd => "hermes-containerd",
            Self::HermesEager => "hermes-eager",
            Self::HermesUnselected => "hermes-unselected",
        }
    }

    /// The first part of the name of its images' repositories: an index is found beside an image.
    pub(crate) fn repositories(self) -> &'static str {
        match self {
            Self::HermesContainerd => Self::Hermes.name(),
            Self::HermesEager | Self::HermesUnselected | Self::Soci15Parallel => {
                Self::Overlayfs.name()
            }
            own => own.name(),
        }
    }

    /// Whether it is Hermes that has the image's bytes.
    pub(crate) fn is_hermes(self) -> bool {
        matches!(self, Self::Hermes | Self::HermesContainerd | Self::HermesEager)
    }

    /// Whether the same image can be started again from what is on disk, as a lower bound.
    pub(crate) fn has_warm_start(self) -> bool {
        self.is_hermes() || matches!(self, Self::Overlayfs | Self::HermesUnselected)
    }
}

impl Contestant {
    /// Starts its daemons in `node`, which has none of the image yet.
    pub(crate) fn start(&self, node: &Node) -> Result<Running> {
        let (version, config) = match self.system {
            System::Overlayfs => (ContainerdVersion::Newest, "version = 2\n".to_owned()),
            System::Soci04 => (ContainerdVersion::Packaged, proxy_config("soci", SOCI_SOCKET)),
            System::Soci15 | System::Soci15Parallel => {
                (ContainerdVersion::Newest, lazy_pull_config("soci15", SOCI15_SOCKET))
            }
            System::Hermes => {
                let daemon = self.start_hermes(node)?;
                return Ok(Running { _containerd: None, _other: Some(daemon) });
            }
            System::HermesContainerd | System::HermesEager | System::HermesUnselected => {
                (ContainerdVersion::Newest, lazy_pull_config("hermes", HERMES_SOCKET))
            }
        };
        let other = match self.system {
            System::Soci04 => Some(node.soci_snapshotter("")?),
            System::Soci15 => Some(node.soci15_snapshotter("")?),
            System::Soci15Parallel => Some(node.soci15_snapshotter(PARALLEL)?),
            System::HermesContainerd | System::HermesEager | System::HermesUnselected => {
                node.write(HERMES_CONFIG, CONFIG)?;
                node.bash("cp ~/.docker/config.json /etc/hermes/docker.json")?;
                if self.system != System::HermesUnselected {
                    node.write("/etc/hermes/policies/all.yaml", POLICY)?;
                }
                Some(self.start_hermes(node)?)
            }
            System::Overlayfs | System::Hermes => None,
        };
        Ok(Running { _containerd: Some(node.containerd(version, &config)?), _other: other })
    }

    /// What a user types for the first start on a node, as lines of bash. It ends with the container.
    pub(crate) fn cold_start(&self, image: Image, registry: &Registry) -> String {
        let (name, user) = (reference(self.system, image), registry.user());
        let pull = match self.system {
            System::Overlayfs => format!("ctr image pull --user {user} {name}\n"),
            System::Soci04 => format!("soci image rpull --user {user} {name}\n"),
            System::Soci15 | System::Soci15Parallel => {
                format!("ctr image pull --user {user} --snapshotter soci15 {name}\n")
            }
            System::HermesContainerd | System::HermesEager | System::HermesUnselected => {
                format!("ctr image pull --user {user} --snapshotter hermes {name}\n")
            }
            System::Hermes => String::new(),
        };
        pull + &self.next_start(image, "first")
    }

    /// What a user types for another start of an image that is there.
    pub(crate) fn next_start(&self, image: Image, id: &str) -> String {
        let name = reference(self.system, image);
        let snapshotter = match self.system {
            System::Overlayfs => "overlayfs",
            System::Soci04 => "soci",
            System::Soci15 | System::Soci15Parallel => "soci15",
            System::HermesContainerd | System::HermesEager | System::HermesUnselected => "hermes",
            System::Hermes => {
                let more = self.hermes.run.join(" ");
                return format!("exec hermes --root {HERMES_ROOT} run {more} {name}\n");
            }
        };
        format!("exec ctr run --net-host --snapshotter {snapshotter} {name} {id}\n")
    }

    /// Where its programs are looked for.
    pub(crate) fn path(&self) -> String {
        let first = match self.system {
            System::Soci04 => "/usr/local/bin",
            System::Hermes => &self.hermes.folder,
            _ => "/opt/peers",
        };
        format!("{first}:/usr/sbin:/usr/bin:/sbin:/bin")
    }

    /// The program of Hermes.
    pub(crate) fn hermes(&self) -> String {
        format!("{}/hermes", self.hermes.folder)
    }

    fn start_hermes(&self, node: &Node) -> Result<Daemon> {
        let HermesTuning { daemon, log, .. } = &self.hermes;
        let mut args = vec!["--root", HERMES_ROOT, "--log", log, "daemon"];
        if self.system != System::Hermes {
            args.extend(["--config", HERMES_CONFIG]);
        }
        args.extend(daemon.iter().map(String::as_str));
        let program = self.hermes();
        let mut daemon = node.spawn("hermes", &program, &args)?;
        // Without a daemon it answers too, and then knows of none.
        daemon.wait_ready("its answer", || {
            let status = node.run(&program, &["--root", HERMES_ROOT, "status"]);
            Ok(status.is_ok_and(|status| !status.starts_with("daemon none")))
        })?;
        Ok(daemon)
    }
}

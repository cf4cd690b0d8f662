//! The far side of the link: a node with the registry, which stays for all runs.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use testnode::{Cache, Network, Node, NodeOptions, Registry};

use crate::images::{Image, PORT, reference, tag};
use crate::systems::System;

/// Lays what the registry will write over what is kept.
const OVERLAY: &str = "mkdir -p /srv/upper /srv/work
mount -t overlay overlay -o lowerdir=/bench/registry,upperdir=/srv/upper,workdir=/srv/work \
  /var/lib/docker-registry";

/// Reads what an image is made of, and asks for it once, as a registry in use would have all of it in memory,
/// and its own programs.
const READ_BLOBS: &str = r#"
curl --silent --show-error --fail --output /dev/null --user "$2" "https://$3/v2/$1/manifests/$4" \
  --header "Accept: application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
cd /var/lib/docker-registry/docker/registry/v2
for link in repositories/"$1"/_layers/sha256/* repositories/"$1"/_manifests/revisions/sha256/*; do
  digest=${link##*/}
  cat "blobs/sha256/${digest:0:2}/$digest/data"
done > /dev/null
"#;

/// The registry's node, and what every near node is made of.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) far: Node,
    pub(crate) registry: Registry,
    binds: Vec<(PathBuf, String)>,
    share: Share,
}

/// What the nodes get of the processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Share {
    /// As much as anything else on the machine.
    Ordinary,
    /// What they want, before anything else.
    First,
}

impl Stage {
    /// Starts the registry. `programs` are files, and where each of them is in every node.
    pub(crate) fn set(
        storage: &Path,
        programs: &[(PathBuf, String)],
        share: Share,
    ) -> Result<Self> {
        let peers = (Cache::locate().existing_peers()?, "/opt/peers".to_owned());
        let binds = [&[peers], programs].concat();
        let kept = (storage.to_owned(), "/bench/registry".to_owned());
        let options = NodeOptions { network: Network::Own, binds: [&binds[..], &[kept]].concat() };
        let far = start(&options, share)?;
        far.bash(OVERLAY)?;
        let registry = far.linked_tls_registry(PORT)?;
        Ok(Self { far, registry, binds, share })
    }

    /// Builds and pushes the index of `image` for Hermes; returns the seconds that the build took.
    pub(crate) fn index(&self, image: Image, arguments: &[String]) -> Result<f64> {
        let name = reference(System::Hermes, image);
        let root = ["--root", "/var/lib/hermes/indexes"];
        let more: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let begin = Instant::now();
        let build = [&root[..], &["index", "build"], &more, &[&name]].concat();
        self.far.run("hermes", &build).context("building an index")?;
        let build_seconds = begin.elapsed().as_secs_f64();
        self.far.run("hermes", &[&root[..], &["index", "push", &name]].concat())?;
        Ok(build_seconds)
    }

    /// A new node without anything, which knows the registry.
    pub(crate) fn near(&self) -> Result<Node> {
        let options = NodeOptions { network: Network::Own, binds: self.binds.clone() };
        let near = start(&options, self.share)?;
        near.use_registry_of(&self.far)?;
        Ok(near)
    }

    /// Empties the page cache of the machine, but for what the registry would have in its own.
    pub(crate) fn forget_files(&self, system: System, image: Image) -> Result<()> {
        rustix::fs::sync();
        std::fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the page cache")?;
        let repository = format!("{}/{}", system.repositories(), image.name());
        let (user, host) = (self.registry.user(), &self.registry.host);
        let tag = tag(system);
        let read = ["-euc", READ_BLOBS, "read", &repository, &user, host, tag];
        self.far.run("bash", &read).map(drop)
    }
}

fn start(options: &NodeOptions, share: Share) -> Result<Node> {
    let node = Node::start_with(options)?;
    if share == Share::First {
        node.precede_others()?;
    }
    Ok(node)
}

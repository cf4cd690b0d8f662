//! The images that are started, and a registry's storage with them and their indexes: made once, kept
//! beside the other parts of tests.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use testnode::{
    Cache, ContainerdVersion, LinkShape, Network, Node, NodeOptions, SOCI_SOCKET, output,
    proxy_config,
};

use crate::systems::System;

/// How the images are made.
const BUILD: &str = include_str!("../../images/build.sh");
/// How they get into a registry.
const PUSH: &str = include_str!("../../images/push.sh");
/// How it is found out what of them is needed.
const NEEDED: &str = include_str!("../../images/needed.sh");
/// Settings of the caller that decide how the network is reached.
const SETTINGS: &[&str] = &["http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "MAVEN_OPTS"];
/// Files of the host that decide it too.
const HOST_FILES: &[&str] = &["/etc/ssl/certs/ca-certificates.crt", "/etc/resolv.conf"];

/// An image that is started until it answers on port 8080.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Image {
    /// nginx with a site of 90 MB.
    Web,
    /// A Python service with numpy, pandas and scikit-learn, beside matplotlib and pip.
    Python,
    /// The same service with no more than it uses.
    Sklearn,
    /// Tomcat on OpenJDK 17, and a JSP that it compiles.
    Jvm,
    /// A Spring Boot service on OpenJDK 17, with Hibernate and a database in memory.
    Spring,
    /// PostgreSQL 15, which makes a cluster.
    Postgres,
    /// PyTorch with CUDA's libraries.
    Pytorch,
}

impl Image {
    /// Its name in tables, results and repositories.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Python => "python",
            Self::Sklearn => "sklearn",
            Self::Jvm => "jvm",
            Self::Spring => "spring",
            Self::Postgres => "postgres",
            Self::Pytorch => "pytorch",
        }
    }

    /// What the kernel calls the first program of its container.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Web => "nginx",
            Self::Python | Self::Sklearn | Self::Pytorch => "python3",
            Self::Jvm => "catalina.sh",
            Self::Spring => "java",
            Self::Postgres => "start-database",
        }
    }

    /// What it is asked.
    pub(crate) fn question(self) -> Question {
        match self {
            Self::Web => Question::Page("/en-US/index.html"),
            Self::Python | Self::Sklearn | Self::Jvm | Self::Spring | Self::Pytorch => {
                Question::Page("/")
            }
            Self::Postgres => Question::Query,
        }
    }
}

/// What a container is asked until it answers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Question {
    /// A page, over HTTP.
    Page(&'static str),
    /// A query, of PostgreSQL.
    Query,
}

/// What a program needs of its image until it first answers; all are bytes.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub(crate) struct Needed {
    /// Pages of files that were touched.
    pub(crate) touched_bytes: u64,
    pub(crate) touched_files: u64,
    /// All layers, as the registry has them.
    pub(crate) gzip_bytes: u64,
    /// All layers, unpacked.
    pub(crate) unpacked_bytes: u64,
}

impl Needed {
    /// What was found out when the registry's storage was made.
    pub(crate) fn of(storage: &Path, image: Image) -> Result<Self> {
        let file = storage.join(format!("needed-{}.json", image.name()));
        let text = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))
    }

    /// The fewest seconds to the first answer over `link` of a client that knows in advance what is
    /// needed, where the program takes `warm` seconds by itself.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub(crate) fn lower_bound(self, link: LinkShape, warm: f64) -> f64 {
        // Touched bytes are taken to compress like the whole image.
        let compressed =
            self.touched_bytes as f64 * self.gzip_bytes as f64 / self.unpacked_bytes as f64;
        let transfer = compressed * 8.0 / link.bits_per_second as f64;
        transfer + ROUND_TRIPS * link.round_trip.as_secs_f64() + warm
    }
}

/// What any client must ask one after the other: TCP, TLS, the challenge, the manifest, the index, its
/// table of contents, the first bytes.
const ROUND_TRIPS: f64 = 7.0;

/// The name of an image for a system; each has a repository of its own, so that none finds the index
/// of another.
pub(crate) fn reference(system: System, image: Image) -> String {
    format!("{REGISTRY}/{}/{}:{}", system.repositories(), image.name(), tag(system))
}

/// The tag of a system's images.
pub(crate) fn tag(system: System) -> &'static str {
    if system == System::Soci15 { "v2" } else { "1" }
}

/// The registry's name and port, everywhere.
pub(crate) const REGISTRY: &str = "reg.test:5443";
/// Its port.
pub(crate) const PORT: u16 = 5443;

/// What a registry with the images and SOCI's indexes keeps on disk; made if it is not there, which
/// takes some minutes and a network.
pub(crate) fn registry_storage() -> Result<PathBuf> {
    let cache = Cache::locate();
    let layout = cache.part("bench-images", &[BUILD]);
    let registry = cache.part("bench-registry", &[BUILD, PUSH, NEEDED]);
    if registry.exists() {
        return Ok(registry);
    }
    let _lock = cache.lock()?;
    Cache::make(&layout, |out| build(out).context("making the images"))?;
    Cache::make(&registry, |out| push(&layout, out).context("filling the registry"))?;
    Ok(registry)
}

fn build(out: &Path) -> Result<()> {
    crate::say("making the images (some minutes, once)");
    let host_files = HOST_FILES.iter().filter(|file| Path::new(file).exists());
    let mut binds: Vec<(PathBuf, String)> =
        host_files.map(|file| (PathBuf::from(file), (*file).to_owned())).collect();
    binds.push((out.to_owned(), "/bench".to_owned()));
    let node = Node::start_with(&NodeOptions { network: Network::Host, binds })?;
    node.write("/srv/build.sh", BUILD)?;
    let mut command = node.command("env");
    for name in SETTINGS {
        if let Some(value) = std::env::var_os(name) {
            command.arg(
                [OsStr::new(name), OsStr::new("="), &value]
                    .into_iter()
                    .collect::<std::ffi::OsString>(),
            );
        }
    }
    output(command.args(["bash", "/srv/build.sh", "/bench/layout"])).map(drop)
}

/// Pushes the images once for each system, with the indexes that SOCI's own tools make.
fn push(layout: &Path, out: &Path) -> Result<()> {
    crate::say("filling a registry with the images and SOCI's indexes (once)");
    let binds = vec![
        (layout.to_owned(), "/bench".to_owned()),
        (out.to_owned(), "/var/lib/docker-registry".to_owned()),
    ];
    let node = Node::start_and_bind(binds)?;
    let registry = node.tls_registry(PORT)?;
    let _plain = node.registry(5000)?;
    let _soci = node.soci_snapshotter("")?;
    let config = proxy_config("soci", SOCI_SOCKET);
    let _containerd = node.containerd(ContainerdVersion::Packaged, &config)?;
    node.write("/srv/push.sh", PUSH)?;
    node.write("/srv/needed.sh", NEEDED)?;
    let user = registry.user();
    node.run("bash", &["/srv/push.sh", REGISTRY, &user, "/var/lib/docker-registry"]).map(drop)
}

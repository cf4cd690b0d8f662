//! Everything that tests need and a fresh Debian 12 with Rust does not have.
//!
//! Each part is made under another name and renamed when it is whole, one process at a time, so an
//! interrupted set-up leaves nothing that looks finished.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use testnode::{Cache, Network, Node, NodeOptions};

use crate::program::{output, project_root, run_quietly};

/// What tests and builds run on the host, beyond Debian's essential packages.
const HOST_PACKAGES: &[&str] = &[
    // makes the Debian root of test nodes
    "mmdebstrap",
    // nodes: namespaces, mounts, and looking at them
    "mount",
    "iproute2",
    "procps",
    // the daemon as a service
    "systemd",
    // crates with C, and libFuzzer with C++
    "g++",
    // mkfs.erofs, getfattr and setcap in tests of images
    "erofs-utils",
    "attr",
    "libcap2-bin",
    // mkfs.ext4 for small disks, and strace, which kills a daemon at a given step
    "e2fsprogs",
    "strace",
];

/// File systems that tests mount.
const FILE_SYSTEMS: &[&str] = &["overlay", "fuse", "erofs"];
/// Devices that tests open, and the modules that make them.
const DEVICES: &[(&str, &str)] =
    &[("/dev/fuse", "fuse"), ("/dev/loop-control", "loop"), ("/dev/net/tun", "tun")];

/// Where Debian is downloaded from if the host does not say.
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";

/// Settings of the caller that decide where Go modules come from.
const GO_SETTINGS: &[&str] =
    &["GOPROXY", "GONOSUMDB", "GOSUMDB", "GOPRIVATE", "http_proxy", "https_proxy", "no_proxy"];

/// The file with trusted certificates, on Debian hosts and in nodes.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Makes what is missing, and prints where tests find it.
pub(crate) fn setup() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("set-up installs packages and makes mounts: run it as root");
    }
    require_kernel_features()?;
    let cache = Cache::locate();
    let _lock = cache.lock()?;

    install_packages(HOST_PACKAGES)?;
    Cache::make(&cache.root(), make_root)?;
    Cache::make(&cache.peers(), |out| make_peers(&cache, out))?;
    println!("HERMES_TESTNODE_ROOT={}", cache.root().display());
    println!("HERMES_TEST_PEERS={}", cache.peers().display());
    Ok(())
}

/// Loads what the kernel has as modules, and fails if it lacks what no test can do without.
fn require_kernel_features() -> Result<()> {
    for name in FILE_SYSTEMS {
        let has = || {
            let all = fs::read_to_string("/proc/filesystems").unwrap_or_default();
            all.lines().any(|line| line.split_whitespace().last() == Some(name))
        };
        if !(has() || load_module(name) && has()) {
            bail!("this kernel has no {name} file system, which tests mount: use another kernel");
        }
    }
    for (device, module) in DEVICES {
        let has = || Path::new(device).exists();
        if !(has() || load_module(module) && has()) {
            bail!("{device} is missing and there is no module `{module}`: use another kernel");
        }
    }
    Ok(())
}

/// Whether the kernel says that it has loaded the module.
fn load_module(name: &str) -> bool {
    Command::new("modprobe").arg(name).status().is_ok_and(|status| status.success())
}

/// Installs those of these packages of Debian that are missing.
pub(crate) fn install_packages(packages: &[&str]) -> Result<()> {
    let mut missing = Vec::new();
    for package in packages {
        let mut query = Command::new("dpkg-query");
        query.args(["--show", "--showformat=${db:Status-Status}", package]);
        let answer =
            query.output().context("running dpkg-query: the tests need Debian 12 or later")?;
        if answer.stdout != b"installed" {
            missing.push(*package);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    // A source that has nothing to do with us may be unreachable; the installation will tell.
    run_quietly("updating the list of Debian packages", Command::new("apt-get").arg("update"))
        .unwrap_or_else(|error| println!("{error:#}"));
    run_quietly(
        &format!("installing {}", missing.join(" ")),
        Command::new("apt-get")
            .args(["install", "--yes", "--no-install-recommends"])
            .args(missing)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

fn make_root(out: &Path) -> Result<()> {
    let recipe = project_root().join("crates/testnode/root.sh");
    run_quietly(
        "making the Debian root of test nodes (two minutes)",
        Command::new("bash").arg(recipe).arg(out).arg(mirror()),
    )
}

/// The mirror that the host itself uses.
fn mirror() -> String {
    let sources =
        ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"].map(fs::read_to_string);
    sources
        .into_iter()
        .flatten()
        .find_map(|text| debian_mirror(&text))
        .unwrap_or_else(|| DEFAULT_MIRROR.to_owned())
}

/// The first mirror of Debian itself (not of its security archive) in a list of sources.
fn debian_mirror(sources: &str) -> Option<String> {
    let lines = sources.lines().filter(|l| l.starts_with("URIs:") || l.starts_with("deb "));
    let mut words = lines.flat_map(str::split_whitespace);
    words
        .find(|w| w.starts_with("http") && w.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
}

/// Builds the peers in a node, with Debian's compilers.
fn make_peers(cache: &Cache, out: &Path) -> Result<()> {
    let source = project_root().join("crates/testnode/peers");
    let go_cache = cache.folder().join("go");
    fs::create_dir_all(&go_cache).context("making the cache of Go")?;
    let mut binds: Vec<(PathBuf, String)> = vec![
        (source, "/peers/source".to_owned()),
        (out.to_owned(), "/peers/out".to_owned()),
        (go_cache, "/peers/go".to_owned()),
    ];
    // A host behind a proxy of its own trusts that proxy; the compiler must, too.
    if Path::new(CERTIFICATES).exists() {
        binds.push((CERTIFICATES.into(), CERTIFICATES.to_owned()));
    }
    let node = Node::start_with(&NodeOptions { network: Network::Host, binds })?;
    let mut build = node.command("env");
    build.args(["GOMODCACHE=/peers/go/modules", "GOCACHE=/peers/go/build"]);
    for name in GO_SETTINGS {
        if let Some(value) = env::var_os(name) {
            build.arg(format!("{name}={}", value.to_string_lossy()));
        }
    }
    build.args(["bash", "/peers/source/build.sh", "/peers/source", "/peers/out"]);
    run_quietly("building containerd 2.4 and SOCI 0.15 from source (five minutes)", &mut build)
}

/// The tools on this machine, for the log of a test run.
pub(crate) fn describe_machine() -> Result<String> {
    let kernel = output(Command::new("uname").arg("-r"))?;
    let rust = output(Command::new("rustc").arg("--version"))?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(format!("Linux {}, {}, {cores} cores", kernel.trim(), rust.trim()))
}

#[cfg(test)]
mod tests {
    use super::debian_mirror;

    #[track_caller]
    fn check(sources: &str, expected: Option<&str>) {
        assert_eq!(debian_mirror(sources).as_deref(), expected);
    }

    #[test]
    fn finds_the_mirror_in_both_forms() {
        check("Types: deb\n# http://old/debian\nURIs: http://m/debian\n", Some("http://m/debian"));
        check("deb [arch=amd64] https://m/debian/ bookworm main\n", Some("https://m/debian/"));
        check(
            "deb http://m/debian-security x main\ndeb http://n/debian x",
            Some("http://n/debian"),
        );
        check("deb http://archive.ubuntu.com/ubuntu noble main\n", None);
    }
}

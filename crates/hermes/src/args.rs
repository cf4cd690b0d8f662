//! The command line, defined once: parsing, help, completions and man pages all come from here.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use policy::{BackendChoice, CacheClass, Completion};

/// Starts containers from unmodified OCI images before the image is downloaded.
#[derive(Debug, Parser)]
#[command(name = "hermes", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) common: GlobalArguments,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The root folder of a node's daemon.
pub(crate) const USUAL_ROOT: &str = "/var/lib/hermes";

/// What every command understands.
#[derive(Debug, Clone, Args)]
pub(crate) struct GlobalArguments {
    /// Folder of this set-up: cache, indexes, mounts and sockets; one daemon serves each
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "HERMES_ROOT",
        default_value = USUAL_ROOT
    )]
    pub(crate) root: PathBuf,
    /// How results are printed
    #[arg(long, global = true, value_enum, default_value_t = OutputFormat::Text, value_name = "FORMAT")]
    pub(crate) output: OutputFormat,
    /// What is logged: error, warn, info, debug, or a filter such as `fill=debug`
    #[arg(long, global = true, env = "HERMES_LOG", default_value = "warn", value_name = "FILTER")]
    pub(crate) log: String,
    #[command(flatten)]
    pub(crate) registry: RegistryArguments,
}

/// How registries are reached.
#[derive(Debug, Clone, Args)]
pub(crate) struct RegistryArguments {
    /// Folder with one hosts.toml for each registry, as containerd has it
    #[arg(long, global = true, value_name = "DIR", default_value = "/etc/containerd/certs.d")]
    pub(crate) hosts_dir: PathBuf,
    /// Docker's config.json with credentials [default: ~/.docker/config.json]
    #[arg(long, global = true, value_name = "FILE", env = "HERMES_DOCKER_CONFIG")]
    pub(crate) docker_config: Option<PathBuf>,
    /// Platform of the image, such as linux/arm64 [default: this machine's]
    #[arg(long, global = true, value_name = "OS/ARCH")]
    pub(crate) platform: Option<String>,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show it all at work: pack an image of this machine's own files, start it lazily and by a full pull
    Demo(DemoArguments),
    /// Mount an image lazily and run a program in it
    Run(RunArguments),
    /// Mount an image lazily
    Mount(MountArguments),
    /// Unmount an image
    Umount(UmountArguments),
    /// Build, push, inspect and verify indexes
    #[command(subcommand)]
    Index(IndexCommand),
    /// Show the daemon, its mounts and what they wait for
    Status(StatusArguments),
    /// Say why an image or a mount is lazy or not, and what is still missing of it
    Explain {
        /// An image, a folder where one is mounted, or the id of a container of containerd
        #[arg(value_name = "IMAGE|DIR|CONTAINER")]
        what: String,
    },
    /// Show which mounts fetch and wait, every second until interrupted
    Top,
    /// Print the daemon's metrics in the text format of Prometheus
    Metrics,
    /// Look after the cache of layers
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Show and check the configuration of a node's daemon
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Set this machine up as a node: service, configuration, containerd; and the way back
    #[command(subcommand)]
    Node(NodeCommand),
    /// Serve the mounts of the root folder; started by `mount` when none runs
    Daemon(DaemonArguments),
    /// Hold the kernel's descriptors while the daemon is away; started by the daemon
    #[command(hide = true)]
    Keeper(KeeperArguments),
    /// The first process of a container; started by `run`
    #[command(hide = true)]
    ContainerInit {
        /// Its root
        rootfs: PathBuf,
        /// Describes the program
        program: PathBuf,
    },
    /// Print a script that completes commands in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    Man {
        /// Folder for them
        dir: PathBuf,
    },
}

/// Arguments of `hermes demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArguments {
    /// Use this image of a real registry instead of packing one
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// Program to run in the image given by --image
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
    /// Bandwidth of the link to the demo's registry, such as 100mbit or 1gbit
    #[arg(long, default_value = "300mbit", value_parser = bandwidth)]
    pub(crate) bandwidth: u64,
    /// Round-trip time of that link, such as 20ms
    #[arg(long, default_value = "20ms", value_parser = duration)]
    pub(crate) latency: Duration,
    /// Compressed bytes that the packed image should have at least, such as 200m
    #[arg(long, default_value = "150m", value_parser = size)]
    pub(crate) image_size: u64,
    /// How often the daemon is killed while the program runs
    #[arg(long, default_value_t = 3)]
    pub(crate) kills: u32,
    /// Back end to use
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub(crate) backend: BackendChoice,
}

/// Arguments of `hermes run`.
#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The image
    pub(crate) image: String,
    /// Program and arguments instead of the image's own
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
    /// Back end to use
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub(crate) backend: BackendChoice,
    /// Program that runs the container: runc or crun if present, else our own namespaces
    #[arg(long, value_enum, default_value_t = RuntimeChoice::Auto)]
    pub(crate) runtime: RuntimeChoice,
}

/// Arguments of `hermes mount`.
#[derive(Debug, Args)]
pub(crate) struct MountArguments {
    /// The image
    pub(crate) image: String,
    /// Where to mount it; made if it is not there
    pub(crate) dir: PathBuf,
    /// Back end to use
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub(crate) backend: BackendChoice,
    /// How long a read waits for bytes that do not come before it fails
    #[arg(long, default_value = "300s", value_parser = duration)]
    pub(crate) deadline: Duration,
    /// When the rest of the image is fetched
    #[arg(long, value_enum, default_value_t = Completion::Now)]
    pub(crate) completion: Completion,
    /// What of the cache is given up first when room is needed
    #[arg(long, value_enum, default_value_t = CacheClass::Standard)]
    pub(crate) cache_class: CacheClass,
    #[command(flatten)]
    pub(crate) daemon: DaemonTuning,
}

/// Arguments of `hermes umount`.
#[derive(Debug, Args)]
pub(crate) struct UmountArguments {
    /// Where the image is mounted
    pub(crate) dir: PathBuf,
    /// Detach now, let go when the last user ends
    #[arg(long)]
    pub(crate) lazy: bool,
}

/// Commands on indexes.
#[derive(Debug, Subcommand)]
pub(crate) enum IndexCommand {
    /// Build the index of each layer, in one streaming pass
    Build(BuildArguments),
    /// Push the indexes of an image to where the image lies
    Push(PushArguments),
    /// Show what the indexes of an image contain
    Show {
        /// The image
        image: String,
    },
    /// Print one file of an image, fetching only the spans that hold it
    GetFile {
        /// The image
        image: String,
        /// The file's path in the image
        path: String,
    },
    /// Read all layers and compare them with their indexes
    Verify {
        /// The image
        image: String,
    },
    /// List the indexes on this machine
    List,
    /// Remove indexes from this machine
    Rm {
        /// Digests of layers, or images
        #[arg(required = true)]
        what: Vec<String>,
    },
}

/// Arguments of `hermes index push`.
#[derive(Debug, Args)]
pub(crate) struct PushArguments {
    /// The image
    pub(crate) image: String,
    /// SOCI's version of the index: 1 refers to the image, 2 is named by a copy of the image's manifest
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=2), default_value_t = 1)]
    pub(crate) version: u8,
    /// New tag for the copy, with --version 2
    #[arg(long, required_if_eq("version", "2"))]
    pub(crate) tag: Option<String>,
}

/// Arguments of `hermes index build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArguments {
    /// The image
    pub(crate) image: String,
    /// Uncompressed bytes between two checkpoints
    #[arg(long, default_value = "4m", value_parser = size)]
    pub(crate) span_size: u64,
    /// Layers smaller than this (compressed) get no index
    #[arg(long, default_value = "0", value_parser = size)]
    pub(crate) min_layer_size: u64,
    /// Keep only the window bytes that the next span refers to; SOCI reads the result too
    #[arg(long)]
    pub(crate) sparse_windows: bool,
    /// Layers built at a time
    #[arg(long, default_value_t = 2)]
    pub(crate) parallel: usize,
}

/// Arguments of `hermes status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    /// Show it again every second until interrupted
    #[arg(long)]
    pub(crate) watch: bool,
}

/// Commands on the cache.
#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// List the layers on this machine
    Ls,
    /// Remove layers that no mount uses
    Prune {
        /// Remove the least recently used until the rest fits, instead of all
        #[arg(long, value_parser = size, value_name = "SIZE")]
        keep: Option<u64>,
    },
    /// Read all layers again and compare them with their checksums
    Verify,
}

/// Commands on the configuration of a node's daemon.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print a configuration file with every key, what it means, and its default
    Default,
    /// Print a policy that makes images lazy, for a file in the policies' folder
    Policy {
        /// Images: `*` stands for anything without a slash, `**` for anything
        glob: String,
        /// The policy's name
        #[arg(long, default_value = "lazy")]
        name: String,
    },
    /// Say what is wrong with a configuration file and the policies that it names
    Check {
        /// The file
        #[arg(default_value = crate::config::USUAL_PLACE)]
        file: PathBuf,
    },
}

/// Commands on this machine as a node of containerd.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Write the configuration, the service and containerd's part, and start the service; again changes nothing
    Install(InstallArguments),
    /// Say what keeps images from being lazy on this machine, and what to do
    Check(NodeArguments),
    /// Take back what `install` has made and changed
    Uninstall(UninstallArguments),
}

/// Where containerd is.
#[derive(Debug, Args)]
pub(crate) struct NodeArguments {
    /// containerd's configuration [default: that of the running one, else /etc/containerd/config.toml]
    #[arg(long, value_name = "FILE")]
    pub(crate) containerd_config: Option<PathBuf>,
    /// containerd's socket
    #[arg(long, value_name = "FILE", default_value = "/run/containerd/containerd.sock")]
    pub(crate) containerd_socket: PathBuf,
}

/// Whether containerd learns of it at once.
#[derive(Debug, Args)]
pub(crate) struct RestartArguments {
    /// Restart containerd if its configuration has changed; containers go on running
    #[arg(long)]
    pub(crate) restart_containerd: bool,
}

/// Arguments of `hermes node install`.
#[derive(Debug, Args)]
pub(crate) struct InstallArguments {
    #[command(flatten)]
    pub(crate) node: NodeArguments,
    #[command(flatten)]
    pub(crate) restart: RestartArguments,
    /// Neither enable nor start the service
    #[arg(long)]
    pub(crate) no_start: bool,
    /// Change nothing; say what would be changed
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Arguments of `hermes node uninstall`.
#[derive(Debug, Args)]
pub(crate) struct UninstallArguments {
    #[command(flatten)]
    pub(crate) node: NodeArguments,
    #[command(flatten)]
    pub(crate) restart: RestartArguments,
    /// Go on although containers use images of Hermes: what they have not read yet they cannot read any more
    #[arg(long)]
    pub(crate) force: bool,
    /// Remove the root folder as well: cache, indexes, snapshots
    #[arg(long)]
    pub(crate) purge: bool,
}

/// What the daemon can be told.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct DaemonTuning {
    /// Disk space that layers may take; kept by removing those that no mount uses, then by giving up what
    /// was not read for long [default: no limit]
    #[arg(long, value_parser = size, value_name = "SIZE")]
    pub(crate) quota: Option<u64>,
    /// How long bytes stay after they were read, if others can be given up [default: 60s]
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) eviction_grace: Option<Duration>,
    /// What is not fetched before it is read, to see what it is worth
    #[arg(long, value_enum, value_delimiter = ',', value_name = "RULE")]
    pub(crate) without: Vec<Rule>,
}

/// Why something is fetched before it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rule {
    /// Small layers are fetched whole at the mount
    SmallLayers,
    /// Who reads on is read ahead of, twice as far each time
    Sequential,
    /// Small files are fetched whole
    SmallFiles,
    /// Around the second read in a large file more of it is fetched, and twice as much each time
    LargeFiles,
    /// The span behind one that is read is fetched with it
    Neighbours,
    /// Directories of which two files are read are fetched whole
    Directories,
    /// The program of `hermes run`, its interpreter and its libraries are fetched at the mount, and later ones
    /// when they are begun to be read
    Program,
    /// What an index says of the start is read into the page cache when it is here
    PageCache,
    /// Everything else is fetched in the background
    Completion,
}

impl Rule {
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// Arguments of `hermes daemon`.
#[derive(Debug, Args)]
pub(crate) struct DaemonArguments {
    #[command(flatten)]
    pub(crate) tuning: DaemonTuning,
    /// Serve containerd, and all else as this file says: see `hermes config default`
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Do not let the keeper start the daemon again when it dies
    #[arg(long)]
    pub(crate) no_respawn: bool,
    /// Write one byte to standard input, a pipe, when the daemon serves
    #[arg(long, hide = true)]
    pub(crate) ready_on_stdin: bool,
    #[command(flatten)]
    pub(crate) service: ServiceArguments,
}

/// What systemd tells a service: `sd_notify(3)`, `sd_listen_fds(3)`.
#[derive(Debug, Args)]
pub(crate) struct ServiceArguments {
    /// Where systemd is told things
    #[arg(long, hide = true, env = "NOTIFY_SOCKET")]
    pub(crate) notify_socket: Option<std::ffi::OsString>,
    /// The process that the descriptors are for
    #[arg(long, hide = true, env = "LISTEN_PID", default_value = "")]
    pub(crate) listen_pid: String,
    /// How many descriptors there are, from 3 on
    #[arg(long, hide = true, env = "LISTEN_FDS", default_value = "")]
    pub(crate) listen_fds: String,
    /// What they are called, with colons between
    #[arg(long, hide = true, env = "LISTEN_FDNAMES", default_value = "")]
    pub(crate) listen_fdnames: String,
    /// How often systemd wants to hear that the service is alive, in microseconds
    #[arg(long, hide = true, env = "WATCHDOG_USEC", default_value = "")]
    pub(crate) watchdog_usec: String,
    /// The process that it wants to hear it from
    #[arg(long, hide = true, env = "WATCHDOG_PID", default_value = "")]
    pub(crate) watchdog_pid: String,
}

/// The environment that [`ServiceArguments`] come from; it is for one process only.
pub(crate) const SERVICE_ENVIRONMENT: [&str; 6] = [
    "NOTIFY_SOCKET",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
];

/// Arguments of `hermes keeper`.
#[derive(Debug, Args)]
pub(crate) struct KeeperArguments {
    /// Command line that starts the daemon again
    #[arg(last = true)]
    pub(crate) respawn: Vec<std::ffi::OsString>,
}

/// Which program runs containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RuntimeChoice {
    /// runc or crun if present, else our own namespaces.
    Auto,
    /// runc.
    Runc,
    /// crun.
    Crun,
    /// Namespaces and chroot.
    Chroot,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed, the reason is on standard error; 2 wrong arguments; \
3 the image or index does not exist; 4 not authorised; 5 the mount is busy; 6 what was read is not what was promised; \
7 the disk is full. \
`run` ends with the program's own code, or 128 + the number of the signal that ended it.";

/// Finds a program on the PATH.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|program| program.is_file())
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Result<u64, String> {
    let text = text.trim().to_ascii_lowercase();
    for (unit, factor) in units {
        if let Some(Ok(number)) = text.strip_suffix(unit).map(str::parse::<u64>) {
            return number.checked_mul(*factor).ok_or_else(|| format!("`{text}` is too large"));
        }
    }
    let known: Vec<&str> =
        units.iter().map(|(unit, _)| *unit).filter(|unit| !unit.is_empty()).collect();
    Err(format!("`{text}` is not a number with one of the units {}", known.join(", ")))
}

fn bandwidth(text: &str) -> Result<u64, String> {
    scaled(text, &[("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)])
}

fn duration(text: &str) -> Result<Duration, String> {
    scaled(text, &[("us", 1), ("ms", 1_000), ("s", 1_000_000)]).map(Duration::from_micros)
}

pub(crate) fn size(text: &str) -> Result<u64, String> {
    scaled(text, &[("k", 1 << 10), ("m", 1 << 20), ("g", 1 << 30), ("t", 1 << 40), ("", 1)])
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn quantities_are_read_with_their_units() {
        assert_eq!(bandwidth("300mbit"), Ok(300_000_000));
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(size("4m"), Ok(4 << 20));
        assert_eq!(size("17"), Ok(17));
        for text in ["", "m", "-1k", "4x", "99999999999t"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}

//! The daemon as a service of a real systemd: a user manager with mounts and a control group of its own.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use testkit::registry::Link;

use crate::BACKENDS;
use crate::setup::{Setup, check, image, kill};

const UNIT: &str = include_str!("../../../../docs/hermes.service");
const SOCKET_UNIT: &str = include_str!("../../../../docs/hermes.socket");

const SERVICE: &str = "hermes.service";
const SOCKET: &str = "hermes.socket";

/// Enters the control group `$1` and sees only what is in it, and has a `/run` where systemd finds that
/// it may run.
const START: &str = r#"
echo $$ > "$1/cgroup.procs"
exec unshare --mount --cgroup sh -ec '
  umount --recursive /sys/fs/cgroup
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mount -t tmpfs tmpfs /run
  mkdir -p /run/systemd/system "$XDG_RUNTIME_DIR"
  exec /lib/systemd/systemd --user --unit=basic.target'
"#;

/// systemd, and everything it has started; ends with it.
struct Systemd {
    manager: Child,
    cgroup: PathBuf,
}

impl Systemd {
    /// Runs the unit of the documentation for the root folder of `setup`, whose commands then go to it.
    fn start(setup: &mut Setup) -> Self {
        Self::start_unit(setup, UNIT)
    }

    /// As [`start`](Self::start), of another unit.
    fn start_unit(setup: &mut Setup, unit: &str) -> Self {
        let systemd = Self::boot(setup, &[(SERVICE, service(setup, unit, ""))]);
        assert!(systemd.control(&["start", SERVICE]).is_some(), "the unit does not start");
        systemd
    }

    /// Runs systemd with these units, of which none is started yet.
    fn boot(setup: &mut Setup, units: &[(&str, String)]) -> Self {
        let cgroup = cgroup_root().join(setup.path("").file_name().unwrap());
        std::fs::create_dir(&cgroup).unwrap();
        for (name, text) in units {
            write_unit(setup, name, text);
        }
        let manager = Command::new("sh")
            .args(["-ec", START, "sh"])
            .arg(&cgroup)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", setup.path("home"))
            .env("XDG_CONFIG_HOME", setup.path("config"))
            .env("XDG_RUNTIME_DIR", RUNTIME_DIR)
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let systemd = Self { manager, cgroup };
        setup.until("systemd runs", || systemd.control(&["is-active", "basic.target"]));
        setup.through = systemd.inside();
        systemd
    }

    /// What runs a command where systemd runs.
    fn inside(&self) -> Vec<String> {
        let pid = self.manager.id().to_string();
        ["nsenter", "--mount", "--target", &pid, "--"].map(str::to_owned).to_vec()
    }

    /// What systemd does or says, if it can.
    fn control(&self, arguments: &[&str]) -> Option<String> {
        let inside = self.inside();
        let mut command = Command::new(&inside[0]);
        command.args(&inside[1..]).args(["systemctl", "--user"]).args(arguments);
        let output = command.env("XDG_RUNTIME_DIR", RUNTIME_DIR).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    fn main_pid(&self) -> Option<i32> {
        let pid = self.control(&["show", "--value", "--property=MainPID", "hermes.service"])?;
        pid.trim().parse().ok().filter(|pid| *pid != 0)
    }

    /// SIGKILL to every process of the service at the same moment.
    fn kill_service(&self) {
        std::fs::write(self.cgroup.join("app.slice/hermes.service/cgroup.kill"), "1").unwrap();
    }

    /// A folder as it is seen there.
    fn seen(&self, dir: &Path) -> PathBuf {
        let root = format!("/proc/{}/root", self.manager.id());
        PathBuf::from(root).join(dir.strip_prefix("/").unwrap())
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        std::fs::write(self.cgroup.join("cgroup.kill"), "1").ok();
        self.manager.wait().ok();
        // Killed processes leave their group a little later.
        for _ in 0..1000 {
            let mut remove = Command::new("find");
            remove.arg(&self.cgroup).args(["-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]);
            if remove.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

/// A service that runs this program for the root folder of `setup`.
fn service(setup: &Setup, unit: &str, more: &str) -> String {
    let (hermes, root) = (env!("CARGO_BIN_EXE_hermes"), setup.path("root"));
    let command = format!("ExecStart={hermes} --log info --root {} daemon{more}", root.display());
    let documented = "ExecStart=/usr/local/bin/hermes daemon --config /etc/hermes/config.toml";
    let unit = unit.replace(documented, &command);
    assert!(unit.contains(&command), "the documented unit starts something else");
    unit
}

fn write_unit(setup: &Setup, name: &str, text: &str) {
    let units = setup.path("config/systemd/user");
    std::fs::create_dir_all(&units).unwrap();
    std::fs::write(units.join(name), text).unwrap();
}

/// Where control groups of the second version are.
fn cgroup_root() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let cgroup2 = fields.into_iter().find(|fields| fields[2] == "cgroup2");
    PathBuf::from(cgroup2.expect("control groups of version 2 are mounted")[1])
}

const RUNTIME_DIR: &str = "/run/user/0";

#[test]
fn daemon_and_keeper_of_a_service_may_die_together() {
    for backend in BACKENDS {
        let mut setup = Setup::new();
        let systemd = Systemd::start(&mut setup);
        let (name, contents) = image(&setup, "killed", 24, 1 << 20);
        setup.index(&name);
        setup.registry.set_link(Link::mbit_per_s(60, Duration::from_millis(2)));
        let dir = setup.mount(&name, "mnt", &["--backend", backend]);
        let seen = systemd.seen(&dir);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| check(&seen, &contents));
            for _ in 0..3 {
                let pid = setup.until("a daemon answers", || setup.daemon_pid());
                systemd.kill_service();
                // Until it is dead it may still accept a question.
                kill(pid);
                setup.until("another daemon answers", || {
                    setup.daemon_pid().filter(|other| *other != pid)
                });
            }
            reader.join().unwrap();
        });
        let status = setup.status();
        assert_eq!(status["mounts"][0]["state"], "served", "{backend}: {status}");
        setup.ok(&["umount", dir.to_str().unwrap()]);
    }
}

#[test]
fn a_service_may_be_stopped_and_started_under_readers() {
    let mut setup = Setup::new();
    let systemd = Systemd::start(&mut setup);
    let (name, contents) = image(&setup, "stopped", 24, 1 << 20);
    setup.index(&name);
    setup.registry.set_link(Link::mbit_per_s(60, Duration::from_millis(2)));
    let dir = setup.mount(&name, "mnt", &["--backend", "erofs"]);
    let seen = systemd.seen(&dir);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| check(&seen, &contents));
        for what in [["restart"].as_slice(), &["stop", "start"], &["stop", "start"]] {
            for what in what {
                assert!(systemd.control(&[what, "hermes.service"]).is_some(), "{what}");
            }
        }
        reader.join().unwrap();
    });
    setup.ok(&["umount", dir.to_str().unwrap()]);
}

/// systemd notices, and its successor serves who waited.
#[test]
fn a_daemon_that_hangs_is_replaced_under_readers() {
    let mut setup = Setup::new();
    let impatient = UNIT.replace("WatchdogSec=30s", "WatchdogSec=2s");
    assert_ne!(impatient, UNIT);
    let systemd = Systemd::start_unit(&mut setup, &impatient);
    let (name, contents) = image(&setup, "hangs", 24, 1 << 20);
    setup.index(&name);
    let dir = setup.mount(&name, "mnt", &["--backend", "erofs", "--completion", "never"]);
    let pid = systemd.main_pid().unwrap();
    let hang = rustix::process::Signal::STOP;
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), hang).unwrap();
    check(&systemd.seen(&dir), &contents);
    assert!(systemd.main_pid().is_some_and(|now| now != pid), "it was replaced");
    setup.ok(&["umount", dir.to_str().unwrap()]);
}

#[test]
fn a_service_waits_for_the_daemon_of_a_command() {
    let mut setup = Setup::new();
    let systemd = Systemd::start(&mut setup);
    let (name, contents) = image(&setup, "waits", 4, 1 << 20);
    assert!(systemd.control(&["stop", "hermes.service"]).is_some());
    let dir = setup.mount(&name, "mnt", &[]);
    let of_command = setup.daemon_pid().unwrap();
    assert!(systemd.control(&["start", "--no-block", "hermes.service"]).is_some());
    setup.until("the service is about to start", || {
        systemd.control(&["is-active", "hermes.service"]).is_none().then_some(())?;
        systemd.main_pid()
    });
    assert_eq!(setup.daemon_pid(), Some(of_command));
    crate::setup::terminate(of_command);
    setup.until("the service serves", || systemd.control(&["is-active", "hermes.service"]));
    assert_eq!(setup.daemon_pid(), systemd.main_pid());
    check(&systemd.seen(&dir), &contents);
    setup.ok(&["umount", dir.to_str().unwrap()]);
}

#[test]
fn commands_right_after_the_death_of_a_service_leave_its_start_to_systemd() {
    let mut setup = Setup::new();
    let systemd = Systemd::start(&mut setup);
    let (name, contents) = image(&setup, "leaves", 2, 100_000);
    for round in 0..5 {
        kill(setup.daemon_pid().unwrap());
        let dir = setup.mount(&name, &format!("mnt{round}"), &[]);
        assert_eq!(setup.daemon_pid(), systemd.main_pid());
        check(&systemd.seen(&dir), &contents);
    }
    for round in 0..5 {
        setup.ok(&["umount", setup.path(&format!("mnt{round}")).to_str().unwrap()]);
    }
}

/// A service that serves containerd, and the path of its socket.
fn for_containerd(setup: &Setup) -> (String, PathBuf) {
    let (socket, config) = (setup.path("containerd.sock"), setup.path("config.toml"));
    let text = format!("[containerd]\nsocket = {socket:?}\npolicies = {:?}\n", setup.path("no"));
    std::fs::write(&config, text).unwrap();
    (service(setup, UNIT, &format!(" --config {}", config.display())), socket)
}

/// The unit of the documentation, at another place.
fn listening_at(path: &Path) -> String {
    let unit = SOCKET_UNIT.replace("/run/hermes/containerd.sock", path.to_str().unwrap());
    assert_ne!(unit, SOCKET_UNIT);
    unit
}

/// Connects as containerd does, and waits until somebody answers as a gRPC server.
fn connect(socket: &Path) {
    const SETTINGS: u8 = 4;
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], SETTINGS);
}

fn inode(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().ino()
}

/// Whatever happens to the daemon, containerd waits and is answered, at the same socket.
#[test]
fn containerd_may_come_before_the_daemon_and_while_it_is_replaced() {
    let mut setup = Setup::new();
    let (service, socket) = for_containerd(&setup);
    let units = [(SERVICE, service), (SOCKET, listening_at(&socket))];
    let systemd = Systemd::boot(&mut setup, &units);
    assert!(systemd.control(&["start", SOCKET]).is_some(), "the socket does not start");
    let (at_first, mode) = (inode(&socket), std::fs::metadata(&socket).unwrap().mode());
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(systemd.main_pid(), None);
    connect(&socket);
    let mut pid = systemd.main_pid().unwrap();
    assert_eq!(setup.daemon_pid(), Some(pid));
    for what in ["restart", "kill", "stop"] {
        match what {
            "kill" => kill(pid),
            what => assert!(systemd.control(&[what, SERVICE]).is_some(), "{what}"),
        }
        connect(&socket);
        let now = setup.until("a daemon", || systemd.main_pid());
        assert_ne!(now, pid, "{what}");
        pid = now;
        assert_eq!(inode(&socket), at_first, "{what}");
    }
    assert!(systemd.control(&["stop", SOCKET, SERVICE]).is_some());
    assert!(!socket.exists());
}

#[test]
fn a_service_that_listened_itself_gets_its_socket_from_systemd_at_a_restart() {
    let mut setup = Setup::new();
    let (service, socket) = for_containerd(&setup);
    let systemd = Systemd::boot(&mut setup, &[(SERVICE, service)]);
    assert!(systemd.control(&["start", SERVICE]).is_some());
    connect(&socket);
    // One that is elsewhere is of no use, and does no harm.
    write_unit(&setup, SOCKET, &listening_at(&setup.path("elsewhere.sock")));
    for what in [["daemon-reload"].as_slice(), &["restart", SERVICE], &["is-active", SOCKET]] {
        assert!(systemd.control(what).is_some(), "{what:?}");
    }
    connect(&socket);
    assert!(systemd.control(&["stop", SOCKET, SERVICE]).is_some());
    assert!(!socket.exists());
    write_unit(&setup, SOCKET, &listening_at(&socket));
    for what in [["daemon-reload"].as_slice(), &["start", SERVICE], &["is-active", SOCKET]] {
        assert!(systemd.control(what).is_some(), "{what:?}");
    }
    let of_systemd = inode(&socket);
    connect(&socket);
    assert!(systemd.control(&["stop", SERVICE]).is_some());
    assert_eq!(inode(&socket), of_systemd);
}

//! `hermes node`: a machine becomes a node of each containerd, whatever its configuration was, and stops
//! being one.

use std::fs;

use serde_json::Value;
use testnode::{Containerd, ContainerdVersion, Daemon, Node, Registry, busybox_image, wait_until};

use crate::{CONFIG, PATIENCE, n_blobs, node, push_index, start, until_containerd_is_served};

/// containerd's configuration in the node.
const OF_CONTAINERD: &str = "/etc/containerd/config.toml";

const VERSIONS_2: [ContainerdVersion; 2] = [ContainerdVersion::Packaged, ContainerdVersion::Newest];

/// What an administrator may have written for Pods that need the image `pause`: of version 2, for all.
pub(super) fn version_2(pause: &str) -> String {
    format!(
        "# Ours, do not touch.\nversion = 2\noom_score = 0 # as ever\n\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{pause}\"\n  \
         restrict_oom_score_adj = true\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n  bin_dir = \"/usr/lib/cni\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc/containerd/certs.d\" # mirrors\n"
    )
}

/// The table that containerd 2 wants in such a file.
pub(super) const RUNTIMES: &str = "\n# The runtimes of this cluster.\n\
    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  \
    runtime_type = \"io.containerd.runc.v2\"\n";

/// The same of version 3.
pub(super) fn version_3(pause: &str) -> String {
    format!(
        "# Ours, do not touch.\nversion = 3\noom_score = 0 # as ever\n\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = \"{pause}\"\n\
         [plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = \"/etc/containerd/certs.d\" # mirrors\n\
         [plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\n  bin_dirs = [\"/usr/lib/cni\"]\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  \
         runtime_type = \"io.containerd.runc.v2\"\n"
    )
}

/// A machine with a containerd and an image that can be lazy.
pub(super) struct Machine {
    pub(super) node: Node,
    registry: Registry,
    containerd: Option<Containerd>,
    version: ContainerdVersion,
    image: String,
}

impl Machine {
    /// With this configuration of containerd, made for the image of pauses.
    pub(super) fn start(version: ContainerdVersion, config: impl FnOnce(&str) -> String) -> Self {
        let node = node();
        let registry = node.registry(5000).unwrap();
        let image = busybox_image(&node, &registry, "lazy:1").unwrap();
        push_index(&node, &image);
        // What keeps a Pod's namespaces open; no policy selects it.
        let pause = format!("{}/pause:1", registry.host);
        let sleep = "umoci config --image /srv/images:bb --tag pause --config.cmd /bin/sleep \
                     --config.cmd 1000";
        node.bash(sleep).unwrap();
        let copy = ["copy", "--quiet", "--dest-tls-verify=false", "oci:/srv/images:pause"];
        node.run("skopeo", &[&copy[..], &[&format!("docker://{pause}")]].concat()).unwrap();
        let containerd = Some(node.containerd(version, &config(&pause)).unwrap());
        Self { node, registry, containerd, version, image }
    }

    pub(super) fn containerd(&self) -> &Containerd {
        self.containerd.as_ref().unwrap()
    }

    pub(super) fn config(&self) -> String {
        fs::read_to_string(self.node.path(OF_CONTAINERD)).unwrap()
    }

    /// What a restart of containerd by somebody who has changed its configuration does.
    pub(super) fn restart_containerd(&mut self, config: &str) {
        drop(self.containerd.take());
        self.containerd = Some(self.node.containerd(self.version, config).unwrap());
    }

    fn hermes(&self, arguments: &[&str]) -> String {
        self.node.run("hermes", arguments).unwrap()
    }

    pub(super) fn install(&self) -> String {
        self.hermes(&["node", "install"])
    }

    /// Starts the daemon as the service does, and says which images are lazy.
    pub(super) fn serve(&self) -> Daemon {
        start(&self.node)
    }

    /// The names of what is wrong.
    pub(super) fn faults(&self) -> Vec<String> {
        let check = "hermes --output json node check || test $? = 1";
        let report: Value = serde_json::from_str(&self.node.bash(check).unwrap()).unwrap();
        let faults = report["faults"].as_array().unwrap();
        faults.iter().map(|fault| fault["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Pulls and runs a lazy image as a kubelet does.
    fn check_lazy_pod(&self) {
        let cri = |arguments: &[&str]| self.node.run("/opt/peers/cri", arguments);
        until_containerd_is_served(self.containerd());
        wait_until("CRI", PATIENCE, || Ok(cri(&["pull", &self.image]).is_ok())).unwrap();
        let list = ["--namespace", "k8s.io", "content", "ls", "--quiet"];
        let blobs = self.containerd().ctr(&list).unwrap();
        assert_eq!(blobs.lines().count(), 2, "{blobs}");
        testnode::check_busybox_output(&cri(&["run", &self.image]).unwrap());
        cri(&["rmi", &self.image]).unwrap();
    }
}

/// A file that somebody cares for: installed, restarted, lazy, checked, and taken back to the byte.
fn a_node_comes_and_goes(version: ContainerdVersion, config: impl FnOnce(&str) -> String) {
    let mut machine = Machine::start(version, config);
    let before = machine.config();
    let dry = machine.hermes(&["node", "install", "--dry-run"]);
    assert!(dry.contains("snapshotter = \"hermes\""), "{dry}");
    assert_eq!(machine.config(), before);
    assert!(!machine.node.path(CONFIG).exists(), "{dry}");
    let said = machine.install();
    assert!(said.contains("systemd does not run here"), "{said}");
    assert!(said.contains("restart containerd for this to be in force"), "{said}");
    let after = machine.config();
    for line in before.lines() {
        assert!(after.contains(line), "{line} is gone:\n{after}");
    }
    let again = machine.install();
    assert!(again.contains("containerd's configuration is right as it is"), "{again}");
    assert!(!again.contains("change ") && !again.contains("write "), "{again}");
    assert_eq!(machine.config(), after);

    let _daemon = machine.serve();
    assert_eq!(machine.faults(), ["containerd-not-restarted"]);
    machine.restart_containerd(&after);
    machine.check_lazy_pod();
    assert_eq!(machine.faults(), [""; 0]);
    assert!(machine.hermes(&["node", "check"]).starts_with("fine, with containerd "));

    let said = machine.hermes(&["node", "uninstall", "--purge"]);
    assert_eq!(machine.config(), before, "{said}");
    for gone in [
        "/etc/hermes/config.toml",
        "/etc/systemd/system/hermes.service",
        "/etc/systemd/system/hermes.socket",
        "/var/lib/hermes/cache",
    ] {
        assert!(!machine.node.path(gone).exists(), "{gone} is left\n{said}");
    }
    let left = machine.node.bash("ls -A /etc/containerd; find /etc/hermes").unwrap();
    // The policy is not ours.
    assert_eq!(
        left,
        "config.toml\n/etc/hermes\n/etc/hermes/policies\n/etc/hermes/policies/lazy.yaml\n"
    );
    machine.restart_containerd(&before);
    drop(machine.registry);
}

#[test]
fn a_node_comes_and_goes_on_containerd_1_6() {
    a_node_comes_and_goes(ContainerdVersion::V1_6, version_2);
}

#[test]
fn a_node_comes_and_goes_on_containerd_1_7() {
    a_node_comes_and_goes(ContainerdVersion::V1_7, |pause| version_2(pause) + RUNTIMES);
}

#[test]
fn a_node_comes_and_goes_on_containerd_2_1() {
    a_node_comes_and_goes(ContainerdVersion::Packaged, version_3);
}

#[test]
fn a_node_comes_and_goes_on_containerd_2_4() {
    a_node_comes_and_goes(ContainerdVersion::Newest, version_3);
}

#[test]
fn a_file_of_version_2_without_runtimes_is_made_right_for_containerd_2_1() {
    a_node_comes_and_goes(ContainerdVersion::Packaged, version_2);
}

#[test]
fn a_file_of_version_2_with_runtimes_is_made_right_for_containerd_2_4() {
    a_node_comes_and_goes(ContainerdVersion::Newest, |pause| version_2(pause) + RUNTIMES);
}

/// Nothing at all is configured.
#[test]
fn every_containerd_is_configured_from_nothing() {
    for version in ContainerdVersion::ALL {
        let mut machine = Machine::start(version, |_pause| String::new());
        fs::remove_file(machine.node.path(OF_CONTAINERD)).unwrap();
        machine.install();
        let _daemon = machine.serve();
        let config = machine.config();
        machine.restart_containerd(&config);
        assert_eq!(machine.faults(), [""; 0], "{version:?}:\n{config}");
        machine.hermes(&["node", "uninstall"]);
        assert!(!machine.node.path(OF_CONTAINERD).exists(), "{version:?}");
    }
}

/// Where containerd imports a folder, nothing else is touched; where importing would lose what the file says,
/// the file is changed.
#[test]
fn a_drop_in_is_used_where_containerd_merges_it() {
    let imports =
        |config: String| config.replacen("version", "imports = [\"conf.d/*.toml\"]\nversion", 1);
    for version in ContainerdVersion::ALL {
        let is_2 = VERSIONS_2.contains(&version);
        let mut machine = Machine::start(version, |pause| {
            imports(if is_2 { version_3(pause) } else { version_2(pause) })
        });
        let before = machine.config();
        let said = machine.install();
        assert_eq!(machine.config() == before, is_2, "{version:?}:\n{said}");
        assert_eq!(machine.node.path("/etc/containerd/conf.d/hermes.toml").exists(), is_2);
        let _daemon = machine.serve();
        let after = machine.config();
        machine.restart_containerd(&after);
        assert_eq!(machine.faults(), [""; 0], "{version:?}:\n{said}");
        machine.check_lazy_pod();
        machine.hermes(&["node", "uninstall"]);
        assert_eq!(machine.config(), before);
        assert!(!machine.node.path("/etc/containerd/conf.d").exists(), "{version:?}");
    }
}

/// One after the other, in a configuration that is right otherwise.
fn each_misconfiguration_is_named(version: ContainerdVersion, cases: &[(&str, &str, &[&str])]) {
    let is_2 = VERSIONS_2.contains(&version);
    let mut machine =
        Machine::start(version, |pause| if is_2 { version_3(pause) } else { version_2(pause) });
    machine.install();
    let daemon = machine.serve();
    let right = machine.config();
    machine.restart_containerd(&right);
    assert_eq!(machine.faults(), [""; 0]);
    let exports = "root = \"/var/lib/hermes/snapshots\"\n";
    let socket = "address = \"/run/hermes/containerd.sock\"";
    let common: [(&str, &str, &[&str]); 3] = [
        (exports, "root = \"/var/lib/other\"\n", &["exports-root"]),
        (socket, "address = \"/run/other.sock\"", &["proxy-address"]),
        (
            "snapshotter = \"hermes\"\ndisable",
            "snapshotter = \"overlayfs\"\ndisable",
            &["cri-snapshotter"],
        ),
    ];
    // 1.6.20 does not know the first.
    let common = &common[usize::from(version == ContainerdVersion::V1_6)..];
    for (from, to, expected) in common.iter().chain(cases) {
        assert!(right.contains(from), "{from} is not in\n{right}");
        machine.node.write(OF_CONTAINERD, right.replace(from, to)).unwrap();
        assert_eq!(&machine.faults()[..], *expected, "{to}");
    }
    machine.node.write(OF_CONTAINERD, "version = [").unwrap();
    assert_eq!(machine.faults(), ["containerd-config"]);
    machine.node.write(OF_CONTAINERD, &right).unwrap();
    let of_hermes = fs::read_to_string(machine.node.path(CONFIG)).unwrap();
    machine.node.write(CONFIG, "quota = 1").unwrap();
    assert_eq!(machine.faults(), ["config"]);
    // Nobody; somebody else; the right one.
    let node = &machine.node;
    for (address, expected) in [
        ("/run/other.sock", &["kubelet-address"][..]),
        ("/var/lib/hermes/daemon.sock", &["kubelet-address"]),
        ("/run/containerd/containerd.sock", &[]),
    ] {
        let text = format!("{of_hermes}\n").replace(
            "# address = \"/run/containerd/containerd.sock\"",
            &format!("address = '{address}'"),
        );
        assert_ne!(text.trim(), of_hermes.trim());
        node.write(CONFIG, text).unwrap();
        assert_eq!(machine.faults(), *expected, "{address}");
    }
    node.write(CONFIG, of_hermes).unwrap();
    // The daemon was started without it. containerd's own client is in the place of a kubelet.
    let images = ["-endpoint", "unix:///run/hermes/containerd.sock", "images", "v1"];
    let refused = node.run("/opt/peers/cri", &images).unwrap_err().to_string();
    assert!(refused.contains("name containerd's socket as `address`"), "{refused}");
    assert_eq!(machine.faults(), ["kubelet-address-missing"]);
    machine.node.write("/etc/hermes/policies/team.yaml", "spec: [").unwrap();
    assert!(machine.faults().contains(&"policies".to_owned()));
    fs::remove_file(machine.node.path("/etc/hermes/policies/team.yaml")).unwrap();
    assert!(daemon.stop().unwrap().success());
    let gone = machine.faults();
    assert!(gone.contains(&"daemon-socket".to_owned()), "{gone:?}");
    assert!(gone.contains(&"daemon-missing".to_owned()), "{gone:?}");
    drop(machine.containerd.take());
    let gone = machine.faults();
    assert!(gone.contains(&"containerd-socket".to_owned()), "{gone:?}");
}

const ANNOTATIONS: &str = "disable_snapshot_annotations = false";
const NO_ANNOTATIONS: &str = "disable_snapshot_annotations = true";

#[test]
fn each_misconfiguration_is_named_on_containerd_1_6() {
    let cases: [(&str, &str, &[&str]); 1] = [(ANNOTATIONS, NO_ANNOTATIONS, &["cri-annotations"])];
    each_misconfiguration_is_named(ContainerdVersion::V1_6, &cases);
}

#[test]
fn each_misconfiguration_is_named_on_containerd_1_7() {
    let cases: [(&str, &str, &[&str]); 2] = [
        (ANNOTATIONS, NO_ANNOTATIONS, &["cri-annotations"]),
        // It cannot mount so.
        (PROXY, &format!("{REMAP_IDS}{PROXY}"), &["user-namespaces"]),
    ];
    each_misconfiguration_is_named(ContainerdVersion::V1_7, &cases);
}

const PROXY: &str = "address = \"/run/hermes/containerd.sock\"\n";
const REMAP_IDS: &str = "capabilities = [\"remap-ids\"]\n";
const REBASE: &str = "capabilities = [\"remap-ids\", \"rebase\"]\n";
const UNPACK: &str = "platform = \"linux\"\nsnapshotter = \"hermes\"";
const NO_UNPACK: &str = "platform = \"linux\"\nsnapshotter = \"native\"";
const TELL: &str = "enable_remote_snapshot_annotations = \"true\"";
const DO_NOT_TELL: &str = "enable_remote_snapshot_annotations = \"false\"";

#[test]
fn each_misconfiguration_is_named_on_containerd_2_1() {
    let cases: [(&str, &str, &[&str]); 5] = [
        (REMAP_IDS, "", &["user-namespaces"]),
        (REMAP_IDS, REBASE, &["rebase"]),
        (UNPACK, NO_UNPACK, &["transfer-unpack"]),
        (TELL, DO_NOT_TELL, &["transfer-annotations"]),
        // Then the Transfer Service tells about layers.
        (ANNOTATIONS, NO_ANNOTATIONS, &[]),
    ];
    each_misconfiguration_is_named(ContainerdVersion::Packaged, &cases);
}

#[test]
fn each_misconfiguration_is_named_on_containerd_2_4() {
    let cases: [(&str, &str, &[&str]); 4] = [
        (REMAP_IDS, "", &["user-namespaces"]),
        (REMAP_IDS, REBASE, &["rebase"]),
        (UNPACK, NO_UNPACK, &["transfer-unpack"]),
        (TELL, DO_NOT_TELL, &["transfer-annotations"]),
    ];
    each_misconfiguration_is_named(ContainerdVersion::Newest, &cases);
}

/// Pulls of Pods fail or are not lazy: both are said of CRI then.
#[test]
fn what_keeps_pods_from_being_lazy_on_containerd_2_is_named() {
    for version in VERSIONS_2 {
        let machine = Machine::start(version, version_2);
        machine.install();
        let _daemon = machine.serve();
        let right = machine.config();
        let check = |changes: &[(&str, &str)], expected: &str| {
            let mut text = right.clone();
            for (from, to) in changes {
                assert!(text.contains(from), "{from} is not in\n{text}");
                text = text.replace(from, to);
            }
            machine.node.write(OF_CONTAINERD, text).unwrap();
            let faults = machine.faults();
            assert_eq!(faults, [expected, "containerd-not-restarted"], "{version:?}");
        };
        let silent = (ANNOTATIONS, NO_ANNOTATIONS);
        check(&[silent, (UNPACK, NO_UNPACK)], "cri-transfer-unpack");
        check(&[silent, (TELL, DO_NOT_TELL)], "cri-transfer-annotations");
        let runtimes = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
                        runtime_type = \"io.containerd.runc.v2\"\n";
        check(&[(runtimes, "")], "cri-lost-in-translation");
    }
}

#[test]
fn what_others_changed_stays_and_what_is_used_is_not_taken_away() {
    let mut machine = Machine::start(ContainerdVersion::Newest, version_3);
    let before = machine.config();
    machine.install();
    let _daemon = machine.serve();
    let config = machine.config();
    machine.restart_containerd(&config);
    let (image, containerd) = (machine.image.clone(), machine.containerd());
    containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "hermes", &image]).unwrap();
    assert_eq!(n_blobs(containerd), 2);
    let run = ["run", "--detach", "--snapshotter", "hermes", &image, "busy", "/bin/sleep", "1000"];
    containerd.ctr(&run).unwrap();
    let refused = machine.node.bash("hermes node uninstall 2>&1 || echo \"code $?\"").unwrap();
    assert!(refused.contains("default/busy (127.0.0.1:5000/lazy:1)"), "{refused}");
    assert!(refused.contains("code 5"), "{refused}");
    assert_eq!(machine.config(), config);

    machine.containerd().ctr(&["task", "kill", "--signal", "KILL", "busy"]).unwrap();
    machine.containerd().ctr(&["task", "delete", "busy"]).unwrap_or_default();
    machine.containerd().ctr(&["container", "delete", "busy"]).unwrap();
    // Somebody else has changed the file.
    let theirs = "[debug]\nlevel = \"info\" # theirs\n";
    machine.node.write(OF_CONTAINERD, format!("{config}\n{theirs}")).unwrap();
    let said = machine.hermes(&["node", "uninstall"]);
    assert!(said.contains("what is ours, since somebody has changed it"), "{said}");
    let left = machine.config();
    for line in before.lines().chain(theirs.lines()) {
        assert!(left.contains(line), "{line} is gone:\n{left}");
    }
    assert!(!left.contains("hermes"), "{left}");
    machine.restart_containerd(&left);
}

/// A machine on which systemd runs, as far as can be seen: what it is asked is written down, and done where the
/// test needs it.
#[test]
fn the_service_is_enabled_and_started_and_stopped_through_systemd() {
    let machine = Machine::start(ContainerdVersion::Newest, version_3);
    let systemctl = "#!/bin/sh\necho \"$*\" >> /run/asked\ncase $1 in\n\
         is-enabled) test -e /run/enabled ;;\nenable) touch /run/enabled ;;\ndisable) rm -f /run/enabled ;;\n\
         is-active) test -e /run/active ;;\nstart) touch /run/active ;;\nstop) rm -f /run/active ;;\n\
         show) printf 'LoadState=loaded\\nKillMode=mixed\\nUnitFileState=disabled\\n' ;;\nesac\n";
    machine.node.write("/usr/local/bin/systemctl", systemctl).unwrap();
    machine.node.bash("chmod 755 /usr/local/bin/systemctl; mkdir -p /run/systemd/system").unwrap();
    let asked = || machine.node.bash("cat /run/asked; rm /run/asked").unwrap();
    let of_service = ["daemon-reload", "is-enabled", "enable", "is-active", "start"];
    let of_service = of_service.map(|verb| match verb {
        "daemon-reload" => verb.to_owned(),
        verb => format!("{verb} hermes.service"),
    });
    machine.hermes(&["node", "install", "--dry-run", "--restart-containerd"]);
    assert!(!machine.node.path("/run/asked").exists());
    machine.hermes(&["node", "install", "--no-start"]);
    assert_eq!(asked(), "daemon-reload\n");
    machine.hermes(&["node", "uninstall"]);
    asked();
    machine.hermes(&["node", "install", "--restart-containerd"]);
    assert_eq!(asked(), of_service.join("\n") + "\nrestart containerd.service\n");
    let unit = machine.node.bash("cat /etc/systemd/system/hermes.service").unwrap();
    assert!(
        unit.contains(
            "\nExecStart=/usr/local/bin/hermes daemon --config /etc/hermes/config.toml\n"
        )
    );
    let socket = machine.node.bash("cat /etc/systemd/system/hermes.socket").unwrap();
    assert!(socket.contains("\nListenStream=/run/hermes/containerd.sock\n"), "{socket}");
    machine.hermes(&["node", "install"]);
    assert_eq!(asked(), "is-enabled hermes.service\nis-active hermes.service\n");
    let faults = machine.faults();
    for id in ["service-kill-mode", "service-disabled"] {
        assert!(faults.contains(&id.to_owned()), "{faults:?}");
    }
    asked();
    machine.hermes(&["node", "uninstall", "--restart-containerd"]);
    let of_service = "restart containerd.service\ncat hermes.service\ncat hermes.socket\n\
        stop hermes.service hermes.socket\ndisable hermes.service\n";
    assert_eq!(
        asked(),
        of_service.to_owned() + "clean --what=fdstore hermes.service\ndaemon-reload\n"
    );
}

//! Containers with a user namespace, on images that Hermes serves and on others.

use testnode::{
    Containerd, ContainerdVersion, Daemon, NUMBERS_SHA256, Node, Registry, busybox_image,
    check_busybox_output, cri_config, wait_until,
};

use super::until_containerd_is_served;
use super::{PATIENCE, SOCKET, node, policy, push_index, start, status};

/// A machine on which Pods' images were pulled.
struct Machine {
    containerd: Containerd,
    image: String,
    daemon: Option<Daemon>,
    registry: Registry,
    node: Node,
}

/// How a container comes by ids of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Somebody else's copy of the image with other owners is below it.
    Copied,
    /// What is below it is shown with other owners.
    Mapped,
}

/// What a container does to see who it is and whose its files are.
const LOOK: &str = "id -u; stat -c '%n %u:%g' / /app/run /data/numbers; sha256sum < /data/numbers
    echo new > /data/new; chown 7:8 /data/new; rm /app/run; stat -c '%n %u:%g' /data/new
    ls /app | grep -v more; read inside outside count < /proc/self/uid_map; echo $inside $outside $count";

impl Machine {
    /// Pulls as a kubelet does, by which every version tells about layers.
    fn pull(version: ContainerdVersion, name: &str, capabilities: &str, more: &str) -> Self {
        let node = node();
        let daemon = Some(start(&node));
        let other = policy("prefix: 127.0.0.1:5000/team/").replace("name: lazy", "name: team");
        node.write("/etc/hermes/policies/team.yaml", format!("{other}{more}")).unwrap();
        let registry = node.registry(5000).unwrap();
        let config = cri_config(version, "hermes", SOCKET, "127.0.0.1:5000/none:1");
        let proxy = "[proxy_plugins.hermes]\n";
        let config = config.replace(proxy, &format!("{proxy}capabilities = [{capabilities}]\n"));
        let containerd = node.containerd(version, &config).unwrap();
        let image = String::new();
        let mut machine = Self { containerd, image, daemon, registry, node };
        machine.image = busybox_image(&machine.node, &machine.registry, name).unwrap();
        machine.index_and_pull(&machine.image);
        machine
    }

    fn index_and_pull(&self, image: &str) {
        push_index(&self.node, image);
        let pull = || Ok(self.node.run("/opt/peers/cri", &["pull", image]).is_ok());
        wait_until("CRI", PATIENCE, pull).unwrap();
    }

    fn ctr(&self, arguments: &[&str]) -> String {
        self.containerd.ctr(&[&["--namespace", "k8s.io"], arguments].concat()).unwrap()
    }

    /// Makes an image of one layer more, without an index.
    fn push_more(&self) -> String {
        let make = "umoci tag --image /srv/images:bb more
            umoci insert --image /srv/images:more /etc/hostname /app/more
            skopeo copy --quiet --dest-tls-verify=false oci:/srv/images:more docker://127.0.0.1:5000/more:1";
        self.node.bash(make).unwrap();
        "127.0.0.1:5000/more:1".to_owned()
    }

    /// Starts a container whose root is `root` outside.
    fn run(&self, how: &[&str], root: u32, (name, command): (&str, &[&str])) -> String {
        let [users, groups] = ["uid", "gid"].map(|kind| format!("--{kind}map=0:{root}:65536"));
        let run = ["run", "--snapshotter", "hermes", &users, &groups];
        self.ctr(&[&run, how, &[&self.image, name], command].concat())
    }

    /// What another program writes in a container that runs.
    #[track_caller]
    fn exec(&self, name: &str, command: &[&str]) -> String {
        self.containerd.exec_in("k8s.io", name, command).unwrap()
    }

    /// What a container sees and does, and what is seen of that from outside.
    #[track_caller]
    fn look(&self, how: &[&str], root: u32, name: &str) {
        let how = [how, &["--detach"]].concat();
        self.run(&how, root, (name, &["/bin/sleep", "1000"]));
        assert_eq!(self.exec(name, &["/bin/sh", "-c", LOOK]), expected(root), "{name}");
        let seen = "stat -c %u:%g /var/lib/hermes/snapshots/*/fs/data/new | sort";
        let seen = self.node.bash(seen).unwrap();
        assert!(seen.contains(&format!("{}:{}\n", root + 7, root + 8)), "{seen}");
    }

    fn committed(&self) -> usize {
        let list = self.ctr(&["snapshots", "--snapshotter", "hermes", "list"]);
        list.matches("Committed").count()
    }

    /// Kills the process of a container, and waits for its end. `ctr` says of it that it failed.
    fn stop(&self, name: &str) {
        let delete = ["--namespace", "k8s.io", "task", "delete", "--force", name];
        self.containerd.ctr(&delete).unwrap_or_default();
        assert!(!self.ctr(&["task", "list", "--quiet"]).lines().any(|task| task == name));
    }

    /// Ends all, and checks that nothing is left.
    fn end(self, containers: &[&str]) {
        for name in containers {
            self.stop(name);
            self.ctr(&["container", "delete", name]);
        }
        self.ctr(&["image", "rm", "--sync", &self.image]);
        let images = self.ctr(&["image", "ls", "--quiet"]);
        for image in images.lines() {
            self.ctr(&["image", "rm", "--sync", image]);
        }
        assert_eq!(self.committed(), 0);
        let mounts = || {
            self.node
                .bash("grep -cE 'hermes/(snapshots|mapped)/[0-9]|idmapped' /proc/mounts || true")
        };
        wait_until("mounts to go", PATIENCE, || Ok(mounts()?.trim() == "0")).unwrap();
        let left =
            "cd /var/lib/hermes; ls snapshots | grep -v metadata.db || true; ls mapped || true";
        let left = || self.node.bash(left);
        wait_until("folders to go", PATIENCE, || Ok(left()?.is_empty())).unwrap();
    }
}

fn containers_have_ids_of_their_own(
    version: ContainerdVersion,
    how: &[&str],
    capabilities: &str,
    way: Way,
) {
    let mut machine = Machine::pull(version, "lazy:1", capabilities, "");
    let copies = |count| if way == Way::Copied { count } else { 0 };
    assert_eq!(machine.committed(), 3);
    machine.look(how, 100_000, "one");
    assert_eq!(machine.committed(), 3 + copies(1));
    machine.daemon.take().unwrap().kill().unwrap();
    machine.daemon = Some(start(&machine.node));
    until_containerd_is_served(&machine.containerd);
    machine.look(how, 200_000, "two");
    machine.look(how, 200_000, "three");
    assert_eq!(machine.committed(), 3 + copies(2));
    // The image is mounted once.
    assert_eq!(status(&machine.node)["mounts"].as_array().unwrap().len(), 1);
    let explained = machine.node.run("hermes", &["explain", "two"]).unwrap();
    assert!(explained.contains("  127.0.0.1:5000/lazy@sha256:"), "{explained}");
    let sum = machine.exec("one", &["/bin/sha256sum", "/data/numbers"]);
    assert!(sum.contains(NUMBERS_SHA256), "{sum}");
    let plain = machine.containerd.run_in("k8s.io", "hermes", &[&machine.image, "plain"]);
    check_busybox_output(&plain.unwrap());
    machine.end(&["one", "two", "three"]);
}

/// What [`LOOK`] prints.
fn expected(root: u32) -> String {
    format!(
        "0\n/ 0:0\n/app/run 0:0\n/data/numbers 0:0\n{NUMBERS_SHA256}  -\n/data/new 7:8\n0 {root} 65536\n"
    )
}

/// Those that mount with other owners.
const VERSIONS: [ContainerdVersion; 2] = [ContainerdVersion::Packaged, ContainerdVersion::Newest];

const LABELS: &[&str] = &["--remap-labels"];
const REMAP_IDS: &str = "'remap-ids'";

#[test]
fn ids_are_copied_on_containerd_1_6() {
    containers_have_ids_of_their_own(ContainerdVersion::V1_6, &[], "", Way::Copied);
}

#[test]
fn ids_are_copied_on_containerd_1_7() {
    containers_have_ids_of_their_own(ContainerdVersion::V1_7, LABELS, "", Way::Copied);
}

#[test]
fn ids_are_copied_on_containerd_2_1() {
    containers_have_ids_of_their_own(ContainerdVersion::Packaged, LABELS, "", Way::Copied);
}

#[test]
fn ids_are_copied_on_containerd_2_4() {
    containers_have_ids_of_their_own(ContainerdVersion::Newest, LABELS, "", Way::Copied);
}

#[test]
fn ids_are_mapped_on_containerd_2_1() {
    containers_have_ids_of_their_own(ContainerdVersion::Packaged, LABELS, REMAP_IDS, Way::Mapped);
}

#[test]
fn ids_are_mapped_on_containerd_2_4() {
    containers_have_ids_of_their_own(ContainerdVersion::Newest, LABELS, REMAP_IDS, Way::Mapped);
}

#[test]
fn whatever_an_image_is_mounted_by_can_be_mapped() {
    for version in VERSIONS {
        for backend in ["erofs-loop", "fuse"] {
            let policy = format!("  backend: {backend}\n");
            let machine = Machine::pull(version, "team/app:1", REMAP_IDS, &policy);
            machine.look(LABELS, 100_000, "one");
            let mounts = &status(&machine.node)["mounts"];
            assert_eq!(mounts[0]["backend"], backend, "{mounts}");
            machine.end(&["one"]);
        }
    }
}

/// containerd may show all that is mounted on the folders of snapshots to a user namespace.
#[test]
fn an_image_that_is_unpacked_is_mapped_beside_a_lazy_one() {
    for version in VERSIONS {
        let machine = Machine::pull(version, "other:1", REMAP_IDS, "  backend: fuse\n");
        let make = "umoci new --image /srv/images:small
            umoci insert --image /srv/images:small /etc/hostname /etc/hostname
            skopeo copy --quiet --dest-tls-verify=false oci:/srv/images:small docker://127.0.0.1:5000/team/small:1";
        machine.node.bash(make).unwrap();
        machine.index_and_pull("127.0.0.1:5000/team/small:1");
        let mounts = || status(&machine.node)["mounts"].as_array().map_or(0, Vec::len);
        wait_until("the lazy image", PATIENCE, || Ok(mounts() == 1)).unwrap();
        machine.look(LABELS, 100_000, "one");
        assert_eq!((machine.committed(), mounts()), (4, 1));
        machine.end(&["one"]);
    }
}

/// An image that stands on layers of another one, which is lazy: together containerd 2.1 would show nothing of
/// the lazy ones.
#[test]
fn unpacked_layers_on_lazy_ones_are_mapped() {
    for version in VERSIONS {
        let mut machine = Machine::pull(version, "lazy:1", REMAP_IDS, "");
        let (image, lazy) = (machine.push_more(), machine.image.clone());
        machine.node.run("/opt/peers/cri", &["pull", &image]).unwrap();
        machine.image = image;
        assert_eq!(machine.committed(), 4);
        for (root, name) in [(100_000, "one"), (200_000, "two")] {
            machine.look(LABELS, root, name);
        }
        let explained = machine.node.run("hermes", &["explain", "two"]).unwrap();
        assert!(explained.contains(&lazy), "{explained}");
        machine.end(&["one", "two"]);
    }
}

/// Also what is not mounted in the folder of snapshots.
#[test]
fn nothing_of_ours_stays_mounted_when_a_node_is_given_up() {
    let machine = Machine::pull(ContainerdVersion::Newest, "lazy:1", REMAP_IDS, "");
    let image = machine.push_more();
    machine.node.run("/opt/peers/cri", &["pull", &image]).unwrap();
    let machine = Machine { image, ..machine };
    machine.look(LABELS, 100_000, "one");
    machine.node.bash("hermes node install; hermes node uninstall --force --purge").unwrap();
    let left = "grep -cE ' /var/lib/hermes/' /proc/mounts || true; ls /var/lib/hermes";
    assert_eq!(machine.node.bash(left).unwrap(), "0\n");
}

/// After a reboot the kernel knows nothing of it.
#[test]
fn ids_are_mapped_again_after_a_reboot() {
    let mut machine = Machine::pull(ContainerdVersion::Newest, "lazy:1", REMAP_IDS, "");
    machine.look(LABELS, 100_000, "one");
    machine.stop("one");
    let keeper = status(&machine.node)["keeper"]["pid"].to_string();
    machine.daemon.take().unwrap().kill().unwrap();
    machine.node.run("kill", &["-KILL", &keeper]).unwrap();
    let unmount =
        "umount --lazy /var/lib/hermes/snapshots/*/fs || true; mount | grep -c erofs || true";
    assert_eq!(machine.node.bash(unmount).unwrap().trim(), "0");
    machine.daemon = Some(start(&machine.node));
    until_containerd_is_served(&machine.containerd);
    machine.ctr(&["task", "start", "--detach", "one"]);
    let look = "stat -c %u:%g / /app /data/numbers /data/new; sha256sum < /data/numbers";
    let seen = machine.exec("one", &["/bin/sh", "-c", look]);
    assert_eq!(seen, format!("0:0\n0:0\n0:0\n7:8\n{NUMBERS_SHA256}  -\n"));
    machine.end(&["one"]);
}

/// A Pod with `hostUsers: false`, with a volume that its image asks for, and an image as a volume where there
/// are such.
fn pods_have_ids_of_their_own(version: ContainerdVersion, config: impl FnOnce(&str) -> String) {
    let mut machine = node::Machine::start(version, config);
    let make = "umoci config --image /srv/images:bb --tag volume --config.volume /data
        skopeo copy --quiet --dest-tls-verify=false oci:/srv/images:volume docker://127.0.0.1:5000/lazy:2";
    machine.node.bash(make).unwrap();
    let image = "127.0.0.1:5000/lazy:2";
    push_index(&machine.node, image);
    // As much of a network as a Pod must have.
    machine.node.write("/etc/cni/net.d/10-none.conf", NETWORK).unwrap();
    machine.node.write("/usr/lib/cni/none", PLUGIN).unwrap();
    machine.node.run("chmod", &["755", "/usr/lib/cni/none"]).unwrap();
    machine.install();
    let daemon = machine.serve();
    let config = machine.config();
    machine.restart_containerd(&config);
    assert_eq!(machine.faults(), [""; 0]);
    let cri = |arguments: &[&str]| machine.node.run("/opt/peers/cri", arguments);
    wait_until("CRI", PATIENCE, || Ok(cri(&["pull", image]).is_ok())).unwrap();
    let is_2 = version >= ContainerdVersion::Packaged;
    let (volume, seen) = match is_2 {
        true => (image, format!("/volume/data/numbers 0:0\n{NUMBERS_SHA256}  -\n")),
        false => ("", String::new()),
    };
    let look = format!(
        "{LOOK}\n[ ! -e /volume ] || stat -c '%n %u:%g' /volume/data/numbers
         [ ! -e /volume ] || sha256sum < /volume/data/numbers"
    );
    for root in [100_000, 200_000] {
        let run = ["-root", &root.to_string(), "run", image, volume, "/bin/sh", "-c", &look];
        let expected = format!("{}{seen}", expected(root));
        assert_eq!(cri(&run).unwrap(), expected, "{}", daemon.log());
    }
    // What containerd calls a copy with other owners while it is made.
    assert_eq!(daemon.log().contains("-remap"), !is_2, "{}", daemon.log());
}

const NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "none", "type": "none"}"#;

const PLUGIN: &str = r#"#!/bin/sh
case $CNI_COMMAND in
ADD)
  interface='{"name": "eth0", "sandbox": "/none"}'
  address='{"version": "4", "address": "10.1.0.2/24", "interface": 0}'
  echo "{\"cniVersion\": \"0.4.0\", \"interfaces\": [$interface], \"ips\": [$address]}" ;;
VERSION) echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.4.0"]}' ;;
esac
"#;

#[test]
fn pods_have_ids_of_their_own_on_containerd_1_7() {
    pods_have_ids_of_their_own(ContainerdVersion::V1_7, |pause| {
        node::version_2(pause) + node::RUNTIMES
    });
}

#[test]
fn pods_have_ids_of_their_own_on_containerd_2_1() {
    pods_have_ids_of_their_own(ContainerdVersion::Packaged, node::version_3);
}

#[test]
fn pods_have_ids_of_their_own_on_containerd_2_4() {
    pods_have_ids_of_their_own(ContainerdVersion::Newest, node::version_3);
}

//! A machine that systemd boots, with Hermes and containerd as its services: what happens from the moment it
//! is switched on until it is off, and at the next boot of the same disk.

use std::time::{Duration, Instant};

use serde_json::Value;
use testnode::{Booted, Node, Registry, busybox_image, check_busybox_output, wait_until};

use crate::{PATIENCE, node, policy, push_index};

/// What completes, and what is fetched only as it is read.
const WHOLE: &str = "127.0.0.1:5000/lazy:1";
const IN_PARTS: &str = "127.0.0.1:5000/parts:1";

/// Makes the image of parts: on top of the other one a layer with files of noise and their checksums.
const MAKE_PARTS: &str = "
    mkdir /srv/parts; cd /srv/parts
    for n in 1 2 3 4 5 6; do head -c 5000000 /dev/urandom > $n; sha256sum $n > $n.sum; done
    umoci tag --image /srv/images:bb parts
    umoci insert --image /srv/images:parts /srv/parts /parts
    umoci config --image /srv/images:parts --config.workingdir /parts
    skopeo copy --quiet --dest-tls-verify=false oci:/srv/images:parts docker://127.0.0.1:5000/parts:1";

/// The program that the machine has: a file that can be replaced.
const PROGRAM: &str = "/opt/hermes/hermes";

/// Puts another build in its place, as a package does.
const UPGRADE: &str = "
    cp /opt/hermes/hermes /opt/hermes/hermes.new
    echo 'another build' >> /opt/hermes/hermes.new
    mv /opt/hermes/hermes.new /opt/hermes/hermes";

/// What runs a container. Shares are of use where processors can be shared out: not in every cgroup of version 2.
const RUN: &[&str] = &["run", "--cpu-shares=0", "--snapshotter", "hermes"];

/// A container that lasts, and ends when it is told to.
const LAST: &str = "trap 'exit 0' TERM; sleep 1000 & wait";

/// systemd lets what does not end by itself have 90 s.
const SHORT: Duration = Duration::from_secs(30);

/// A disk that can be booted, and the world around the machine: the registry with two lazy images.
struct World {
    node: Node,
    registry: Option<Registry>,
}

impl World {
    fn new() -> Self {
        let node = node();
        node.bash("mkdir /opt/hermes; cp /usr/local/bin/hermes /opt/hermes").unwrap();
        let registry = node.registry(5000).unwrap();
        busybox_image(&node, &registry, "lazy:1").unwrap();
        node.bash(MAKE_PARTS).unwrap();
        [WHOLE, IN_PARTS].iter().for_each(|image| push_index(&node, image));
        let never = policy("glob: '127.0.0.1:5000/parts*'").replace("name: lazy", "name: parts");
        node.write("/etc/hermes/policies/parts.yaml", never + "  completion: never\n").unwrap();
        Self { node, registry: Some(registry) }
    }

    /// The first boot: the machine becomes a node, and has both images and a container of each.
    fn set_up(&self) -> Machine<'_> {
        let machine = Machine { booted: self.node.boot().unwrap(), world: self };
        let said = machine.run(PROGRAM, &["node", "install", "--restart-containerd"]);
        assert!(said.contains("restart containerd"), "{said}");
        // As the README has it: it is in force for the next pull.
        let write = "config policy '127.0.0.1:5000/lazy*' > /etc/hermes/policies/lazy.yaml";
        machine.booted.bash(&format!("{PROGRAM} {write}")).unwrap();
        for (image, name) in [(WHOLE, "whole"), (IN_PARTS, "parts")] {
            machine.ctr(&["image", "pull", "--plain-http", "--snapshotter", "hermes", image]);
            let last = ["/bin/sh", "-c", LAST];
            let run = ["--detach", image, name];
            machine.ctr(&[RUN, &run, &last].concat());
        }
        machine
    }

    /// A later boot, at which nobody does anything.
    fn boot_again(&self, boot: fn(&Node) -> anyhow::Result<Booted>) -> Machine<'_> {
        let machine = Machine { booted: boot(&self.node).unwrap(), world: self };
        machine.check_services();
        machine
    }
}

/// The machine, while it is on.
struct Machine<'a> {
    booted: Booted,
    world: &'a World,
}

impl Machine<'_> {
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        self.booted.run(program, arguments).unwrap()
    }

    fn ctr(&self, arguments: &[&str]) -> String {
        self.run("ctr", arguments)
    }

    /// What a program in a container writes, which `ctr` runs.
    #[track_caller]
    fn written(&self, how: &[&str], what: &[&str]) -> String {
        let run = |log: &str| self.booted.run("ctr", &[how, &[log], what].concat());
        self.world.node.written(run).unwrap()
    }

    /// What another program writes in a container that runs.
    #[track_caller]
    fn exec(&self, name: &str, command: &[&str]) -> String {
        self.written(&["task", "exec", "--exec-id", "look"], &[&[name], command].concat())
    }

    /// When systemd wrote this of a unit, in microseconds.
    fn time(&self, unit: &str, property: &str) -> u64 {
        self.booted.property(unit, property).unwrap().parse().unwrap()
    }

    /// What the daemon says. One that is just being started serves readers first.
    fn status(&self) -> Value {
        let mut status = Value::Null;
        let is_said = || {
            let said = self.booted.run(PROGRAM, &["--output", "json", "status"])?;
            status = serde_json::from_str(&said)?;
            Ok(!status["daemon"]["pid"].is_null())
        };
        wait_until("a daemon that answers", PATIENCE, is_said).unwrap();
        status
    }

    /// The state of an image's mount.
    fn mount(&self, image: &str) -> Value {
        let status = self.status();
        let mounts = status["mounts"].as_array().unwrap();
        let prefix = format!("{}@", image.trim_end_matches(":1"));
        let is_of_image =
            |mount: &&Value| mount["image"].as_str().is_some_and(|name| name.starts_with(&prefix));
        let of_image = mounts.iter().find(is_of_image);
        assert!(of_image.is_some(), "{image} is not mounted: {status}");
        of_image.unwrap().clone()
    }

    /// How much of the image of parts is there.
    fn present(&self) -> u64 {
        self.mount(IN_PARTS)["bytes_present"].as_u64().unwrap()
    }

    /// A container that runs reads a file, and has all its bytes.
    #[track_caller]
    fn check_part(&self, number: usize) {
        let said = self.exec("parts", &["/bin/sha256sum", "-c", &format!("{number}.sum")]);
        assert_eq!(said, format!("{number}: OK\n"));
    }

    /// The same after `what`, of a file that has to be fetched.
    #[track_caller]
    fn check_part_after(&self, number: usize, what: impl FnOnce()) {
        let before = self.present();
        what();
        self.check_part(number);
        let after = self.present();
        assert!(before < after, "part {number} was there: {after} bytes");
    }

    /// Another container starts, and what it sees is right.
    #[track_caller]
    fn check_another(&self, image: &str, name: &str) {
        check_busybox_output(&self.written(RUN, &["--rm", image, name, "/app/run"]));
    }

    /// The containers that were there before the machine was switched off.
    fn start_again(&self, containers: &[&str]) {
        for name in containers {
            self.ctr(&["task", "start", "--detach", name]);
        }
    }

    /// What the daemon runs is the file that is there now.
    #[track_caller]
    fn check_program(&self) {
        let pid = &self.status()["daemon"]["pid"];
        let runs = format!("test /proc/{pid}/exe -ef {PROGRAM} && cmp /proc/{pid}/exe {PROGRAM}");
        self.booted.bash(&runs).unwrap();
    }

    /// systemd listens, Hermes serves, containerd asks: in this order, and there is no fault.
    #[track_caller]
    fn check_services(&self) {
        for unit in ["hermes.socket", "hermes.service", "containerd.service"] {
            assert_eq!(self.booted.property(unit, "ActiveState").unwrap(), "active", "{unit}");
        }
        let listens = self.time("hermes.socket", "ActiveEnterTimestampMonotonic");
        let begins = self.time("hermes.service", "InactiveExitTimestampMonotonic");
        let serves = self.time("hermes.service", "ActiveEnterTimestampMonotonic");
        let asks = self.time("containerd.service", "InactiveExitTimestampMonotonic");
        let times = [listens, begins, serves, asks];
        assert!(times.is_sorted() && listens > 0, "{times:?}");
        let checked = self.run(PROGRAM, &["node", "check"]);
        assert!(checked.starts_with("fine, with containerd "), "{checked}");
    }

    /// With all that it has mounted, and containers that run.
    fn power_off(self) {
        let begin = Instant::now();
        self.booted.power_off().unwrap();
        assert!(begin.elapsed() < SHORT, "it took {:?}", begin.elapsed());
    }
}

#[test]
fn a_booted_node_serves_whatever_is_restarted() {
    let world = World::new();
    let machine = world.set_up();
    let systemctl = |arguments: &[&str]| machine.run("systemctl", arguments);
    let restarts = || machine.booted.property("hermes.service", "NRestarts").unwrap();
    // The last one first: what is fetched ahead of a reader is behind it.
    machine.check_part_after(6, || ());

    machine.check_part_after(5, || drop(systemctl(&["restart", "hermes.service"])));
    machine.check_another(WHOLE, "after-a-restart");

    assert_eq!(restarts(), "0");
    let kill = ["kill", "--signal=KILL", "--kill-whom=main", "hermes.service"];
    machine.check_part_after(4, || drop(systemctl(&kill)));
    machine.check_another(IN_PARTS, "after-a-kill");
    assert_eq!(restarts(), "1");

    machine.check_part_after(3, || drop(systemctl(&["restart", "containerd.service"])));
    machine.check_another(WHOLE, "after-a-restart-of-containerd");

    // containerd's question starts it again.
    systemctl(&["stop", "hermes.service"]);
    machine.check_another(IN_PARTS, "after-a-stop");
    machine.check_part_after(2, || ());

    // Twice: systemd starts another build, and so does whoever sees that the daemon was killed.
    machine.check_part_after(1, || {
        machine.booted.bash(UPGRADE).unwrap();
        systemctl(&["restart", "hermes.service"]);
    });
    machine.check_program();
    machine.booted.bash(UPGRADE).unwrap();
    systemctl(&kill);
    machine.check_another(IN_PARTS, "after-an-upgrade");
    machine.check_program();
    (1..=6).for_each(|part| machine.check_part(part));
    machine.power_off();
}

#[test]
fn a_node_boots_with_and_without_its_registry() {
    let mut world = World::new();
    let machine = world.set_up();
    machine.check_part_after(6, || ());
    let is_whole = || Ok(machine.mount(WHOLE)["sealed"] == true);
    wait_until("the image to be complete", PATIENCE, is_whole).unwrap();
    let mut present = machine.present();
    machine.power_off();

    for (part, is_shut_down) in [(5, false), (4, true)] {
        let machine = world.boot_again(Node::boot);
        machine.start_again(&["whole", "parts"]);
        assert!(machine.present() >= present, "what was there is there");
        machine.check_part_after(part, || ());
        machine.check_another(IN_PARTS, &format!("with-a-registry-{part}"));
        present = machine.present();
        match is_shut_down {
            true => machine.power_off(),
            // The power fails.
            false => drop(machine),
        }
    }

    drop(world.registry.take());
    let machine = world.boot_again(Node::boot_without_network);
    machine.start_again(&["whole", "parts"]);
    // What was fetched before each of the boots.
    (4..=6).for_each(|part| machine.check_part(part));
    check_busybox_output(&machine.exec("whole", &["/app/run"]));
    machine.check_another(WHOLE, "without-a-registry");
    assert_eq!(machine.mount(WHOLE)["sealed"], true);
    machine.power_off();
}

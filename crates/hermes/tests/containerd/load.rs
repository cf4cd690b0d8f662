//! Many containers of many images at once, while the daemon is killed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use testnode::{Containerd, ContainerdVersion, Node, lazy_pull_config, wait_until};

use super::{PATIENCE, SOCKET, node, push_index, start_with, status};

const IMAGES: usize = 20;
const CLIENTS: usize = 8;
const CONTAINERS: usize = 200;

/// After so many containers that have ended the daemon is killed again.
const KILL_EVERY: usize = 15;

/// Makes images that have nothing in common, and pushes them as `lazy-1:1` and so on. Their program
/// compares a file of noise with its checksum.
const MAKE: &str = r"
mkdir /srv/load
cd /srv/load
umoci init --layout layout
for n in $(seq $1); do
  mkdir -p $n/bin $n/data
  cp /usr/bin/busybox $n/bin/sh
  for applet in sha256sum cat; do ln -s sh $n/bin/$applet; done
  head -c 1500000 /dev/urandom > $n/data/noise
  (cd $n; sha256sum data/noise > data/sum)
  tar -C $n -cf $n.tar .
  umoci new --image layout:$n
  umoci raw add-layer --image layout:$n $n.tar
  umoci config --image layout:$n --config.cmd /bin/sh --config.cmd -c \
    --config.cmd 'sha256sum -c data/sum' --config.workingdir / --config.env PATH=/bin
  skopeo copy --quiet --dest-tls-verify=false oci:layout:$n docker://127.0.0.1:5000/lazy-$n:1
  rm -r $n $n.tar
done
";

/// Whoever calls while no daemon is there waits for the next one. A call that has begun may fail with the
/// daemon, and is made again, as a kubelet would.
#[test]
fn containers_start_while_the_daemon_is_killed_again_and_again() {
    let node = node();
    let _daemon = start_with(&node, &[]);
    let _registry = node.registry(5000).unwrap();
    node.write("/srv/make", MAKE).unwrap();
    node.run("bash", &["-eu", "/srv/make", &IMAGES.to_string()]).unwrap();
    let images: Vec<String> = (1..=IMAGES).map(|n| format!("127.0.0.1:5000/lazy-{n}:1")).collect();
    images.iter().for_each(|image| push_index(&node, image));
    let config = lazy_pull_config("hermes", SOCKET);
    let containerd = node.containerd(ContainerdVersion::Newest, &config).unwrap();
    let (next, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let repeated: usize = std::thread::scope(|scope| {
        let killer = scope.spawn(|| kill_again_and_again(&node, &ended));
        let client = || {
            let mut repeated = 0;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= CONTAINERS {
                    return repeated;
                }
                repeated += start_until_it_works(&containerd, &images[number % IMAGES], number);
                ended.fetch_add(1, Ordering::Relaxed);
            }
        };
        let clients = [(); CLIENTS].map(|()| scope.spawn(client));
        let repeated = clients.into_iter().map(|client| client.join().unwrap()).sum();
        killer.join().unwrap();
        repeated
    });
    println!("{repeated} calls had to be repeated");
    // The last daemon may just be starting.
    let all_are_lazy = || {
        let mounts = &status(&node)["mounts"];
        Ok(mounts.as_array().is_some_and(|mounts| mounts.len() == IMAGES))
    };
    wait_until("all images to be mounted", PATIENCE, all_are_lazy).unwrap();
}

/// A daemon that dies ever so early is started ever later, so kills follow what has been done.
fn kill_again_and_again(node: &Node, ended: &AtomicUsize) {
    for kills in 1..=(CONTAINERS - 1) / KILL_EVERY {
        let is_time = || Ok(ended.load(Ordering::Relaxed) >= kills * KILL_EVERY);
        wait_until("containers to end", PATIENCE * 3, is_time).unwrap();
        let mut pid = None;
        let is_there = || {
            pid = status(node)["daemon"]["pid"].as_u64();
            Ok(pid.is_some())
        };
        wait_until("a daemon", PATIENCE, is_there).unwrap();
        node.run("kill", &["-KILL", &pid.unwrap().to_string()]).unwrap();
    }
}

/// Pulls an image and runs it; returns how often that had to be done again.
fn start_until_it_works(containerd: &Containerd, image: &str, number: usize) -> usize {
    let patient = |call: &dyn Fn(usize) -> anyhow::Result<String>| {
        let (mut attempt, begin) = (0, Instant::now());
        loop {
            match call(attempt) {
                Ok(printed) => return (printed, attempt),
                Err(err) => assert!(begin.elapsed() < LIMIT, "{image}: {err:#}"),
            }
            attempt += 1;
        }
    };
    let pull = ["image", "pull", "--plain-http", "--snapshotter", "hermes", image];
    let (_, pulls) = patient(&|_| containerd.ctr(&pull));
    let (printed, runs) = patient(&|attempt| {
        let name = format!("{number}-{attempt}");
        containerd.run("hermes", &[image, &name])
    });
    assert_eq!(printed, "data/noise: OK\n", "{image}");
    pulls + runs
}

const LIMIT: Duration = Duration::from_secs(60);

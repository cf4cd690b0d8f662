//! What is fetched ahead of the dynamic loader.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testkit::image::{Compression, Content, ImageBuilder, LayerBuilder, Texture};
use testkit::registry::{Fault, Outage, Scope, Times};

use crate::setup::Setup;

/// Reads a file while nobody answers the kernel; nothing if it asks.
fn read_alone(setup: &Setup, file: &Path) -> Option<Vec<u8>> {
    let daemon = Pid::from_raw(setup.daemon_pid()?)?;
    kill_process(daemon, Signal::STOP).unwrap();
    let read = Command::new("timeout").args(["--signal=KILL", "1", "cat"]).arg(file).output();
    kill_process(daemon, Signal::CONT).unwrap();
    let read = read.unwrap();
    read.status.success().then_some(read.stdout)
}

/// A library that this very program has loaded.
fn loaded(name: &str) -> Vec<u8> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5));
    let path = paths.into_iter().find(|path| path.rsplit('/').next() == Some(name));
    fs::read(path.unwrap_or_else(|| panic!("{name} is not loaded: {maps}"))).unwrap()
}

#[test]
fn what_a_library_needs_comes_as_soon_as_somebody_reads_its_beginning() {
    let setup = Setup::new();
    let (libm, libc) = (loaded("libm.so.6"), loaded("libc.so.6"));
    // Far enough from each other that no span holds parts of both.
    let filler = Content::generated(1, 16 << 20, Texture::Random);
    let layer =
        LayerBuilder::new().dir("usr").dir("usr/lib").file("usr/lib/libc.so.6", libc.clone());
    let layer = layer.file("usr/lib/filler", filler).dir("opt").file("opt/libm.so.6", libm.clone());
    let image = ImageBuilder::new().layer(layer.build(), Compression::Gzip { level: 6 }).build();
    let name = image.push_to(&setup.registry, "libraries", "1").unwrap().reference;
    setup.index(&name);
    setup.end_daemon();

    let others = "small-layers,sequential,small-files,large-files,neighbours,directories";
    let on_demand = ["--completion", "never", "--without", others];
    let dir = setup.mount(&name, "mnt", &on_demand);
    let head = &mut [0; 4096];
    File::open(dir.join("opt/libm.so.6")).unwrap().read_exact_at(head, 0).unwrap();
    assert_eq!(head[..], libm[..4096]);
    setup.until("the libraries are there", || {
        let status = setup.status();
        let present = status["mounts"][0]["bytes_present"].as_u64()?;
        (present >= (libm.len() + libc.len()) as u64).then_some(())
    });
    let explained = setup.ok(&["explain", dir.to_str().unwrap()]);
    let slow = explained["slowest_reads"].as_array().unwrap();
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    let ours = slow.iter().all(|read| read["pid"] == thread);
    assert!(!slow.is_empty() && ours, "a read of the daemon's own is reported: {slow:?}");
    setup.registry.faults().cut(Outage::Refuse);
    assert!(fs::read(dir.join("opt/libm.so.6")).unwrap() == libm, "wrong bytes");
    assert!(fs::read(dir.join("usr/lib/libc.so.6")).unwrap() == libc, "wrong bytes");
    let status = setup.status();
    assert!(status["mounts"][0]["bytes_present"].as_u64().unwrap() < 16 << 20, "{status}");
}

#[test]
fn what_a_python_program_imports_comes_before_it_is_read() {
    let setup = Setup::new();
    let filler = |seed| Content::generated(seed, 8 << 20, Texture::Random);
    let source = |text: &str| text.as_bytes().to_vec();
    let module = vec![b'#'; 3000];
    let site = "usr/lib/python3.11/site-packages";
    let modules =
        [format!("{site}/__pycache__/first.cpython-311.pyc"), format!("{site}/second.py")];
    let layer = LayerBuilder::new()
        .file("usr/bin/python3.11", source("of nobody's interest"))
        .symlink("usr/bin/python3", "python3.11")
        .file("filler/1", filler(1))
        .file(format!("{site}/first.py"), source("from second import name"))
        .file("filler/2", filler(2))
        .file(modules[0].clone(), module.clone())
        .file("filler/3", filler(3))
        .file(modules[1].clone(), module.clone())
        .file("filler/4", filler(4))
        .file("srv/serve.py", source("import first"));
    let image = ImageBuilder::new()
        .layer(layer.build(), Compression::Gzip { level: 6 })
        .entrypoint(&["python3", "/srv/serve.py"])
        .build();
    let name = image.push_to(&setup.registry, "python", "1").unwrap().reference;
    for arguments in [["index", "build", &name], ["index", "push", &name]] {
        let output = setup.run_at("builder", &arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    let others = "small-layers,sequential,small-files,large-files,neighbours,directories";
    let dir = setup.mount(&name, "mnt", &["--completion", "idle", "--without", others]);
    // Each lies in a span of its own, of nearly 1 MiB.
    let present = || setup.status()["mounts"][0]["bytes_present"].as_u64();
    let all = || present().filter(|present| *present > 3_500_000);
    setup.until("all that the program needs is there", all);
    for path in &modules {
        let read = || read_alone(&setup, &dir.join(path));
        let read = setup.until("the kernel has what the program needs", read);
        assert!(read == module, "wrong bytes of {path}");
    }
    // Of what is whole nobody is asked.
    let present = present().unwrap();
    assert!(present < 8 << 20, "what is between was fetched, too: {present}");
    setup.registry.faults().cut(Outage::Refuse);
    for path in &modules {
        assert!(fs::read(dir.join(path)).unwrap() == module, "wrong bytes of {path}");
    }
    assert_eq!(fs::read(dir.join("srv/serve.py")).unwrap(), source("import first"));
}

#[test]
fn a_mount_goes_at_once_although_its_start_is_not_here() {
    let setup = Setup::new();
    let program = Content::generated(1, 4 << 20, Texture::Random);
    let layer = LayerBuilder::new().file("bin/serve", program);
    let image = ImageBuilder::new()
        .layer(layer.build(), Compression::Gzip { level: 6 })
        .entrypoint(&["/bin/serve"])
        .build();
    let name = image.push_to(&setup.registry, "unread", "1").unwrap().reference;
    let built = setup.run_at("builder", &["index", "build", &name]);
    let built: Value = serde_json::from_slice(&built.stdout).unwrap();
    assert!(setup.run_at("builder", &["index", "push", &name]).status.success());
    let layer = built["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
    setup.registry.faults().inject(Scope::Blob(layer), Times::Always, Fault::Status(503));
    for _ in 0..3 {
        let dir = setup.mount(&name, "mnt", &["--completion", "idle"]);
        setup.ok(&["umount", dir.to_str().unwrap()]);
        assert_eq!(setup.status()["mounts"], serde_json::json!([]));
    }
}

//! A node with Hermes in it, and an image of Debian's own files.

use std::path::PathBuf;

use rustix::fs::{XattrFlags, setxattr};
use serde_json::Value;
use testnode::{Node, Registry};

/// Makes the layout `/srv/images` with the tag `app`: a small layer with a shell, one of Debian's
/// programs and libraries in GNU's tar format, one with long names, hard links, extended attributes
/// and noise in POSIX's, a small one with a program and a whiteout. What they unpack to is
/// `/srv/truth`.
const MAKE: &str = r#"
cd /srv
umoci init --layout images
umoci new --image images:app
pack() {
  tar --sort=name "$@" -cf layer.tar .
  tar -C /srv/truth -xf layer.tar
  mv layer.tar /srv/layer.tar
  cd /srv
  umoci raw add-layer --image images:app layer.tar
  rm -rf layer.tar work
}
begin() { mkdir -p /srv/work /srv/truth; cd /srv/work; }

begin
mkdir -p bin etc proc sys dev tmp
cp /usr/bin/busybox bin/busybox
for applet in $(busybox --list); do [ "$applet" = busybox ] || ln -s busybox "bin/$applet"; done
echo 'root:x:0:0:root:/:/bin/sh' > etc/passwd
pack --format=gnu

begin
mkdir -p usr/bin usr/lib
cp -a /usr/bin/perl /usr/bin/bash /usr/bin/tar /usr/bin/skopeo usr/bin
cp -a /usr/lib/x86_64-linux-gnu/lib*.so* usr/lib
ln -s usr/lib lib
echo gone > usr/removed
pack --format=gnu

cd /srv && mv prepared work && cd work
pack --format=posix --xattrs --xattrs-include='*'

begin
mkdir -p app usr
printf '#!/bin/sh\ncd "${1:-/}"\nfind app usr data ! -type d ! -name ".wh.*" | LC_ALL=C sort | while read -r f; do if [ -L "$f" ]; then echo "$f -> $(readlink "$f")"; else sha256sum "$f"; fi; done\n' > app/run
chmod +x app/run
touch usr/.wh.removed
pack --format=gnu
rm truth/usr/removed truth/usr/.wh.removed

umoci config --image images:app --config.cmd /app/run --config.env PATH=/bin
"#;

/// The content of the third layer, before its extended attributes.
const PREPARE: &str = r#"
mkdir -p /srv/prepared/data
cd /srv/prepared/data
head -c 12000000 /dev/urandom > noise
seq 1000000 > numbers
ln numbers hard-link
long=$(printf 'directory-%0150d' 7)
mkdir -p "$long/$long/$long"
seq 1000 > "$long/$long/$long/$(printf 'file-%0200d' 9)"
seq 99 > "naïve-ünïcode"
ln -s "$long/$long" short-cut
ln -s ../data/short-cut/../../numbers roundabout
"#;

/// A regular file of the image, for each of its layers; the last by way of symbolic links.
pub(crate) const SAMPLES: &[&str] = &[
    "/bin/busybox",
    "/usr/bin/perl",
    "lib/libc.so.6",
    "/data/hard-link",
    "/data/naïve-ünïcode",
    "/app/run",
    "/data/roundabout",
];

/// A node in which `hermes` is the program under test.
pub(crate) fn node() -> Node {
    let hermes = PathBuf::from(env!("CARGO_BIN_EXE_hermes"));
    Node::start_and_bind(vec![(hermes, "/usr/local/bin/hermes".to_owned())]).unwrap()
}

/// Makes the image in the node and pushes it as `app:1` to `registry`; returns the reference.
pub(crate) fn debian_image(node: &Node, registry: &Registry) -> String {
    node.bash(PREPARE).unwrap();
    for (file, name, value) in [
        ("data/numbers", "user.comment", b"counted".as_slice()),
        ("data/noise", "user.empty", b""),
        ("data", "user.folder", &[0, 1, 2, 255]),
    ] {
        let path = node.path("/srv/prepared").join(file);
        setxattr(&path, name, value, XattrFlags::CREATE).unwrap();
    }
    node.bash(MAKE).unwrap();
    let reference = format!("{}/app:1", registry.host);
    let tls = format!("--dest-tls-verify={}", registry.credentials.is_some());
    let to = format!("docker://{reference}");
    node.run("skopeo", &["copy", "--quiet", &tls, "oci:/srv/images:app", &to]).unwrap();
    reference
}

/// What the image's program prints when every file is right.
pub(crate) fn expected_output(node: &Node) -> String {
    let output = node.run("busybox", &["sh", "/srv/truth/app/run", "/srv/truth"]).unwrap();
    assert!(output.lines().count() > 30, "{output}");
    assert!(output.contains("/file-000") && !output.contains("removed"), "{output}");
    output
}

/// Runs `hermes index …` with `root` and returns its result.
#[track_caller]
pub(crate) fn hermes(node: &Node, root: &str, args: &[&str]) -> Value {
    let args = [&["--root", root, "--output", "json", "index"], args].concat();
    serde_json::from_str(&node.run("hermes", &args).unwrap()).unwrap()
}

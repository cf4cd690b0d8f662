//! A small image to run: busybox, some data, a program.

use anyhow::Result;

use crate::node::Node;
use crate::registry::Registry;

/// Makes the layout `/srv/images` with the tag `bb`. The data layer is larger than the 10 MiB below
/// which SOCI leaves a layer alone, and has both text and bytes that do not compress.
const MAKE: &str = r#"
mkdir -p /srv
cd /srv
umoci init --layout images
umoci new --image images:bb
layer() { umoci unpack --image images:bb work; "$@"; umoci repack --image images:bb work; rm -rf work; }
base() {
  cd work/rootfs
  mkdir -p bin etc proc sys dev tmp
  cp /usr/bin/busybox bin/busybox
  for applet in $(busybox --list); do [ "$applet" = busybox ] || ln -s busybox "bin/$applet"; done
  echo 'root:x:0:0:root:/:/bin/sh' > etc/passwd
  cd ../..
}
data() {
  mkdir work/rootfs/data
  head -c 12000000 /dev/urandom > work/rootfs/data/noise
  seq 1000000 > work/rootfs/data/numbers
  touch work/rootfs/data/removed
}
app() {
  mkdir work/rootfs/app
  printf '#!/bin/sh\necho hello\nsha256sum /data/noise /data/numbers\nls /data\n' > work/rootfs/app/run
  chmod +x work/rootfs/app/run
  rm work/rootfs/data/removed
}
layer base
layer data
layer app
umoci config --image images:bb --config.cmd /app/run --config.env PATH=/bin
"#;

/// Makes an image of three layers in the node and pushes it as `NAME` to `registry`; returns the
/// reference to pull. Its program prints `hello`, the digests of two files and a listing without the
/// file `removed`, which the last layer whites out.
///
/// The image is also at `/srv/images:bb` as an OCI layout.
///
/// # Errors
/// When umoci or skopeo fails.
pub fn busybox_image(node: &Node, registry: &Registry, name: &str) -> Result<String> {
    node.bash(&format!("[ -e /srv/images ] || {{\n{MAKE}\n}}"))?;
    let reference = format!("{}/{name}", registry.host);
    let tls = format!("--dest-tls-verify={}", registry.credentials.is_some());
    node.run(
        "skopeo",
        &["copy", "--quiet", &tls, "oci:/srv/images:bb", &format!("docker://{reference}")],
    )?;
    Ok(reference)
}

/// What `seq 1000000 | sha256sum` prints: the digest of `/data/numbers` in [`busybox_image`].
pub const NUMBERS_SHA256: &str = "90433fcbd9e16297e6a7c1dacb1056394743194776e52f78ebf0a44b80b6b14f";

/// Checks what the program of [`busybox_image`] has printed.
///
/// # Panics
/// If that is anything else.
#[track_caller]
pub fn check_busybox_output(output: &str) {
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 5, "{output}");
    assert_eq!(lines[0], "hello");
    assert!(lines[1].ends_with("  /data/noise"), "{output}");
    assert_eq!(lines[2], format!("{NUMBERS_SHA256}  /data/numbers"));
    assert_eq!(lines[3..], ["noise", "numbers"], "the whiteout is in force");
}

//! Images with all that layers can carry, in one layer and in many: beside the same ones unpacked.

use testkit::image::{Compression, Image, ImageBuilder, LayerBuilder, TarEntry};
use testnode::{ContainerdVersion, Node, lazy_pull_config};

use crate::{SOCKET, n_blobs, node, push_index, start};

/// What there is, and what is in it. A directory's size and links are its file system's own affair.
const LIST: &str = "
    cd /
    for name in $(find n etc bin cap secret link same gone deep -print | sort); do
      case $(stat -c %F $name) in
        directory) stat -c '%n %F %a %u %g' $name;;
        'symbolic link') stat -c '%N %u %g' $name;;
        *) stat -c '%n %F %a %u %g %s %h %Y' $name; sha256sum < $name;;
      esac
    done 2>&1";

/// The right to read every file, for whoever runs the program: version 2 of the kernel's format, in force at
/// once.
const DAC_OVERRIDE: [u8; 20] = [1, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// The same files however many layers they come in, as far as those below can be changed.
fn image(node: &Node, layers: usize) -> Image {
    let busybox = std::fs::read(node.path("/usr/bin/busybox")).unwrap();
    let mut base = LayerBuilder::new().dir("bin").dir("n").dir("etc").dir("cap").dir("gone");
    base = base.entry(TarEntry::file("bin/busybox", busybox.clone()).mode(0o755));
    for applet in ["sh", "find", "sort", "stat", "sha256sum"] {
        base = base.symlink(format!("bin/{applet}"), "busybox");
    }
    let capable = TarEntry::file("cap/cat", busybox).mode(0o755);
    let base = base
        .entry(capable.xattr("security.capability", DAC_OVERRIDE))
        .entry(TarEntry::file("secret", b"only root's\n".to_vec()).mode(0o400))
        .entry(TarEntry::file("etc/owned", b"somebody's\n".to_vec()).mode(0o4750).owner(77, 78))
        .file("n/0", b"linked\n".to_vec())
        // Within a layer: containerd itself cannot unpack one to a layer below.
        .hard_link("link", "n/0")
        .file("n/whited", b"out\n".to_vec())
        .file("gone/below", b"opaque\n".to_vec())
        .file("same", b"0\n".to_vec());
    let middle = (1..layers).map(|number| {
        let content = format!("{number}\n").into_bytes();
        LayerBuilder::new().file(format!("n/{number}"), content.clone()).file("same", content)
    });
    let mut all: Vec<LayerBuilder> = [base].into_iter().chain(middle).collect();
    let last = all.pop().unwrap_or_default().dir("deep");
    let last = if layers > 1 { last.whiteout("n/whited").opaque("gone") } else { last };
    let gzip = Compression::Gzip { level: 6 };
    let image = all.iter().chain([&last]);
    image.fold(ImageBuilder::new(), |image, layer| image.layer(layer.build(), gzip)).build()
}

#[test]
fn images_of_one_to_128_layers_are_what_they_are_unpacked() {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let _daemon = start(&node);
    let config = lazy_pull_config("hermes", SOCKET);
    let containerd = node.containerd(ContainerdVersion::Packaged, &config).unwrap();
    for layers in [1, 2, 128] {
        let name = format!("{}/lazy{layers}:1", registry.host);
        image(&node, layers).write_layout(node.path("/srv/layered"), "1").unwrap();
        let target = format!("docker://{name}");
        let copy = ["copy", "--quiet", "--dest-tls-verify=false", "oci:/srv/layered:1", &target];
        node.run("skopeo", &copy).unwrap();
        node.bash("rm -r /srv/layered").unwrap();
        push_index(&node, &name);

        let pull = |snapshotter| {
            let pull = ["image", "pull", "--plain-http", "--snapshotter", snapshotter, &name];
            containerd.ctr(&pull).unwrap();
        };
        let before = n_blobs(&containerd);
        pull("hermes");
        assert_eq!(n_blobs(&containerd), before + 2, "layers were fetched");
        let look = |snapshotter: &str| {
            let id = format!("{snapshotter}-{layers}");
            let listed = [&name, &id, "/bin/sh", "-c", LIST];
            let listed = containerd.run(snapshotter, &listed).unwrap();
            let id = format!("{id}-user");
            let secret = ["--user", "1000", &name, &id, "/cap/cat", "/secret"];
            (listed, containerd.run(snapshotter, &secret).unwrap())
        };
        let lazy = look("hermes");
        pull("overlayfs");
        assert_eq!(lazy, look("overlayfs"), "of {layers} layers");
        assert!(lazy.0.contains("'bin/sh' -> 'busybox'"), "{}", lazy.0);
        assert_eq!(lazy.0.contains("n/whited"), layers == 1, "{}", lazy.0);
        assert_eq!(lazy.1, "only root's\n");
    }
}

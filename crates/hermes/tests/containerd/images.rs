//! Images with all that layers can carry, in one layer and in many: beside the same ones unpacked.

use testkit::image::{Compression, Content, Image, ImageBuilder, LayerBuilder, TarEntry, Texture};
use testnode::{Containerd, ContainerdVersion, Node, lazy_pull_config};

use crate::{SOCKET, n_blobs, node, push_index, push_index_built_with, start};

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
fn image_builder(node: &Node, layers: usize) -> ImageBuilder {
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
    image.fold(ImageBuilder::new(), |image, layer| image.layer(layer.build(), gzip))
}

/// Pushes an image as it is.
fn push(node: &Node, image: &Image, name: &str) {
    image.write_layout(node.path("/srv/layered"), "1").unwrap();
    let target = format!("docker://{name}");
    let as_it_is = ["copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"];
    node.run("skopeo", &[&as_it_is[..], &["oci:/srv/layered:1", &target]].concat()).unwrap();
    node.bash("rm -r /srv/layered").unwrap();
}

fn pull(containerd: &Containerd, snapshotter: &str, name: &str) {
    let pull = ["image", "pull", "--plain-http", "--snapshotter", snapshotter, name];
    containerd.ctr(&pull).unwrap();
}

/// Those that an image's index leaves out, too: containerd fetches none of them.
#[test]
fn layers_of_every_compression_are_lazy_with_and_without_an_index() {
    let node = node();
    let registry = node.registry(5000).unwrap();
    let daemon = start(&node);
    let config = lazy_pull_config("hermes", SOCKET);
    let containerd = node.containerd(ContainerdVersion::Newest, &config).unwrap();
    let kinds = [
        Compression::Gzip { level: 6 },
        Compression::GzipMembers { level: 6, member_size: 100_000 },
        Compression::Zstd { level: 3 },
        Compression::ZstdFrames { level: 3, frame_size: 100_000 },
        Compression::None,
    ];
    for (number, smallest) in ["0", "4m", "4m"].into_iter().enumerate() {
        let mut built = image_builder(&node, 1).layer(
            LayerBuilder::new().dir("data").file("data/tiny", b"tiny\n".to_vec()).build(),
            Compression::Zstd { level: 3 },
        );
        for (place, kind) in kinds.into_iter().enumerate() {
            let seed = 10 * number as u64 + place as u64;
            // With 4 MiB at least, each kind is left out once or twice.
            let mib = (place as u64 + 3 * number as u64) % 5 + 1;
            let content = Content::generated(seed, mib << 20, Texture::Random);
            let layer = LayerBuilder::new().file(format!("data/{place}"), content);
            built = built.layer(layer.build(), kind);
        }
        let name = format!("{}/lazy-kinds{number}:1", registry.host);
        push(&node, &built.build(), &name);
        push_index_built_with(&node, &name, &["--min-layer-size", smallest]);

        let before = n_blobs(&containerd);
        pull(&containerd, "hermes", &name);
        assert_eq!(n_blobs(&containerd), before + 2, "layers were fetched: {}", daemon.log());
        let sums = |snapshotter: &str| {
            let id = format!("{snapshotter}-{number}");
            let sums = [&name, &id, "/bin/sh", "-c", "sha256sum /data/*"];
            containerd.run(snapshotter, &sums).unwrap()
        };
        let lazy = sums("hermes");
        pull(&containerd, "overlayfs", &name);
        assert_eq!(lazy, sums("overlayfs"));
        assert_eq!(lazy.lines().count(), kinds.len() + 1, "{lazy}");
    }
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
        push(&node, &image_builder(&node, layers).build(), &name);
        push_index(&node, &name);

        let before = n_blobs(&containerd);
        pull(&containerd, "hermes", &name);
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
        pull(&containerd, "overlayfs", &name);
        assert_eq!(lazy, look("overlayfs"), "of {layers} layers");
        assert!(lazy.0.contains("'bin/sh' -> 'busybox'"), "{}", lazy.0);
        assert_eq!(lazy.0.contains("n/whited"), layers == 1, "{}", lazy.0);
        assert_eq!(lazy.1, "only root's\n");
    }
}

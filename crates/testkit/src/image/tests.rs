//! Images as others see them: registries, layouts, archives, and folders packed and unpacked.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use oci::Digest;
use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use serde_json::Value;

use super::{
    Compression, Image, ImageBuilder, LayerBuilder, PackProgress, pack_directory, push_index,
};
use crate::registry::{Options, Registry};
use crate::untar::{Kind, diff, snapshot, untar};

fn image() -> Image {
    let lower = LayerBuilder::new().dir("etc").file("etc/motd", b"hello\n").build();
    let upper = LayerBuilder::new().whiteout("etc/motd").file("bin", vec![1; 70_000]).build();
    ImageBuilder::new()
        .layer(lower, Compression::Gzip { level: 6 })
        .layer(upper, Compression::Zstd { level: 3 })
        .entrypoint(&["/bin"])
        .environment(&["A=b"])
        .annotation("org.example", "x")
        .build()
}

/// Follows the descriptors of a manifest and checks size and digest of everything.
fn check_manifest(manifest: &[u8], blob: &dyn Fn(&str) -> Vec<u8>) {
    let manifest: Value = serde_json::from_slice(manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for descriptor in layers.iter().chain([&manifest["config"]]) {
        let digest = descriptor["digest"].as_str().unwrap();
        let bytes = blob(digest);
        assert_eq!(Digest::of(&bytes).to_string(), digest);
        assert_eq!(descriptor["size"], bytes.len());
    }
    let config = blob(manifest["config"]["digest"].as_str().unwrap());
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["config"]["Entrypoint"][0], "/bin");
    let gzip = blob(layers[0]["digest"].as_str().unwrap());
    let mut tar = Vec::new();
    flate2::read::GzDecoder::new(&gzip[..]).read_to_end(&mut tar).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"][0], Digest::of(&tar).to_string());
}

#[test]
fn an_image_is_pushed_with_all_its_blobs() {
    let registry = Registry::start(Options::default()).unwrap();
    let image = image();
    let refs = image.push_to(&registry, "some/image", "1").unwrap();
    assert_eq!(refs.reference, format!("{}/some/image:1", registry.reference_prefix()));
    assert_eq!(refs.layers.len(), 2);
    for digest in refs.layers.iter().chain([&refs.config]) {
        assert!(registry.has_blob(*digest));
    }
    let docker = ImageBuilder::new().layer("x", Compression::None).docker().platform("s390x", "os");
    let docker = docker.build();
    assert!(docker.manifest_media_type.contains("docker"));
    let index = push_index(&[&image, &docker], &registry, "some/image", "1").unwrap();
    assert_ne!(index, refs.manifest);
}

#[test]
fn a_layout_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let image = image();
    image.write_layout(folder.path().join("new"), "tag").unwrap();
    check_layout(&folder.path().join("new"), "tag");
    image.write_archive(folder.path().join("a.tar"), "tag2").unwrap();
    let unpacked = folder.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(folder.path().join("a.tar")).arg("-C").arg(&unpacked);
    assert!(tar.status().expect("GNU tar is installed").success());
    check_layout(&unpacked, "tag2");
    let docker: Value =
        serde_json::from_slice(&fs::read(unpacked.join("manifest.json")).unwrap()).unwrap();
    for layer in docker[0]["Layers"].as_array().unwrap() {
        assert!(unpacked.join(layer.as_str().unwrap()).exists());
    }
}

fn check_layout(root: &Path, tag: &str) {
    let blob = |digest: &str| {
        fs::read(root.join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())).unwrap()
    };
    assert_eq!(fs::read(root.join("oci-layout")).unwrap(), br#"{"imageLayoutVersion":"1.0.0"}"#);
    let index: Value = serde_json::from_slice(&fs::read(root.join("index.json")).unwrap()).unwrap();
    let found = &index["manifests"][0];
    assert_eq!(found["annotations"]["org.opencontainers.image.ref.name"], tag);
    check_manifest(&blob(found["digest"].as_str().unwrap()), &blob);
}

/// A folder with everything in it that a file system can have.
fn fill(folder: &Path) {
    fs::create_dir_all(folder.join("empty")).unwrap();
    fs::create_dir_all(folder.join("deep/er")).unwrap();
    fs::write(folder.join("deep/er/file"), b"content").unwrap();
    fs::hard_link(folder.join("deep/er/file"), folder.join("zzz second name")).unwrap();
    fs::write(folder.join(OsStr::from_bytes(b"binary \xff\n name")), vec![3; 70_001]).unwrap();
    std::os::unix::fs::symlink("/nowhere", folder.join("dangling")).unwrap();
    std::os::unix::fs::chown(folder.join("empty"), Some(77), Some(88)).unwrap();
    let value = b"\0 \xff\n".as_slice();
    rustix::fs::setxattr(folder.join("deep"), "user.k", value, XattrFlags::empty()).unwrap();
    let (fifo, node) = (folder.join("fifo"), folder.join("node"));
    rustix::fs::mknodat(CWD, fifo, FileType::Fifo, Mode::from(0o600), 0).unwrap();
    let device = rustix::fs::makedev(5, 7);
    rustix::fs::mknodat(CWD, node, FileType::CharacterDevice, Mode::from(0o640), device).unwrap();
    let sparse = File::create(folder.join("sparse")).unwrap();
    sparse.write_all_at(b"end", 300_000).unwrap();
}

#[test]
fn packed_folders_unpack_to_the_same() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = folder.path().join("source");
    fill(&source);
    let socket = std::os::unix::net::UnixListener::bind(source.join("socket")).unwrap();
    std::os::unix::fs::symlink("source", folder.path().join("through")).unwrap();
    let mut expected = snapshot(&source).unwrap();
    assert_eq!(expected.remove(b"socket".as_slice()).unwrap().kind, Kind::Socket);

    let blob = other.path().join("layer.tar.gz");
    let mut last = (0, 0);
    let mut progress = |at: PackProgress<'_>| {
        assert!(at.tar_bytes > last.1 && at.entries == last.0 + 1);
        last = (at.entries, at.tar_bytes);
    };
    let paths = [folder.path().join("through/deep"), source.clone()];
    let packed = pack_directory(&paths, &blob, &mut progress).unwrap();
    let again = pack_directory(&paths, other.path().join("again"), &mut |_| {}).unwrap();
    assert_eq!((again.digest, again.diff_id), (packed.digest, packed.diff_id));
    drop(socket);
    let bytes = fs::read(&blob).unwrap();
    assert_eq!(packed.digest, Digest::of(&bytes));
    assert_eq!((packed.entries, packed.tar_size), (last.0, last.1 + 1024));
    assert_eq!(usize::try_from(packed.size), Ok(bytes.len()));
    let mut tar = Vec::new();
    flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut tar).unwrap();
    assert_eq!(packed.diff_id, Digest::of(&tar));

    let root = other.path().join("root");
    untar(&root, &[&tar]).unwrap();
    let inside = root.join(folder.path().strip_prefix("/").unwrap());
    assert_eq!(fs::read_link(inside.join("through")).unwrap(), Path::new("source"));
    let found = snapshot(&inside.join("source")).unwrap();
    assert_eq!(diff(&expected, &found), Vec::<String>::new());

    let image = ImageBuilder::new().packed_layer(&packed).build();
    let registry = Registry::start(Options::default()).unwrap();
    let refs = image.push_to(&registry, "packed", "latest").unwrap();
    assert_eq!((refs.layers, refs.diff_ids), (vec![packed.digest], vec![packed.diff_id]));
    fs::write(&blob, b"changed").unwrap();
    image.push_to(&registry, "packed", "latest").unwrap_err();
}

#[test]
fn what_cannot_be_packed_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    for path in [missing.join("x"), missing.clone()] {
        let err = pack_directory(&[&path], folder.path().join("l"), &mut |_| {});
        assert_eq!(err.unwrap_err().to_string(), format!("reading {}", path.display()));
    }
    let err = pack_directory(&[folder.path()], missing.join("l"), &mut |_| {});
    assert!(err.unwrap_err().to_string().starts_with("writing the layer"));
}

//! Images in the hands of the kernel and of erofs-utils: what they show is what was put in.
//!
//! Needs root, Linux 6.12 or later with `CONFIG_EROFS_FS_BACKED_BY_FILE`, and on the `PATH` a
//! `fsck.erofs` that takes 512-byte blocks: 1.9.4 (Debian forky) does, 1.5 (bookworm) does not.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fsck;
mod image;
mod mounted;

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata},
    io::{ErrorKind, Read},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{DirEntryExt, FileExt, FileTypeExt, MetadataExt},
    },
    path::Path,
};

use image::{ImageFiles, Layer, Made, pattern};
use mounted::Mounted;
use proptest::prelude::*;
use tree::{FileData, Node, NodeId, NodeKind, Tree};
use ztoc::{EntryKind, TocEntry};

/// Mounts the image and compares everything it shows with the tree and the layers.
#[track_caller]
fn check(layers: &[Layer]) {
    let made = Made::new(layers);
    let files = ImageFiles::new(&made);
    let mounted = Mounted::new(&files.image, &files.devices).unwrap();
    check_tree(&made, &mounted.root());
}

fn check_tree(made: &Made, root: &Path) {
    let mut stack = vec![(root.to_owned(), Tree::ROOT)];
    while let Some((path, id)) = stack.pop() {
        let node = made.tree.node(id);
        check_metadata(made, (id, node), &path);
        match &node.kind {
            NodeKind::Directory(children) => {
                check_names(made, id, &path);
                for (name, child) in children {
                    stack.push((path.join(OsStr::from_bytes(name)), *child));
                }
            }
            NodeKind::File(data) => check_bytes(made, data, &path),
            NodeKind::Symlink(target) => {
                let found = fs::read_link(&path).unwrap().into_os_string().into_vec();
                assert_eq!(found, **target, "{}", path.display());
            }
            NodeKind::CharDevice(..) | NodeKind::BlockDevice(..) | NodeKind::Fifo => {}
        }
    }
}

fn check_metadata(made: &Made, (id, node): (NodeId, &Node), path: &Path) {
    // A trailing slash: the root is reached through a symbolic link of /proc.
    let path = if id == Tree::ROOT { path.join("") } else { path.to_owned() };
    let found = path.symlink_metadata().unwrap();
    let context = path.display();
    assert_eq!(found.ino(), made.info.nid_of(id), "{context}");
    assert_eq!(found.mode() & 0o7777, u32::from(node.mode), "{context}");
    assert_eq!((found.uid(), found.gid()), (node.uid, node.gid), "{context}");
    assert_eq!(found.mtime(), node.mtime.seconds, "{context}");
    assert_eq!(found.mtime_nsec(), i64::from(node.mtime.nanos), "{context}");
    assert_eq!(found.nlink(), u64::from(node.links), "{context}");
    check_kind(node, &found);
    let mut xattrs = xattrs(&path);
    xattrs.sort();
    let expected: Vec<_> =
        node.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!(xattrs, expected, "{context}");
}

fn check_kind(node: &Node, found: &Metadata) {
    let kind = found.file_type();
    let device = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    match &node.kind {
        NodeKind::Directory(_) => assert!(kind.is_dir()),
        NodeKind::File(data) => {
            assert!(kind.is_file());
            assert_eq!(found.len(), data.size);
        }
        NodeKind::Symlink(target) => {
            assert!(kind.is_symlink());
            assert_eq!(found.len(), u64::try_from(target.len()).unwrap());
        }
        NodeKind::CharDevice(major, minor) => {
            assert!(kind.is_char_device());
            assert_eq!(device, (*major, *minor));
        }
        NodeKind::BlockDevice(major, minor) => {
            assert!(kind.is_block_device());
            assert_eq!(device, (*major, *minor));
        }
        NodeKind::Fifo => assert!(kind.is_fifo()),
    }
}

fn check_names(made: &Made, id: NodeId, path: &Path) {
    let mut found: Vec<(Vec<u8>, u64)> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_vec(), entry.ino()))
        .collect();
    found.sort();
    let expected: Vec<(Vec<u8>, u64)> = made
        .tree
        .children(id)
        .map(|(name, child)| (name.to_vec(), made.info.nid_of(child)))
        .collect();
    assert_eq!(found, expected, "{}", path.display());
}

/// Compares a file piece by piece with what its layer has, and what is between with zeros.
fn check_bytes(made: &Made, data: &FileData, path: &Path) {
    let mut expected = vec![0; usize::try_from(data.size).unwrap()];
    let mut stored = made.layer_bytes(data);
    match &data.sparse {
        None => expected.copy_from_slice(stored),
        Some(map) => {
            for &(start, len) in &map.pieces {
                let (start, len) = (usize::try_from(start).unwrap(), usize::try_from(len).unwrap());
                let (piece, rest) = stored.split_at(len);
                expected[start..start + len].copy_from_slice(piece);
                stored = rest;
            }
        }
    }
    let found = fs::read(path).unwrap();
    assert!(found == expected, "{} has other bytes", path.display());
}

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 70_000];
    let len = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap();
    names[..len]
        .split_inclusive(|byte| *byte == 0)
        .map(|name| {
            let name = &name[..name.len() - 1];
            let mut value = vec![0; 70_000];
            let len =
                rustix::fs::lgetxattr(path, OsStr::from_bytes(name), value.as_mut_slice()).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect()
}

#[test]
fn one_of_everything() {
    check(&image::everything());
}

#[test]
fn every_length_around_blocks() {
    let mut layer = Layer::default();
    for len in (0..20).chain(500..530).chain([1023, 1024, 1025, 4095, 4096, 4097, 200_000]) {
        layer.file(&format!("files/{len}"), &pattern(len, len));
    }
    for len in (1..20).chain(420..520).chain([1000, 1023, 1024, 1025, 4000, 4095]) {
        layer.symlink(&format!("links/{len}"), &"t".repeat(len));
    }
    for len in 1..=255 {
        layer.file(&format!("names/{len}/{}", "n".repeat(len)), b"x");
        layer.file(&format!("names/{len}/{}", "m".repeat(len)), b"y");
    }
    check(&[layer]);
}

#[test]
fn attributes_of_every_size() {
    let mut layer = Layer::default();
    for len in (0..60).chain([400, 444, 448, 500, 512, 4000, 4096, 5000, 65_535]) {
        let key = format!("SCHILY.xattr.user.{}", "k".repeat(len % 200 + 1));
        let pax = vec![
            (b"SCHILY.xattr.trusted.a".to_vec(), vec![1; len]),
            (key.into_bytes(), pattern(len, 1)),
        ];
        layer.add(TocEntry {
            pax: pax.clone(),
            ..image::entry(EntryKind::File, &format!("f{len}"))
        });
        layer.add(TocEntry { pax, ..image::entry(EntryKind::Directory, &format!("d{len}")) });
        layer.file(&format!("d{len}/x"), b"x");
    }
    check(&[layer]);
}

#[test]
fn directory_of_a_hundred_thousand_names() {
    let mut layer = Layer::default();
    for number in 0..100_000 {
        layer.file(&format!("d/{number:x}-{}", "n".repeat(number % 60)), b"");
    }
    let made = Made::new(&[layer]);
    let files = ImageFiles::new(&made);
    let mounted = Mounted::new(&files.image, &files.devices).unwrap();
    let directory = mounted.root().join("d");
    check_names(&made, made.tree.lookup(b"d").unwrap(), &directory);
    for (name, child) in made.tree.children(made.tree.lookup(b"d").unwrap()) {
        let found = directory.join(OsStr::from_bytes(name)).symlink_metadata().unwrap();
        assert_eq!(found.ino(), made.info.nid_of(child));
    }
    for missing in ["", "0", "zzz", "!"] {
        let path = directory.join(format!("{missing}not there"));
        assert_eq!(path.symlink_metadata().unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
fn three_hundred_layers() {
    let layers: Vec<Layer> = (0..300)
        .map(|number| {
            let mut layer = Layer::default();
            layer.file(&format!("l{number}"), &pattern(1000, number));
            layer.file("same", &pattern(700, number));
            layer.file(&format!("d/{number}/x"), &pattern(20, number));
            layer
        })
        .collect();
    check(&layers);
}

#[test]
fn sparse_files() {
    let mut layer = Layer::default();
    layer.sparse("holes", &[(0, 4096), (65_536, 4096), (131_072, 100)], 131_172);
    layer.sparse("hole at the end", &[(512, 512)], 1_000_000);
    layer.sparse("only a hole", &[], 100_001);
    layer.sparse("joined", &[(0, 100), (100, 412), (512, 1024), (4096, 512)], 5000);
    layer.file("after", &pattern(3000, 5));
    check(&[layer]);
}

#[test]
fn files_beyond_four_gigabytes() {
    let size = (5_u64 << 30) + 77;
    let mut layer = Layer::default();
    layer.add(TocEntry { offset: 1024, size, ..image::entry(EntryKind::File, "big") });
    let made = Made::with_device_bytes(&[layer], 6 << 30);
    let files = ImageFiles::new(&made);
    let device = File::options().write(true).open(&files.devices[0]).unwrap();
    device.set_len(6 << 30).unwrap();
    let places = [0, (1 << 32) - 3, 1 << 32, (1 << 32) + 512, size - 7];
    for (seed, at) in places.into_iter().enumerate() {
        device.write_all_at(&pattern(7, seed), 1024 + at).unwrap();
    }
    let mounted = Mounted::new(&files.image, &files.devices).unwrap();
    let big = File::open(mounted.root().join("big")).unwrap();
    assert_eq!(big.metadata().unwrap().len(), size);
    for at in places {
        let mut expected = [0; 7];
        File::open(&files.devices[0]).unwrap().read_exact_at(&mut expected, 1024 + at).unwrap();
        let mut found = [0; 7];
        big.read_exact_at(&mut found, at).unwrap();
        assert_eq!(found, expected);
    }
    assert_eq!(big.read_at(&mut [0; 10], size - 7).unwrap(), 7);
}

#[test]
fn forgotten_devices_are_errors_not_wrong_bytes() {
    let mut layer = Layer::default();
    layer.file("a", &pattern(1000, 1));
    // So that the image has bytes at the addresses that the files have in their layers.
    for number in 0..100 {
        layer.symlink(&format!("filler/{number}"), "anywhere");
    }
    let mut other = Layer::default();
    other.file("b", &pattern(1000, 2));
    let made = Made::new(&[layer, other]);
    let files = ImageFiles::new(&made);
    assert!(Mounted::new(&files.image, &files.devices[..1]).is_err(), "one device of two");
    let Ok(mounted) = Mounted::new(&files.image, &[]) else {
        return;
    };
    for name in ["a", "b"] {
        let mut bytes = Vec::new();
        let read =
            File::open(mounted.root().join(name)).and_then(|mut file| file.read_to_end(&mut bytes));
        assert!(read.is_err() && bytes.is_empty(), "{name}: {read:?}, {} bytes", bytes.len());
    }
}

#[test]
fn damaged_superblock_does_not_mount() {
    let mut layer = Layer::default();
    layer.file("a", b"a");
    let mut made = Made::new(&[layer]);
    made.image[1024 + 20] ^= 1;
    let files = ImageFiles::new(&made);
    let error = Mounted::new(&files.image, &files.devices).unwrap_err();
    let expected = rustix::io::Errno::BADMSG.raw_os_error();
    assert_eq!(error.raw_os_error(), Some(expected), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn random_layers(layers in proptest::collection::vec(image::a_layer(), 1..4)) {
        check(&layers);
    }
}

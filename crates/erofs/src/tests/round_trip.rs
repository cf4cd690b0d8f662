//! What is read is what was written.

use proptest::{collection::vec, prelude::*};
use tree::{FileData, Node, NodeId, NodeKind, Tree};
use ztoc::{EntryKind, Mtime, SparseMap, TocEntry};

use super::{entry, file, large_device, listed, merged, written};
use crate::{
    Device, ImageInfo,
    reader::{Content, Extent, Inode, Listing, Place, read_image},
    write_image,
};

/// Compares all that an image says with the tree.
#[track_caller]
fn check_equal(tree: &Tree, info: &ImageInfo, listing: &Listing) {
    assert_eq!(listing.inodes.len(), tree.len());
    assert_eq!(listing.superblock.n_inodes, u64::try_from(tree.len()).unwrap());
    assert_eq!(listing.superblock.root_nid, info.nid_of(Tree::ROOT));
    for (id, node) in tree.iter() {
        let nid = info.nid_of(id);
        assert_eq!(info.node_of(nid), Some(id));
        assert_eq!(info.node_of(nid + 1), None);
        check_inode(tree, info, (id, node), &listing.inodes[&nid]);
    }
}

fn check_inode(tree: &Tree, info: &ImageInfo, (id, node): (NodeId, &Node), inode: &Inode) {
    assert_eq!(inode.mode & 0o7777, node.mode);
    let metadata = (inode.uid, inode.gid, inode.mtime, inode.links);
    assert_eq!(metadata, (node.uid, node.gid, node.mtime, node.links));
    let xattrs: Vec<_> =
        node.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!(inode.xattrs, xattrs);
    match (&node.kind, &inode.content) {
        (NodeKind::Directory(children), Content::Directory(entries)) => {
            assert_eq!(entries.len(), children.len() + 2);
            for entry in entries {
                let child = match &*entry.name {
                    b"." => id,
                    b".." => tree.parent(id),
                    name => children[name],
                };
                assert_eq!(entry.nid, info.nid_of(child));
            }
        }
        (NodeKind::File(data), Content::File(extents)) => {
            assert_eq!(inode.size, data.size);
            assert_eq!(extents, &expected_extents(data));
        }
        (NodeKind::Symlink(expected), Content::Symlink(target)) => {
            assert_eq!(target.as_slice(), &**expected);
        }
        (NodeKind::CharDevice(major, minor), Content::Device(found_major, found_minor)) => {
            assert_eq!((major, minor), (found_major, found_minor));
            assert_eq!(inode.mode >> 12, 2);
        }
        (NodeKind::BlockDevice(major, minor), Content::Device(found_major, found_minor)) => {
            assert_eq!((major, minor), (found_major, found_minor));
            assert_eq!(inode.mode >> 12, 6);
        }
        (NodeKind::Fifo, Content::Empty) => assert_eq!(inode.mode >> 12, 1),
        (kind, content) => panic!("{kind:?} became {content:?}"),
    }
}

fn expected_extents(data: &FileData) -> Vec<Extent> {
    let whole = SparseMap { pieces: vec![(0, data.size)], logical_size: data.size };
    let map = data.sparse.as_ref().unwrap_or(&whole);
    let mut extents: Vec<Extent> = Vec::new();
    let mut add = |bytes, place: Option<Place>| match extents.last_mut() {
        _ if bytes == 0 => {}
        Some(last)
            if last.place.map(|at| Place { offset: at.offset + last.bytes, ..at }) == place =>
        {
            last.bytes += bytes;
        }
        _ => extents.push(Extent { bytes, place }),
    };
    let device = u16::try_from(data.layer + 1).unwrap();
    let (mut logical, mut offset) = (0, data.offset);
    for &(start, len) in &map.pieces {
        add(start - logical, None);
        add(len, Some(Place { device, offset }));
        (logical, offset) = (start + len, offset + len);
    }
    add(data.size - logical, None);
    extents
}

#[track_caller]
fn check(entries: &[TocEntry]) {
    let (tree, info, listing) = listed(entries);
    check_equal(&tree, &info, &listing);
}

#[test]
fn empty_tree() {
    check(&[]);
    let mut image = Vec::new();
    let tree = merged(&[]);
    write_image(&tree, &[], &mut image).unwrap();
    assert!(read_image(&image).unwrap().superblock.devices.is_empty());
}

#[test]
fn content_of_every_length_around_blocks() {
    // Symbolic links, and directories with one name, whose content has 40 bytes more.
    for len in (1..=255).chain([256, 447, 448, 449, 471, 472, 473, 500, 511, 512, 513, 1024, 4095])
    {
        let target = vec![b't'; len];
        let mut entries = vec![TocEntry { linkname: target, ..entry(EntryKind::Symlink, b"l") }];
        if len <= 255 {
            entries.push(entry(EntryKind::Fifo, format!("d/{}", "n".repeat(len)).as_bytes()));
            // Two and three such names are two blocks.
            entries.push(entry(EntryKind::Fifo, format!("d/{}", "m".repeat(len)).as_bytes()));
            entries.push(entry(EntryKind::Fifo, format!("e/{}", "m".repeat(len)).as_bytes()));
        }
        check(&entries);
    }
}

#[test]
fn names_that_sort_before_dots() {
    let names = ["!", "-", "-x", "..a", ".a", "0", "a", "\u{ff}"];
    let entries: Vec<_> = names.iter().map(|name| file(name, 512, 0)).collect();
    check(&entries);
}

#[test]
fn files_of_every_size_are_one_extent() {
    let sizes = (0..=33).map(|bits| 1_u64 << bits).flat_map(|size| [size - 1, size, size + 1]);
    let sizes = sizes.chain([1 << 40, (1 << 40) + 1, (1 << 41) - 4096]);
    let entries: Vec<_> =
        sizes.enumerate().map(|(at, size)| file(&format!("f{at}"), 1024, size)).collect();
    check(&entries);
}

#[test]
fn pieces_of_sparse_files_are_mapped() {
    let k = 1024;
    for (pieces, logical_size) in [
        (vec![], 1),
        (vec![], 1 << 50),
        (vec![(0, 512)], 512),
        (vec![(0, 512)], 513),
        (vec![(512, 100)], 612),
        (vec![(0, 4 * k), (64 * k, 4 * k)], 128 * k),
        (vec![(4 * k, 4 * k), (8 * k, 4 * k), (20 * k, 512)], 21 * k),
        (vec![(0, 100), (100, 412), (512, 1)], 513),
        (vec![(0, 512), (k, 0)], k),
        (vec![(1 << 34, 512)], (1 << 34) + 512),
    ] {
        let size = pieces.iter().map(|(_, len)| len).sum();
        let sparse = Some(SparseMap { pieces, logical_size });
        check(&[TocEntry { sparse, ..file("s", 4096, size) }]);
    }
}

#[test]
fn directory_of_a_hundred_thousand() {
    let names = (0..100_000).map(|number| format!("d/{number:x}"));
    let entries: Vec<_> = names.map(|name| file(&name, 512, 3)).collect();
    check(&entries);
}

#[test]
fn many_devices_keep_the_root_number_small() {
    let tree = merged(&[file("a", 512, 1)]);
    let devices: Vec<Device> = (0..65_534).map(|_| large_device()).collect();
    let mut image = Vec::new();
    let info = write_image(&tree, &devices, &mut image).unwrap();
    let listing = read_image(&image).unwrap();
    check_equal(&tree, &info, &listing);
    assert_eq!(listing.superblock.devices.len(), 65_534);
    for device in listing.superblock.devices {
        assert_eq!(device.tag, b"layer");
        assert!(u64::from(device.unified_address) * 512 >= info.bytes);
    }
}

/// The names at which directories are made; the last component of files is random.
const DIRECTORIES: [&str; 4] = ["", "d/", "d/e/", "!/"];

prop_compose! {
    fn an_entry()(
        parent in prop::sample::select(DIRECTORIES.as_slice()),
        name in vec(any::<u8>().prop_filter("in names", |byte| !matches!(byte, 0 | b'/')), 1..=255),
        kind in prop::sample::select(vec![
            EntryKind::File, EntryKind::File, EntryKind::Directory, EntryKind::Symlink,
            EntryKind::CharDevice, EntryKind::BlockDevice, EntryKind::Fifo,
        ]),
        linkname in vec(1..=255_u8, 1..=1200),
        (offset, size) in (0_u64..1000, prop_oneof![Just(0), 1..5000_u64, 1..1_u64 << 35]),
        pieces in prop::option::of(vec((1_u64..9, 1_u64..9), 0..6)),
        (mode, uid, gid) in any::<(u32, u32, u32)>(),
        (seconds, nanos) in (any::<i64>(), 0..1_000_000_000_u32),
        device in (1..4096_u32, 0..1_u32 << 20),
        pax in vec((a_key(), vec(any::<u8>(), 0..300)), 0..4),
    ) -> TocEntry {
        let offset = offset * 512;
        let name = [parent.as_bytes(), &name].concat();
        let mtime = Mtime { seconds, nanos };
        let (sparse, size) = match pieces {
            Some(pieces) => {
                let (map, stored) = sparse(&pieces, size % 10_000);
                (Some(map), stored)
            }
            None => (None, size),
        };
        TocEntry {
            linkname, offset, size, mode, uid, gid, mtime, device, pax, sparse,
            ..entry(kind, &name)
        }
    }
}

fn a_key() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::select(vec!["user.", "trusted.", "security."]);
    (prefix, vec(1..=255_u8, 1..100))
        .prop_map(|(prefix, name)| [b"SCHILY.xattr.", prefix.as_bytes(), &name].concat())
}

/// Holes and pieces in turn, counted in blocks, and a hole at the end.
fn sparse(blocks: &[(u64, u64)], end: u64) -> (SparseMap, u64) {
    let (mut at, mut stored) = (0, 0);
    let mut pieces = Vec::new();
    for (hole, len) in blocks {
        pieces.push((at + hole * 512, len * 512));
        at += (hole + len) * 512;
        stored += len * 512;
    }
    (SparseMap { pieces, logical_size: at + end }, stored)
}

proptest! {
    #[test]
    fn any_tree(entries in vec(an_entry(), 0..60)) {
        let with_name = |entry: &&TocEntry| !entry.name.ends_with(b".");
        let mut entries: Vec<TocEntry> = entries.iter().filter(with_name).cloned().collect();
        let links: Vec<TocEntry> = entries
            .iter()
            .enumerate()
            .filter(|(number, target)| number % 4 == 0 && target.kind != EntryKind::Directory)
            .map(|(number, target)| TocEntry {
                linkname: target.name.clone(),
                ..entry(EntryKind::HardLink, format!("links/{number}").as_bytes())
            })
            .collect();
        entries.extend(links);
        // The same name twice, with another kind, may leave a link without a target.
        let Ok(tree) = Tree::merge(&[&entries], &tree::Limits::default()) else {
            return Ok(());
        };
        let (image, info) = written(&tree).unwrap();
        check_equal(&tree, &info, &read_image(&image).unwrap());
        prop_assert_eq!(written(&tree).unwrap(), (image, info));
    }
}

//! Layers with their tables of contents, and the files that are mounted.

use std::{fs, path::PathBuf};

use erofs::{Device, ImageInfo, write_image};
use proptest::{collection::vec, prelude::*};
use tempfile::TempDir;
use tree::{FileData, Limits, Tree};
use ztoc::{EntryKind, Mtime, SparseMap, TocEntry};

pub(crate) fn entry(kind: EntryKind, name: &str) -> TocEntry {
    TocEntry {
        offset: 512,
        mtime: Mtime { seconds: 1_700_000_000, nanos: 123_456_789 },
        device: (1, 3),
        ..TocEntry::new(name, kind)
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 7 + at / 512 * 31 + seed * 13) % 251).unwrap()).collect()
}

/// A layer as a tar has it: a header block before each file, data padded to blocks. Headers and
/// padding are not zeros, so that a wrong address shows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Layer {
    entries: Vec<TocEntry>,
    bytes: Vec<u8>,
}

impl Layer {
    pub(crate) fn add(&mut self, entry: TocEntry) {
        self.entries.push(entry);
    }

    pub(crate) fn file(&mut self, name: &str, content: &[u8]) {
        let offset = self.store(content);
        let size = u64::try_from(content.len()).unwrap();
        self.add(TocEntry { offset, size, ..entry(EntryKind::File, name) });
    }

    pub(crate) fn sparse(&mut self, name: &str, pieces: &[(u64, u64)], logical_size: u64) {
        let size = pieces.iter().map(|(_, len)| len).sum();
        let offset = self.store(&pattern(usize::try_from(size).unwrap(), name.len()));
        let sparse = Some(SparseMap { pieces: pieces.to_vec(), logical_size });
        self.add(TocEntry { offset, size, sparse, ..entry(EntryKind::File, name) });
    }

    pub(crate) fn symlink(&mut self, name: &str, target: &str) {
        self.add(TocEntry { linkname: target.into(), ..entry(EntryKind::Symlink, name) });
    }

    pub(crate) fn hard_link(&mut self, name: &str, target: &str) {
        self.add(TocEntry { linkname: target.into(), ..entry(EntryKind::HardLink, name) });
    }

    fn store(&mut self, content: &[u8]) -> u64 {
        self.bytes.extend([0xEE; 512]);
        let offset = u64::try_from(self.bytes.len()).unwrap();
        self.bytes.extend(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0xDD);
        offset
    }
}

/// An access list that gives user 7 `permissions`.
pub(crate) fn acl(permissions: u16) -> Vec<u8> {
    let none = u32::MAX;
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1, 6, none), (2, permissions, 7), (4, 4, none), (16, 7, none), (32, 4, none)]
    {
        list.extend(u16::to_le_bytes(tag));
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

/// Two layers with one of everything.
pub(crate) fn everything() -> Vec<Layer> {
    let mut lower = Layer::default();
    lower.add(TocEntry { mode: 0o1777, ..entry(EntryKind::Directory, "./") });
    lower.file("bin/program", &pattern(100_000, 1));
    lower.file("bin/hidden", b"never seen");
    lower.hard_link("bin/same", "bin/program");
    lower.symlink("lib", "usr/lib");
    lower.file("lib/empty", b"");
    lower.sparse("sparse", &[(4096, 4096), (16_384, 7)], 16_391);
    let mut upper = Layer::default();
    upper.add(entry(EntryKind::File, "bin/.wh.hidden"));
    upper.file("bin/program", &pattern(5000, 2));
    upper.hard_link("bin/old", "bin/same");
    upper.file("!first", &pattern(513, 3));
    for (kind, name) in [
        (EntryKind::CharDevice, "dev/c"),
        (EntryKind::BlockDevice, "dev/b"),
        (EntryKind::Fifo, "f"),
    ] {
        let mtime = Mtime { seconds: -5, nanos: 999_999_999 };
        let device = (4095, (1 << 20) - 1);
        upper.add(TocEntry { uid: 70_000, gid: u32::MAX - 1, mtime, device, ..entry(kind, name) });
    }
    let pax = [("user.u", "1"), ("trusted.t", "22"), ("security.s", "333")];
    let mut pax: Vec<_> = pax
        .iter()
        .map(|(name, value)| (format!("SCHILY.xattr.{name}").into(), Vec::from(*value)))
        .collect();
    pax.push((b"SCHILY.xattr.system.posix_acl_access".to_vec(), acl(7)));
    upper.add(TocEntry { pax: pax.clone(), mode: 0o674, ..entry(EntryKind::File, "attributes") });
    pax.push((b"SCHILY.xattr.system.posix_acl_default".to_vec(), acl(5)));
    upper.add(TocEntry { pax, mode: 0o674, ..entry(EntryKind::Directory, "attributed") });
    upper.add(TocEntry { mode: 0o6755, ..entry(EntryKind::File, "set-uid") });
    vec![lower, upper]
}

prop_compose! {
    /// An entry of a random kind and a random name in one of a few directories, with its content.
    fn an_entry()(
        parent in prop::sample::select(vec!["", "d/", "d/e/", "!/", "..."]),
        name in vec(any::<u8>().prop_filter("in names", |byte| !b"\0/.".contains(byte)), 1..=250),
        kind in prop::sample::select(vec![
            EntryKind::File, EntryKind::File, EntryKind::File, EntryKind::Directory,
            EntryKind::Symlink, EntryKind::CharDevice, EntryKind::BlockDevice, EntryKind::Fifo,
        ]),
        linkname in vec(1..=255_u8, 1..=1500),
        (len, seed) in (prop_oneof![Just(0_usize), 1..2000_usize, 1..100_000_usize], 0..100_usize),
        holes in prop::option::of(vec(1_u64..20, 1..5)),
        (mode, uid, gid) in any::<(u32, u32, u32)>(),
        (seconds, nanos) in (-1_i64 << 40..1 << 40, 0..1_000_000_000_u32),
        device in (1..4096_u32, 0..1_u32 << 20),
        pax in vec((a_key(), vec(any::<u8>(), 0..600)), 0..4),
    ) -> (TocEntry, Vec<u8>) {
        let name = [parent.as_bytes(), &name].concat();
        let content = pattern(if kind == EntryKind::File { len } else { 0 }, seed);
        let sparse = holes.filter(|_| !content.is_empty()).map(|holes| with_holes(&content, &holes));
        // The kernel takes -1 for "no such user".
        let (uid, gid) = (uid.min(u32::MAX - 1), gid.min(u32::MAX - 1));
        let mtime = Mtime { seconds, nanos };
        let size = u64::try_from(content.len()).unwrap();
        let entry = TocEntry {
            name, linkname, mode, uid, gid, mtime, device, pax, sparse, size, ..entry(kind, "")
        };
        (entry, content)
    }
}

/// A sparse map of a content: a hole before each block until they are used up, counted in blocks.
fn with_holes(content: &[u8], holes: &[u64]) -> SparseMap {
    let size = u64::try_from(content.len()).unwrap();
    let mut pieces = Vec::new();
    let (mut at, mut left) = (0, size);
    for hole in holes {
        at += hole * 512;
        let len = left.min(512);
        pieces.push((at, len));
        (at, left) = (at + len, left - len);
        if left == 0 {
            return SparseMap { pieces, logical_size: at };
        }
    }
    pieces.push((at, left));
    SparseMap { pieces, logical_size: at + left }
}

fn a_key() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::select(vec!["user.", "trusted.", "security."]);
    (prefix, vec(1..=255_u8, 1..100))
        .prop_map(|(prefix, name)| [b"SCHILY.xattr.", prefix.as_bytes(), &name].concat())
}

/// A random layer; a few of its files have a second name.
pub(crate) fn a_layer() -> impl Strategy<Value = Layer> {
    vec(an_entry(), 0..40).prop_map(|entries| {
        let mut layer = Layer::default();
        for (number, (entry, content)) in entries.into_iter().enumerate() {
            let offset = if content.is_empty() { 512 } else { layer.store(&content) };
            let target = entry.name.clone();
            let is_directory = entry.kind == EntryKind::Directory;
            layer.add(TocEntry { offset, ..entry });
            if number % 5 == 0 && !is_directory {
                let linkname = target;
                let link = self::entry(EntryKind::HardLink, &format!("links/{number}"));
                layer.add(TocEntry { linkname, ..link });
            }
        }
        layer
    })
}

/// Layers and the image made of them.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) tree: Tree,
    pub(crate) info: ImageInfo,
    pub(crate) image: Vec<u8>,
    layers: Vec<Vec<u8>>,
}

impl Made {
    pub(crate) fn new(layers: &[Layer]) -> Self {
        Self::with_device_bytes(layers, 0)
    }

    /// As [`Made::new`], the layers having at least so many bytes.
    pub(crate) fn with_device_bytes(layers: &[Layer], bytes: u64) -> Self {
        let entries: Vec<&[TocEntry]> =
            layers.iter().map(|layer| layer.entries.as_slice()).collect();
        let tree = Tree::merge(&entries, &Limits::default()).unwrap();
        let device = |(number, layer): (usize, &Layer)| Device {
            tag: format!("layer {number}"),
            bytes: u64::try_from(layer.bytes.len()).unwrap().max(bytes),
        };
        let devices: Vec<Device> = layers.iter().enumerate().map(device).collect();
        let mut image = Vec::new();
        let info = write_image(&tree, &devices, &mut image).unwrap();
        let layers = layers.iter().map(|layer| layer.bytes.clone()).collect();
        Self { tree, info, image, layers }
    }

    /// What the layer holds of a file.
    pub(crate) fn layer_bytes(&self, data: &FileData) -> &[u8] {
        let start = usize::try_from(data.offset).unwrap();
        let len = usize::try_from(data.stored_bytes()).unwrap();
        let layer = &self.layers[usize::try_from(data.layer).unwrap()];
        if len == 0 { &[] } else { &layer[start..start + len] }
    }
}

/// The image and its devices in files, removed when dropped.
#[derive(Debug)]
pub(crate) struct ImageFiles {
    pub(crate) image: PathBuf,
    pub(crate) devices: Vec<PathBuf>,
    /// Removes the files.
    _directory: TempDir,
}

impl ImageFiles {
    pub(crate) fn new(made: &Made) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, &made.image).unwrap();
        let devices = made.layers.iter().enumerate().map(|(number, bytes)| {
            let path = directory.path().join(format!("layer{number}"));
            fs::write(&path, bytes).unwrap();
            path
        });
        Self { image, devices: devices.collect(), _directory: directory }
    }
}

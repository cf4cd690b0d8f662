//! Random images for property tests: everything that a layer's tar can carry and that can be unpacked.

use std::collections::{BTreeMap, BTreeSet};

use super::content::{Content, Random, Texture};
use super::entry::{DEFAULT_MTIME, Dialect, SparseContent, SparseFormat, TarEntry, TarKind};
use super::layer::{End, LayerBuilder};

/// What random images are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many layers.
    pub layers: usize,
    /// How many entries in each.
    pub entries: usize,
    /// The size of the largest file in bytes.
    pub max_file_size: u64,
    /// Whether there are sparse files.
    pub sparse: bool,
    /// Whether there are devices, and `security.` and `trusted.` attributes: what only root can unpack.
    pub special: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self { layers: 4, entries: 40, max_file_size: 20_000, sparse: true, special: true }
    }
}

/// The tars of a random image's layers, the lowest first; always the same for a seed and a shape.
///
/// There are whiteouts (also of what the same layer brings), opaque directories, files that become
/// directories and the reverse, hard links within and across layers, missing parents, names that come
/// twice, long and binary names, all dialects of tar. Parents are never symbolic links of the same layer,
/// and a hard link says the same of its file as the file's own entry.
#[must_use]
pub fn random_layers(seed: u64, shape: &Shape) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed);
    let mut lower = Files::new();
    (0..shape.layers)
        .map(|_| {
            let seed = random.next();
            let mut layer = Layer::new(seed, shape, &lower);
            for _ in 0..shape.entries {
                layer.add();
            }
            let (tar, merged) = layer.finish();
            lower = merged;
            tar
        })
        .collect()
}

/// What is at each path; the root is not mentioned.
type Files = BTreeMap<Vec<u8>, Made>;

#[derive(Debug, Clone)]
enum Made {
    Directory,
    /// Anything else, with the entry that made it.
    Other(Box<TarEntry>),
}

impl Made {
    const fn is_directory(&self) -> bool {
        matches!(self, Self::Directory)
    }
}

struct Layer<'a> {
    random: Random,
    shape: &'a Shape,
    lower: &'a Files,
    upper: Files,
    whiteouts: BTreeSet<Vec<u8>>,
    opaque: BTreeSet<Vec<u8>>,
    builder: LayerBuilder,
}

impl<'a> Layer<'a> {
    fn new(seed: u64, shape: &'a Shape, lower: &'a Files) -> Self {
        let mut random = Random::new(seed);
        let mut builder = LayerBuilder::new();
        if random.one_in(4) {
            builder = builder.global_pax(&[("comment", "of no importance")]);
        }
        if random.one_in(2) {
            builder = builder.entry(TarEntry::directory("./").mode(0o755));
        }
        Self {
            random,
            shape,
            lower,
            upper: Files::new(),
            whiteouts: BTreeSet::new(),
            opaque: BTreeSet::new(),
            builder,
        }
    }

    fn add(&mut self) {
        let Some(path) = self.pick_path() else { return };
        let kind = match self.random.below(24) {
            0 => return self.hide(&path),
            1 if self.random.one_in(2) => return self.hide_children(&path),
            1..=7 => TarKind::Directory,
            8..=9 => TarKind::Symlink(self.pick(&LINK_TARGETS).to_vec()),
            10..=12 => return self.link(&path),
            13 if self.shape.sparse => TarKind::Sparse(self.sparse_content()),
            14 if self.shape.special => self.device(),
            15 => TarKind::Fifo,
            _ => TarKind::File(self.content()),
        };
        let spelled = self.spelled(&path);
        let entry = match kind {
            TarKind::Directory => TarEntry::directory(spelled),
            kind => TarEntry::new(spelled, kind),
        };
        let entry = self.described(entry);
        self.put(&path, entry);
    }

    fn device(&mut self) -> TarKind {
        let number = |number| u32::try_from(number).unwrap_or(0);
        // Never 0:0, which is a whiteout.
        let (major, minor) =
            (1 + number(self.random.below(300)), number(self.random.below(70_000)));
        if self.random.one_in(2) {
            TarKind::CharDevice(major, minor)
        } else {
            TarKind::BlockDevice(major, minor)
        }
    }

    /// A path that this layer can write to: above it the layer has made directories, or nothing.
    fn pick_path(&mut self) -> Option<Vec<u8>> {
        let known = self.lower.len() + self.upper.len();
        let mut path = if known == 0 || self.random.one_in(3) {
            Vec::new()
        } else {
            let at = self.random.index(known);
            self.lower.keys().chain(self.upper.keys()).nth(at).cloned().unwrap_or_default()
        };
        // One in four is a path that is there already; the others are, or may be, new.
        let deeper = if path.is_empty() { 1 } else { [0, 1, 1, 2][self.random.index(4)] };
        for _ in 0..deeper {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(self.pick(&NAMES));
        }
        let shallow = path.iter().filter(|&&byte| byte == b'/').count() < 6;
        let free =
            ancestors(&path).all(|above| self.upper.get(above).is_none_or(Made::is_directory));
        (shallow && free).then_some(path)
    }

    fn pick(&mut self, from: &[&'static [u8]]) -> &'static [u8] {
        from[self.random.index(from.len())]
    }

    /// The path as archives write it, in one way or another.
    fn spelled(&mut self, path: &[u8]) -> Vec<u8> {
        let prefix: &[u8] = [b"".as_slice(), b"", b"./", b"/"][self.random.index(4)];
        [prefix, path].concat()
    }

    fn put(&mut self, path: &[u8], entry: TarEntry) {
        self.make_parents(path);
        if entry.kind == TarKind::Directory {
            if !self.upper.get(path).is_some_and(Made::is_directory) {
                self.forget(path);
                self.upper.insert(path.to_vec(), Made::Directory);
            }
        } else {
            self.forget(path);
            self.upper.insert(path.to_vec(), Made::Other(Box::new(entry.clone())));
        }
        self.append(entry);
    }

    fn append(&mut self, entry: TarEntry) {
        let builder = std::mem::take(&mut self.builder);
        self.builder = builder.entry(entry);
    }

    fn make_parents(&mut self, path: &[u8]) {
        for above in ancestors(path) {
            self.upper.entry(above.to_vec()).or_insert(Made::Directory);
        }
    }

    /// Removes what the layer has at and below `path`.
    fn forget(&mut self, path: &[u8]) {
        let kept = |other: &[u8]| !is_at_or_below(other, path);
        self.upper.retain(|other, _| kept(other));
        self.opaque.retain(|other| kept(other));
        self.whiteouts.retain(|other| !(is_at_or_below(other, path) && other != path));
    }

    fn hide(&mut self, path: &[u8]) {
        self.make_parents(path);
        self.whiteouts.insert(path.to_vec());
        let builder = std::mem::take(&mut self.builder);
        self.builder = builder.whiteout(path);
    }

    fn hide_children(&mut self, path: &[u8]) {
        if self.upper.get(path).is_some_and(|made| !made.is_directory()) {
            return;
        }
        self.make_parents(path);
        self.upper.insert(path.to_vec(), Made::Directory);
        self.opaque.insert(path.to_vec());
        let builder = std::mem::take(&mut self.builder);
        self.builder = builder.opaque(path);
    }

    /// Links to a file of this layer, or to one of the lower ones that this layer has not covered.
    fn link(&mut self, path: &[u8]) {
        let upper = &self.upper;
        let visible = |target: &&Vec<u8>| {
            !upper.contains_key(*target)
                && ancestors(target).all(|above| upper.get(above).is_none_or(Made::is_directory))
        };
        let lower = self.lower.iter().filter(|(target, _)| visible(target));
        let targets: Vec<(&Vec<u8>, &TarEntry)> = lower
            .chain(upper)
            .filter_map(|(target, made)| match made {
                Made::Other(entry)
                    if !is_at_or_below(target, path) && !is_at_or_below(path, target) =>
                {
                    Some((target, &**entry))
                }
                _ => None,
            })
            .collect();
        if targets.is_empty() {
            return;
        }
        let (target, linked) = targets[self.random.index(targets.len())];
        // What a link's entry says of the file is what the file's own entry said.
        let mut entry = linked.clone();
        entry.kind = TarKind::HardLink(target.clone());
        entry.xattrs.clear();
        entry.name = self.spelled(path);
        self.put(path, entry);
    }

    fn described(&mut self, mut entry: TarEntry) -> TarEntry {
        let random = &mut self.random;
        let is_symlink = matches!(entry.kind, TarKind::Symlink(_));
        let is_sparse = matches!(entry.kind, TarKind::Sparse(_));
        if !is_symlink {
            entry.mode = [0o644, 0o755, 0o600, 0o4755, 0o2750, 0o1777, 0, 0o7777][random.index(8)];
        }
        entry.uid = [0, 0, 1000, 65_534, 3_000_000][random.index(5)];
        entry.gid = [0, 0, 1000, 5, 3_000_000][random.index(5)];
        entry.dialect = [Dialect::Pax, Dialect::Ustar, Dialect::Gnu][random.index(3)];
        let times = [
            (DEFAULT_MTIME, 0),
            (0, 0),
            (DEFAULT_MTIME, 123_456_789),
            (-5, 500_000_000),
            (1 << 33, 0),
        ];
        let (seconds, nanos) = times[random.index(times.len())];
        let gnu = entry.dialect == Dialect::Gnu
            || matches!(&entry.kind, TarKind::Sparse(it) if it.format == SparseFormat::OldGnu);
        entry.mtime = seconds;
        entry.mtime_nanos = if gnu { 0 } else { nanos };
        let plain = matches!(entry.kind, TarKind::File(_) | TarKind::Directory) || is_sparse;
        if plain && random.one_in(4) {
            entry = entry.xattr("user.note", b"two\nlines, = and \0 \xff".as_slice());
        }
        if plain && self.shape.special && random.one_in(6) {
            entry = entry.xattr("trusted.note", b"".as_slice());
        }
        if matches!(entry.kind, TarKind::File(_)) && self.shape.special && random.one_in(6) {
            entry = entry.xattr("security.capability", CAPABILITY);
        }
        entry
    }

    fn content(&mut self) -> Content {
        let max = self.shape.max_file_size.max(1);
        let sizes = [0, 1, 511, 512, 513, 4096, self.random.below(max), self.random.below(max)];
        let len = sizes[self.random.index(sizes.len())].min(max);
        let textures = [Texture::Random, Texture::Text, Texture::Text, Texture::Zeros];
        Content::generated(self.random.next(), len, textures[self.random.index(4)])
    }

    fn sparse_content(&mut self) -> SparseContent {
        use SparseFormat::{OldGnu, Pax00, Pax01, Pax10};
        let mut pieces = Vec::new();
        let mut end = 0;
        for _ in 0..[0, 1, 3, 5, 30][self.random.index(5)] {
            let offset = end + self.random.below(9000) + 1;
            let len = (self.random.below(3) + 1) * 512;
            let content = Content::generated(self.random.next(), len, Texture::Text);
            pieces.push((offset, content.to_bytes()));
            end = offset + len;
        }
        // Readers disagree on where a piece of less than a block ends, unless it is the last.
        if let Some((_offset, last)) = pieces.last_mut() {
            let cut = self.random.below(512);
            last.truncate(last.len() - usize::try_from(cut).unwrap_or(0));
            end -= cut;
        }
        let size = end + [0, 1, 100_000][self.random.index(3)];
        let format = [OldGnu, Pax00, Pax01, Pax10][self.random.index(4)];
        SparseContent { pieces, size, format }
    }

    /// The tar, and what the image has with it.
    fn finish(mut self) -> (Vec<u8>, Files) {
        let end = [End::TwoBlocks, End::Record, End::Nothing][self.random.index(3)];
        let mut merged = self.lower.clone();
        merged.retain(|path, _| {
            let hidden = |hider: &Vec<u8>| is_at_or_below(path, hider);
            !self.whiteouts.iter().any(hidden)
                && !self.opaque.iter().any(|hider| path != hider && hidden(hider))
        });
        for (path, made) in self.upper {
            let merges = made.is_directory() && merged.get(&path).is_some_and(Made::is_directory);
            if !merges {
                merged.retain(|other, _| !is_at_or_below(other, &path));
            }
            merged.insert(path, made);
        }
        (self.builder.end(end).build(), merged)
    }
}

/// The paths above `path`, the highest first.
fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
    slashes.map(|(at, _)| &path[..at])
}

fn is_at_or_below(path: &[u8], top: &[u8]) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// So few that they meet often. The long ones do not fit into a header, alone or together.
const NAMES: [&[u8]; 10] = [
    b"a",
    b"b",
    b"c",
    b"lib",
    b".hidden",
    b"with space",
    b"binary \xff\xfe\n name",
    b"a name of more than a hundred bytes, which a header cannot take, 0123456789 0123456789 0123456789 0123456789",
    b"sixty bytes that make a prefix necessary, 0123456789 01234567",
    b"w",
];

const LINK_TARGETS: [&[u8]; 6] = [
    b"a",
    b"../b",
    b"/lib/c",
    b"nowhere at all",
    b"\xff binary",
    b"a target of more than a hundred bytes/0123456789/0123456789/0123456789/0123456789/0123456789/0123456789",
];

/// `cap_net_bind_service=ep`, in version 2 of the kernel's `vfs_cap_data`.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_makes_the_same_image() {
        let shape = Shape::default();
        assert_eq!(random_layers(3, &shape), random_layers(3, &shape));
        assert_ne!(random_layers(3, &shape), random_layers(4, &shape));
    }
}

//! A whole image as a file system.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::{Bound, Range};
use std::sync::{Arc, OnceLock};

use sys::fuse_device::{Attr, Errno, Statfs};
use tree::{FileData, LaterTree, Node, NodeId, NodeKind, Tree};

use self::sparse::SparseIndex;
use crate::bytes::Bytes;
use crate::filesystem::{DirEntry, DirSink, Filesystem, Ino, Names, Xattrs};
use crate::reply::ReadReply;

mod sparse;

/// The size that directories report.
const DIRECTORY_BYTES: u64 = 4096;
/// Of a large directory every so many-th name is noted, to find the place of a cookie.
const STRIDE: usize = 64;

/// What a directory holds.
type Children = BTreeMap<Box<[u8]>, NodeId>;

/// Serves a [`Tree`]. Inode numbers are its node numbers plus one.
pub struct TreeFs {
    tree: Arc<LaterTree>,
    files: OnceLock<Result<Files, Errno>>,
    bytes: Arc<dyn Bytes>,
}

/// What is known of the files of a [`Tree`].
struct Files {
    tree: Arc<Tree>,
    xattrs: Xattrs,
    figures: Statfs,
    /// Of directories with more than [`STRIDE`] entries, every `STRIDE`-th name.
    strides: HashMap<NodeId, Vec<Box<[u8]>>>,
    sparse: HashMap<NodeId, Arc<SparseIndex>>,
}

impl std::fmt::Debug for TreeFs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TreeFs").field("tree", &self.tree).finish_non_exhaustive()
    }
}

impl TreeFs {
    /// Serves `tree`, which is made when the kernel asks first, with the bytes that `bytes` gives for its layers.
    #[must_use]
    pub const fn new(tree: Arc<LaterTree>, bytes: Arc<dyn Bytes>) -> Self {
        Self { tree, files: OnceLock::new(), bytes }
    }

    /// Without a tree all that the kernel asks is an error.
    fn files(&self) -> Result<&Files, Errno> {
        let make = || match self.tree.get() {
            Ok(tree) => Ok(Files::new(Arc::clone(tree))),
            Err(err) => {
                tracing::error!(error = causes::in_full(&err), "nothing can be read of an image");
                Err(Errno::IO)
            }
        };
        self.files.get_or_init(make).as_ref().map_err(|errno| *errno)
    }
}

impl Files {
    fn new(tree: Arc<Tree>) -> Self {
        let files = u64::try_from(tree.len()).unwrap_or(u64::MAX);
        let figures = Statfs { bytes: tree.total_file_bytes(), files };
        let mut strides = HashMap::new();
        let mut sparse = HashMap::new();
        for (id, node) in tree.iter() {
            match &node.kind {
                NodeKind::Directory(children) if children.len() > STRIDE => {
                    strides.insert(id, children.keys().step_by(STRIDE).cloned().collect());
                }
                NodeKind::File(FileData { sparse: Some(map), .. }) => {
                    sparse.insert(id, Arc::new(SparseIndex::new(&map.pieces)));
                }
                _ => {}
            }
        }
        let xattrs = xattrs_of(&tree);
        Self { tree, xattrs, figures, strides, sparse }
    }

    fn node(&self, ino: Ino) -> Result<(NodeId, &Node), Errno> {
        let number = ino.0.checked_sub(Ino::ROOT.0).ok_or(Errno::STALE)?;
        let id = NodeId(u32::try_from(number).map_err(|_not_ours| Errno::STALE)?);
        Ok((id, self.tree.get(id).ok_or(Errno::STALE)?))
    }

    fn directory(&self, ino: Ino) -> Result<(NodeId, &Children), Errno> {
        match self.node(ino)? {
            (id, Node { kind: NodeKind::Directory(children), .. }) => Ok((id, children)),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn attr(&self, id: NodeId, node: &Node) -> Attr {
        let (size, stored) = self.sizes(id, node);
        let device = match node.kind {
            NodeKind::CharDevice(major, minor) | NodeKind::BlockDevice(major, minor) => {
                (major, minor)
            }
            _ => (0, 0),
        };
        Attr {
            ino: ino_of(id).0,
            size,
            stored,
            mtime: (node.mtime.seconds, node.mtime.nanos),
            mode: file_type(&node.kind) | u32::from(node.mode),
            links: node.links,
            uid: node.uid,
            gid: node.gid,
            device,
        }
    }

    /// The size, and how many bytes are not in holes.
    fn sizes(&self, id: NodeId, node: &Node) -> (u64, u64) {
        match &node.kind {
            NodeKind::Directory(_) => (DIRECTORY_BYTES, DIRECTORY_BYTES),
            NodeKind::File(data) => match self.sparse.get(&id) {
                Some(index) => (data.size, index.stored_bytes()),
                None => (data.size, data.size),
            },
            NodeKind::Symlink(target) => (u64::try_from(target.len()).unwrap_or(0), 0),
            NodeKind::CharDevice(..) | NodeKind::BlockDevice(..) | NodeKind::Fifo => (0, 0),
        }
    }
}

impl Filesystem for TreeFs {
    fn names(&self) -> Names {
        Names::Fixed
    }

    fn xattrs(&self) -> Xattrs {
        self.files().map_or(Xattrs::Some, |files| files.xattrs)
    }

    fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attr>, Errno> {
        let files = self.files()?;
        let (_, children) = files.directory(parent)?;
        Ok(children.get(name).map(|&id| files.attr(id, files.tree.node(id))))
    }

    fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        let files = self.files()?;
        let (id, node) = files.node(ino)?;
        Ok(files.attr(id, node))
    }

    fn readlink(&self, ino: Ino) -> Result<Cow<'_, [u8]>, Errno> {
        match &self.files()?.node(ino)?.1.kind {
            NodeKind::Symlink(target) => Ok(Cow::Borrowed(target)),
            _ => Err(Errno::INVAL),
        }
    }

    fn parent(&self, directory: Ino) -> Result<Ino, Errno> {
        let files = self.files()?;
        let (id, _) = files.node(directory)?;
        Ok(ino_of(files.tree.parent(id)))
    }

    fn readdir(&self, directory: Ino, after: u64, sink: &mut DirSink<'_>) -> Result<(), Errno> {
        let files = self.files()?;
        let (id, children) = files.directory(directory)?;
        let n_before = usize::try_from(after).unwrap_or(usize::MAX);
        if n_before >= children.len() {
            return Ok(());
        }
        let stride = files.strides.get(&id).and_then(|names| names.get(n_before / STRIDE));
        let (from, skip) = match stride {
            Some(name) => (Bound::Included(&**name), n_before % STRIDE),
            None => (Bound::Unbounded, n_before),
        };
        let entries = children.range::<[u8], _>((from, Bound::Unbounded)).skip(skip);
        for (cookie, (name, &id)) in (after + 1..).zip(entries) {
            let attr = files.attr(id, files.tree.node(id));
            if !sink.push(&DirEntry { name, cookie, attr }) {
                break;
            }
        }
        Ok(())
    }

    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Cow<'_, [u8]>, Errno> {
        let (_, node) = self.files()?.node(ino)?;
        let found = node.xattrs.binary_search_by(|(other, _)| (**other).cmp(name));
        let place = found.map_err(|_missing| Errno::NODATA)?;
        Ok(Cow::Borrowed(&node.xattrs[place].1))
    }

    fn listxattr(&self, ino: Ino, names: &mut Vec<u8>) -> Result<(), Errno> {
        for (name, _) in &self.files()?.node(ino)?.1.xattrs {
            names.extend_from_slice(name);
            names.push(0);
        }
        Ok(())
    }

    fn statfs(&self) -> Statfs {
        self.files().map_or_else(|_lost| Statfs::default(), |files| files.figures)
    }

    fn read(&self, ino: Ino, range: Range<u64>, reply: ReadReply) {
        let files = match self.files() {
            Ok(files) => files,
            Err(errno) => return reply.error(errno),
        };
        let (id, data) = match files.node(ino) {
            Ok((id, Node { kind: NodeKind::File(data), .. })) => (id, data),
            Ok(_) => return reply.error(Errno::INVAL),
            Err(errno) => return reply.error(errno),
        };
        let range = range.start.min(data.size)..range.end.min(data.size);
        let Ok(len) = usize::try_from(range.end.saturating_sub(range.start)) else {
            return reply.error(Errno::INVAL);
        };
        if len == 0 {
            return reply.data(&[]);
        }
        match files.sparse.get(&id) {
            Some(index) => read_sparse(&*self.bytes, data, index, range, len, reply),
            None => {
                let at = data.offset.saturating_add(range.start);
                let stored = at..data.offset.saturating_add(range.end);
                let then = move |found: Result<(&std::fs::File, u64), Errno>| match found {
                    Ok((file, offset)) => reply.file(file, offset, len),
                    Err(errno) => reply.error(errno),
                };
                self.bytes.read(data.layer, stored, Box::new(then));
            }
        }
    }
}

/// All pieces of a range follow one another in the layer, so one stretch of it is enough.
fn read_sparse(
    bytes: &dyn Bytes,
    data: &FileData,
    index: &Arc<SparseIndex>,
    range: Range<u64>,
    len: usize,
    reply: ReadReply,
) {
    let stored = index.stored_range(&range);
    if stored.is_empty() {
        return reply.zeros(len);
    }
    let at = data.offset.saturating_add(stored.start);
    let stretch = at..data.offset.saturating_add(stored.end);
    let index = Arc::clone(index);
    let then = move |found: Result<(&std::fs::File, u64), Errno>| match found {
        // The pieces are made only now: waiting reads should need little memory.
        Ok((file, offset)) => reply.scattered(file, offset, len, &index.pieces_in(&range)),
        Err(errno) => reply.error(errno),
    };
    bytes.read(data.layer, stretch, Box::new(then));
}

fn ino_of(id: NodeId) -> Ino {
    Ino(u64::from(id.0) + Ino::ROOT.0)
}

fn file_type(kind: &NodeKind) -> u32 {
    match kind {
        NodeKind::Directory(_) => 0o040_000,
        NodeKind::File(_) => 0o100_000,
        NodeKind::Symlink(_) => 0o120_000,
        NodeKind::CharDevice(..) => 0o020_000,
        NodeKind::BlockDevice(..) => 0o060_000,
        NodeKind::Fifo => 0o010_000,
    }
}

fn xattrs_of(tree: &Tree) -> Xattrs {
    let mut names = tree.iter().flat_map(|(_, node)| &node.xattrs).map(|(name, _)| name).peekable();
    if names.peek().is_none() {
        return Xattrs::None;
    }
    if names.any(|name| name.starts_with(b"system.posix_acl_")) {
        return Xattrs::Acls;
    }
    Xattrs::Some
}

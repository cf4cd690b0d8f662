//! What a mounted tree looks like from above, and how two such views differ.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use oci::{Digest, Hasher};

use super::apply::list_xattrs;

/// All files of a tree by their paths from its root, without a leading slash; the root's is empty.
pub type Snapshot = BTreeMap<Vec<u8>, Entry>;

/// A file as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits with set-uid, set-gid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds rounded down, nanoseconds.
    pub mtime: (i64, i64),
    /// Extended attributes: names and values.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The number of links, of anything but directories: those count differently everywhere.
    pub links: u64,
    /// The first of the paths that lead to this same file; of a file of one name its own.
    pub first_path: Vec<u8>,
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file: size in bytes, and the digest of the content.
    File {
        /// Bytes.
        size: u64,
        /// Of what reading it gives.
        content: Digest,
    },
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// Looks at everything below `root`, and reads all of it. Symbolic links are not followed.
///
/// # Errors
/// The first file that cannot be looked at, with its path.
pub fn snapshot(root: &Path) -> io::Result<Snapshot> {
    let mut all = Snapshot::new();
    let mut first_paths = HashMap::new();
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let at = join(root, &path);
        let explain = |err: io::Error| {
            let kind = err.kind();
            io::Error::new(kind, Unreadable { path: path.clone(), source: err })
        };
        let metadata = at.symlink_metadata().map_err(explain)?;
        let first = first_paths.entry((metadata.dev(), metadata.ino()));
        let first_path = first.or_insert_with(|| path.clone()).clone();
        let entry = look(&at, &metadata, first_path).map_err(explain)?;
        if entry.kind == Kind::Directory {
            let mut names = Vec::new();
            for child in fs::read_dir(&at).map_err(explain)? {
                names.push(child.map_err(explain)?.file_name().into_vec());
            }
            // In order of paths, so that the first path of a file does not depend on the file system.
            names.sort_by(|a, b| b.cmp(a));
            let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
            waiting.extend(names.into_iter().map(|name| [&path, slash, &name].concat()));
        }
        all.insert(path, entry);
    }
    Ok(all)
}

/// A file that could not be looked at.
#[derive(Debug, thiserror::Error)]
#[error("looking at \"{}\"", path.escape_ascii())]
struct Unreadable {
    path: Vec<u8>,
    source: io::Error,
}

fn join(root: &Path, path: &[u8]) -> std::path::PathBuf {
    if path.is_empty() { root.to_path_buf() } else { root.join(std::ffi::OsStr::from_bytes(path)) }
}

fn look(at: &Path, metadata: &Metadata, first_path: Vec<u8>) -> io::Result<Entry> {
    let file_type = metadata.file_type();
    let device = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let kind = if file_type.is_dir() {
        Kind::Directory
    } else if file_type.is_symlink() {
        Kind::Symlink(fs::read_link(at)?.into_os_string().into_vec())
    } else if file_type.is_char_device() {
        Kind::CharDevice(device.0, device.1)
    } else if file_type.is_block_device() {
        Kind::BlockDevice(device.0, device.1)
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else if file_type.is_socket() {
        Kind::Socket
    } else {
        Kind::File { size: metadata.len(), content: digest_of(at)? }
    };
    let mut xattrs = BTreeMap::new();
    for name in list_xattrs(at)? {
        // A value can have 64 KiB at most.
        let mut value = Vec::with_capacity(64 << 10);
        let room = rustix::buffer::spare_capacity(&mut value);
        rustix::fs::lgetxattr(at, name.as_slice(), room)?;
        xattrs.insert(name, value);
    }
    let is_directory = kind == Kind::Directory;
    Ok(Entry {
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        xattrs,
        links: if is_directory { 0 } else { metadata.nlink() },
        first_path,
    })
}

fn digest_of(at: &Path) -> io::Result<Digest> {
    let mut file = File::open(at)?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..n]);
    }
}

/// How `found` differs from `expected`, a line for each path; empty if it does not.
#[must_use]
pub fn diff(expected: &Snapshot, found: &Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, entry) in expected {
        let name = path.escape_ascii();
        match found.get(path) {
            None => lines.push(format!("{name}: missing, expected {:?}", entry.kind)),
            Some(other) if other != entry => {
                lines.push(format!("{name}: {}", differences(entry, other).join("; ")));
            }
            Some(_) => {}
        }
    }
    for (path, entry) in found {
        if !expected.contains_key(path) {
            lines.push(format!("{}: not expected, found {:?}", path.escape_ascii(), entry.kind));
        }
    }
    lines
}

fn differences(expected: &Entry, found: &Entry) -> Vec<String> {
    let (a, b) = (expected, found);
    let fields = [
        ("kind", format!("{:?}", a.kind), format!("{:?}", b.kind)),
        ("mode", format!("{:04o}", a.mode), format!("{:04o}", b.mode)),
        ("owner", format!("{}:{}", a.uid, a.gid), format!("{}:{}", b.uid, b.gid)),
        ("mtime", format!("{:?}", a.mtime), format!("{:?}", b.mtime)),
        ("xattrs", readable(&a.xattrs), readable(&b.xattrs)),
        ("links", a.links.to_string(), b.links.to_string()),
        (
            "is the same file as",
            a.first_path.escape_ascii().to_string(),
            b.first_path.escape_ascii().to_string(),
        ),
    ];
    let differing = fields.into_iter().filter(|(_, a, b)| a != b);
    differing.map(|(field, a, b)| format!("{field} {b}, expected {a}")).collect()
}

fn readable(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> String {
    let pairs = xattrs
        .iter()
        .map(|(name, value)| format!("{}=\"{}\"", name.escape_ascii(), value.escape_ascii()));
    format!("[{}]", pairs.collect::<Vec<_>>().join(", "))
}

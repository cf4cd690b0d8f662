//! A layer out of folders of this machine.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use flate2::write::GzEncoder;
use oci::{Digest, Hasher};

use super::encode::{write_head, write_padding};
use super::entry::{TarEntry, TarKind};

/// A layer made by [`pack_directory`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedLayer {
    /// Where its blob is.
    pub path: PathBuf,
    /// The digest of the blob.
    pub digest: Digest,
    /// The size of the blob in bytes.
    pub size: u64,
    /// The digest of the tar.
    pub diff_id: Digest,
    /// The size of the tar in bytes.
    pub tar_size: u64,
    /// How many entries it has.
    pub entries: u64,
}

/// How far packing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackProgress<'a> {
    /// What was packed last.
    pub path: &'a Path,
    /// Entries so far.
    pub entries: u64,
    /// Bytes of tar so far.
    pub tar_bytes: u64,
}

/// Folders could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Something in the folders cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The layer cannot be written.
    #[error("writing the layer {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Packs folders and files of this machine, under their own absolute names, into the gzip layer `blob`.
///
/// Links, modes, owners, modification times, devices, `user.` attributes and capabilities are kept.
/// Sockets and what vanishes meanwhile are left out. Symbolic links are packed, not followed, except that
/// a path which leads through one brings both the link and what it leads to. The order is that of the
/// names, so the same folders make the same layer. `progress` is called after each entry.
///
/// # Errors
/// What cannot be read or written is named.
pub fn pack_directory<P: AsRef<Path>>(
    paths: &[P],
    blob: impl AsRef<Path>,
    progress: &mut dyn FnMut(PackProgress<'_>),
) -> Result<PackedLayer, PackError> {
    let blob = blob.as_ref();
    let write = |source| PackError::Write { path: blob.to_path_buf(), source };
    let file = File::create(blob).map_err(write)?;
    let gzip = GzEncoder::new(Hashed::new(BufWriter::new(file)), flate2::Compression::new(6));
    let mut packer = Packer {
        out: Hashed::new(gzip),
        blob,
        inodes: HashMap::new(),
        packed: std::collections::BTreeSet::new(),
        entries: 0,
        progress,
    };
    let mut roots = Vec::new();
    for path in paths {
        expand(path.as_ref(), &mut roots, 0)?;
    }
    roots.sort();
    roots.dedup();
    for root in &roots {
        packer.with_parents(root)?;
    }
    let Packer { mut out, entries, .. } = packer;
    out.write_all(&[0; 1024]).map_err(write)?;
    let (gzip, diff_id, tar_size) = out.finish();
    let (file, digest, size) = gzip.finish().map_err(write)?.finish();
    file.into_inner().map_err(|err| write(err.into_error()))?;
    Ok(PackedLayer { path: blob.to_path_buf(), digest, size, diff_id, tar_size, entries })
}

/// Adds `path` to the roots; if it leads through a symbolic link, also that link and where it leads.
fn expand(path: &Path, roots: &mut Vec<PathBuf>, depth: u32) -> Result<(), PackError> {
    let read = |source| PackError::Read { path: path.to_path_buf(), source };
    let path = &std::path::absolute(path).map_err(read)?;
    if path.components().any(|part| part == Component::ParentDir) {
        return expand(&path.canonicalize().map_err(read)?, roots, depth);
    }
    let mut ancestors: Vec<&Path> = path.ancestors().skip(1).collect();
    ancestors.reverse();
    for ancestor in ancestors {
        if fs::symlink_metadata(ancestor).map_err(read)?.is_symlink() && depth < 40 {
            roots.push(ancestor.to_path_buf());
            let target = fs::read_link(ancestor).map_err(read)?;
            let rest = path.strip_prefix(ancestor).map_err(io::Error::other).map_err(read)?;
            let parent = ancestor.parent().unwrap_or_else(|| Path::new("/"));
            let led = parent.join(target).join(rest);
            return expand(&led, roots, depth + 1);
        }
    }
    // What vanishes later is left out; what was never there is a mistake.
    path.symlink_metadata().map_err(read)?;
    roots.push(path.clone());
    Ok(())
}

struct Packer<'a> {
    out: Hashed<GzEncoder<Hashed<BufWriter<File>>>>,
    blob: &'a Path,
    /// The first name of each file that has several.
    inodes: HashMap<(u64, u64), Vec<u8>>,
    packed: std::collections::BTreeSet<PathBuf>,
    entries: u64,
    progress: &'a mut dyn FnMut(PackProgress<'_>),
}

impl Packer<'_> {
    fn with_parents(&mut self, path: &Path) -> Result<(), PackError> {
        let mut parents: Vec<&Path> = path.ancestors().skip(1).collect();
        parents.reverse();
        for parent in parents.into_iter().filter(|parent| parent.parent().is_some()) {
            self.one(parent)?;
        }
        self.all(path)
    }

    /// Packs `path` and everything in it. A stack of its own, as folders may be deep.
    fn all(&mut self, path: &Path) -> Result<(), PackError> {
        let mut waiting = vec![path.to_path_buf()];
        while let Some(path) = waiting.pop() {
            let Some(metadata) = self.one(&path)? else { continue };
            if !metadata.is_dir() {
                continue;
            }
            let read = |source| PackError::Read { path: path.clone(), source };
            let mut children = Vec::new();
            match fs::read_dir(&path) {
                Ok(entries) => {
                    for entry in entries {
                        children.push(entry.map_err(read)?.path());
                    }
                }
                Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
                Err(err) => return Err(read(err)),
            }
            children.sort();
            waiting.extend(children.into_iter().rev());
        }
        Ok(())
    }

    /// Packs `path` by itself, unless it is there already; `None` if it has vanished.
    fn one(&mut self, path: &Path) -> Result<Option<Metadata>, PackError> {
        let read = |source| PackError::Read { path: path.to_path_buf(), source };
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(read(err)),
        };
        // The layer itself may lie in what is packed.
        if path == self.blob || metadata.file_type().is_socket() {
            return Ok(None);
        }
        let name = path.strip_prefix("/").unwrap_or(path).as_os_str();
        if name.is_empty() || !self.packed.insert(path.to_path_buf()) {
            return Ok(Some(metadata));
        }
        let Some(kind) = self.kind_of(path, name, &metadata).map_err(read)? else {
            return Ok(None);
        };
        let entry = describe(name, kind, path, &metadata).map_err(read)?;
        let contained = matches!(entry.kind, TarKind::File(_));
        let file = match contained.then(|| File::open(path)).transpose() {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                // A later name of the same file must not link to this one.
                self.inodes.remove(&(metadata.dev(), metadata.ino()));
                return Ok(None);
            }
            Err(err) => return Err(read(err)),
        };
        self.write(&entry, file, metadata.len(), path)?;
        self.entries += 1;
        let (entries, tar_bytes) = (self.entries, self.out.len);
        (self.progress)(PackProgress { path, entries, tar_bytes });
        Ok(Some(metadata))
    }

    fn kind_of(
        &mut self,
        path: &Path,
        name: &OsStr,
        metadata: &Metadata,
    ) -> io::Result<Option<TarKind>> {
        let file_type = metadata.file_type();
        if file_type.is_dir() {
            return Ok(Some(TarKind::Directory));
        }
        if metadata.nlink() > 1 {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.inodes.get(&inode) {
                return Ok(Some(TarKind::HardLink(first.clone())));
            }
            self.inodes.insert(inode, name.as_bytes().to_vec());
        }
        let device = metadata.rdev();
        let device = (rustix::fs::major(device), rustix::fs::minor(device));
        Ok(Some(if file_type.is_symlink() {
            TarKind::Symlink(fs::read_link(path)?.into_os_string().as_bytes().to_vec())
        } else if file_type.is_file() {
            TarKind::File(b"".into())
        } else if file_type.is_char_device() {
            TarKind::CharDevice(device.0, device.1)
        } else if file_type.is_block_device() {
            TarKind::BlockDevice(device.0, device.1)
        } else if file_type.is_fifo() {
            TarKind::Fifo
        } else {
            return Ok(None);
        }))
    }

    fn write(
        &mut self,
        entry: &TarEntry,
        file: Option<File>,
        size: u64,
        path: &Path,
    ) -> Result<(), PackError> {
        let write = |source| PackError::Write { path: self.blob.to_path_buf(), source };
        let Some(file) = file else {
            return write_head(&mut self.out, entry, 0).map_err(write);
        };
        write_head(&mut self.out, entry, size).map_err(write)?;
        // A file that grows meanwhile is cut, one that shrinks is filled up: its size is written already.
        let mut content = file.take(size).chain(io::repeat(0)).take(size);
        let mut buffer = vec![0; 256 << 10];
        loop {
            let n = content
                .read(&mut buffer)
                .map_err(|source| PackError::Read { path: path.to_path_buf(), source })?;
            if n == 0 {
                break;
            }
            self.out.write_all(&buffer[..n]).map_err(write)?;
        }
        write_padding(&mut self.out, size).map_err(write)
    }
}

fn describe(name: &OsStr, kind: TarKind, path: &Path, metadata: &Metadata) -> io::Result<TarEntry> {
    let is_link = matches!(kind, TarKind::HardLink(_));
    let entry = match kind {
        TarKind::Directory => TarEntry::directory(name.as_bytes()),
        kind => TarEntry::new(name.as_bytes(), kind),
    };
    let nanos = u32::try_from(metadata.mtime_nsec()).map_err(io::Error::other)?;
    let mut entry = entry
        .mode(metadata.mode() & 0o7777)
        .owner(metadata.uid().into(), metadata.gid().into())
        .mtime(metadata.mtime(), nanos);
    if !is_link {
        entry.xattrs = xattrs(path)?;
    }
    Ok(entry)
}

/// The attributes that mean something on another machine.
fn xattrs(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut list = Vec::with_capacity(64 << 10);
    match rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut list)) {
        Ok(_len) => {}
        Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        Err(err) => return Err(err.into()),
    }
    let names = list.split(|&byte| byte == 0);
    let kept = names.filter(|name| name.starts_with(b"user.") || *name == b"security.capability");
    let mut found = Vec::new();
    for name in kept.filter(|name| !name.contains(&b'=')) {
        let mut value = Vec::with_capacity(64 << 10);
        rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value))?;
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}

/// Hashes and counts what is written.
struct Hashed<W> {
    out: W,
    hasher: Hasher,
    len: u64,
}

impl<W> Hashed<W> {
    fn new(out: W) -> Self {
        Self { out, hasher: Hasher::new(), len: 0 }
    }

    fn finish(self) -> (W, Digest, u64) {
        (self.out, self.hasher.finish(), self.len)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.len += u64::try_from(n).map_err(io::Error::other)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

//! Unpacking: each layer into an empty folder, and that over what the layers below left.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

use super::reader::{Header, next_header, padding};

/// A layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[error("unpacking entry \"{}\" of layer {layer}", name.escape_ascii())]
pub struct UntarError {
    /// The layer, counted from the lowest, 0.
    pub layer: usize,
    /// The entry, as it is named in the archive; of a broken archive the one before.
    pub name: Vec<u8>,
    /// Why not.
    pub source: io::Error,
}

/// Unpacks the uncompressed tars of an image's layers, the lowest first, into the folder `root`, which
/// is made if it is missing and belongs to root with mode 0755 unless an entry says otherwise.
///
/// Must run as root, on a file system with extended attributes. Attributes of overlayfs itself are left
/// out, and so are `user.` ones of what is neither a file nor a directory. Beside `root` a temporary
/// folder is used.
///
/// # Errors
/// The first entry that cannot be unpacked is named. What was unpacked so far stays.
pub fn untar<T: AsRef<[u8]>>(root: &Path, layers: &[T]) -> Result<(), UntarError> {
    let first = |source| UntarError { layer: 0, name: b".".to_vec(), source };
    fs::create_dir_all(root).map_err(first)?;
    describe(root, &implied_directory()).map_err(first)?;
    for (layer, tar) in layers.iter().enumerate() {
        let mut name = Vec::new();
        untar_layer(root, &mut tar.as_ref(), &mut name).map_err(|source| UntarError {
            layer,
            name,
            source,
        })?;
    }
    Ok(())
}

/// Unpacks one more layer over what is in `root`; `name` tells afterwards how far it came.
///
/// # Errors
/// Whatever an entry of that name met with.
pub fn untar_layer(root: &Path, tar: &mut dyn Read, name: &mut Vec<u8>) -> io::Result<()> {
    fs::create_dir_all(root)?;
    // Beside the root: hard links and renames must not cross file systems.
    let beside = root.canonicalize()?.parent().map(Path::to_path_buf).unwrap_or_default();
    let upper = tempfile::Builder::new().prefix("untar-").tempdir_in(beside)?;
    let mut layer = Layer::new(upper.path().join("upper"), root.to_path_buf())?;
    while let Some(header) = next_header(tar)? {
        name.clone_from(&header.name);
        layer.unpack(&header, tar)?;
        skip(tar, padding(header.size))?;
    }
    layer.lay_over()
}

/// A layer on its own.
struct Layer {
    upper: PathBuf,
    lower: PathBuf,
    /// What the layer's directories are like; those that are only parents of entries are not here.
    directories: BTreeMap<PathBuf, Header>,
    whiteouts: BTreeSet<PathBuf>,
    opaque: BTreeSet<PathBuf>,
}

impl Layer {
    fn new(upper: PathBuf, lower: PathBuf) -> io::Result<Self> {
        fs::create_dir(&upper)?;
        Ok(Self {
            upper,
            lower,
            directories: BTreeMap::new(),
            whiteouts: BTreeSet::new(),
            opaque: BTreeSet::new(),
        })
    }

    fn unpack(&mut self, header: &Header, tar: &mut dyn Read) -> io::Result<()> {
        let path = clean(&header.name);
        let (Some(parent), Some(base)) = (path.parent(), path.file_name()) else {
            if header.flag == b'5' {
                self.directories.insert(path, header.clone());
            }
            return skip(tar, header.size);
        };
        let parent = self.make_parents(parent)?;
        match base.as_bytes().strip_prefix(b".wh.") {
            Some(b".wh..opq") => {
                self.opaque.insert(parent);
                skip(tar, header.size)
            }
            // Notes of AUFS to itself.
            Some(other) if other.starts_with(b".wh.") => skip(tar, header.size),
            Some(hidden) => {
                self.whiteouts.insert(parent.join(OsStr::from_bytes(hidden)));
                skip(tar, header.size)
            }
            None => self.make(&parent.join(base), header, tar),
        }
    }

    /// Makes missing directories, mode 0755, and says where they are: symbolic links of this layer are
    /// followed, as containerd follows them.
    fn make_parents(&self, path: &Path) -> io::Result<PathBuf> {
        let resolved = resolve(&self.upper, path, 0)?;
        let mut made = PathBuf::new();
        for part in &resolved {
            made.push(part);
            match fs::create_dir(self.upper.join(&made)) {
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                    if !self.upper.join(&made).symlink_metadata()?.is_dir() {
                        return Err(io::ErrorKind::NotADirectory.into());
                    }
                }
                other => other?,
            }
        }
        Ok(resolved)
    }

    fn make(&mut self, path: &Path, header: &Header, tar: &mut dyn Read) -> io::Result<()> {
        let at = self.upper.join(path);
        let there = found(at.symlink_metadata())?;
        if header.flag == b'5' {
            if !there.as_ref().is_some_and(Metadata::is_dir) {
                self.remove(path, there.as_ref())?;
                fs::create_dir(&at)?;
            }
            self.directories.insert(path.to_path_buf(), header.clone());
            return Ok(());
        }
        self.remove(path, there.as_ref())?;
        if header.flag == b'3' && header.device == (0, 0) {
            // To overlayfs, which containerd leaves it to, this is a whiteout.
            self.whiteouts.insert(path.to_path_buf());
            return Ok(());
        }
        match header.flag {
            b'0' => write_file(&at, header, tar)?,
            b'1' => {
                let target = self.link_target(&header.link)?;
                return fs::hard_link(target, at);
            }
            b'2' => std::os::unix::fs::symlink(OsStr::from_bytes(&header.link), &at)?,
            flag => {
                let kind = match flag {
                    b'3' => FileType::CharacterDevice,
                    b'4' => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let (major, minor) = header.device;
                let device = rustix::fs::makedev(major, minor);
                rustix::fs::mknodat(CWD, &at, kind, Mode::from(0o600), device)?;
            }
        }
        describe(&at, header)
    }

    /// Removes what this layer has made so far at and below `path`.
    fn remove(&mut self, path: &Path, there: Option<&Metadata>) -> io::Result<()> {
        let at = self.upper.join(path);
        match there {
            None => return Ok(()),
            Some(metadata) if metadata.is_dir() => fs::remove_dir_all(at)?,
            Some(_) => fs::remove_file(at)?,
        }
        let below = |other: &PathBuf| other.starts_with(path);
        self.directories.retain(|other, _| !below(other));
        self.opaque.retain(|other| !below(other));
        // A whiteout of the name itself belongs to the parent.
        self.whiteouts.retain(|other| other == path || !below(other));
        Ok(())
    }

    /// A file of this layer, or else one of those below.
    fn link_target(&self, name: &[u8]) -> io::Result<PathBuf> {
        let path = clean(name);
        let (Some(parent), Some(base)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        for root in [&self.upper, &self.lower] {
            let target = root.join(resolve(root, parent, 0)?).join(base);
            if found(target.symlink_metadata())?.is_some() {
                return Ok(target);
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Removes from below what this layer hides, then moves everything down.
    fn lay_over(&self) -> io::Result<()> {
        self.merge(Path::new(""), &self.lower.symlink_metadata()?)
    }

    /// Lays a directory of the layer over a directory below, which `before` describes.
    fn merge(&self, path: &Path, before: &Metadata) -> io::Result<()> {
        let lower = self.lower.join(path);
        let opaque = self.opaque.contains(path);
        for child in fs::read_dir(&lower)? {
            let child = path.join(child?.file_name());
            if opaque || self.whiteouts.contains(&child) {
                remove_tree(&self.lower.join(child))?;
            }
        }
        let children: io::Result<Vec<_>> = fs::read_dir(self.upper.join(path))?.collect();
        for child in children? {
            let child = path.join(child.file_name());
            let (from, to) = (self.upper.join(&child), self.lower.join(&child));
            if !from.symlink_metadata()?.is_dir() {
                remove_tree(&to)?;
                fs::rename(from, to)?;
                continue;
            }
            match found(to.symlink_metadata())? {
                Some(below) if below.is_dir() => self.merge(&child, &below)?,
                _ => {
                    remove_tree(&to)?;
                    fs::create_dir(&to)?;
                    describe(&to, &implied_directory())?;
                    self.merge(&child, &to.symlink_metadata()?)?;
                }
            }
        }
        // At the end, since all that was done in the directory has changed its time.
        match self.directories.get(path) {
            Some(header) => {
                for name in list_xattrs(&lower)? {
                    rustix::fs::lremovexattr(&lower, name.as_slice())?;
                }
                describe(&lower, header)
            }
            None => set_mtime(&lower, before.mtime(), before.mtime_nsec()),
        }
    }
}

/// What a directory is like that no layer has an entry for.
fn implied_directory() -> Header {
    Header { mode: 0o755, ..Header::default() }
}

/// The components of a name, `.` and `..` taken lexically; nothing leads out of the root.
fn clean(name: &[u8]) -> PathBuf {
    let mut path = PathBuf::new();
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                path.pop();
            }
            part => path.push(OsStr::from_bytes(part)),
        }
    }
    path
}

/// Follows the symbolic links in `path` without leaving `root`; what does not exist stays as it is.
fn resolve(root: &Path, path: &Path, links: u32) -> io::Result<PathBuf> {
    let mut resolved = PathBuf::new();
    let mut parts = path.iter();
    while let Some(part) = parts.next() {
        let at = root.join(&resolved).join(part);
        let is_link = found(at.symlink_metadata())?.is_some_and(|there| there.is_symlink());
        if !is_link {
            resolved.push(part);
            continue;
        }
        if links > 255 {
            return Err(io::Error::other("too many symbolic links"));
        }
        let target = fs::read_link(at)?;
        let joined = resolved.join(target).join(parts.as_path());
        return resolve(root, &clean(joined.as_os_str().as_bytes()), links + 1);
    }
    Ok(resolved)
}

fn write_file(at: &Path, header: &Header, tar: &mut dyn Read) -> io::Result<()> {
    let mut file = File::create_new(at)?;
    let Some((pieces, size)) = &header.sparse else {
        let copied = io::copy(&mut tar.take(header.size), &mut file)?;
        if copied != header.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        return file.flush();
    };
    file.set_len(*size)?;
    for &(offset, len) in pieces {
        let mut piece = Vec::new();
        tar.take(len).read_to_end(&mut piece)?;
        if u64::try_from(piece.len()) != Ok(len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.write_all_at(&piece, offset)?;
    }
    Ok(())
}

/// Sets owner, mode, attributes and time, in the order in which the kernel leaves them alone: a change
/// of the owner clears set-uid bits and capabilities.
fn describe(at: &Path, header: &Header) -> io::Result<()> {
    let owner = (Uid::from_raw(header.uid), Gid::from_raw(header.gid));
    rustix::fs::chownat(CWD, at, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = at.symlink_metadata()?.file_type();
    if !kind.is_symlink() {
        fs::set_permissions(at, fs::Permissions::from_mode(header.mode))?;
    }
    for (name, value) in &header.xattrs {
        let refused = name.starts_with(b"user.") && !kind.is_file() && !kind.is_dir();
        if !refused && !name.starts_with(b"trusted.overlay.") {
            rustix::fs::lsetxattr(at, name.as_slice(), value, XattrFlags::empty())?;
        }
    }
    set_mtime(at, header.mtime.0, header.mtime.1.into())
}

fn set_mtime(at: &Path, seconds: i64, nanos: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, at, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// The names of the extended attributes.
pub(super) fn list_xattrs(at: &Path) -> io::Result<Vec<Vec<u8>>> {
    let mut list = Vec::with_capacity(64 << 10);
    match rustix::fs::llistxattr(at, rustix::buffer::spare_capacity(&mut list)) {
        Ok(_len) => {}
        Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        Err(err) => return Err(err.into()),
    }
    let names = list.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(<[u8]>::to_vec).collect())
}

fn remove_tree(at: &Path) -> io::Result<()> {
    match found(at.symlink_metadata())? {
        None => Ok(()),
        Some(there) if there.is_dir() => fs::remove_dir_all(at),
        Some(_) => fs::remove_file(at),
    }
}

fn skip(tar: &mut dyn Read, len: u64) -> io::Result<()> {
    io::copy(&mut tar.take(len), &mut io::sink()).map(|_len| ())
}

/// `None` for what does not exist, also below something that is not a directory.
fn found(metadata: io::Result<Metadata>) -> io::Result<Option<Metadata>> {
    match metadata {
        Ok(metadata) => Ok(Some(metadata)),
        Err(err)
            if matches!(err.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(err) => Err(err),
    }
}

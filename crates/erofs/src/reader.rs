//! Reading an image back, for tests and for checking foreign images: names, attributes and where
//! the bytes of files lie.
//!
//! Bounded and checked: time and memory are linear in the image's size whatever it says. Takes
//! uncompressed images with any block size, compact and extended inodes, and attributes that are not
//! shared.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod bytes;
mod content;
mod inode;
mod superblock;

use std::collections::{BTreeMap, btree_map::Entry};

pub use superblock::{DeviceSlot, Superblock};
use ztoc::Mtime;

use bytes::Source;

use crate::format::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG};

/// Everything that can be reached from an image's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// What the superblock and the device table say.
    pub superblock: Superblock,
    /// By inode number.
    pub inodes: BTreeMap<u64, Inode>,
}

/// An extended attribute: its name with the namespace prefix, and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A file of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Kind and permission bits, as `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// How many names it says it has.
    pub links: u32,
    /// Size in bytes.
    pub size: u64,
    /// Extended attributes (name with its namespace prefix, value), as they are stored.
    pub xattrs: Vec<Xattr>,
    /// What is in it.
    pub content: Content,
}

/// What is in a file of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The entries of a directory, `.` and `..` among them, ordered by name.
    Directory(Vec<DirectoryEntry>),
    /// Where the bytes of a regular file lie; together as long as the file.
    File(Vec<Extent>),
    /// The target of a symbolic link.
    Symlink(Vec<u8>),
    /// Major and minor number of a device.
    Device(u32, u32),
    /// A named pipe or a socket.
    Empty,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The number of its inode.
    pub nid: u64,
    /// The kind of the file, as the directory has it.
    pub file_type: u8,
}

/// A contiguous part of a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub bytes: u64,
    /// Where it lies; a hole lies nowhere.
    pub place: Option<Place>,
}

/// A byte of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// 0 is the image itself, n the device of slot n - 1.
    pub device: u16,
    /// Offset in bytes.
    pub offset: u64,
}

/// An image could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The image is cut off or says something impossible.
    #[error("the image is corrupt at byte {at}: {what}")]
    Corrupt {
        /// Where.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The image uses a feature that this reader does not have.
    #[error("cannot read an image with {what}")]
    Unsupported {
        /// The feature.
        what: &'static str,
    },
}

/// Reads an image.
///
/// # Errors
/// When it is not a well-formed EROFS image whose directories are a tree, or uses compression, shared
/// attributes or other features that images written here do not.
pub fn read_image(image: &[u8]) -> Result<Listing, ReadError> {
    let mut source = Source::new(image);
    let superblock = superblock::read(&source)?;
    let mut inodes = BTreeMap::new();
    let mut directories = vec![(superblock.root_nid, superblock.root_nid)];
    let root = inode::read(&mut source, &superblock, superblock.root_nid)?;
    if root.mode & S_IFMT != S_IFDIR {
        return Err(ReadError::Corrupt { at: 0, what: "the root is not a directory" });
    }
    inodes.insert(superblock.root_nid, root);
    while let Some((nid, parent)) = directories.pop() {
        let Some(Content::Directory(entries)) = inodes.get(&nid).map(|inode| &inode.content) else {
            continue;
        };
        for entry in entries.clone() {
            let corrupt = |what| ReadError::Corrupt { at: superblock.inode_at(entry.nid), what };
            match &*entry.name {
                b"." if entry.nid != nid => return Err(corrupt("'.' is another directory")),
                b".." if entry.nid != parent => return Err(corrupt("'..' is not the parent")),
                b"." | b".." => continue,
                _ => {}
            }
            let is_directory = |inode: &Inode| inode.mode & S_IFMT == S_IFDIR;
            let child = match inodes.entry(entry.nid) {
                Entry::Vacant(vacant) => {
                    let child = vacant.insert(inode::read(&mut source, &superblock, entry.nid)?);
                    if is_directory(child) {
                        directories.push((entry.nid, nid));
                    }
                    child
                }
                Entry::Occupied(seen) if is_directory(seen.get()) => {
                    return Err(corrupt("a directory has two names"));
                }
                Entry::Occupied(seen) => seen.into_mut(),
            };
            if file_type(child.mode) != Some(entry.file_type) {
                return Err(corrupt("an entry has another type than its inode"));
            }
        }
    }
    Ok(Listing { superblock, inodes })
}

/// The type that directory entries give a file of that mode.
fn file_type(mode: u16) -> Option<u8> {
    match mode & S_IFMT {
        S_IFREG => Some(1),
        S_IFDIR => Some(2),
        S_IFCHR => Some(3),
        S_IFBLK => Some(4),
        S_IFIFO => Some(5),
        S_IFSOCK => Some(6),
        S_IFLNK => Some(7),
        _ => None,
    }
}

const S_IFSOCK: u16 = 0o140_000;

//! One inode with its attributes.

use ztoc::Mtime;

use super::{
    Inode, ReadError, Superblock, Xattr,
    bytes::{Fields, Source},
    content,
};
use crate::format::{INODE_EXTENDED, LAYOUT_SHIFT, XATTR_ENTRY_BYTES, XATTR_PREFIXES};

/// Where an inode is and what of it says where its content is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) at: u64,
    pub(super) data_layout: u16,
    pub(super) mode: u16,
    pub(super) size: u64,
    /// `i_u`.
    pub(super) union: u32,
    /// The byte after the inode and its attributes.
    pub(super) end: u64,
}

pub(super) fn read(
    source: &mut Source<'_>,
    superblock: &Superblock,
    nid: u64,
) -> Result<Inode, ReadError> {
    let at = superblock.inode_at(nid);
    let format = source.get(at, 2)?.u16_at(0);
    if format >> LAYOUT_SHIFT > 0b111 {
        return Err(ReadError::Unsupported { what: "inode flags that Linux 5.16 does not know" });
    }
    let bytes = if format & INODE_EXTENDED == 0 { 32 } else { 64 };
    let raw = source.take(at, bytes)?;
    let xattr_bytes = match raw.u16_at(2) {
        0 => 0,
        1 => return Err(ReadError::Corrupt { at, what: "attributes without attributes" }),
        count => u64::from(count).saturating_sub(1).saturating_mul(4).saturating_add(12),
    };
    let xattrs_at = at.saturating_add(bytes);
    let xattrs = source.take(xattrs_at, xattr_bytes)?;
    let mut inode = if bytes == 32 { compact(raw, superblock) } else { extended(raw) };
    inode.xattrs = read_xattrs(xattrs, xattrs_at)?;
    let head = Head {
        at,
        data_layout: format >> LAYOUT_SHIFT,
        mode: inode.mode,
        size: inode.size,
        union: raw.u32_at(16),
        end: xattrs_at.saturating_add(xattr_bytes),
    };
    inode.content = content::read(source, superblock, &head)?;
    Ok(inode)
}

fn compact(raw: &[u8], superblock: &Superblock) -> Inode {
    let (seconds, nanos) = superblock.epoch;
    Inode {
        mode: raw.u16_at(4),
        uid: u32::from(raw.u16_at(24)),
        gid: u32::from(raw.u16_at(26)),
        mtime: Mtime { seconds: seconds.saturating_add(i64::from(raw.u32_at(12))), nanos },
        links: u32::from(raw.u16_at(6)),
        size: u64::from(raw.u32_at(8)),
        xattrs: Vec::new(),
        content: super::Content::Empty,
    }
}

fn extended(raw: &[u8]) -> Inode {
    Inode {
        mode: raw.u16_at(4),
        uid: raw.u32_at(24),
        gid: raw.u32_at(28),
        mtime: Mtime { seconds: raw.u64_at(32).cast_signed(), nanos: raw.u32_at(40) },
        links: raw.u32_at(44),
        size: raw.u64_at(8),
        xattrs: Vec::new(),
        content: super::Content::Empty,
    }
}

fn read_xattrs(body: &[u8], at: u64) -> Result<Vec<Xattr>, ReadError> {
    let mut xattrs = Vec::new();
    let Some((header, mut rest)) = body.split_at_checked(12) else {
        return Ok(xattrs);
    };
    if header.u8_at(4) != 0 {
        return Err(ReadError::Unsupported { what: "shared extended attributes" });
    }
    while !rest.is_empty() {
        let (entry, after) = split_entry(rest)
            .ok_or(ReadError::Corrupt { at, what: "an attribute goes on past the inode's" })?;
        rest = after;
        let prefix = XATTR_PREFIXES.iter().find(|(number, _)| *number == entry.u8_at(1));
        let Some((_, prefix)) = prefix else {
            return Err(ReadError::Unsupported { what: "an unknown attribute prefix" });
        };
        let (suffix, value) = entry
            .split_at_checked(XATTR_ENTRY_BYTES)
            .and_then(|(_, rest)| rest.split_at_checked(usize::from(entry.u8_at(0))))
            .unwrap_or_default();
        let value = value.get(..usize::from(entry.u16_at(2))).unwrap_or_default();
        xattrs.push(([*prefix, suffix].concat(), value.to_vec()));
    }
    Ok(xattrs)
}

/// The first entry of `rest` and what is after it and its padding.
fn split_entry(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let bytes = XATTR_ENTRY_BYTES
        .checked_add(usize::from(rest.u8_at(0)))?
        .checked_add(usize::from(rest.u16_at(2)))?;
    rest.split_at_checked(bytes.checked_next_multiple_of(4)?)
}

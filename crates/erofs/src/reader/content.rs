//! The content of one inode.

use super::{
    Content, DirectoryEntry, Extent, Place, ReadError, Superblock,
    bytes::{Fields, Source},
    inode::Head,
};
use crate::format::{
    CHUNK_FORMAT_BLOCK_BITS, CHUNK_FORMAT_INDEXES, CHUNK_INDEX_BYTES, DIRENT_BYTES,
    LAYOUT_CHUNK_BASED, LAYOUT_FLAT_INLINE, LAYOUT_FLAT_PLAIN, NULL_ADDRESS, S_IFBLK, S_IFCHR,
    S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG,
};

/// Linux' largest file offset.
const MAX_SIZE: u64 = i64::MAX.cast_unsigned();

pub(super) fn read(
    source: &mut Source<'_>,
    superblock: &Superblock,
    head: &Head,
) -> Result<Content, ReadError> {
    let corrupt = |what| ReadError::Corrupt { at: head.at, what };
    if head.size > MAX_SIZE {
        return Err(corrupt("a file is larger than files can be"));
    }
    match head.mode & S_IFMT {
        S_IFREG => Ok(Content::File(extents(source, superblock, head)?)),
        S_IFDIR => {
            let bytes = flat_bytes(source, superblock, head)?;
            let entries = directory(&bytes, superblock, head.at)?;
            Ok(Content::Directory(entries))
        }
        S_IFLNK => Ok(Content::Symlink(flat_bytes(source, superblock, head)?)),
        S_IFCHR | S_IFBLK => {
            let device = head.union;
            let minor = (device & 0xff) | ((device >> 12) & 0xf_ff00);
            Ok(Content::Device((device >> 8) & 0xfff, minor))
        }
        S_IFIFO | super::S_IFSOCK => Ok(Content::Empty),
        _ => Err(corrupt("a file is of no known type")),
    }
}

fn extents(
    source: &mut Source<'_>,
    superblock: &Superblock,
    head: &Head,
) -> Result<Vec<Extent>, ReadError> {
    if head.data_layout == LAYOUT_CHUNK_BASED {
        return chunks(source, superblock, head);
    }
    let parts = flat_parts(superblock, head)?.into_iter();
    let extent = |(at, bytes)| Extent { bytes, place: Some(Place { device: 0, offset: at }) };
    Ok(parts.filter(|(_, bytes)| *bytes > 0).map(extent).collect())
}

/// Where content that is in the image itself lies: (byte, length) of its blocks, then of its tail.
fn flat_parts(superblock: &Superblock, head: &Head) -> Result<[(u64, u64); 2], ReadError> {
    let block = superblock.block_bytes();
    let tail = match head.data_layout {
        LAYOUT_FLAT_PLAIN => 0,
        LAYOUT_FLAT_INLINE => head.size.checked_rem(block).unwrap_or(0),
        _ => return Err(ReadError::Unsupported { what: "compressed files" }),
    };
    let in_block = head.end.checked_rem(block).unwrap_or(0);
    if tail > block.saturating_sub(in_block) {
        let what = "a tail goes over the end of a block";
        return Err(ReadError::Corrupt { at: head.at, what });
    }
    let at = u64::from(head.union).saturating_mul(block);
    Ok([(at, head.size.saturating_sub(tail)), (head.end, tail)])
}

fn flat_bytes(
    source: &mut Source<'_>,
    superblock: &Superblock,
    head: &Head,
) -> Result<Vec<u8>, ReadError> {
    let parts = flat_parts(superblock, head)?.into_iter();
    let mut bytes = Vec::new();
    for (at, len) in parts.filter(|(_, len)| *len > 0) {
        bytes.extend_from_slice(source.take(at, len)?);
    }
    Ok(bytes)
}

fn chunks(
    source: &mut Source<'_>,
    superblock: &Superblock,
    head: &Head,
) -> Result<Vec<Extent>, ReadError> {
    let corrupt = |what| ReadError::Corrupt { at: head.at, what };
    let format = u16::try_from(head.union).map_err(|_wide| corrupt("bad chunk format"))?;
    if format & !CHUNK_FORMAT_BLOCK_BITS != CHUNK_FORMAT_INDEXES {
        return Err(ReadError::Unsupported { what: "chunks that are not indexes" });
    }
    let bits = u32::from(superblock.block_bits)
        .saturating_add(u32::from(format & CHUNK_FORMAT_BLOCK_BITS));
    let chunk_bytes = 1_u64.checked_shl(bits).ok_or_else(|| corrupt("chunks are too large"))?;
    let n_chunks = head.size.div_ceil(chunk_bytes);
    let array_at = head.end.next_multiple_of(CHUNK_INDEX_BYTES);
    let array = source.take(array_at, n_chunks.saturating_mul(CHUNK_INDEX_BYTES))?;
    let mut extents: Vec<Extent> = Vec::new();
    let mut left = head.size;
    for entry in array.chunks_exact(8) {
        let bytes = left.min(chunk_bytes);
        left = left.saturating_sub(bytes);
        let address = entry.u32_at(4);
        let device = entry.u16_at(2);
        if usize::from(device) > superblock.devices.len() {
            return Err(corrupt("a chunk is on a device that does not exist"));
        }
        let offset = u64::from(address).saturating_mul(superblock.block_bytes());
        let place = (address != NULL_ADDRESS).then_some(Place { device, offset });
        match extents.last_mut() {
            Some(last) if continues(last, place) => last.bytes = last.bytes.saturating_add(bytes),
            _ => extents.push(Extent { bytes, place }),
        }
    }
    Ok(extents)
}

/// Whether a chunk at `place` is the continuation of `extent`.
fn continues(extent: &Extent, place: Option<Place>) -> bool {
    let end = |last: Place| Place { offset: last.offset.saturating_add(extent.bytes), ..last };
    extent.place.map(end) == place
}

fn directory(
    bytes: &[u8],
    superblock: &Superblock,
    at: u64,
) -> Result<Vec<DirectoryEntry>, ReadError> {
    let corrupt = |what| ReadError::Corrupt { at, what };
    let block_bytes = usize::try_from(superblock.block_bytes()).unwrap_or(usize::MAX);
    let mut entries: Vec<DirectoryEntry> = Vec::new();
    for block in bytes.chunks(block_bytes) {
        let in_block =
            directory_block(block).ok_or_else(|| corrupt("a directory block is malformed"))?;
        for entry in in_block {
            if entries.last().is_some_and(|last| last.name >= entry.name) {
                return Err(corrupt("names are not in order"));
            }
            entries.push(entry);
        }
    }
    let has =
        |name: &[u8]| entries.binary_search_by(|entry| entry.name.as_slice().cmp(name)).is_ok();
    if !has(b".") || !has(b"..") {
        return Err(corrupt("a directory has no '.' or no '..'"));
    }
    Ok(entries)
}

fn directory_block(block: &[u8]) -> Option<Vec<DirectoryEntry>> {
    let names_at = usize::from(block.u16_at(8));
    if names_at == 0 || !names_at.is_multiple_of(DIRENT_BYTES) {
        return None;
    }
    let raw: Vec<&[u8]> = block.get(..names_at)?.chunks_exact(DIRENT_BYTES).collect();
    let starts = raw.iter().map(|entry| usize::from(entry.u16_at(8)));
    let ends = starts.clone().skip(1).map(Some).chain([None]);
    let entry = |((raw, start), end): ((&&[u8], usize), Option<usize>)| {
        let name = match end {
            Some(end) => block.get(start..end)?,
            None => block.get(start..)?.split(|byte| *byte == 0).next()?,
        };
        let is_name = !name.is_empty()
            && name.len() <= 255
            && !name.iter().any(|byte| matches!(byte, 0 | b'/'));
        is_name.then(|| DirectoryEntry {
            name: name.to_vec(),
            nid: raw.u64_at(0),
            file_type: raw.u8_at(10),
        })
    };
    raw.iter().zip(starts).zip(ends).map(entry).collect()
}

//! One tar header block: v7, ustar, star and GNU.

use super::pax::{self, Records};
use crate::toc::{EntryKind, Mtime, TocEntry};

/// Everything in a tar comes in blocks of this many bytes.
pub(super) const BLOCK: usize = 512;

pub(super) type Block = [u8; BLOCK];

/// The fields of one header, not yet overridden by PAX or GNU records.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) flag: u8,
    pub(super) size: i64,
    format: Format,
    name: Vec<u8>,
    linkname: Vec<u8>,
    mode: i64,
    uid: i64,
    gid: i64,
    mtime: i64,
    uname: Vec<u8>,
    gname: Vec<u8>,
    device: (i64, i64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

const BAD_NUMBER: &str = "bad number";

impl Header {
    pub(super) fn parse(block: &Block) -> Result<Self, &'static str> {
        if !checksum_matches(block) {
            return Err("wrong checksum");
        }
        let format = format(block);
        let mut header = Self {
            flag: field(block, 156, 1).first().copied().unwrap_or_default(),
            size: numeric(field(block, 124, 12)).ok_or(BAD_NUMBER)?,
            format,
            name: string(field(block, 0, 100)).to_vec(),
            linkname: string(field(block, 157, 100)).to_vec(),
            mode: numeric(field(block, 100, 8)).ok_or(BAD_NUMBER)?,
            uid: numeric(field(block, 108, 8)).ok_or(BAD_NUMBER)?,
            gid: numeric(field(block, 116, 8)).ok_or(BAD_NUMBER)?,
            mtime: numeric(field(block, 136, 12)).ok_or(BAD_NUMBER)?,
            uname: Vec::new(),
            gname: Vec::new(),
            device: (0, 0),
        };
        if format != Format::V7 {
            header.uname = string(field(block, 265, 32)).to_vec();
            header.gname = string(field(block, 297, 32)).to_vec();
            let major = numeric(field(block, 329, 8)).ok_or(BAD_NUMBER)?;
            let minor = numeric(field(block, 337, 8)).ok_or(BAD_NUMBER)?;
            header.device = (major, minor);
            let prefix = prefix(block, format)?;
            if !prefix.is_empty() {
                header.name = [prefix, b"/", &header.name].concat();
            }
        }
        Ok(header)
    }

    /// The entry that this header and the PAX records before it describe, and its size field. Its
    /// kind, place and size are still to be set. `None` if a record holds no number where one must
    /// stand.
    pub(super) fn entry(&self, records: Records) -> Option<(TocEntry, i64)> {
        let mut entry = TocEntry {
            name: self.name.clone(),
            kind: EntryKind::File,
            offset: 0,
            size: 0,
            linkname: self.linkname.clone(),
            mode: low_bits(self.mode),
            uid: low_bits(self.uid),
            gid: low_bits(self.gid),
            uname: self.uname.clone(),
            gname: self.gname.clone(),
            mtime: Mtime { seconds: self.mtime, nanos: 0 },
            device: (low_bits(self.device.0), low_bits(self.device.1)),
            pax: Vec::new(),
            sparse: None,
        };
        let mut size = self.size;
        for (key, value) in &records {
            // An empty value keeps what the header says.
            if value.is_empty() {
                continue;
            }
            match key.as_slice() {
                b"path" => entry.name.clone_from(value),
                b"linkpath" => entry.linkname.clone_from(value),
                b"uname" => entry.uname.clone_from(value),
                b"gname" => entry.gname.clone_from(value),
                b"uid" => entry.uid = low_bits(pax::integer(value)?),
                b"gid" => entry.gid = low_bits(pax::integer(value)?),
                b"size" => size = pax::integer(value)?,
                b"mtime" => entry.mtime = pax::time(value)?,
                _ => {}
            }
        }
        entry.pax = records;
        Some((entry, size))
    }
}

/// What a type flag makes; `None` for those that container runtimes refuse to unpack.
pub(super) fn kind(flag: u8, name: &[u8]) -> Option<EntryKind> {
    Some(match flag {
        // Archives older than POSIX mark directories by their name alone.
        0 if name.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' | b'7' | b'S' => EntryKind::File,
        b'1' => EntryKind::HardLink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::CharDevice,
        b'4' => EntryKind::BlockDevice,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        _ => return None,
    })
}

/// The bytes up to the first NUL.
pub(super) fn string(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// How many bytes follow `len` bytes up to the next block.
pub(super) fn padding(len: u64) -> u64 {
    len.wrapping_neg() % 512
}

pub(super) fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// What a GNU `S` header says about its sparse file.
#[derive(Debug)]
pub(super) struct GnuSparse {
    pub(super) pieces: Vec<(u64, u64)>,
    pub(super) logical_size: u64,
    /// Whether extension blocks with more pieces follow.
    pub(super) more: bool,
}

pub(super) fn gnu_sparse(header: &Header, block: &Block) -> Option<GnuSparse> {
    if header.format != Format::Gnu {
        return None;
    }
    let logical_size = u64::try_from(numeric(field(block, 483, 12))?).ok()?;
    let mut pieces = Vec::new();
    let more = sparse_array(field(block, 386, 97), &mut pieces)?;
    Some(GnuSparse { pieces, logical_size, more })
}

/// Adds the pieces of an extension block.
pub(super) fn sparse_extension(block: &Block, map: &mut GnuSparse) -> Option<()> {
    map.more = sparse_array(field(block, 0, 505), &mut map.pieces)?;
    Some(())
}

fn sparse_array(array: &[u8], pieces: &mut Vec<(u64, u64)>) -> Option<bool> {
    let chunks = array.chunks_exact(24);
    let more = chunks.remainder().first().is_some_and(|&flag| flag > 0);
    for chunk in chunks {
        let (offset, len) = chunk.split_at_checked(12)?;
        // As GNU and BSD tar: the first unused slot ends the list of this block.
        if offset.first() == Some(&0) {
            break;
        }
        pieces.push((u64::try_from(numeric(offset)?).ok()?, u64::try_from(numeric(len)?).ok()?));
    }
    Some(more)
}

fn field(block: &Block, at: usize, len: usize) -> &[u8] {
    block.get(at..at.saturating_add(len)).unwrap_or_default()
}

/// The header's sum, counted over unsigned bytes (POSIX) or signed ones (old Sun tar), with the
/// field itself as spaces.
fn checksum_matches(block: &Block) -> bool {
    let Some(expected) = octal(field(block, 148, 8)) else { return false };
    let (mut unsigned, mut signed) = (0_i64, 0_i64);
    for (at, &byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { byte };
        unsigned = unsigned.saturating_add(i64::from(byte));
        signed = signed.saturating_add(i64::from(byte.cast_signed()));
    }
    expected == unsigned || expected == signed
}

fn format(block: &Block) -> Format {
    match (field(block, 257, 6), field(block, 263, 2), field(block, 508, 4)) {
        (b"ustar\0", _, b"tar\0") => Format::Star,
        (b"ustar\0", _, _) => Format::Ustar,
        (b"ustar ", b" \0", _) => Format::Gnu,
        _ => Format::V7,
    }
}

fn prefix(block: &Block, format: Format) -> Result<&[u8], &'static str> {
    match format {
        Format::V7 => Ok(&[]),
        Format::Ustar => Ok(string(field(block, 345, 155))),
        Format::Star => {
            for at in [476, 488] {
                numeric(field(block, at, 12)).ok_or(BAD_NUMBER)?;
            }
            Ok(string(field(block, 345, 131)))
        }
        // Go before 1.8 wrote a prefix where GNU has two times. If they are no numbers, and there
        // is plain text, it is one of those.
        Format::Gnu => {
            let is_time = |at| {
                let time = field(block, at, 12);
                time.first() == Some(&0) || numeric(time).is_some()
            };
            let text = string(field(block, 345, 155));
            let is_prefix = !(is_time(345) && is_time(357)) && text.is_ascii();
            Ok(if is_prefix { text } else { &[] })
        }
    }
}

/// A number in octal digits, or in base 256 (two's complement, big-endian) if the first bit is set.
fn numeric(bytes: &[u8]) -> Option<i64> {
    match bytes.first() {
        Some(first) if first & 0x80 != 0 => base_256(bytes),
        _ => octal(bytes),
    }
}

fn base_256(bytes: &[u8]) -> Option<i64> {
    let negative = bytes.first()? & 0x40 != 0;
    let mut number = 0_u64;
    for (at, &byte) in bytes.iter().enumerate() {
        let byte = if negative { !byte } else { byte };
        let byte = if at == 0 { byte & 0x7f } else { byte };
        if number >> 56 != 0 {
            return None;
        }
        number = number << 8 | u64::from(byte);
    }
    let number = i64::try_from(number).ok()?;
    Some(if negative { !number } else { number })
}

/// Octal digits between spaces and NULs; nothing but those is zero.
fn octal(bytes: &[u8]) -> Option<i64> {
    let is_filler = |byte: &u8| matches!(byte, b' ' | 0);
    let start = bytes.iter().position(|byte| !is_filler(byte)).unwrap_or(bytes.len());
    let end =
        bytes.iter().rposition(|byte| !is_filler(byte)).map_or(start, |at| at.saturating_add(1));
    let digits = string(bytes.get(start..end)?);
    // At most 12 digits: 36 bits.
    digits.iter().try_fold(0_i64, |number, digit| match digit {
        b'0'..=b'7' => Some(number << 3 | i64::from(digit & 7)),
        _ => None,
    })
}

/// Go keeps owners as wide integers and SOCI cuts them when it writes; so do we.
fn low_bits(number: i64) -> u32 {
    u32::try_from(number & 0xffff_ffff).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let check = |bytes: &[u8], expected| assert_eq!(numeric(bytes), expected, "{bytes:?}");
        check(b"0000644\0", Some(0o644));
        check(b"   644 \0", Some(0o644));
        check(b"\0\0\0\0", Some(0));
        check(b"", Some(0));
        check(b"0000648\0", None);
        check(b"64\x004\0\0", Some(0o64));
        check(b"+644", None);
        check(b"\x80\0\0\0\0\0\x01\0", Some(256));
        check(b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1));
        check(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX));
        check(b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None);
        check(b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None);
    }
}

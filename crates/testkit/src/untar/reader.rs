//! A small tar reader: ustar, PAX records, GNU's long names and all forms of sparse files.

use std::collections::BTreeMap;
use std::io::{self, Read};

/// What is wrong with a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TarFault {
    /// The checksum of a header is wrong.
    #[error("a header with a wrong checksum")]
    Checksum,
    /// A field is not a number, or one that makes no sense.
    #[error("a field that is not a number")]
    Number,
    /// The PAX records are not records.
    #[error("broken PAX records")]
    Records,
    /// The map of a sparse file does not fit the file.
    #[error("a broken sparse map")]
    Sparse,
    /// An entry that is nothing which can be unpacked.
    #[error("an entry of unknown type {0:#04x}")]
    Type(u8),
    /// The tar ends within an entry, or records are longer than any sensible ones.
    #[error("an entry that is cut short, or records of an absurd length")]
    Length,
}

/// An entry without its data.
#[derive(Debug, Clone, Default)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    /// As in the archive, but never an old or a special form: `0` to `6` only.
    pub(super) flag: u8,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes in the archive.
    pub(super) size: u64,
    /// Pieces (offset, length) and size of a sparse file.
    pub(super) sparse: Option<(Vec<(u64, u64)>, u64)>,
}

type Records = BTreeMap<Vec<u8>, Vec<u8>>;
type Block = [u8; 512];

/// The longest records and names that are believed.
const RECORDS_LIMIT: u64 = 64 << 20;

/// Reads entries. After each the caller has to read its data and [`padding`].
pub(super) fn next_header(tar: &mut dyn Read) -> io::Result<Option<Header>> {
    let mut records = Records::new();
    let (mut long_name, mut long_link) = (None, None);
    loop {
        let Some(block) = read_header_block(tar)? else { return Ok(None) };
        let flag = block[156];
        match flag {
            b'x' => records = parse_records(&read_meta(tar, &block)?)?,
            b'g' => {
                // Neither Go nor containerd applies global records to the entries.
                read_meta(tar, &block)?;
            }
            b'L' => long_name = Some(text(&read_meta(tar, &block)?).to_vec()),
            b'K' => long_link = Some(text(&read_meta(tar, &block)?).to_vec()),
            _ => {
                let mut header = header_of(&block, &records)?;
                header.name = long_name.unwrap_or(header.name);
                header.link = long_link.unwrap_or(header.link);
                read_sparse(tar, &block, &records, &mut header)?;
                header.flag = match flag {
                    // Directories from before there was a flag for them.
                    0 if header.name.ends_with(b"/") => b'5',
                    0 | b'0' | b'7' | b'S' => b'0',
                    b'1'..=b'6' => flag,
                    _ => return Err(fault(TarFault::Type(flag))),
                };
                if header.flag != b'0' {
                    header.size = 0;
                }
                return Ok(Some(header));
            }
        }
    }
}

/// How many bytes follow `size` bytes of data up to the next block.
pub(super) const fn padding(size: u64) -> u64 {
    size.wrapping_neg() % 512
}

pub(super) fn fault(fault: TarFault) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, fault)
}

/// The next block that is a header; `None` at the end of the archive.
fn read_header_block(tar: &mut dyn Read) -> io::Result<Option<Block>> {
    let mut bytes = Vec::new();
    tar.take(512).read_to_end(&mut bytes)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let block: Block = bytes.try_into().map_err(|_short| fault(TarFault::Length))?;
    if block == [0; 512] {
        return Ok(None);
    }
    let sum = |from: usize, to: usize| block[from..to].iter().map(|&b| i128::from(b)).sum::<i128>();
    let expected = sum(0, 148) + 8 * i128::from(b' ') + sum(156, 512);
    if number(&block[148..156])? != expected {
        return Err(fault(TarFault::Checksum));
    }
    Ok(Some(block))
}

fn read_block(tar: &mut dyn Read) -> io::Result<Block> {
    let mut block = [0; 512];
    tar.read_exact(&mut block)?;
    Ok(block)
}

/// The data of a header that describes others.
fn read_meta(tar: &mut dyn Read, block: &Block) -> io::Result<Vec<u8>> {
    let size = unsigned(number(&block[124..136])?)?;
    if size > RECORDS_LIMIT {
        return Err(fault(TarFault::Length));
    }
    let mut data = Vec::new();
    let read = tar.take(size + padding(size)).read_to_end(&mut data)?;
    let size = usize::try_from(size).map_err(io::Error::other)?;
    if read < size {
        return Err(fault(TarFault::Length));
    }
    data.truncate(size);
    Ok(data)
}

fn header_of(block: &Block, records: &Records) -> io::Result<Header> {
    let is_ustar = &block[257..263] == b"ustar\0";
    let name = text(&block[..100]);
    let prefix = if is_ustar { text(&block[345..500]) } else { b"" };
    let name = if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() };
    let found = |key: &[u8]| records.get(key).filter(|value| !value.is_empty());
    let numeric = |key: &[u8], from: usize, len: usize| match found(key) {
        Some(value) => decimal(value),
        None => unsigned(number(&block[from..from + len])?),
    };
    let small = |value: u64| u32::try_from(value).map_err(|_large| fault(TarFault::Number));
    let has_device = matches!(block[156], b'3' | b'4');
    let device = |from: usize| if has_device { number(&block[from..from + 8]) } else { Ok(0) };
    Ok(Header {
        name: found(b"path").cloned().unwrap_or(name),
        link: found(b"linkpath").cloned().unwrap_or_else(|| text(&block[157..257]).to_vec()),
        flag: block[156],
        mode: small(unsigned(number(&block[100..108])?)?)? & 0o7777,
        uid: small(numeric(b"uid", 108, 8)?)?,
        gid: small(numeric(b"gid", 116, 8)?)?,
        mtime: match found(b"mtime") {
            Some(value) => time(value)?,
            None => {
                let seconds = number(&block[136..148])?;
                (i64::try_from(seconds).map_err(|_large| fault(TarFault::Number))?, 0)
            }
        },
        device: (small(unsigned(device(329)?)?)?, small(unsigned(device(337)?)?)?),
        xattrs: records
            .iter()
            .filter_map(|(key, value)| {
                Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone()))
            })
            .collect(),
        size: numeric(b"size", 124, 12)?,
        sparse: None,
    })
}

/// Finds the sparse map of an entry, wherever it is, and the entry's real name.
fn read_sparse(
    tar: &mut dyn Read,
    block: &Block,
    records: &Records,
    header: &mut Header,
) -> io::Result<()> {
    let record = |key: &str| records.get(key.as_bytes()).map(Vec::as_slice);
    if let Some(name) = record("GNU.sparse.name") {
        header.name = name.to_vec();
    }
    let size = record("GNU.sparse.realsize").or_else(|| record("GNU.sparse.size"));
    let map = if block[156] == b'S' {
        let real = unsigned(number(&block[483..495])?)?;
        Some((old_gnu_map(tar, block)?, real))
    } else if record("GNU.sparse.major") == Some(b"1") {
        let real = decimal(size.unwrap_or_default())?;
        let (map, len) = map_in_data(tar)?;
        header.size = header.size.checked_sub(len).ok_or_else(|| fault(TarFault::Sparse))?;
        Some((map, real))
    } else if let Some(map) = record("GNU.sparse.map") {
        let numbers: io::Result<Vec<u64>> =
            map.split(|&byte| byte == b',').filter(|text| !text.is_empty()).map(decimal).collect();
        let pieces = numbers?.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        Some((pieces, decimal(size.unwrap_or_default())?))
    } else if record("GNU.sparse.numblocks").is_some() {
        Some((Vec::new(), decimal(size.unwrap_or_default())?))
    } else {
        None
    };
    if let Some((pieces, real)) = &map {
        let mut end = 0;
        let mut stored = 0;
        for &(offset, len) in pieces {
            let next = offset.checked_add(len).filter(|&next| offset >= end && next <= *real);
            end = next.ok_or_else(|| fault(TarFault::Sparse))?;
            stored += len;
        }
        if stored != header.size {
            return Err(fault(TarFault::Sparse));
        }
    }
    header.sparse = map;
    Ok(())
}

/// The map in an old GNU header and the blocks that follow it.
fn old_gnu_map(tar: &mut dyn Read, block: &Block) -> io::Result<Vec<(u64, u64)>> {
    let mut pieces = Vec::new();
    let mut add = |map: &[u8]| -> io::Result<()> {
        for slot in map.chunks_exact(24).filter(|slot| slot[0] != 0) {
            pieces.push((unsigned(number(&slot[..12])?)?, unsigned(number(&slot[12..])?)?));
        }
        Ok(())
    };
    add(&block[386..482])?;
    let mut more = block[482] != 0;
    while more {
        let extension = read_block(tar)?;
        add(&extension[..504])?;
        more = extension[504] != 0;
    }
    pieces.retain(|&(_, len)| len > 0);
    Ok(pieces)
}

/// The map at the start of the data, in decimal lines, and how many bytes it takes.
fn map_in_data(tar: &mut dyn Read) -> io::Result<(Vec<(u64, u64)>, u64)> {
    let mut text = Vec::new();
    let mut blocks = 0;
    loop {
        text.extend_from_slice(&read_block(tar)?);
        blocks += 1;
        let lines: Vec<&[u8]> = text.split(|&byte| byte == b'\n').collect();
        // What follows the last line break is not a line.
        let (_rest, lines) = lines.split_last().ok_or_else(|| fault(TarFault::Sparse))?;
        let Some((count, numbers)) = lines.split_first() else { continue };
        let count = usize::try_from(decimal(count)?).map_err(io::Error::other)?;
        if numbers.len() / 2 >= count {
            let pairs = numbers.chunks_exact(2).take(count);
            let pieces: io::Result<_> =
                pairs.map(|pair| Ok((decimal(pair[0])?, decimal(pair[1])?))).collect();
            return Ok((pieces?, blocks * 512));
        }
    }
}

/// Records by key; of a repeated key the last one, but all pieces of a sparse file joined to a map.
fn parse_records(mut bytes: &[u8]) -> io::Result<Records> {
    let mut records = Records::new();
    let broken = || fault(TarFault::Records);
    while !bytes.is_empty() {
        let space = bytes.iter().position(|&byte| byte == b' ').ok_or_else(broken)?;
        let len = usize::try_from(decimal(&bytes[..space])?).map_err(io::Error::other)?;
        let record = bytes.get(space + 1..len).ok_or_else(broken)?;
        let record = record.strip_suffix(b"\n").ok_or_else(broken)?;
        let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(broken)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
            let map = records.entry(b"GNU.sparse.map".to_vec()).or_default();
            map.extend_from_slice(value);
            map.push(b',');
        } else {
            records.insert(key.to_vec(), value.to_vec());
        }
        bytes = &bytes[len..];
    }
    Ok(records)
}

/// The bytes before the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A numeric field: octal, or GNU's binary form.
fn number(field: &[u8]) -> io::Result<i128> {
    if field[0] & 0x80 != 0 {
        // The first byte is a mark (0x80, or 0xff before a negative number), of which bit 6 is the sign.
        let sign = if field[0] & 0x40 != 0 { -1 } else { i128::from(field[0] & 0x3f) };
        return Ok(field[1..].iter().fold(sign, |sum, &byte| (sum << 8) | i128::from(byte)));
    }
    let digits = text(field).trim_ascii();
    digits.iter().try_fold(0_i128, |sum, &digit| match digit {
        b'0'..=b'7' => Ok(sum * 8 + i128::from(digit - b'0')),
        _ => Err(fault(TarFault::Number)),
    })
}

fn unsigned(number: i128) -> io::Result<u64> {
    u64::try_from(number).map_err(|_outside| fault(TarFault::Number))
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    let text = std::str::from_utf8(text).map_err(|_binary| fault(TarFault::Number))?;
    text.parse().map_err(|_malformed| fault(TarFault::Number))
}

/// Seconds rounded down and nanoseconds, of a decimal fraction that may be negative.
fn time(text: &[u8]) -> io::Result<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|&byte| byte == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, b"".as_slice()),
    };
    let whole = i64::try_from(decimal(whole)?).map_err(|_large| fault(TarFault::Number))?;
    let mut nanos = 0;
    for place in 0..9 {
        let digit = fraction.get(place).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return Err(fault(TarFault::Number));
        }
        nanos = nanos * 10 + u32::from(digit - b'0');
    }
    Ok(match (negative, nanos) {
        (false, _) => (whole, nanos),
        (true, 0) => (-whole, 0),
        (true, _) => (-whole - 1, 1_000_000_000 - nanos),
    })
}

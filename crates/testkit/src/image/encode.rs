//! Writing tar: ustar headers, PAX records, GNU's long names and the four forms of sparse files.

use std::io::{self, Write};

use super::entry::{Dialect, SparseContent, SparseFormat, TarEntry, TarKind};

const BLOCK: usize = 512;
type Block = [u8; BLOCK];
type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// Writes an entry with its records and its data.
pub(super) fn write_entry(out: &mut impl Write, entry: &TarEntry) -> io::Result<()> {
    match &entry.kind {
        TarKind::File(content) => {
            write_head(out, entry, content.size())?;
            let mut reader = content.reader();
            let len = io::copy(&mut reader, out)?;
            write_padding(out, len)
        }
        TarKind::Sparse(sparse) => write_sparse(out, entry, sparse),
        _ => write_head(out, entry, 0),
    }
}

/// Writes everything of an entry that comes before its data, of which there are `size` bytes.
pub(super) fn write_head(out: &mut impl Write, entry: &TarEntry, size: u64) -> io::Result<()> {
    write_head_with(out, entry, size, Records::new(), |_header| {})
}

/// Fills up to a whole block after `len` bytes of data.
pub(super) fn write_padding(out: &mut impl Write, len: u64) -> io::Result<()> {
    let partial = usize::try_from(len % 512).map_err(io::Error::other)?;
    if partial > 0 {
        out.write_all(&[0; BLOCK][partial..])?;
    }
    Ok(())
}

fn write_head_with(
    out: &mut impl Write,
    entry: &TarEntry,
    size: u64,
    mut records: Records,
    adjust: impl FnOnce(&mut Block),
) -> io::Result<()> {
    records.splice(0..0, entry.pax.iter().cloned());
    let linkname = match &entry.kind {
        TarKind::Symlink(target) | TarKind::HardLink(target) => target.as_slice(),
        _ => b"",
    };
    let gnu = entry.dialect == Dialect::Gnu;
    let mut header = [0; BLOCK];
    let prefix = (entry.dialect == Dialect::Ustar).then(|| split_name(&entry.name)).flatten();
    let (prefix, name) = prefix.unwrap_or((b"", &entry.name));
    put(&mut header[..100], name);
    put(&mut header[345..500], prefix);
    put(&mut header[157..257], linkname);
    for (too_long, bytes, key, flag) in [
        (name.len() > 100, name, b"path".as_slice(), b'L'),
        (linkname.len() > 100, linkname, b"linkpath", b'K'),
    ] {
        if too_long && gnu {
            write_gnu_long(out, flag, bytes)?;
        } else if too_long {
            records.push((key.to_vec(), bytes.to_vec()));
        }
    }
    put(&mut header[265..296], &entry.uname);
    put(&mut header[297..328], &entry.gname);
    let mode = i128::from(entry.mode);
    let (major, minor) = match entry.kind {
        TarKind::CharDevice(major, minor) | TarKind::BlockDevice(major, minor) => (major, minor),
        _ => (0, 0),
    };
    for (from, len, number, key) in [
        (100, 8, mode, ""),
        (108, 8, i128::from(entry.uid), "uid"),
        (116, 8, i128::from(entry.gid), "gid"),
        (124, 12, i128::from(size), "size"),
        (136, 12, i128::from(entry.mtime), "mtime"),
        (329, 8, i128::from(major), ""),
        (337, 8, i128::from(minor), ""),
    ] {
        let fits = put_number(&mut header[from..from + len], number, gnu || key.is_empty());
        if !fits && key != "mtime" {
            records.push((key.as_bytes().to_vec(), number.to_string().into_bytes()));
        }
    }
    if !gnu && (entry.mtime_nanos > 0 || !(0..1 << 33).contains(&entry.mtime)) {
        let time = decimal_time(entry.mtime, entry.mtime_nanos);
        records.push((b"mtime".to_vec(), time.into_bytes()));
    }
    for (name, value) in &entry.xattrs {
        records.push(([b"SCHILY.xattr.", name.as_slice()].concat(), value.clone()));
    }
    header[156] = type_flag(&entry.kind);
    header[257..265].copy_from_slice(if gnu { b"ustar  \0" } else { b"ustar\x0000" });
    adjust(&mut header);
    put_checksum(&mut header);
    if !records.is_empty() {
        write_records(out, b'x', b"PaxHeaders/0", &records)?;
    }
    out.write_all(&header)
}

/// Writes a header of PAX records; flag `x` for the next entry, `g` for all that follow.
pub(super) fn write_records(
    out: &mut impl Write,
    flag: u8,
    name: &[u8],
    records: &[(Vec<u8>, Vec<u8>)],
) -> io::Result<()> {
    let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
    write_meta(out, flag, name, *b"ustar\x0000", &body)
}

/// `<length> <key>=<value>\n`, where the length counts its own digits.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn write_gnu_long(out: &mut impl Write, flag: u8, name: &[u8]) -> io::Result<()> {
    let body = [name, b"\0"].concat();
    write_meta(out, flag, b"././@LongLink", *b"ustar  \0", &body)
}

fn write_meta(
    out: &mut impl Write,
    flag: u8,
    name: &[u8],
    magic: [u8; 8],
    body: &[u8],
) -> io::Result<()> {
    let mut header = [0; BLOCK];
    let len = u64::try_from(body.len()).map_err(io::Error::other)?;
    put(&mut header[..100], name);
    for (from, len, number) in
        [(100, 8, 0o644), (108, 8, 0), (116, 8, 0), (124, 12, i128::from(len)), (136, 12, 0)]
    {
        put_number(&mut header[from..from + len], number, false);
    }
    header[156] = flag;
    header[257..265].copy_from_slice(&magic);
    put_checksum(&mut header);
    out.write_all(&header)?;
    out.write_all(body)?;
    write_padding(out, len)
}

fn write_sparse(out: &mut impl Write, entry: &TarEntry, sparse: &SparseContent) -> io::Result<()> {
    let mut pieces = Vec::new();
    let mut stored = 0;
    for (offset, bytes) in &sparse.pieces {
        let len = u64::try_from(bytes.len()).map_err(io::Error::other)?;
        pieces.push((*offset, len));
        stored += len;
    }
    // A hole at the end is told by an empty piece, as GNU tar does; it refuses a map of no pieces.
    if pieces.last().is_none_or(|(offset, len)| offset + len < sparse.size) {
        pieces.push((sparse.size, 0));
    }
    match sparse.format {
        SparseFormat::OldGnu => {
            let gnu = TarEntry { dialect: Dialect::Gnu, ..entry.clone() };
            write_head_with(out, &gnu, stored, Records::new(), |header| {
                header[156] = b'S';
                put_number(&mut header[483..495], i128::from(sparse.size), true);
                put_map(&mut header[386..483], &pieces);
            })?;
            let mut later = pieces.get(4..).unwrap_or_default();
            while !later.is_empty() {
                let mut block = [0; BLOCK];
                put_map(&mut block[..505], later);
                later = later.get(21..).unwrap_or_default();
                out.write_all(&block)?;
            }
        }
        SparseFormat::Pax10 => {
            let mut map = format!("{}\n", pieces.len());
            for (offset, len) in &pieces {
                map.push_str(&format!("{offset}\n{len}\n"));
            }
            let mut map = map.into_bytes();
            map.resize(map.len().next_multiple_of(BLOCK), 0);
            let map_len = u64::try_from(map.len()).map_err(io::Error::other)?;
            let records = records(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", &entry.name),
                ("GNU.sparse.realsize", sparse.size.to_string().as_bytes()),
            ]);
            write_head_with(out, &stand_in(entry), map_len + stored, records, |_header| {})?;
            out.write_all(&map)?;
        }
        SparseFormat::Pax00 | SparseFormat::Pax01 => {
            let old = sparse.format == SparseFormat::Pax00;
            let records = map_records(old, entry, sparse.size, &pieces);
            let named = if old { entry.clone() } else { stand_in(entry) };
            write_head_with(out, &named, stored, records, |_header| {})?;
        }
    }
    for (_offset, bytes) in &sparse.pieces {
        out.write_all(bytes)?;
    }
    write_padding(out, stored)
}

/// The entry under the name that readers see who know nothing of sparse files.
fn stand_in(entry: &TarEntry) -> TarEntry {
    TarEntry { name: b"GNUSparseFile.0/stand-in".to_vec(), ..entry.clone() }
}

fn map_records(old: bool, entry: &TarEntry, size: u64, pieces: &[(u64, u64)]) -> Records {
    let (size, count) = (size.to_string(), pieces.len().to_string());
    let mut all = records(&[
        ("GNU.sparse.size", size.as_bytes()),
        ("GNU.sparse.numblocks", count.as_bytes()),
    ]);
    if old {
        for (offset, len) in pieces {
            all.extend(records(&[
                ("GNU.sparse.offset", offset.to_string().as_bytes()),
                ("GNU.sparse.numbytes", len.to_string().as_bytes()),
            ]));
        }
    } else {
        let map: Vec<String> = pieces.iter().map(|(at, len)| format!("{at},{len}")).collect();
        all.extend(records(&[
            ("GNU.sparse.map", map.join(",").as_bytes()),
            ("GNU.sparse.name", &entry.name),
        ]));
    }
    all
}

fn records(pairs: &[(&str, &[u8])]) -> Records {
    pairs.iter().map(|(key, value)| (key.as_bytes().to_vec(), value.to_vec())).collect()
}

/// Puts as many pieces of an old GNU map as there is room for; a byte left over says if there are more.
fn put_map(room: &mut [u8], pieces: &[(u64, u64)]) {
    let count = room.len() / 24;
    for (slot, (offset, len)) in room.chunks_exact_mut(24).zip(pieces) {
        put_number(&mut slot[..12], i128::from(*offset), true);
        put_number(&mut slot[12..], i128::from(*len), true);
    }
    if let Some(more) = room.get_mut(count * 24) {
        *more = u8::from(pieces.len() > count);
    }
}

const fn type_flag(kind: &TarKind) -> u8 {
    match kind {
        TarKind::File(_) | TarKind::Sparse(_) => b'0',
        TarKind::HardLink(_) => b'1',
        TarKind::Symlink(_) => b'2',
        TarKind::CharDevice(..) => b'3',
        TarKind::BlockDevice(..) => b'4',
        TarKind::Directory => b'5',
        TarKind::Fifo => b'6',
    }
}

/// Prefix and name of a name over 100 bytes, if there is a slash at the right place.
fn split_name(name: &[u8]) -> Option<(&[u8], &[u8])> {
    if name.len() <= 100 {
        return None;
    }
    let first = (name.len() - 101).max(1);
    let at = (first..name.len().min(156)).find(|&at| name[at] == b'/' && at + 1 < name.len())?;
    Some((&name[..at], &name[at + 1..]))
}

fn put(field: &mut [u8], bytes: &[u8]) {
    let len = bytes.len().min(field.len());
    field[..len].copy_from_slice(&bytes[..len]);
}

/// Octal with a NUL at the end, or else GNU's binary form if that is allowed. Says whether it fitted.
fn put_number(field: &mut [u8], number: i128, gnu: bool) -> bool {
    let digits = field.len() - 1;
    let octal = format!("{number:0digits$o}");
    if number >= 0 && octal.len() == digits {
        field[..digits].copy_from_slice(octal.as_bytes());
        return true;
    }
    if !gnu {
        field[..digits].fill(b'0');
        return false;
    }
    let bytes = number.to_be_bytes();
    let start = bytes.len() - field.len();
    field.copy_from_slice(&bytes[start..]);
    field[0] = if number < 0 { 0xff } else { 0x80 };
    true
}

fn put_checksum(header: &mut Block) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

/// Seconds with a fraction; `seconds` is rounded down, also below zero.
fn decimal_time(seconds: i64, nanos: u32) -> String {
    if nanos == 0 {
        return seconds.to_string();
    }
    let (sign, whole, fraction) = if seconds < 0 {
        ("-", -(i128::from(seconds) + 1), 1_000_000_000 - nanos)
    } else {
        ("", i128::from(seconds), nanos)
    };
    let text = format!("{sign}{whole}.{fraction:09}");
    text.trim_end_matches('0').to_owned()
}

//! Writing, in exactly the order of AWS's tool: everything that an object refers to is written
//! before it, and the buffer grows from its end.

use std::ops::Range;

use super::{Ztoc, ZtocTooLarge};
use crate::flatbuffer::{Builder, Place};
use crate::rfc3339;
use crate::spans::Compression;
use crate::toc::{EntryKind, TocEntry};

/// The document, and where in it the span data lies. It is built around `zinfo`, most of it.
pub(crate) fn encode(ztoc: &Ztoc, zinfo: Vec<u8>) -> Result<(Vec<u8>, Range<u64>), ZtocTooLarge> {
    let len = zinfo.len();
    let mut builder = Builder::default();
    let version = builder.string(ztoc.version.as_bytes());
    let build_tool = builder.string(ztoc.build_tool.as_bytes());

    let mut entries: Vec<Place> =
        ztoc.toc.iter().rev().map(|entry| write_entry(&mut builder, entry)).collect();
    entries.reverse();
    let entries = builder.offsets(&entries);
    let mut toc = builder.table();
    toc.reference(0, entries);
    let toc = toc.end();

    let checkpoints = builder.bytes_later(len);
    let digests: Vec<Place> = ztoc
        .spans
        .digests()
        .iter()
        .map(|digest| builder.string(digest.to_string().as_bytes()))
        .collect();
    let digests = builder.offsets(&digests);
    let mut info = builder.table();
    // -1 for a layer without spans.
    info.uint(1, ztoc.spans.len().wrapping_sub(1));
    info.reference(2, digests);
    info.reference(3, checkpoints);
    let algorithm = match ztoc.spans.compression() {
        Compression::Gzip => GZIP,
        Compression::Uncompressed => UNCOMPRESSED,
    };
    info.scalar(0, [algorithm], [GZIP]);
    let info = info.end();

    let mut root = builder.table();
    root.reference(0, version);
    root.reference(1, build_tool);
    root.reference(4, toc);
    root.long(2, ztoc.compressed_size);
    root.long(3, ztoc.uncompressed_size);
    root.reference(5, info);
    let root = root.end();
    let bytes = builder.finish(root, zinfo).ok_or(ZtocTooLarge)?;
    let place = zinfo_place(&bytes, checkpoints, len);
    Ok((bytes, place))
}

/// `CompressionAlgorithm` in the format's schema.
pub(super) const GZIP: u8 = 1;
pub(super) const UNCOMPRESSED: u8 = 2;

/// The words of the format for each kind.
pub(super) const KINDS: [(EntryKind, &[u8]); 7] = [
    (EntryKind::File, b"reg"),
    (EntryKind::Directory, b"dir"),
    (EntryKind::Symlink, b"symlink"),
    (EntryKind::HardLink, b"hardlink"),
    (EntryKind::CharDevice, b"char"),
    (EntryKind::BlockDevice, b"block"),
    (EntryKind::Fifo, b"fifo"),
];

fn write_entry(builder: &mut Builder, entry: &TocEntry) -> Place {
    let kind =
        KINDS.iter().find(|(kind, _)| *kind == entry.kind).map_or(&b""[..], |(_, word)| word);
    let name = builder.string(&entry.name);
    let kind = builder.string(kind);
    let linkname = builder.string(&entry.linkname);
    let uname = builder.string(&entry.uname);
    let gname = builder.string(&entry.gname);
    let mtime = builder.string(rfc3339::format(entry.mtime).as_bytes());
    let pax: Vec<Place> = entry
        .pax
        .iter()
        .map(|(key, value)| {
            let key = builder.string(key);
            let value = builder.string(value);
            let mut record = builder.table();
            record.reference(0, key);
            record.reference(1, value);
            record.end()
        })
        .collect();
    let pax = builder.offsets(&pax);
    let mut table = builder.table();
    table.reference(0, name);
    table.reference(1, kind);
    table.long(2, entry.offset);
    table.long(3, entry.size);
    table.reference(4, linkname);
    table.long(5, u64::from(entry.mode));
    table.uint(6, entry.uid);
    table.uint(7, entry.gid);
    table.reference(8, uname);
    table.reference(9, gname);
    table.reference(10, mtime);
    table.long(11, u64::from(entry.device.0));
    table.long(12, u64::from(entry.device.1));
    table.reference(13, pax);
    table.end()
}

/// A place counts from the end of the buffer to the vector's length, which precedes its bytes.
fn zinfo_place(bytes: &[u8], place: Place, len: usize) -> Range<u64> {
    let start = bytes.len().saturating_sub(place.distance()).saturating_add(4);
    let end = start.saturating_add(len);
    u64::try_from(start).unwrap_or(u64::MAX)..u64::try_from(end).unwrap_or(u64::MAX)
}

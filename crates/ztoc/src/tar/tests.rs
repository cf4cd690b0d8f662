//! Tests of the tar reader on archives made by hand.

use proptest::prelude::*;

use super::*;
use crate::toc::{Mtime, SparseMap};

/// A header block with a right checksum; `change` sets further fields first.
fn header_with(name: &str, flag: u8, size: usize, change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[108..116].copy_from_slice(b"0001750\0");
    block[116..124].copy_from_slice(b"0001751\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[136..148].copy_from_slice(b"00000000007\0");
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[265..269].copy_from_slice(b"user");
    change(&mut block);
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn header(name: &str, flag: u8, size: usize) -> Vec<u8> {
    header_with(name, flag, size, |_block| {})
}

fn gnu(block: &mut [u8]) {
    block[257..265].copy_from_slice(b"ustar  \0");
}

/// Header, data, padding.
fn member(name: &str, flag: u8, data: &[u8]) -> Vec<u8> {
    padded(&[&header(name, flag, data.len()), data].concat())
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn record(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let mut len = rest.len() + 1;
    while len.to_string().len() + rest.len() != len {
        len += 1;
    }
    format!("{len}{rest}")
}

fn pax(pairs: &[(&str, &str)]) -> Vec<u8> {
    let body: String = pairs.iter().map(|(key, value)| record(key, value)).collect();
    member("PaxHeaders/x", b'x', body.as_bytes())
}

/// By somebody who takes the entries as they are found.
fn scan_with(limits: Limits, tar: &[u8], piece: usize) -> Result<TarToc, TarError> {
    let mut scanner = TarScanner::new(limits);
    let mut entries = Vec::new();
    for piece in tar.chunks(piece.max(1)) {
        scanner.push(piece)?;
        entries.extend(scanner.take_entries());
    }
    let rest = scanner.finish()?;
    entries.extend(rest.entries);
    Ok(TarToc { entries, archive_size: rest.archive_size })
}

fn scan(tar: &[u8]) -> Result<TarToc, TarError> {
    let mut scanner = TarScanner::new(Limits::default());
    scanner.push(tar)?;
    scanner.finish()
}

const END: [u8; 1024] = [0; 1024];

fn entries(parts: &[&[u8]]) -> Vec<TocEntry> {
    scan(&[&parts.concat(), &END[..]].concat()).unwrap().entries
}

#[test]
fn fields_of_a_plain_header() {
    let found = entries(&[&member("dir/file", b'0', b"hello")]);
    let expected = TocEntry {
        name: b"dir/file".to_vec(),
        kind: EntryKind::File,
        offset: 512,
        size: 5,
        linkname: vec![],
        mode: 0o644,
        uid: 1000,
        gid: 1001,
        uname: b"user".to_vec(),
        gname: vec![],
        mtime: Mtime { seconds: 7, nanos: 0 },
        device: (0, 0),
        pax: vec![],
        sparse: None,
    };
    assert_eq!(found, [expected]);
}

#[test]
fn ends_that_are_complete_and_ends_that_are_not() {
    let file = member("f", b'0', b"hello");
    let check = |tar: &[u8], expected: Result<u64, ()>| {
        let found = scan(tar).map(|toc| toc.archive_size).map_err(|_error| ());
        assert_eq!(found, expected, "{} bytes", tar.len());
    };
    check(&[], Ok(0));
    check(&END[..512], Ok(512));
    check(&END, Ok(1024));
    check(&[&END[..], b"anything"].concat(), Ok(1024));
    check(&file, Ok(1024));
    check(&[&file[..], &END, &[0; 5000]].concat(), Ok(2048));
    // The padding of the last file may be missing, its data not.
    check(&file[..512 + 5], Ok(517));
    check(&file[..512 + 6], Ok(518));
    check(&file[..512 + 4], Err(()));
    check(&file[..511], Err(()));
    check(&[&END[..512], &file].concat(), Err(()));
    check(&END[..700], Err(()));
}

#[test]
fn kinds_follow_gos_reader() {
    let check = |name: &str, flag: u8, expected: EntryKind| {
        assert_eq!(entries(&[&header(name, flag, 0)])[0].kind, expected, "{name} {flag}");
    };
    check("f", b'0', EntryKind::File);
    check("f", 0, EntryKind::File);
    check("f", b'7', EntryKind::File);
    check("d/", 0, EntryKind::Directory);
    check("d/", b'5', EntryKind::Directory);
    // Only type 0 is old enough to mean a directory by its name.
    check("d/", b'0', EntryKind::File);
    check("h", b'1', EntryKind::HardLink);
    check("s", b'2', EntryKind::Symlink);
    check("c", b'3', EntryKind::CharDevice);
    check("b", b'4', EntryKind::BlockDevice);
    check("p", b'6', EntryKind::Fifo);
    scan(&header("v", b'V', 0)).unwrap_err();
}

#[test]
fn what_has_no_data_has_no_size() {
    let found = entries(&[&header("h", b'1', 700), &member("f", b'0', b"x")]);
    let places: Vec<_> = found.iter().map(|entry| (entry.offset, entry.size)).collect();
    assert_eq!(places, [(512, 0), (1024, 1)]);
}

#[test]
fn pax_records_override_and_are_kept() {
    let evil = "x\n22 linkpath=/etc/evil\n";
    let records = pax(&[
        ("uid", "3000000000"),
        ("SCHILY.xattr.security.capability", evil),
        ("path", "long/name"),
        ("mtime", "-1.25"),
        ("size", "5"),
        ("uname", ""),
    ]);
    let found = entries(&[&records, &padded(&[&header("short", b'0', 0)[..], b"hello"].concat())]);
    let entry = &found[0];
    assert_eq!((&entry.name[..], entry.uid, entry.size), (&b"long/name"[..], 3_000_000_000, 5));
    assert_eq!(entry.mtime, Mtime { seconds: -2, nanos: 750_000_000 });
    assert_eq!((&entry.linkname[..], &entry.uname[..]), (&b""[..], &b"user"[..]));
    let xattrs: Vec<_> = entry.xattrs().collect();
    assert_eq!(xattrs, [(&b"security.capability"[..], evil.as_bytes())]);
    assert_eq!(entry.pax.len(), 6);
    assert!(entry.pax.is_sorted(), "records are sorted by key");
    // PAX header, its body, and the header of the file.
    assert_eq!(entry.offset, 3 * 512);
}

#[test]
fn gnu_long_names_and_links() {
    let name = "n".repeat(300);
    let link = "l".repeat(600);
    let found = entries(&[
        &member("././@LongLink", b'K', format!("{link}\0").as_bytes()),
        &member("././@LongLink", b'L', format!("{name}\0").as_bytes()),
        &header_with("short", b'2', 0, gnu),
        &header("next", b'0', 0),
    ]);
    assert_eq!(found[0].name, name.as_bytes());
    assert_eq!(found[0].linkname, link.as_bytes());
    assert_eq!(found[1].name, b"next");
}

#[test]
fn prefixes_belong_to_ustar_and_not_to_gnu() {
    let prefix = |block: &mut [u8]| block[345..348].copy_from_slice(b"pre");
    assert_eq!(entries(&[&header_with("f", b'0', 0, prefix)])[0].name, b"pre/f");
    let times = |block: &mut [u8]| {
        gnu(block);
        block[345..357].copy_from_slice(b"00000000007\0");
    };
    assert_eq!(entries(&[&header_with("f", b'0', 0, times)])[0].name, b"f");
}

#[test]
fn global_headers_are_stepped_over() {
    let global = member("g", b'g', record("uid", "5").as_bytes());
    let found = entries(&[&pax(&[("path", "lost")]), &global, &header("f", b'0', 0)]);
    assert_eq!((&found[0].name[..], found[0].uid, found[0].offset), (&b"f"[..], 1000, 5 * 512));
}

#[test]
fn numbers_in_base_256() {
    let change = |block: &mut [u8]| {
        block[108..116].copy_from_slice(b"\x80\0\0\0\xb2\xd0\x5e\0");
        block[136..148].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe");
    };
    let entry = &entries(&[&header_with("f", b'0', 0, change)])[0];
    assert_eq!((entry.uid, entry.mtime.seconds), (3_000_000_000, -2));
    let negative_size = |block: &mut [u8]| block[124..136].fill(0xff);
    scan(&header_with("f", b'0', 0, negative_size)).unwrap_err();
}

#[test]
fn pax_sparse_files_of_each_version() {
    let data = [1; 1024];
    let expected = SparseMap { pieces: vec![(512, 512), (4096, 512)], logical_size: 10_000 };
    let check = |records: &[(&str, &str)], data: &[u8], offset: u64| {
        let archive = [pax(records), member("GNUSparseFile.1/f", b'0', data)];
        let found = entries(&[&archive.concat(), &header("next", b'0', 0)]);
        assert_eq!(found[0].sparse.as_ref(), Some(&expected), "{records:?}");
        assert_eq!((found[0].offset, found[0].size), (offset, 1024), "{records:?}");
        assert_eq!(found[0].logical_size(), 10_000);
        assert_eq!(found[1].offset, offset + 1024 + 512, "{records:?}");
        assert!(found[0].pax.is_sorted() && found[0].pax.iter().any(|(key, _)| key == sparse::MAP));
    };
    let version_0_0 = [
        ("GNU.sparse.size", "10000"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.offset", "512"),
        ("GNU.sparse.numbytes", "512"),
        ("GNU.sparse.offset", "4096"),
        ("GNU.sparse.numbytes", "512"),
    ];
    check(&version_0_0, &data, 3 * 512);
    let version_0_1 = [
        ("GNU.sparse.size", "10000"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.map", "512,512,4096,512"),
    ];
    check(&version_0_1, &data, 3 * 512);
    let version_1_0 =
        [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "10000")];
    let with_map = [&padded(b"2\n512\n512\n4096\n512\n")[..], &data].concat();
    check(&version_1_0, &with_map, 4 * 512);
}

#[test]
fn gnu_sparse_files_with_an_extension_block() {
    let number = |n: usize| format!("{n:011o}\0").into_bytes();
    let change = |block: &mut [u8]| {
        gnu(block);
        for piece in 0..4 {
            let at = 386 + 24 * piece;
            block[at..at + 12].copy_from_slice(&number(piece * 1000));
            block[at + 12..at + 24].copy_from_slice(&number(512));
        }
        block[482] = 1;
        block[483..495].copy_from_slice(&number(5000));
    };
    let mut extension = vec![0; BLOCK];
    extension[..12].copy_from_slice(&number(4000));
    extension[12..24].copy_from_slice(&number(100));
    let data = padded(&[5; 4 * 512 + 100]);
    let archive = [header_with("f", b'S', 4 * 512 + 100, change), extension, data].concat();
    let found = entries(&[&archive, &header("next", b'0', 0)]);
    let pieces = vec![(0, 512), (1000, 512), (2000, 512), (3000, 512), (4000, 100)];
    assert_eq!(found[0].sparse, Some(SparseMap { pieces, logical_size: 5000 }));
    assert_eq!((found[0].offset, found[0].size), (1024, 2148));
    assert_eq!(found[1].offset, 1024 + 2560 + 512);
    // The records that let a zTOC carry the map.
    assert!(matches!(sparse::from_records(&found[0].pax), Ok(PaxSparse::Pieces(_))));
}

#[test]
fn malformed_archives_are_refused() {
    let check = |tar: &[u8], expected: &str| {
        let error = scan(&[tar, &END[..]].concat()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    let mut damaged = header("f", b'0', 0);
    damaged[0] = b'g';
    check(&damaged, "byte 0: wrong checksum");
    check(&[&header("f", b'0', 0)[..], &damaged].concat(), "byte 512: wrong checksum");
    check(&header_with("f", b'0', 0, |block| block[100] = b'9'), "bad number");
    check(&member("x", b'x', b"99 path=f\n"), "bad PAX record");
    check(&[pax(&[("uid", "x")]), header("f", b'0', 0)].concat(), "bad number in a PAX record");
    let overlapping = [("GNU.sparse.map", "0,10,5,10"), ("GNU.sparse.numblocks", "2")];
    check(&[pax(&overlapping), member("f", b'0', &[0; 20])].concat(), "bad PAX sparse map");
    let too_long = [("GNU.sparse.map", "0,30"), ("GNU.sparse.numblocks", "1")];
    check(&[pax(&too_long), member("f", b'0', &[0; 20])].concat(), "bad PAX sparse map");
}

#[test]
fn limits_are_kept() {
    let check = |limits: Limits, tar: &[u8], expected: &str| {
        let error = scan_with(limits, tar, 512).unwrap_err();
        assert!(matches!(error, TarError::TooLarge { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    let limits = Limits::default();
    let files = [header("a", b'0', 0), header("b", b'0', 0)].concat();
    check(Limits { entries: 1, ..limits }, &files, "number of entries");
    check(Limits { text: 9, ..limits }, &files, "all names and records");
    // Refused by its announced size, before it is there.
    check(limits, &header("x", b'x', (1 << 20) + 1), "a metadata record");
    check(limits, &header("L", b'L', (1 << 30) + 1), "a metadata record");
    let name = member("L", b'L', "n".repeat(100).as_bytes());
    check(Limits { name: 99, ..limits }, &[name, header("f", b'0', 0)].concat(), "a name");
    let records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")];
    let map = format!("100000\n{}", "1\n".repeat(5000));
    let file = [pax(&records), member("f", b'0', map.as_bytes())].concat();
    check(Limits { record: 2048, ..limits }, &file, "a sparse map");
}

/// An archive with something of everything.
fn varied() -> Vec<u8> {
    [
        header("d/", b'5', 0),
        pax(&[("path", "d/long"), ("SCHILY.xattr.user.x", "\n=\n")]),
        member("d/l", b'0', &[7; 1000]),
        member("L", b'L', &[b'n'; 700]),
        header("s", b'2', 0),
        pax(&[
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.realsize", "9000"),
        ]),
        member("f", b'0', &padded(b"1\n5\n5\n\0")),
        member("g", b'g', record("a", "b").as_bytes()),
        END.to_vec(),
    ]
    .concat()
}

proptest! {
    #[test]
    fn how_the_bytes_are_cut_and_when_entries_are_taken_changes_nothing(piece in 1_usize..2000) {
        let tar = varied();
        prop_assert_eq!(scan_with(Limits::default(), &tar, piece), scan(&tar));
    }

    #[test]
    fn mutated_archives_are_answered(
        changes in proptest::collection::vec((0_usize..8192, any::<u8>()), 1..8),
        fix in any::<bool>(),
        len in 0_usize..8192,
    ) {
        let mut tar = varied();
        for (at, byte) in changes {
            let at = at % tar.len();
            tar[at] = byte;
            if fix {
                let start = at / BLOCK * BLOCK;
                let block = &mut tar[start..start + BLOCK];
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        tar.truncate(len.max(512));
        if let Ok(toc) = scan(&tar) {
            prop_assert!(toc.archive_size <= tar.len() as u64);
            for pair in toc.entries.windows(2) {
                prop_assert!(pair[0].offset + pair[0].size <= pair[1].offset);
            }
        }
    }
}

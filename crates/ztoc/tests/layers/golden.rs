//! The same bytes as AWS's tool writes.
//!
//! `edge.tar.gz` has entries of every kind, PAX records with newlines and fractions of seconds, names
//! beyond ASCII and beyond 100 bytes, many flushed blocks, and a second member with a file name. The
//! digests are those of the Go module `github.com/awslabs/soci-snapshotter` 0.15.0, `ztoc.NewBuilder`,
//! with the default build tool.

use std::io::Read as _;

use oci::Digest;
use ztoc::{Compression, EntryKind, IndexerOptions, Mtime, Ztoc};

use crate::make::{index, limits, options};

const LAYER: &[u8] = include_bytes!("../golden/edge.tar.gz");

fn tar() -> Vec<u8> {
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(LAYER).read_to_end(&mut tar).unwrap();
    tar
}

#[track_caller]
fn check(layer: &[u8], compression: Compression, span_size: u64, expected: &str) {
    let built = index(layer, IndexerOptions { compression, ..options(span_size) });
    assert_eq!(Digest::of(&built.ztoc_bytes).to_string(), expected);
    let ztoc = Ztoc::parse(&built.ztoc_bytes, &limits()).unwrap();
    assert_eq!(ztoc, built.ztoc);
    assert!(ztoc.to_bytes(&built.ztoc_bytes).unwrap() == built.ztoc_bytes);
}

#[test]
fn gzip_layers() {
    for (span_size, expected) in [
        (4 << 20, "sha256:d4e7492ad283ae1ea41db2d454b2ed793dc231000af024ec35793b80e180187b"),
        (3000, "sha256:df3d4498da02076079ffe3d7f959f0a5e2ee718441937dc4688a75af3a4b85be"),
        (100, "sha256:473bfa9fd844242b01972a5a5eedd9377e7fd7e155a574b78586483f72860eb9"),
    ] {
        check(LAYER, Compression::Gzip, span_size, expected);
    }
}

#[test]
fn plain_layers() {
    for (span_size, expected) in [
        (4096, "sha256:752deef8af05a00af938a79d8964c4f0c0c03c363ca299542dc9e8ed95db5a4e"),
        (4 << 20, "sha256:a07fc260f35da170ea954e8c62cd1a4aebd16e7777a89d6c5bab3cfa3a6716c3"),
    ] {
        check(&tar(), Compression::Uncompressed, span_size, expected);
    }
}

#[test]
fn entries_of_every_kind() {
    let toc = index(LAYER, options(4 << 20)).ztoc.toc;
    let kinds: Vec<_> = toc.iter().map(|entry| entry.kind).collect();
    use EntryKind::{BlockDevice, CharDevice, Directory, Fifo, File, HardLink, Symlink};
    let expected = [
        Directory,
        Directory,
        File,
        File,
        Symlink,
        HardLink,
        CharDevice,
        BlockDevice,
        Fifo,
        File,
        File,
        File,
        File,
        File,
    ];
    assert_eq!(kinds, expected);
    let named = |name: &str| toc.iter().find(|entry| entry.name == name.as_bytes()).unwrap();
    assert_eq!(named("./null").device, (1, 3));
    assert_eq!(named("cap").mtime, Mtime { seconds: 1_234_567_890, nanos: 123_456_789 });
    let xattrs: Vec<_> = named("cap").xattrs().collect();
    assert_eq!(xattrs, [(&b"user.a"[..], &b"x\n22 linkpath=/etc/evil\n"[..])]);
    assert_eq!(named("neg").mtime, Mtime { seconds: -2, nanos: 750_000_000 });
    assert_eq!(named("ünïcödé").uid, 3_000_000_000);
    let tar = tar();
    let cap = named("cap");
    assert_eq!(&tar[cap.offset as usize..][..cap.size as usize], b"hello");
}

//! Small layers with known results, GNU tar as a second opinion, and random images.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use super::{Kind, Snapshot, diff, snapshot, untar};
use crate::image::{
    Dialect, LayerBuilder, Shape, SparseContent, SparseFormat, TarEntry, TarKind, random_layers,
};

fn unpack<T: AsRef<[u8]>>(layers: &[T]) -> Snapshot {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    untar(&root, layers).unwrap();
    let seen = snapshot(&root).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "something was left behind");
    seen
}

/// A line for each file: path, type, mode and for files the size.
fn listing(snapshot: &Snapshot) -> String {
    let mut lines = String::new();
    for (path, entry) in snapshot.iter().skip(1) {
        let kind = match &entry.kind {
            Kind::Directory => "dir".to_owned(),
            Kind::File { size, .. } => format!("file {size}"),
            Kind::Symlink(target) => format!("-> {}", target.escape_ascii()),
            other => format!("{other:?}"),
        };
        writeln!(lines, "{} {:o} {kind}", path.escape_ascii(), entry.mode).unwrap();
    }
    lines
}

#[track_caller]
fn check(layers: &[LayerBuilder], expected: &str) {
    let tars: Vec<Vec<u8>> = layers.iter().map(LayerBuilder::build).collect();
    let expected: String = expected.lines().map(|line| format!("{}\n", line.trim())).collect();
    assert_eq!(listing(&unpack(&tars)), expected);
}

fn new() -> LayerBuilder {
    LayerBuilder::new()
}

#[test]
fn whiteouts_hide_lower_names_only() {
    let lower = || new().dir("d").file("d/x", b"1").file("d/y", b"1").file("e", b"1");
    check(&[lower(), new().whiteout("d/x")], "d 755 dir\nd/y 644 file 1\ne 644 file 1");
    check(&[lower(), new().whiteout("d")], "e 644 file 1");
    for upper in [
        new().whiteout("d/x").file("d/x", b"22").whiteout("e"),
        new().file("d/x", b"22").whiteout("e").whiteout("d/x"),
    ] {
        check(&[lower(), upper], "d 755 dir\nd/x 644 file 2\nd/y 644 file 1");
    }
    check(
        &[lower(), new().dir("d").file("d/z", b"").whiteout("d")],
        "d 755 dir\nd/z 644 file 0\ne 644 file 1",
    );
    check(&[new().whiteout("nothing/here")], "nothing 755 dir");
}

#[test]
fn opaque_directories_hide_lower_children_only() {
    let lower = || new().dir("d").file("d/x", b"1").dir("d/sub").file("d/sub/y", b"1");
    for upper in [
        new().dir("d").opaque("d").file("d/z", b"22").dir("d/sub"),
        new().dir("d/sub").file("d/z", b"22").opaque("d"),
    ] {
        check(&[lower(), upper], "d 755 dir\nd/sub 755 dir\nd/z 644 file 2");
    }
    check(&[lower(), new().opaque("")], "");
    check(&[lower(), new().opaque("d"), new().file("d/x", b"333")], "d 755 dir\nd/x 644 file 3");
}

#[test]
fn anything_but_a_directory_over_a_directory_replaces() {
    let private = || TarEntry::directory("d").mode(0o700);
    let lower = || new().entry(private()).file("d/x", b"1").symlink("s", "d");
    check(&[lower(), new().file("d", b"22")], "d 644 file 2\ns 777 -> d");
    check(&[lower(), new().symlink("d", "t")], "d 777 -> t\ns 777 -> d");
    check(&[lower(), new().dir("s")], "d 700 dir\nd/x 644 file 1\ns 755 dir");
    // A parent that no entry is made for keeps what it was, and hides what is not a directory.
    check(
        &[lower(), new().file("d/y", b"")],
        "d 700 dir\nd/x 644 file 1\nd/y 644 file 0\ns 777 -> d",
    );
    check(
        &[lower(), new().file("s/y", b"")],
        "d 700 dir\nd/x 644 file 1\ns 755 dir\ns/y 644 file 0",
    );
    check(&[lower(), new().dir("d")], "d 755 dir\nd/x 644 file 1\ns 777 -> d");
    // Within a layer the last one wins; what the layer replaces by itself does not hide lower names.
    check(
        &[lower(), new().file("d", b"").dir("d").file("s", b"1").file("s", b"22")],
        "d 755 dir\nd/x 644 file 1\ns 644 file 2",
    );
    check(&[new().dir("d").file("d/x", b"").file("d", b"1").dir("d")], "d 755 dir");
}

#[test]
fn names_do_not_lead_out_of_the_root() {
    check(
        &[new().file("../../x", b"").file("/a/../b//c/.", b"")],
        "b 755 dir\nb/c 644 file 0\nx 644 file 0",
    );
    // Symbolic links of the same layer are followed, within the root.
    check(
        &[new().symlink("up", "../../a").file("up/x", b"").symlink("abs", "/b").file("abs/y", b"")],
        "a 755 dir\na/x 644 file 0\nabs 777 -> /b\nb 755 dir\nb/y 644 file 0\nup 777 -> ../../a",
    );
}

#[test]
fn missing_parents_are_of_the_epoch_and_times_survive() {
    let tar = new().file("a/b", b"").entry(TarEntry::directory("d").mtime(5, 0)).file("d/x", b"");
    let seen = unpack(&[tar.build(), new().file("d/y", b"").build()]);
    let mtime = |path: &str| seen[path.as_bytes()].mtime;
    assert_eq!(
        [mtime(""), mtime("a"), mtime("d"), mtime("a/b")],
        [(0, 0), (0, 0), (5, 0), (1_700_000_000, 0)]
    );
}

#[test]
fn hard_links_lead_to_lower_layers_too() {
    let lower = new().file("a", b"1").symlink("s", "a").file("gone", b"22");
    let upper = new()
        .hard_link("d/b", "./a")
        .hard_link("t", "/s")
        .hard_link("kept", "gone")
        .whiteout("gone");
    let seen = unpack(&[lower.build(), upper.build()]);
    assert_eq!(
        listing(&seen),
        "a 644 file 1\nd 755 dir\nd/b 644 file 1\nkept 644 file 2\ns 777 -> a\nt 777 -> a\n"
    );
    let entry = |path: &str| &seen[path.as_bytes()];
    assert_eq!((entry("a").links, entry("d/b").first_path.as_slice()), (2, b"a".as_slice()));
    assert_eq!((entry("t").links, entry("t").first_path.as_slice()), (2, b"s".as_slice()));
    assert_eq!(entry("kept").links, 1);
}

#[test]
fn broken_tars_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let good = new().file("a", vec![1; 1000]).build();
    let mut spoilt = good.clone();
    spoilt[0] ^= 1;
    let unknown = new().entry(TarEntry::directory("x")).build();
    let mut unknown_type = unknown;
    unknown_type[156] = b'Z';
    let raise = |field: &mut [u8]| {
        let sum = u32::from_str_radix(std::str::from_utf8(&field[..6]).unwrap(), 8).unwrap();
        let sum = format!("{:06o}", sum + u32::from(b'Z' - b'5'));
        field[..6].copy_from_slice(sum.as_bytes());
    };
    raise(&mut unknown_type[148..156]);
    for (tar, expected) in [
        (good[..1100].to_vec(), "unexpected end of file"),
        (spoilt, "a header with a wrong checksum"),
        (unknown_type, "an entry of unknown type 0x5a"),
        (new().hard_link("a", "nowhere").build(), "entity not found"),
        (new().file("f", b"").file("f/x", b"").build(), "not a directory"),
    ] {
        let err = untar(&folder.path().join("root"), &[tar]).unwrap_err();
        assert_eq!(err.source.to_string(), expected);
    }
}

/// Everything in all dialects, as far as GNU tar can unpack it, too.
fn everything() -> Vec<u8> {
    let long = "long/".to_owned() + &"0123456789".repeat(11);
    let mut layer = new().entry(TarEntry::directory("long").mtime(7, 0));
    for (dialect, letter) in [(Dialect::Pax, "p"), (Dialect::Ustar, "u"), (Dialect::Gnu, "g")] {
        let name = |name: &str| format!("{long}/{letter}/{name}").into_bytes();
        let kinds = [
            TarKind::File("content".into()),
            TarKind::Symlink(name("0")),
            TarKind::CharDevice(5, 1),
            TarKind::BlockDevice(259, 70_000),
            TarKind::Fifo,
            TarKind::HardLink(name("0")),
        ];
        if letter == "p" {
            layer = layer.entry(TarEntry::directory(long.as_str()));
        }
        layer = layer.entry(TarEntry::directory(name("")).dialect(dialect).mode(0o1777));
        for (number, kind) in kinds.into_iter().enumerate() {
            let entry = TarEntry::new(name(&number.to_string()), kind).dialect(dialect);
            layer = layer.entry(entry.owner(3_000_000, 5).mtime(-77, 0));
        }
    }
    // GNU tar only knows whole blocks, but for the last piece.
    let piece = |number: u8| (u64::from(number) * 10_000, vec![number; 1024]);
    let mut pieces: Vec<(u64, Vec<u8>)> = (1..39).map(piece).collect();
    pieces.push((390_000, vec![39; 700]));
    for (number, format) in
        [SparseFormat::OldGnu, SparseFormat::Pax00, SparseFormat::Pax01, SparseFormat::Pax10]
            .into_iter()
            .enumerate()
    {
        for (count, size) in [(0, 0), (0, 5000), (3, 35_000), (39, 390_700)] {
            let content = SparseContent { pieces: pieces[..count].to_vec(), size, format };
            layer = layer.sparse(format!("sparse-{number}-{count}-{size}"), content);
        }
    }
    let strange = TarEntry::file(b"strange \xff\n=".as_slice(), b"x").mtime(-5, 250_000_000);
    layer
        .entry(strange.mode(0o6711).xattr("user.a", b"x\ny=\0z".as_slice()))
        .global_pax(&[("mtime", "1"), ("comment", "x")])
        .file("last", b"y")
        .build()
}

#[test]
fn gnu_tar_agrees() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    let tar = everything();
    untar(&ours, std::slice::from_ref(&tar)).unwrap();
    std::fs::create_dir(&theirs).unwrap();
    let file = folder.path().join("layer.tar");
    std::fs::write(&file, tar).unwrap();
    let status = Command::new("tar")
        .args([
            "--extract",
            "--preserve-permissions",
            "--same-owner",
            "--numeric-owner",
            "--xattrs",
        ])
        .args(["--xattrs-include=*", "--file"])
        .arg(&file)
        .arg("--directory")
        .arg(&theirs)
        .output()
        .expect("GNU tar is installed");
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let mut expected = snapshot(&theirs).unwrap();
    let found = snapshot(&ours).unwrap();
    // The roots were made differently, and only GNU tar applies global records.
    for path in [b"".as_slice(), b"last"] {
        let root = found[path].clone();
        expected.insert(path.to_vec(), root);
    }
    assert!(found.len() > 35);
    assert_eq!(diff(&expected, &found), Vec::<String>::new());
}

#[test]
fn random_images_unpack_and_differ() {
    let mut kinds = [0; 4];
    for seed in 0..12 {
        let layers = random_layers(seed, &Shape::default());
        let all = unpack(&layers);
        for entry in all.values() {
            kinds[0] += usize::from(entry.links > 1);
            kinds[1] += usize::from(matches!(entry.kind, Kind::File { size: 1.., .. }));
            kinds[2] += usize::from(!entry.xattrs.is_empty());
            kinds[3] += usize::from(matches!(entry.kind, Kind::CharDevice(..)));
        }
        let again = unpack(&layers);
        assert_eq!(diff(&all, &again), Vec::<String>::new(), "seed {seed}");
        let fewer = unpack(&layers[..layers.len() - 1]);
        assert!(!diff(&all, &fewer).is_empty(), "the last layer of seed {seed} does nothing");
    }
    assert!(kinds.iter().all(|&count| count > 5), "{kinds:?}");
}

#[test]
fn every_difference_is_told() {
    let unpack_one = |builder: LayerBuilder| unpack(&[builder.build()]);
    let expected = unpack_one(new().file("a", b"1").file("b", b"1").hard_link("c", "b"));
    let a = TarEntry::file("a", b"2").mode(0o600).owner(1, 2).xattr("user.k", "v").mtime(1, 2);
    let found = unpack_one(new().entry(a).file("c", b"1").dir("d"));
    let lines = diff(&expected, &found);
    assert_eq!(lines.len(), 4, "{lines:#?}");
    for part in [
        "mode 0600, expected 0644",
        "owner 1:2, expected 0:0",
        "mtime (1, 2), expected (1700000000, 0)",
        "xattrs [user.k=\"v\"], expected []",
    ] {
        assert!(lines[0].starts_with("a: kind") && lines[0].contains(part), "{}", lines[0]);
    }
    assert!(lines[1].starts_with("b: missing"));
    assert_eq!(lines[2], "c: links 1, expected 2; is the same file as c, expected b");
    assert_eq!(lines[3], "d: not expected, found Directory");
    assert_eq!(diff(&expected, &expected.clone()), Vec::<String>::new());
    snapshot(Path::new("/nowhere/at/all")).unwrap_err();
}

//! What layers over one another show.

use ztoc::{EntryKind, SparseMap, TocEntry};

use super::{check, directory, entry, file, hard_link, listing, merge, symlink};
use crate::Tree;

#[test]
fn no_layers_make_an_empty_root() {
    check(&[], &[]);
    let root = merge(&[]).unwrap();
    assert_eq!((root.node(Tree::ROOT).mode, root.node(Tree::ROOT).links), (0o755, 2));
}

#[test]
fn names_are_cleaned_and_stay_in_the_root() {
    for name in ["a/b", "./a/b", "/a/b", "a//b", "a/./b/", "../a/b", "x/../a/b", "/../../a/b"] {
        check(&[&[file(name, 1)]], &["/a/ 755", "/a/b 0:1"]);
    }
}

#[test]
fn root_entry_describes_the_root_and_nothing_else_can() {
    let tree = merge(&[&[directory("./", 0o7700), file("a/..", 3)]]).unwrap();
    assert_eq!(tree.node(Tree::ROOT).mode, 0o7700);
    assert_eq!(tree.len(), 1);
    // A layer without an entry for the root leaves it as it is.
    let tree = merge(&[&[directory("/", 0o700)], &[file("a", 1)]]).unwrap();
    assert_eq!(tree.node(Tree::ROOT).mode, 0o700);
}

#[test]
fn missing_parents_belong_to_root_and_have_no_time() {
    let tree = merge(&[&[file("a/b", 1)]]).unwrap();
    let parent = tree.node(tree.lookup(b"a").unwrap());
    assert_eq!((parent.mode, parent.uid, parent.gid), (0o755, 0, 0));
    assert_eq!(parent.mtime, ztoc::Mtime::default());
}

#[test]
fn missing_parent_keeps_the_lower_directory_as_it_was() {
    check(
        &[&[directory("a", 0o700), file("a/x", 1)], &[file("a/y", 2)]],
        &["/a/ 700", "/a/x 0:1", "/a/y 1:2"],
    );
}

#[test]
fn mode_keeps_twelve_bits() {
    check(&[&[directory("a", 0o107_777)]], &["/a/ 7777"]);
}

#[test]
fn later_entries_of_a_layer_win() {
    check(&[&[file("a", 1), file("a", 2)]], &["/a 0:2"]);
    check(&[&[directory("a", 0o700), file("a/x", 1), file("a", 2)]], &["/a 0:2"]);
    check(
        &[&[directory("a", 0o700), file("a/x", 1), directory("a", 0o750)]],
        &["/a/ 750", "/a/x 0:1"],
    );
    check(&[&[symlink("a", "b"), directory("a", 0o700)]], &["/a/ 700"]);
}

#[test]
fn directory_over_directory_shows_both() {
    check(
        &[
            &[directory("a", 0o700), file("a/x", 1), file("a/y", 1)],
            &[directory("a", 0o711), file("a/y", 2), file("a/z", 2)],
        ],
        &["/a/ 711", "/a/x 0:1", "/a/y 1:2", "/a/z 1:2"],
    );
}

#[test]
fn other_kinds_replace_what_is_below() {
    let lower = [directory("a", 0o700), file("a/x", 1)];
    check(&[&lower, &[file("a", 2)]], &["/a 1:2"]);
    check(&[&lower, &[symlink("a", "t")]], &["/a -> t"]);
    check(&[&lower, &[file("a", 2)], &[directory("a", 0o711)]], &["/a/ 711"]);
    // A path through what was a file below.
    check(&[&[file("a", 1)], &[file("a/x", 2)]], &["/a/ 755", "/a/x 1:2"]);
}

#[test]
fn whiteout_hides_one_name_of_the_lower_layers() {
    let lower = [directory("a", 0o700), file("a/x", 1), file("a/y", 1)];
    check(&[&lower, &[file("a/.wh.x", 0)]], &["/a/ 700", "/a/y 0:1"]);
    check(&[&lower, &[file(".wh.a", 0)]], &[]);
    check(&[&lower, &[file("b/.wh.a", 0)]], &["/a/ 700", "/a/x 0:1", "/a/y 0:1", "/b/ 755"]);
    // It is gone for the layers above, too.
    check(&[&lower, &[file(".wh.a", 0)], &[file("a/z", 3)]], &["/a/ 755", "/a/z 2:3"]);
}

#[test]
fn whiteout_spares_its_own_layer_in_any_order() {
    let lower = [directory("a", 0o700), file("a/x", 1)];
    let own = [directory("a", 0o711), file("a/y", 2), file(".wh.a", 0)];
    check(&[&lower, &own], &["/a/ 711", "/a/y 1:2"]);
    let [one, two, three] = own;
    check(&[&lower, &[three, one, two]], &["/a/ 711", "/a/y 1:2"]);
}

#[test]
fn opaque_hides_all_lower_children_in_any_order() {
    let lower = [directory("a", 0o700), file("a/x", 1), file("a/b/y", 1), file("z", 1)];
    let expected = ["/a/ 700", "/a/new 1:2", "/z 0:1"];
    check(&[&lower, &[file("a/.wh..wh..opq", 0), file("a/new", 2)]], &expected);
    check(&[&lower, &[file("a/new", 2), file("a/.wh..wh..opq", 0)]], &expected);
    check(&[&lower, &[file(".wh..wh..opq", 0)]], &[]);
}

/// As in the upper folder of overlayfs, where the marks of a removed directory go with it.
#[test]
fn a_directory_that_its_own_layer_replaces_hides_nothing() {
    let lower = [directory("a", 0o700), file("a/x", 1), file("a/y", 1)];
    let expected = ["/a/ 711", "/a/x 0:1", "/a/y 0:1"];
    for mark in ["a/.wh..wh..opq", "a/.wh.x"] {
        let marked = [directory("a", 0o755), file(mark, 0)];
        check(
            &[&lower, &[&marked[..], &[file("a", 2), directory("a", 0o711)]].concat()],
            &expected,
        );
    }
}

#[test]
fn other_names_of_aufs_mean_nothing() {
    let entries =
        [file("a/.wh..wh.plnk", 1), file(".wh..wh.orph/x", 1), file("b/.wh..wh.x/y/z", 1)];
    check(&[&entries], &[]);
}

#[test]
fn null_device_is_a_whiteout_too() {
    let lower = [file("a", 1), file("b", 1)];
    check(&[&lower, &[entry(EntryKind::CharDevice, "a")]], &["/b 0:1"]);
}

#[test]
fn special_files_keep_their_numbers() {
    let device = |kind, name| TocEntry { device: (1, 3), ..entry(kind, name) };
    check(
        &[&[
            device(EntryKind::CharDevice, "c"),
            device(EntryKind::BlockDevice, "b"),
            entry(EntryKind::Fifo, "f"),
        ]],
        &["/b b1,3", "/c c1,3", "/f fifo"],
    );
}

#[test]
fn symlinked_parents_of_the_same_layer_are_followed() {
    for target in ["usr/lib", "/usr/lib", "../../usr/lib", "./usr/x/../lib", "l2"] {
        check(
            &[&[symlink("l2", "usr/lib"), symlink("lib", target), file("lib/x", 1)]],
            &[
                "/l2 -> usr/lib",
                &format!("/lib -> {target}"),
                "/usr/ 755",
                "/usr/lib/ 755",
                "/usr/lib/x 0:1",
            ],
        );
    }
    check(
        &[&[symlink("a/b/up", "../c"), file("a/b/up/x", 1)]],
        &["/a/ 755", "/a/b/ 755", "/a/b/up -> ../c", "/a/c/ 755", "/a/c/x 0:1"],
    );
    // Whiteouts go the same way.
    check(
        &[&[file("usr/x", 1)], &[symlink("u", "usr"), file("u/.wh.x", 0)]],
        &["/u -> usr", "/usr/ 755"],
    );
}

#[test]
fn symlinked_parents_of_lower_layers_are_replaced() {
    // Each layer is unpacked by itself, so it does not see the link; overlayfs then shows the
    // directory.
    check(
        &[&[file("usr/lib/a", 1), symlink("lib", "usr/lib")], &[file("lib/x", 2)]],
        &["/lib/ 755", "/lib/x 1:2", "/usr/ 755", "/usr/lib/ 755", "/usr/lib/a 0:1"],
    );
}

#[test]
fn hard_links_share_their_node() {
    let tree = merge(&[&[
        file("b", 1),
        hard_link("a", "./b"),
        hard_link("d/c", "/a"),
        symlink("s", "b"),
        hard_link("s2", "s"),
    ]])
    .unwrap();
    let [a, b, c] = ["a", "b", "d/c"].map(|path| tree.lookup(path.as_bytes()).unwrap());
    assert_eq!((a, b), (b, c));
    assert_eq!(tree.node(a).links, 3);
    assert_eq!(tree.path_of(a), b"a");
    assert_eq!(tree.node(tree.lookup(b"s2").unwrap()).links, 2);
    assert_eq!(tree.len(), 4);
}

#[test]
fn hard_link_finds_lower_layers_and_symlinked_parents() {
    let tree = merge(&[
        &[file("x", 1), symlink("d", "e"), file("e/y", 2)],
        &[hard_link("h", "x"), hard_link("i", "d/y")],
    ])
    .unwrap();
    assert_eq!(tree.lookup(b"h"), tree.lookup(b"x"));
    assert_eq!(tree.lookup(b"i"), tree.lookup(b"e/y"));
    // The own layer comes first.
    let tree = merge(&[&[file("x", 1)], &[file("x", 2), hard_link("h", "x")]]).unwrap();
    assert_eq!(listing(&tree), ["/h 1:2", "/x 1:2"]);
}

#[test]
fn replacing_one_name_leaves_the_others() {
    let lower = [file("a", 1), hard_link("b", "a")];
    let tree = merge(&[&lower, &[file("a", 2)]]).unwrap();
    assert_eq!(listing(&tree), ["/a 1:2", "/b 0:1"]);
    assert_eq!(tree.node(tree.lookup(b"b").unwrap()).links, 1);
    check(&[&lower, &[file(".wh.a", 0)]], &["/b 0:1"]);
    let tree = merge(&[&[file("a", 1), hard_link("b", "a"), file("a", 2)]]).unwrap();
    assert_eq!(listing(&tree), ["/a 0:2", "/b 0:1"]);
}

#[test]
fn attributes_are_filtered_and_sorted() {
    let keys = [
        "SCHILY.xattr.user.b",
        "SCHILY.xattr.user.a",
        "SCHILY.xattr.user.",
        "SCHILY.xattr.trusted.overlay.opaque",
        "SCHILY.xattr.trusted.x",
        "SCHILY.xattr.security.capability",
        "SCHILY.xattr.system.posix_acl_access",
        "SCHILY.xattr.system.other",
        "SCHILY.xattr.com.apple.x",
        "path",
    ];
    let pax: Vec<_> = keys.iter().map(|key| (Vec::from(*key), b"v".to_vec())).collect();
    let link = TocEntry { pax: pax.clone(), ..symlink("l", "a") };
    let tree = merge(&[&[TocEntry { pax, ..file("a", 1) }, link]]).unwrap();
    let node = tree.node(tree.lookup(b"a").unwrap());
    let names: Vec<&[u8]> = node.xattrs.iter().map(|(name, _)| &**name).collect();
    let expected: [&[u8]; 5] =
        [b"security.capability", b"system.posix_acl_access", b"trusted.x", b"user.a", b"user.b"];
    assert_eq!(names, expected);
    // Linux has `user.` attributes on files and directories only.
    let link = tree.node(tree.lookup(b"l").unwrap());
    assert_eq!(link.xattrs.len(), 3);
}

#[test]
fn sparse_files_have_their_logical_size() {
    let map = SparseMap { pieces: vec![(0, 512), (4096, 100)], logical_size: 10_000 };
    let tree = merge(&[&[TocEntry { size: 612, sparse: Some(map), ..file("s", 0) }]]).unwrap();
    assert_eq!(tree.total_file_bytes(), 10_000);
    assert_eq!(tree.files_in_layer_order()[0].size, 612);
}

#[test]
fn paths_as_deep_as_they_can_be_take_no_stack() {
    let deep = "d/".repeat(2047) + "f";
    let tree = merge(&[&[file(&deep, 1)], &[file(&deep, 2)]]).unwrap();
    let id = tree.lookup(deep.as_bytes()).unwrap();
    assert_eq!(tree.len(), 2049);
    assert_eq!(tree.path_of(id), deep.as_bytes());
}

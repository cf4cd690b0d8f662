//! Layers that can only be read from their beginning, and layers of which nothing is known yet.

use std::path::Path;
use std::time::Duration;

use oci::Digest;
use testkit::image::{Compression, Content, End, ImageBuilder, LayerBuilder, Texture};
use testkit::registry::{Fault, Link, Scope, Times};

use crate::BACKENDS;
use crate::setup::{Setup, check, image, image_as};

/// What files hold, by their paths.
type Files = Vec<(String, Vec<u8>)>;

const ZSTD: Compression = Compression::Zstd { level: 1 };

/// A layer with a file of `mib` MiB, which cannot be compressed, and what the file holds.
fn layer(path: &str, mib: u64) -> (LayerBuilder, (String, Vec<u8>)) {
    let seed = path.bytes().map(u64::from).sum();
    let content = Content::generated(seed, mib << 20, Texture::Random);
    let bytes = content.to_bytes();
    (LayerBuilder::new().file(path, content), (path.to_owned(), bytes))
}

impl Setup {
    fn present(&self) -> (u64, u64) {
        let mount = &self.status()["mounts"][0];
        (mount["bytes_present"].as_u64().unwrap(), mount["bytes_total"].as_u64().unwrap())
    }

    /// How often the blob was asked for, and how many bytes of it were sent.
    fn transferred(&self, blob: &Digest) -> (usize, u64) {
        let requests = self.registry.requests();
        let name = blob.to_string();
        let of_blob = || requests.iter().filter(|request| request.path.ends_with(&name));
        (of_blob().count(), of_blob().map(|request| request.bytes_sent).sum())
    }

    /// Layers of which the cache has all.
    fn whole_layers(&self) -> usize {
        let listed = self.ok(&["cache", "ls"]);
        let layers = listed["layers"].as_array().unwrap();
        layers.iter().filter(|layer| layer["spans_present"] == layer["spans"]).count()
    }

    /// Bytes that the daemon has written so far, wherever to.
    fn written(&self) -> u64 {
        let path = format!("/proc/{}/io", self.daemon_pid().unwrap());
        let io = std::fs::read_to_string(path).unwrap();
        let wchar = io.lines().find_map(|line| line.strip_prefix("wchar: "));
        wchar.unwrap().parse().unwrap()
    }
}

#[test]
fn a_zstd_layer_is_mounted_long_before_it_is_here() {
    for backend in BACKENDS {
        let setup = Setup::new();
        let (name, contents) = image_as(&setup, "zstd", (24, 1 << 20), ZSTD);
        setup.index(&name);
        setup.registry.set_link(Link::mbit_per_s(40, Duration::from_millis(2)));
        let dir = setup.mount(&name, "mnt", &["--backend", backend]);
        let (present, total) = setup.present();
        assert!(present < total / 2, "{backend}: {present} of {total} bytes when it was mounted");
        std::thread::scope(|scope| {
            let (first, last) = (&contents[..1], &contents[23..]);
            let reader = scope.spawn(|| check(&dir, last));
            check(&dir, first);
            let (present, total) = setup.present();
            assert!(
                present < total / 2,
                "{backend}: {present} of {total} bytes for the first file"
            );
            assert!(!reader.is_finished(), "{backend}: the last file cannot be here yet");
            reader.join().unwrap();
        });
        check(&dir, &contents);
        setup.until_sealed();
    }
}

#[track_caller]
fn killed_daemons_are_not_noticed(backend: &str) {
    let setup = Setup::new();
    let (name, contents) = image_as(&setup, "killed", (16, 1 << 20), ZSTD);
    setup.index(&name);
    setup.registry.set_link(Link::mbit_per_s(60, Duration::from_millis(2)));
    let dir = setup.mount(&name, "mnt", &["--backend", backend]);
    std::thread::scope(|scope| {
        let readers = [0, 1].map(|number| {
            let (dir, contents) = (&dir, &contents);
            scope.spawn(move || {
                let half = contents.iter().skip(number).step_by(2).cloned();
                check(dir, &half.collect::<Vec<_>>());
            })
        });
        for _ in 0..3 {
            setup.kill_daemon();
        }
        for reader in readers {
            reader.join().unwrap();
        }
    });
    check(&dir, &contents);
    setup.until_sealed();
}

#[test]
fn killed_daemons_are_not_noticed_by_readers_of_a_stream_through_erofs() {
    killed_daemons_are_not_noticed("erofs");
}

#[test]
fn killed_daemons_are_not_noticed_by_readers_of_a_stream_through_erofs_loop() {
    killed_daemons_are_not_noticed("erofs-loop");
}

#[test]
fn killed_daemons_are_not_noticed_by_readers_of_a_stream_through_fuse() {
    killed_daemons_are_not_noticed("fuse");
}

#[test]
fn wrong_bytes_in_a_stream_are_an_error_and_never_served() {
    for backend in BACKENDS {
        let setup = Setup::new();
        let (name, contents) = image_as(&setup, "wrong", (4, 1 << 20), ZSTD);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never", "--backend", backend]);
        let fault = Fault::FlipBodyByte { offset: 2_500_000 };
        let fault = setup.registry.faults().inject(Scope::Blobs, Times::Always, fault);
        check(&dir, &contents[..1]);
        let read = std::fs::read(dir.join(&contents[3].0)).map(|bytes| bytes.len());
        let errno = read.as_ref().err().and_then(std::io::Error::raw_os_error);
        let eio = Some(rustix::io::Errno::IO.raw_os_error());
        assert_eq!(errno, eio, "{backend}: {read:?}\n{}", setup.log());
        setup.registry.faults().remove(fault);
        // An error is never remembered for good.
        check(&dir, &contents);
    }
}

#[test]
fn passing_faults_of_a_stream_are_not_noticed() {
    for fault in [
        Fault::Status(503),
        Fault::ResetRequest,
        Fault::Truncate { after: 1_500_000 },
        Fault::ResetBody { after: 1_500_000 },
        Fault::FlipBodyByte { offset: 1_500_000 },
        Fault::IgnoreRange,
    ] {
        let setup = Setup::new();
        let (name, contents) = image_as(&setup, "faults", (4, 1 << 20), ZSTD);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
        setup.registry.faults().inject(Scope::Blobs, Times::Next(2), fault);
        check(&dir, &contents);
    }
}

/// An image of one layer of each kind, what its files hold, and its layers' digests.
fn three_kinds(setup: &Setup) -> (String, Files, Vec<Digest>) {
    let kinds =
        [("gzip", Compression::Gzip { level: 1 }), ("zstd", ZSTD), ("none", Compression::None)];
    let (mut image, mut contents) = (ImageBuilder::new(), Vec::new());
    for (path, compression) in kinds {
        let (layer, content) = layer(path, 8);
        image = image.layer(layer.build(), compression);
        contents.push(content);
    }
    let image = image.build();
    let layers = image.layers.iter().map(|layer| layer.digest).collect();
    (image.push_to(&setup.registry, "kinds", "1").unwrap().reference, contents, layers)
}

#[test]
fn a_first_mount_transfers_and_writes_each_layer_once_and_the_next_is_lazy() {
    let setup = Setup::new();
    let (name, contents, layers) = three_kinds(&setup);
    let (other, _) = image(&setup, "other", 1, 1000);
    setup.mount(&other, "other", &[]);
    let before = setup.written();
    let dir = setup.mount(&name, "mnt", &[]);
    let written = setup.written() - before;
    let whole = 3 * (8 << 20);
    assert!((whole..whole * 11 / 10).contains(&written), "{written} bytes written");
    for layer in &layers {
        let (_, sent) = setup.transferred(layer);
        assert!((8 << 20..9 << 20).contains(&sent), "{layer}: {sent} bytes");
    }
    assert_eq!(std::fs::read_dir(setup.path("root/cache/incoming")).unwrap().count(), 0);
    setup.until_sealed();
    check(&dir, &contents);

    setup.ok(&["umount", dir.to_str().unwrap()]);
    setup.ok(&["cache", "prune"]);
    setup.registry.clear_requests();
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    let sent: u64 = layers.iter().map(|layer| setup.transferred(layer).1).sum();
    assert_eq!(sent, 0, "the kept indexes make it lazy");
    check(&dir, &contents);
}

#[test]
fn padding_behind_an_archive_may_fill_spans() {
    let setup = Setup::new();
    let (mut image, mut contents) = (ImageBuilder::new(), Vec::new());
    // The archives end just before a span does, and what GNU tar adds goes on behind it.
    for (path, end, compression) in [("zstd", 1 << 20, ZSTD), ("none", 4 << 20, Compression::None)]
    {
        let content = Content::generated(1, end - 2560, Texture::Random);
        contents.push((path.to_owned(), content.to_bytes()));
        let layer = LayerBuilder::new().file(path, content).end(End::Record).build();
        image = image.layer(layer, compression);
    }
    let name = image.build().push_to(&setup.registry, "padded", "1").unwrap().reference;
    let dir = setup.mount(&name, "mnt", &[]);
    check(&dir, &contents);
    setup.ok(&["umount", dir.to_str().unwrap()]);
    setup.ok(&["cache", "prune"]);
    let dir = setup.mount(&name, "mnt", &[]);
    check(&dir, &contents);
    setup.until_sealed();
}

#[test]
fn layers_that_have_an_index_are_not_received_for_those_without() {
    let setup = Setup::new();
    let (lower, lower_content) = layer("lower", 4);
    let (upper, upper_content) = layer("upper", 2);
    let gzip = Compression::Gzip { level: 1 };
    let one = ImageBuilder::new().layer(lower.build(), gzip);
    let known = one.clone().build().push_to(&setup.registry, "known", "1").unwrap().reference;
    setup.index(&known);
    let image = one.layer(upper.build(), ZSTD).build();
    let name = image.push_to(&setup.registry, "both", "1").unwrap().reference;
    setup.registry.clear_requests();
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    assert_eq!(setup.transferred(&image.layers[0].digest), (0, 0));
    assert_eq!(setup.transferred(&image.layers[1].digest).0, 1);
    check(&dir, &[lower_content, upper_content]);
    let explained = setup.ok(&["explain", dir.to_str().unwrap()]);
    let in_order = ["in_order", "sealed"].map(|what| explained["layers"][1][what].as_bool());
    assert_eq!(in_order, [Some(true), Some(true)], "{explained}");
    let index = explained["index"].as_str().unwrap();
    assert!(index.contains("1 of 2 layers were read whole"), "{index}");
}

#[test]
fn a_first_mount_that_was_killed_does_not_begin_anew_with_layers_that_are_whole() {
    let setup = Setup::new();
    let (small, small_content) = layer("small", 1);
    let (large, large_content) = layer("large", 12);
    let gzip = Compression::Gzip { level: 1 };
    let image = ImageBuilder::new().layer(small.build(), ZSTD).layer(large.build(), gzip).build();
    let name = image.push_to(&setup.registry, "resumed", "1").unwrap().reference;
    setup.registry.set_link(Link::mbit_per_s(40, Duration::ZERO));
    std::thread::scope(|scope| {
        let dir = setup.path("mnt");
        let setup = &setup;
        let mount = scope.spawn(move || setup.run(&["mount", &name, dir.to_str().unwrap()]));
        setup.until("the daemon runs", || {
            setup.run(&["status"]).status.success().then(|| setup.daemon_pid()).flatten()
        });
        setup.until("the small layer is whole", || (setup.whole_layers() == 1).then_some(()));
        setup.kill_daemon();
        assert!(!mount.join().unwrap().status.success());
    });
    setup.registry.set_link(Link::UNLIMITED);
    let name = format!("{}/resumed:1", setup.registry.reference_prefix());
    let dir = setup.mount(&name, "mnt", &[]);
    assert_eq!(setup.transferred(&image.layers[0].digest).0, 1);
    // What had come of it, and then all of it.
    let (_, sent) = setup.transferred(&image.layers[1].digest);
    assert!((12 << 20..24 << 20).contains(&sent), "{sent} bytes");
    check(&dir, &[small_content, large_content]);
    assert_eq!(std::fs::read_dir(setup.path("root/cache/incoming")).unwrap().count(), 0);
}

#[test]
fn mounts_at_a_time_receive_a_layer_once_and_do_not_hold_up_others() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "large", 16, 1 << 20);
    let (other, other_contents) = image(&setup, "small", 1, 1000);
    setup.index(&other);
    setup.registry.clear_requests();
    setup.registry.set_link(Link::mbit_per_s(40, Duration::ZERO));
    std::thread::scope(|scope| {
        let mounts = ["one", "two"].map(|dir| {
            let (setup, name) = (&setup, &name);
            scope.spawn(move || setup.mount(name, dir, &[]))
        });
        setup.until("the layer comes", || (setup.registry.bytes_sent() > 1 << 20).then_some(()));
        let dir = setup.mount(&other, "other", &[]);
        check(&dir, &other_contents);
        assert!(mounts.iter().all(|mount| !mount.is_finished()), "nothing was under way");
        for mount in mounts {
            check(&mount.join().unwrap(), &contents);
        }
    });
    let blobs = |path: &Path| path.parent().is_some_and(|parent| parent.ends_with("large/blobs"));
    let requests = setup.registry.requests();
    let mut parts: Vec<_> = requests.iter().filter(|one| blobs(Path::new(&one.path))).collect();
    parts.retain(|one| one.range.is_some());
    parts.sort_by_key(|one| one.range);
    // The lower layer is that of the other image.
    assert!(parts.iter().all(|one| one.path == parts[0].path), "one layer");
    let n_parts = parts.len();
    parts.dedup_by_key(|one| one.range);
    assert!(parts.len() > 1 && parts.len() == n_parts, "each part once");
}

//! What goes wrong while an image is mounted or read, beside a registry that is away.

use std::time::{Duration, Instant};

use oci::Digest;
use serde_json::json;
use testkit::image::{Compression, ImageBuilder, LayerBuilder, compress};
use testkit::registry::{Auth, BearerAuth, Fault, Link, Outage, Scope, Times};

use crate::setup::{Setup, check, image, terminate};
use crate::{BACKENDS, Contents};

/// Reads everything in a thread, acts as soon as a read waits, and waits for the reader.
#[track_caller]
fn while_a_read_waits(
    setup: &Setup,
    dir: &std::path::Path,
    contents: &Contents,
    act: impl FnOnce(),
) {
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| check(dir, contents));
        setup.until("a read waits", || {
            (setup.status()["mounts"][0]["waiting_reads"].as_u64()? > 0).then_some(())
        });
        act();
        reader.join().unwrap();
    });
}

#[test]
fn a_token_that_expires_is_replaced_without_a_reader_noticing() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "token", 48, 1 << 20);
    setup.index(&name);
    setup.registry.faults().set_auth(Auth::Bearer(BearerAuth::default()));
    setup.registry.set_link(Link::mbit_per_s(100, Duration::from_millis(1)));
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| check(&dir, &contents));
        setup.until("some of it was fetched", || {
            (setup.status()["bytes_fetched"].as_u64()? > 4 << 20).then_some(())
        });
        setup.registry.faults().expire_tokens();
        setup.registry.clear_requests();
        // What is under way needs no new token; what follows does.
        setup.registry.faults().cut(Outage::Reset);
        setup.until_a_failure();
        setup.registry.faults().restore();
        reader.join().unwrap();
    });
    let refused = setup.registry.requests().iter().filter(|request| request.status == 401).count();
    assert!(refused > 0, "no token expired: {:?}", setup.registry.requests());
}

#[test]
fn a_reader_does_not_wait_for_a_body_that_stalls() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "stalled", 4, 1 << 20);
    setup.index(&name);
    // It is given up after half a minute, which is too late for a reader.
    let dir = setup.mount(&name, "mnt", &["--completion", "never", "--deadline", "15s"]);
    let stall = Fault::Stall { after: 100_000 };
    setup.registry.faults().inject(Scope::Blobs, Times::Next(1), stall);
    check(&dir, &contents);
}

#[test]
fn a_daemon_that_is_told_to_end_during_a_fetch_does_and_its_successor_serves_the_reader() {
    for backend in BACKENDS {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "term", 8, 1 << 20);
        let (other, _) = image(&setup, "other", 1, 1000);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never", "--backend", backend]);
        setup.registry.faults().cut(Outage::Silence);
        while_a_read_waits(&setup, &dir, &contents, || {
            let (daemon, begin) = (setup.daemon_pid().unwrap(), Instant::now());
            terminate(daemon);
            assert!(begin.elapsed() < Duration::from_secs(10), "{backend}: {:?}", begin.elapsed());
            setup.registry.faults().restore();
            setup.mount(&other, "other", &[]);
            assert_ne!(setup.daemon_pid().unwrap(), daemon);
        });
    }
}

#[test]
fn a_mount_is_not_unmounted_while_a_read_waits() {
    for backend in BACKENDS {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "busy", 4, 1 << 20);
        setup.index(&name);
        let dir = setup.mount(&name, "mnt", &["--completion", "never", "--backend", backend]);
        setup.registry.faults().cut(Outage::Refuse);
        while_a_read_waits(&setup, &dir, &contents, || {
            setup.fails(5, &["umount", dir.to_str().unwrap()]);
            setup.registry.faults().restore();
        });
        setup.ok(&["umount", dir.to_str().unwrap()]);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "{backend}");
    }
}

#[test]
fn killed_daemons_are_not_noticed_wherever_in_a_fetch_they_are() {
    for backend in BACKENDS {
        let setup = Setup::new();
        let (name, contents) = image(&setup, "points", 24, 1 << 20);
        setup.index(&name);
        setup.registry.set_link(Link::mbit_per_s(200, Duration::from_millis(1)));
        let dir = setup.mount(&name, "mnt", &["--backend", backend]);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| check(&dir, &contents));
            for _ in 0..6 {
                // A random point of its life: after so many bytes, unless all are there.
                let bytes = u64::from(rand_byte()) << 14;
                setup.until(&format!("{backend}: {bytes} bytes were fetched"), || {
                    let status = setup.status();
                    let fetched = status["bytes_fetched"].as_u64()?;
                    let sealed = status["mounts"][0]["sealed"].as_bool()?;
                    (fetched >= bytes || sealed).then_some(())
                });
                setup.kill_daemon();
            }
            reader.join().unwrap();
        });
        check(&dir, &contents);
    }
}

fn rand_byte() -> u8 {
    let mut byte = [0];
    rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::empty()).unwrap();
    byte[0]
}

/// An image of one layer; its blob is `blob`, whatever the configuration says.
fn odd_image(setup: &Setup, blob: Vec<u8>, diff_id: Digest, compression: Compression) -> String {
    let image = ImageBuilder::new().compressed_layer(blob, diff_id, compression).build();
    image.push_to(&setup.registry, "odd", "1").unwrap().reference
}

#[test]
fn a_layer_that_cannot_be_read_is_refused_in_a_sentence() {
    let tar = LayerBuilder::new().file("a", vec![b'x'; 100_000]).build();
    let gzip = Compression::Gzip { level: 6 };
    let good = compress(&tar, gzip);
    let mut damaged = good.clone();
    let middle = damaged.len() / 2;
    damaged[middle..].fill(0xff);
    let mut bad_tar = tar.clone();
    bad_tar[150] ^= 1;
    let xz = [b"\xfd7zXZ\0".to_vec(), vec![7; 5000]].concat();
    for (what, blob, diff_id, word) in [
        ("cut", good[..good.len() - 20].to_vec(), Digest::of(&tar), "layer"),
        ("damaged", damaged, Digest::of(&tar), "layer"),
        ("of an unknown compression", xz, Digest::of(&tar), "layer"),
        ("with a damaged tar", compress(&bad_tar, gzip), Digest::of(&bad_tar), "layer"),
        ("with another content", good, Digest::of(b"other"), "layer"),
    ] {
        let setup = Setup::new();
        let name = odd_image(&setup, blob, diff_id, gzip);
        let dir = setup.path("mnt");
        let output = setup.run(&["mount", &name, dir.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(1 | 6)), "{what}: {said}");
        assert!(said.trim().lines().count() == 1 && said.contains(word), "{what}: {said}");
        assert!(std::fs::read_dir(&dir).map_or(0, Iterator::count) == 0, "{what}");
    }
}

#[test]
fn a_layer_of_an_unknown_media_type_is_refused_in_a_sentence() {
    let setup = Setup::new();
    let tar = LayerBuilder::new().file("a", b"x".to_vec()).build();
    let image = ImageBuilder::new().layer(&tar, Compression::None).build();
    let refs = image.push_to(&setup.registry, "odd", "1").unwrap();
    let descriptor = |kind: &str, digest: &Digest, size: usize| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": oci::media_type::OCI_MANIFEST,
        "config": descriptor("config.v1+json", &refs.config, 300),
        "layers": [descriptor("layer.v1.tar+lz4", &refs.layers[0], tar.len())],
    });
    let media_type = oci::media_type::OCI_MANIFEST;
    setup.registry.put_manifest("odd", Some("1"), media_type, manifest.to_string());
    let dir = setup.path("mnt");
    let said = setup.fails(1, &["mount", &refs.reference, dir.to_str().unwrap()]);
    assert!(said.contains("tar+lz4"), "{said}");
}

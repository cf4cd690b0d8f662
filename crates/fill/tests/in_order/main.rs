//! zstd layers: one stream, whose spans become present in order.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails, wherever in it that is"
)]

mod setup;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fill::ReadError;
use testkit::image::{Compression, LayerBuilder, compress};
use testkit::registry::{Fault, Link, Outage, Scope, Times};

use crate::setup::{Setup, until, wait, wait_for_both};

#[test]
fn readers_get_their_bytes_in_the_order_of_the_stream() {
    let setup = Setup::new(12);
    setup.registry.set_link(Link::mbit_per_s(80, Duration::from_millis(2)));
    let running = setup.start();
    let last = running.read(running.last());
    let first = running.read(0..4096);
    wait(&first).unwrap();
    let present = running.layer.bytes_present();
    assert!(present < running.layer.bytes() / 2, "{present} bytes were here already");
    assert!(last.try_recv().is_err(), "the last byte cannot be here yet");
    setup.assert_right(0..4096);
    wait(&last).unwrap();
    setup.assert_right(running.all());
}

#[test]
fn a_layer_is_transferred_once_whoever_wants_it() {
    let setup = Setup::new(8);
    setup.registry.set_link(Link::mbit_per_s(400, Duration::ZERO));
    let running = setup.start();
    running.layer.mounted();
    running.layer.complete();
    let answers: Vec<_> =
        [7_000_000, 10, 3_000_000, 8_000_000].map(|at| running.read(at..at + 5000)).into();
    for answer in &answers {
        wait(answer).unwrap();
    }
    until("the layer is sealed", || running.layer.is_sealed());
    setup.assert_right(running.all());
    assert_eq!(setup.transfers(), [0]);
    assert_eq!(running.engine.figures().bytes_fetched, setup.blob_bytes);
}

#[test]
fn a_successor_begins_anew_and_keeps_what_is_present() {
    let setup = Setup::new(8);
    setup.registry.set_link(Link::mbit_per_s(80, Duration::ZERO));
    let running = setup.start();
    wait(&running.read(0..2 << 20)).unwrap();
    drop(running);
    setup.registry.set_link(Link::UNLIMITED);
    // What is written again would be right again.
    File::options().write(true).open(setup.data()).unwrap().write_all_at(b"mark", 5000).unwrap();
    let running = setup.start();
    assert!(running.cache.is_present(0));
    wait(&running.read(running.last())).unwrap();
    setup.assert_right(2 << 20..running.layer.bytes());
    let mut found = [0; 4];
    File::open(setup.data()).unwrap().read_exact_at(&mut found, 5000).unwrap();
    assert_eq!(&found, b"mark");
    assert_eq!(setup.transfers(), [0, 0]);
}

#[test]
fn a_transfer_that_breaks_off_goes_on_at_its_byte() {
    let setup = Setup::new(6);
    let fault = Fault::Truncate { after: 1 << 20 };
    setup.registry.faults().inject(Scope::Blobs, Times::Next(3), fault);
    let running = setup.start();
    wait(&running.read(running.all())).unwrap();
    setup.assert_right(running.all());
    assert_eq!(setup.transfers(), [0, 1 << 20, 2 << 20, 3 << 20]);
    assert_eq!(running.engine.figures().bytes_fetched, setup.blob_bytes);
}

#[test]
fn a_registry_that_is_away_is_waited_for_until_the_deadline() {
    let mut setup = Setup::new(4);
    setup.deadline = Duration::from_secs(1);
    setup.registry.faults().cut(Outage::Refuse);
    let running = setup.start();
    let Err(ReadError::Deadline { last, .. }) = wait(&running.read(running.last())) else {
        panic!("there is no registry");
    };
    assert!(last.contains("reading the layer from its source"), "{last}");
    setup.deadline = Duration::from_secs(60);
    drop(running);
    let running = setup.start();
    let answer = running.read(running.last());
    until("an attempt fails", || running.engine.figures().failed_spans > 1);
    setup.registry.faults().restore();
    wait(&answer).unwrap();
    setup.assert_right(running.all());
}

#[test]
fn wrong_bytes_are_an_error_for_all_behind_them_and_never_written() {
    let setup = Setup::new(6);
    let middle = setup.blob_bytes / 2;
    let fault = setup.registry.faults().flip_byte(setup.blob, middle, Times::Always);
    let running = setup.start();
    running.layer.complete();
    wait(&running.read(0..1000)).unwrap();
    for range in [3 << 20..4 << 20, running.last()] {
        let answer = wait(&running.read(range));
        assert!(matches!(answer, Err(ReadError::Corrupt { .. })), "{answer:?}");
    }
    setup.assert_right_where_present(&running);
    assert!(running.layer.bytes_present() < running.layer.bytes() / 2 + (1 << 20));
    // An error is never remembered for good.
    setup.registry.faults().remove(fault);
    wait(&running.read(running.last())).unwrap();
    setup.assert_right(running.all());
}

#[test]
fn wrong_bytes_that_pass_are_not_noticed() {
    let setup = Setup::new(4);
    for offset in [5, 1 << 20, (3 << 20) + 7] {
        setup.registry.faults().flip_byte(setup.blob, offset, Times::Next(1));
    }
    let running = setup.start();
    wait(&running.read(running.all())).unwrap();
    setup.assert_right(running.all());
}

#[test]
fn a_blob_of_another_length_is_wrong() {
    let tar = LayerBuilder::new().file("a", vec![7; 3 << 20]).build();
    let short = |tar: &[u8]| compress(&tar[..tar.len() - 2000], Compression::Zstd { level: 1 });
    let cut = |tar: &[u8]| {
        let mut blob = compress(tar, Compression::Zstd { level: 1 });
        blob.truncate(blob.len() - 10);
        blob
    };
    let other = |_tar: &[u8]| b"this is not zstd".to_vec();
    for packed in [&short as &dyn Fn(&[u8]) -> Vec<u8>, &cut, &other] {
        let setup = Setup::of(tar.clone(), packed);
        let running = setup.start();
        let answer = wait(&running.read(running.last()));
        assert!(matches!(answer, Err(ReadError::Corrupt { .. })), "{answer:?}");
        setup.assert_right_where_present(&running);
    }
}

#[test]
fn many_frames_are_one_stream() {
    let tar = Setup::new(3).tar;
    let frames = Compression::ZstdFrames { level: 1, frame_size: 100_000 };
    let setup = Setup::of(tar, |tar| compress(tar, frames));
    let running = setup.start();
    running.layer.complete();
    until("the layer is sealed", || running.layer.is_sealed());
    setup.assert_right(running.all());
}

#[test]
fn a_span_behind_the_stream_is_fetched_by_another_one() {
    let setup = Setup::new(10);
    setup.registry.set_link(Link::mbit_per_s(80, Duration::ZERO));
    let running = setup.start();
    wait(&running.read(3 << 20..4 << 20)).unwrap();
    // As an eviction does.
    running.cache.forget(&[0]).unwrap();
    let (behind, ahead) = (running.read(0..1000), running.read(5 << 20..6 << 20));
    assert!(wait_for_both(&ahead, &behind), "who waits ahead comes first");
    let sent = setup.registry.requests()[0].bytes_sent;
    assert!(sent < setup.blob_bytes, "the first stream went on to its end");
    setup.assert_right_where_present(&running);
    assert_eq!(setup.transfers(), [0, 0]);
    // Nobody waits for what was evicted: it stays away when the end is reached.
    wait(&running.read(running.last())).unwrap();
    running.cache.forget(&[1]).unwrap();
    until("the stream has ended", || setup.open.load(Ordering::SeqCst) == 0);
    assert_eq!(setup.transfers().len(), 2);
    wait(&running.read(running.all())).unwrap();
    setup.assert_right(running.all());
}

#[test]
fn a_layer_that_is_let_go_is_not_read_on() {
    let setup = Setup::new(8);
    setup.registry.set_link(Link::mbit_per_s(40, Duration::ZERO));
    let running = setup.start();
    let answer = running.read(running.last());
    wait(&running.read(0..10)).unwrap();
    running.engine.remove(&running.layer);
    assert!(matches!(wait(&answer), Err(ReadError::Gone { .. })));
    until("the transfer ends", || setup.open.load(Ordering::SeqCst) == 0);
    assert!(running.layer.bytes_present() < running.layer.bytes());
}

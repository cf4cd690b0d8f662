//! Layers that are received: kept whole, or not at all.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;
use crate::disk::recorder::record;
use crate::store::{LAYERS, StoreOptions};

fn open(root: &Path) -> Store {
    Store::open(root, StoreOptions { quota: None, boot_id: "boot".to_owned() }).unwrap()
}

fn blob() -> Digest {
    Digest::of(b"blob")
}

fn bytes() -> Vec<u8> {
    (0..20_000_u32).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect()
}

/// Three spans, and padding of the layer that belongs to none.
fn shape() -> LayerShape {
    LayerShape { bytes: 19_000, spans: vec![0, 5000, 12_300], index: Digest::of(b"index") }
}

/// Receives the layer in pieces that end at `edges` and at its end.
fn receive(store: &Store, edges: &[usize]) -> Result<Incoming, Box<dyn std::error::Error>> {
    let bytes = bytes();
    let mut incoming = store.receive(&blob())?;
    let mut at = 0;
    for &edge in edges.iter().chain([&bytes.len()]) {
        incoming.append(&bytes[at..edge])?;
        at = edge;
    }
    Ok(incoming)
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

#[track_caller]
fn check(edges: &[usize]) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let incoming = receive(&store, edges).unwrap();
    let layer = store.keep(incoming, shape()).unwrap();
    assert_eq!(layer.first_missing(0), None);
    layer.seal(Digest::of(b"tar"), layer.proven().unwrap()).unwrap();
    let sealed = layer.sealed().unwrap();
    assert_eq!((sealed.bytes, sealed.total_bytes), (19_000, 20_000));
    assert_eq!(sealed.crc32c, crc32c::crc32c(&bytes()[..19_000]));
    let mut found = vec![0; 19_000];
    layer.data().read_exact_at(&mut found, 0).unwrap();
    assert!(found == bytes()[..19_000]);
    assert_eq!(layer.data().metadata().unwrap().len(), 19_000);
    // The checksums of the spans are right, too, and outlive the seal.
    let report = layer.verify(&mut |_| {}).unwrap();
    assert!(report.spans == 3 && report.is_sound(), "{report:?}");
    layer.unseal().unwrap();
    assert_eq!(layer.bytes_present(), 19_000);
    assert!(is_empty(&folder.path().join(INCOMING)));
}

#[test]
fn a_received_layer_is_sealed_with_a_checksum_of_each_span() {
    check(&[5000, 12_300, 19_000]);
    check(&[1, 4999, 5000, 5000, 9000, 12_300, 12_301, 19_000, 19_500]);
    check(&[]);
    check(&[4000, 6000, 12_300, 18_000]);
    check(&[5000, 13_000]);
}

#[test]
fn what_was_proven_is_forgotten_with_the_first_span_and_with_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let layer = store.keep(receive(&store, &[]).unwrap(), shape()).unwrap();
    assert_eq!(layer.proven(), Some(20_000));
    layer.forget(&[1]).unwrap();
    assert_eq!(layer.proven(), None);
    layer.mark_present(1, crc32c::crc32c(&bytes()[5000..12_300])).unwrap();
    assert_eq!(layer.proven(), None, "it may be other bytes now");
    drop((layer, store));
    let layer = open(folder.path()).layer(&blob(), shape(), None).unwrap();
    assert_eq!((layer.proven(), layer.first_missing(0)), (None, None));
}

#[test]
fn what_is_not_kept_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let incoming = receive(&store, &[]).unwrap();
    assert!(store.usage().unwrap() >= 20_000, "what comes takes up room");
    let twice = store.receive(&blob()).unwrap_err();
    assert_eq!(twice.kind(), io::ErrorKind::AlreadyExists);
    drop(incoming);
    let too_long = LayerShape { bytes: 20_001, ..shape() };
    let incoming = receive(&store, &[]).unwrap();
    let refused = store.keep(incoming, too_long);
    assert!(matches!(refused, Err(KeepError::BadShape { received: 20_000 })), "{refused:?}");
    assert!(is_empty(&folder.path().join(INCOMING)) && is_empty(&folder.path().join(LAYERS)));
    // Neither does a process that was killed.
    std::mem::forget(receive(&store, &[]).unwrap());
    drop(store);
    open(folder.path());
    assert!(is_empty(&folder.path().join(INCOMING)) && is_empty(&folder.path().join(LAYERS)));
}

#[test]
fn it_takes_the_place_of_a_part_but_not_of_what_is_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let other = LayerShape { index: Digest::of(b"other"), ..shape() };
    let part = store.layer(&blob(), other, None).unwrap();
    let refused = store.keep(receive(&store, &[]).unwrap(), shape());
    assert!(matches!(refused, Err(KeepError::InUse { .. })), "{refused:?}");
    drop(part);
    let kept = store.keep(receive(&store, &[]).unwrap(), shape()).unwrap();
    assert!(Arc::ptr_eq(&kept, &store.layer(&blob(), shape(), None).unwrap()));
    assert_eq!(kept.first_missing(0), None);
    assert!(is_empty(&folder.path().join("trash")));
}

#[test]
fn a_process_killed_while_it_receives_leaves_nothing() {
    let life = |root: &Path| -> Result<(), Box<dyn std::error::Error>> {
        let store = open(root);
        store.keep(receive(&store, &[5000])?, shape())?;
        Ok(())
    };
    let whole = tempfile::tempdir().unwrap();
    let (result, changes) = record(None, || life(whole.path()));
    result.unwrap();
    for allowed in 0..changes.len() {
        let folder = tempfile::tempdir().unwrap();
        let (result, _) = record(Some(allowed), || life(folder.path()));
        result.unwrap_err();
        let store = open(folder.path());
        assert!(store.stored(&blob()).unwrap().is_none());
        assert!(is_empty(&folder.path().join(INCOMING)));
    }
}

//! What is kept, what is refused, and what a failure leaves.

use std::fs;

use tempfile::TempDir;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn store() -> (TempDir, Store) {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

fn create(store: &Store, kind: Kind, key: &str, parent: &str) -> Result<Lineage, StoreError> {
    store.create(kind, (key, parent), &BTreeMap::new(), |_| Ok(()))
}

/// A committed snapshot on another.
fn layer(store: &Store, name: &str, parent: &str) -> SnapshotId {
    create(store, Kind::Active, "work", parent).unwrap();
    store.commit("work", (name, parent), &BTreeMap::new(), |_| Ok(())).unwrap()
}

#[test]
fn what_is_written_is_read_after_a_restart() {
    let (dir, store) = store();
    let first = layer(&store, "first", "");
    let wanted = labels(&[("a", "1"), ("b", "ü")]);
    let second = store.create(Kind::View, ("second", "first"), &wanted, |_| Ok(())).unwrap();
    let before = store.list().unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.list().unwrap(), before);
    let info = store.stat("second").unwrap();
    assert_eq!((info.labels, info.parent.as_deref()), (wanted, Some("first")));
    assert_eq!(second.below.parents, [first]);
    store.with_ids(|ids| assert_eq!(*ids, HashSet::from([first, second.id]))).unwrap();
}

#[test]
fn ancestors_come_nearest_first() {
    let (_dir, store) = store();
    let one = layer(&store, "one", "");
    let two = layer(&store, "two", "one");
    let three = layer(&store, "three", "two");
    layer(&store, "beside", "one");
    let top = create(&store, Kind::Active, "top", "three").unwrap();
    assert_eq!(top.below.parents, [three, two, one]);
    assert_eq!(store.lineage("top").unwrap(), top);
    assert_eq!(store.lineage("one").unwrap().below.parents, []);
}

fn lazy(layers: u32) -> LazyLayer {
    let (image, chain) = ("reg.test/app@sha256:0".to_owned(), "sha256:1".to_owned());
    let (pulled_as, layer) = ("reg.test/app:1".to_owned(), format!("sha256:{layers}"));
    LazyLayer { image, pulled_as, layer, chain, layers, is_whole: layers == 2 }
}

#[test]
fn a_lazy_ancestor_stands_for_all_below_it() {
    let (dir, store) = store();
    let wanted = labels(&[("containerd.io/snapshot.ref", "one")]);
    store.create_lazy(("one", ""), &wanted, &lazy(1), |_| Ok(())).unwrap();
    let two = store.create_lazy(("two", "one"), &wanted, &lazy(2), |_| Ok(())).unwrap();
    let three = layer(&store, "three", "two");
    let top = create(&store, Kind::Active, "top", "three").unwrap();
    assert_eq!(
        (top.below.parents.as_slice(), &top.below.lazy),
        ([three, two].as_slice(), &Some(lazy(2)))
    );
    assert_eq!(["", "one", "three"].map(|name| store.height(name).unwrap()), [0, 1, 3]);
    let again = store.create_lazy(("two", "one"), &wanted, &lazy(2), |_| Ok(()));
    assert!(matches!(again, Err(StoreError::Exists(_))));
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.lineage("top").unwrap(), top);
    let info = store.stat("two").unwrap();
    assert_eq!(
        (info.kind, info.parent.as_deref(), info.labels),
        (Kind::Committed, Some("one"), wanted)
    );
    assert_eq!(store.usage("two").unwrap().lazy, Some(lazy(2)));
    assert!(store.has_layer("sha256:2").unwrap() && !store.has_layer("sha256:3").unwrap());
}

#[test]
fn numbers_are_never_used_twice() {
    let (dir, store) = store();
    let first = create(&store, Kind::Active, "a", "").unwrap().id;
    store.remove("a").unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert!(create(&store, Kind::Active, "a", "").unwrap().id > first);
}

#[test]
fn a_snapshot_whose_folder_cannot_be_made_is_none() {
    let (_dir, store) = store();
    let fails = |_: &Lineage| Err(io::ErrorKind::StorageFull.into());
    let error = store.create(Kind::Active, ("a", ""), &BTreeMap::new(), fails).unwrap_err();
    assert!(matches!(error, StoreError::Folder(_)), "{error}");
    assert!(matches!(store.stat("a"), Err(StoreError::Missing(_))));
}

#[test]
fn a_snapshot_whose_folder_does_not_reach_the_disk_is_not_committed() {
    let (_dir, store) = store();
    create(&store, Kind::Active, "a", "").unwrap();
    let broken = |_| Err(io::Error::other("broken disk"));
    store.commit("a", ("b", ""), &BTreeMap::new(), broken).unwrap_err();
    assert_eq!(store.stat("a").unwrap().kind, Kind::Active);
    store.stat("b").unwrap_err();
}

#[test]
fn labels_are_replaced_set_and_deleted() {
    let (_dir, store) = store();
    store.create(Kind::Active, ("a", ""), &labels(&[("x", "1"), ("y", "2")]), |_| Ok(())).unwrap();
    let check = |update, expected: &[(&str, &str)]| {
        assert_eq!(store.update("a", update).unwrap().labels, labels(expected));
    };
    check(Update::Set(labels(&[("x", ""), ("z", "3")])), &[("y", "2"), ("z", "3")]);
    check(Update::Replace(labels(&[("x", "4"), ("w", "")])), &[("x", "4")]);
    let info = store.stat("a").unwrap();
    assert!(info.updated > info.created);
}

#[test]
fn usage_belongs_to_what_was_committed() {
    let (_dir, store) = store();
    let id = create(&store, Kind::Active, "a", "").unwrap().id;
    let usage = Usage { bytes: 4096, inodes: 2 };
    store.set_usage(id, usage).unwrap();
    let known = |name: &str| {
        let KnownUsage { id, kind, usage, .. } = store.usage(name).unwrap();
        (id, kind, usage)
    };
    assert_eq!(known("a"), (id, Kind::Active, None));
    store.commit("a", ("b", ""), &BTreeMap::new(), |_| Ok(())).unwrap();
    store.set_usage(id, usage).unwrap();
    assert_eq!(known("b"), (id, Kind::Committed, Some(usage)));
}

#[test]
fn what_cannot_be_used_is_refused_and_left_alone() {
    let (dir, store) = store();
    drop(store);
    let file = dir.path().join("metadata.db");
    let right = fs::read(&file).unwrap();
    let refused = |expected: fn(&OpenStoreError) -> bool| {
        let before = fs::read(&file).ok();
        let error = Store::open(dir.path()).unwrap_err();
        assert!(expected(&error), "{error}");
        assert!(fs::read(&file).ok() == before, "it was changed");
    };
    fs::write(&file, b"this is no database, and long enough to be read as one".repeat(100))
        .unwrap();
    refused(|error| matches!(error, OpenStoreError::Damaged { .. }));
    fs::write(&file, &right).unwrap();
    let later = Connection::open(&file).unwrap();
    later.pragma_update(None, "user_version", 2).unwrap();
    later.close().unwrap();
    refused(|error| matches!(error, OpenStoreError::Newer { found: 2, .. }));
    fs::create_dir(dir.path().join("7")).unwrap();
    fs::remove_file(&file).unwrap();
    refused(|error| matches!(error, OpenStoreError::Lost { snapshots: 1, .. }));
    fs::write(&file, b"").unwrap();
    refused(|error| matches!(error, OpenStoreError::Lost { snapshots: 1, .. }));
}

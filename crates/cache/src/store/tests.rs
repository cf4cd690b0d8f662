//! The store as a whole: what it finds, keeps, lists and gives up.

use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;
use crate::layer::SpanState;

const SPAN: u64 = 64 << 10;

fn options(quota: Option<u64>) -> StoreOptions {
    StoreOptions { quota, boot_id: "boot".to_owned() }
}

fn open(root: &Path) -> Store {
    Store::open(root, options(None)).unwrap().with_grace(Duration::ZERO)
}

fn shape(spans: u64) -> LayerShape {
    LayerShape {
        bytes: spans * SPAN,
        spans: (0..spans).map(|span| span * SPAN).collect(),
        index: Digest::of(b"index"),
    }
}

fn named(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

/// A layer with its first `present` spans filled.
fn layer(store: &Store, name: &str, spans: u64, present: u64) -> Arc<Layer> {
    let layer = store.layer(&named(name), shape(spans), None).unwrap();
    let bytes = vec![7; usize::try_from(SPAN).unwrap()];
    for span in 0..present {
        layer.write_at(span * SPAN, &bytes).unwrap();
        layer.mark_present(u32::try_from(span).unwrap(), crc32c::crc32c(&bytes)).unwrap();
    }
    layer
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_new_store_is_private_and_empty() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("deep/store");
    let store = open(&root);
    for folder in [root.clone(), root.join(LAYERS), root.join(QUARANTINE)] {
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
    }
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(store.supports_holes(), HoleSupport::Full, "tests need a file system with holes");
    assert_eq!(
        names_in(&root),
        ["incoming", "layers", "lock", "quarantine", "trash"],
        "no probe left"
    );
    layer(&store, "a", 1, 1);
    let data = root.join(LAYERS).join(named("a").hex()).join("data");
    assert_eq!(fs::metadata(data).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn one_process_uses_a_store_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let second = Store::open(folder.path(), options(None));
    assert!(matches!(second, Err(OpenStoreError::InUse { .. })), "{second:?}");
    drop(store);
    open(folder.path());
}

#[test]
fn an_open_layer_is_shared() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let one = layer(&store, "a", 2, 1);
    let two = store.layer(&named("a"), shape(2), None).unwrap();
    assert!(Arc::ptr_eq(&one, &two));
    assert!(Arc::ptr_eq(&one, &store.stored(&named("a")).unwrap().unwrap()));
    let other = LayerShape { index: named("other"), ..shape(2) };
    let refused = store.layer(&named("a"), other.clone(), None);
    assert!(matches!(refused, Err(OpenLayerError::InUse { index }) if index == named("index")));
    drop((one, two));
    store.layer(&named("a"), other, None).unwrap();
}

#[test]
fn impossible_spans_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for (bytes, spans) in [(9, vec![]), (9, vec![1]), (9, vec![0, 5, 4]), (9, vec![0, 10])] {
        let shape = LayerShape { bytes, spans, index: named("index") };
        let refused = store.layer(&named("a"), shape, None);
        assert!(matches!(refused, Err(OpenLayerError::BadShape)), "{refused:?}");
    }
    assert_eq!(names_in(&folder.path().join(LAYERS)), [""; 0]);
}

#[test]
fn a_descriptor_that_was_handed_over_is_the_one_used() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let kept = layer(&store, "a", 2, 1).data().try_clone().unwrap();
    let again = store.layer(&named("a"), shape(2), Some(kept.try_clone().unwrap().into())).unwrap();
    assert!(again.is_present(0));
    // An open file's flags are those of its description: only the same one shows the change.
    let flags = rustix::fs::fcntl_getfl(&kept).unwrap();
    rustix::fs::fcntl_setfl(&kept, flags | rustix::fs::OFlags::APPEND).unwrap();
    assert_eq!(
        rustix::fs::fcntl_getfl(again.data()).unwrap(),
        rustix::fs::fcntl_getfl(&kept).unwrap()
    );
    drop(again);

    let foreign = layer(&store, "b", 2, 1).data().try_clone().unwrap();
    let refused = store.layer(&named("a"), shape(2), Some(foreign.into()));
    assert!(matches!(refused, Err(OpenLayerError::ForeignDescriptor)), "{refused:?}");
    let refused = store.layer(&named("a"), shape(3), Some(kept.into()));
    assert!(matches!(refused, Err(OpenLayerError::ForeignDescriptor)), "{refused:?}");
    assert!(layer(&store, "a", 2, 0).is_present(0), "and does no harm");
}

#[test]
fn a_layer_is_opened_as_it_lies_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    drop(layer(&store, "a", 3, 2));
    let found = store.stored(&named("a")).unwrap().unwrap();
    assert_eq!(*found.shape(), shape(3));
    assert_eq!(found.present_spans().iter().collect::<Vec<_>>(), [0, 1]);
    assert!(store.stored(&named("nothing")).unwrap().is_none());

    layer(&store, "s", 2, 2).seal(named("tar"), 2 * SPAN).unwrap();
    let path = folder.path().join(LAYERS).join(named("s").hex());
    fs::write(path.join("map"), "damaged").unwrap();
    let found = store.stored(&named("s")).unwrap().unwrap();
    assert!(found.is_sealed());
    assert_eq!(found.bytes_present(), 2 * SPAN);
}

#[test]
fn layers_are_listed_without_opening_them() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let half = layer(&store, "half", 4, 2);
    layer(&store, "whole", 2, 2).seal(named("tar"), 2 * SPAN).unwrap();
    fs::create_dir(folder.path().join(LAYERS).join("not-ours")).unwrap();
    half.data().sync_all().unwrap();
    let of = |layers: Vec<StoredLayer>, name| {
        layers.into_iter().find(|layer| layer.digest == named(name)).unwrap()
    };
    let found = of(store.list().unwrap(), "half");
    assert_eq!((found.bytes, found.spans, found.spans_present), (4 * SPAN, 4, 2));
    assert!(found.is_open && found.sealed.is_none());
    assert!((2 * SPAN..3 * SPAN).contains(&found.allocated), "{}", found.allocated);
    let found = of(list(folder.path()).unwrap(), "whole");
    assert_eq!((found.bytes, found.spans_present, found.is_open), (2 * SPAN, 2, false));
    assert_eq!(found.sealed.unwrap().diff_id, named("tar"));
    assert_eq!(list(&folder.path().join("nowhere")).unwrap(), []);
    assert_eq!(store.list().unwrap().len(), 2);
}

#[test]
fn a_layer_in_use_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let held = layer(&store, "a", 2, 2);
    assert!(matches!(store.remove(&named("a")), Err(RemoveError::InUse { .. })));
    drop(held);
    assert!(store.remove(&named("a")).unwrap() >= 2 * SPAN);
    assert_eq!(store.remove(&named("a")).unwrap(), 0);
    assert_eq!(store.list().unwrap(), []);
    assert!(!layer(&store, "a", 2, 0).is_present(0));
}

#[test]
fn a_wrong_layer_is_kept_aside_and_starts_anew() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for reason in ["first", "second"] {
        let wrong = layer(&store, "a", 2, 2);
        store.quarantine(&named("a"), reason).unwrap();
        assert!(wrong.seal(named("tar"), 2 * SPAN).is_err());
        assert!(!layer(&store, "a", 2, 0).is_present(0));
        let aside = folder.path().join(QUARANTINE).join(named("a").hex());
        assert_eq!(fs::read_to_string(aside.join("reason")).unwrap(), format!("{reason}\n"));
    }
    store.quarantine(&named("nothing"), "").unwrap();
    let pruned = store.prune(&|_| false).unwrap();
    assert_eq!(pruned.layers, 1);
    assert!(pruned.bytes >= 2 * SPAN);
    assert_eq!(names_in(&folder.path().join(QUARANTINE)), [""; 0]);
}

#[test]
fn pruning_leaves_what_is_open() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let held = layer(&store, "held", 2, 1);
    drop(layer(&store, "idle", 2, 1));
    drop(layer(&store, "kept", 2, 1));
    assert_eq!(store.prune(&|digest| *digest == named("kept")).unwrap().layers, 1);
    assert_eq!(store.list().unwrap().len(), 2);
    assert!(held.is_present(0));
}

#[test]
fn what_a_crash_left_is_cleared_away() {
    let folder = tempfile::tempdir().unwrap();
    let layers = folder.path().join(LAYERS);
    let store = open(folder.path());
    drop(layer(&store, "good", 2, 1));
    drop(store);
    let half = layers.join(named("half").hex());
    fs::create_dir(&half).unwrap();
    fs::write(half.join("data"), "x").unwrap();
    fs::write(half.join("map.tmp"), "x").unwrap();
    let good = layers.join(named("good").hex());
    fs::write(good.join("sealed.tmp"), "{").unwrap();
    fs::create_dir_all(folder.path().join("trash/old/deeper")).unwrap();
    let store = open(folder.path());
    assert_eq!(names_in(&layers), [named("good").hex()]);
    assert_eq!(names_in(&good), ["data", "map"]);
    assert_eq!(names_in(&folder.path().join(TRASH)), [""; 0]);
    assert!(layer(&store, "good", 2, 0).is_present(0));
}

#[test]
fn use_is_measured_in_blocks_and_held_against_the_quota() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), options(Some(8 * SPAN))).unwrap();
    assert_eq!(store.quota(), Some(8 * SPAN));
    let told = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&told);
    store.on_quota(Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    }));
    let told = || told.load(Ordering::Relaxed);
    assert_eq!(store.usage().unwrap(), 16 << 10, "four folders");
    let sparse = layer(&store, "a", 1000, 2);
    sparse.data().sync_all().unwrap();
    assert_eq!(told(), 0);
    let usage = store.usage().unwrap();
    assert!((2 * SPAN..3 * SPAN).contains(&usage), "{usage}");
    layer(&store, "a", 1000, 1);
    assert_eq!(told(), 0, "there is room for one more");
    layer(&store, "a", 1000, 5);
    assert_eq!(told(), 1, "writes count, whether they take room or not");
    store.usage().unwrap();
    layer(&store, "a", 1000, 1);
    assert_eq!(told(), 1, "the measurement found that there is room");
    layer(&store, "a", 1000, 9);
    assert_eq!(told(), 2);
}

/// What is to go, by names.
fn plan(store: &Store, layers: &[Arc<Layer>], needed: u64) -> Vec<(Digest, Vec<u32>)> {
    let plan = store.plan_eviction(layers, needed, Duration::ZERO);
    plan.into_iter().map(|(layer, spans)| (*layer.digest(), spans)).collect()
}

#[test]
fn sealed_layers_go_last() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let sealed = layer(&store, "sealed", 2, 2);
    sealed.seal(named("tar"), 2 * SPAN).unwrap();
    let used = layer(&store, "used", 3, 2);
    let layers = [sealed, used];
    assert_eq!(plan(&store, &layers, 0), []);
    assert_eq!(plan(&store, &layers, 1), [(named("used"), vec![0])]);
    let all = [(named("used"), vec![0, 1]), (named("sealed"), vec![0, 1])];
    assert_eq!(plan(&store, &layers, u64::MAX), all);

    // What the plan says frees what was asked for.
    let before = store.usage().unwrap();
    for (layer, spans) in store.plan_eviction(&layers, u64::MAX, Duration::ZERO) {
        layer.unseal().unwrap();
        let evicted = layer.evict(&spans, Duration::ZERO, &|_| false).unwrap();
        assert_eq!(evicted.punched, 2 * SPAN);
    }
    assert!(store.usage().unwrap() <= before - 4 * SPAN);
    assert!(layers.iter().all(|layer| layer.state(1) == SpanState::Missing));
}

#[test]
fn the_span_used_longest_ago_goes_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let layers = [layer(&store, "a", 3, 3), layer(&store, "b", 3, 3)];
    for (layer, last_uses) in layers.iter().zip([[5, 1, 9], [4, 2, 0]]) {
        for (span, at) in (0..).zip(last_uses) {
            layer.set_last_use(span, at);
        }
    }
    let mut expected = vec![(named("b"), vec![2, 1]), (named("a"), vec![1])];
    assert_eq!(plan(&store, &layers, 3 * SPAN), expected);
    expected[0].1.push(0);
    assert_eq!(plan(&store, &layers, 3 * SPAN + 1), expected);
}

#[test]
fn what_was_just_used_stays() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let layer = layer(&store, "a", 2, 2);
    let idle = Duration::from_mins(1);
    assert!(store.plan_eviction(&[Arc::clone(&layer)], u64::MAX, idle).is_empty());
    assert!(layer.evict(&[0, 1], idle, &|_| false).unwrap().spans.is_empty());
    let mut byte = [0];
    layer.data().read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [7]);
}

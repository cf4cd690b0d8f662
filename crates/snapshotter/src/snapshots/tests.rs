//! What is below a snapshot for a user namespace, and whom its folder belongs to.

use std::os::unix::fs::MetadataExt;

use tempfile::TempDir;

use super::*;
use crate::lazy::LazyError;

/// Takes every layer for lazy that it is told of. Whoever holds the other end learns when nobody uses it.
#[derive(Debug)]
struct AllLazy {
    _used: mpsc::Sender<()>,
}

impl LazyImages for AllLazy {
    fn find(&self, wanted: &WantedLayer<'_>) -> Option<LazyLayer> {
        Some(LazyLayer {
            image: wanted.image.to_owned(),
            pulled_as: wanted.image.to_owned(),
            layer: wanted.layer.to_owned(),
            chain: wanted.chain.to_owned(),
            layers: wanted.below + 1,
            is_whole: false,
        })
    }

    fn is_mounted(&self, _: &Path) -> bool {
        false
    }

    fn mount(&self, _: &LazyLayer, _: &Path) -> Result<(), LazyError> {
        Ok(())
    }

    fn disk_usage(&self, _: &LazyLayer) -> u64 {
        0
    }

    fn forget(&self, _: &LazyLayer) {}

    fn unmount(&self, _: &Path) -> Result<(), LazyError> {
        Ok(())
    }
}

struct Case {
    snapshots: Snapshots,
    // After the snapshots, and before the folder that their thread may be busy in.
    _end: End,
    root: TempDir,
}

/// Waits until the snapshots' thread has ended.
struct End(mpsc::Receiver<()>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.recv().unwrap_or_default();
    }
}

impl Case {
    /// With one lazy layer, called `lazy`.
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let dir = root.path().join("snapshots");
        let (used, end) = mpsc::channel();
        let images = Arc::new(AllLazy { _used: used });
        let snapshots = Snapshots::open(&dir, Some(images)).unwrap();
        let case = Self { snapshots, _end: End(end), root };
        let labels = lazy_labels("lazy");
        let error = case
            .snapshots
            .create(Kind::Active, ("extract", ""), &labels, Patience::Images)
            .unwrap_err();
        assert!(matches!(error, StoreError::Exists(_)), "{error}");
        case
    }

    /// Prepares a snapshot for a user namespace whose root is `root` outside.
    fn prepare(&self, key: &str, parent: &str, root: u32) -> Result<Mount, StoreError> {
        self.snapshots.create(Kind::Active, (key, parent), &ids(root), Patience::Images)
    }

    fn commit(&self, key: &str, name: &str, parent: &str) {
        self.snapshots.commit(key, (name, parent), &BTreeMap::new()).unwrap();
    }

    /// Whom the folder that a mount writes to belongs to.
    fn owner(mount: &Mount) -> u32 {
        let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
        std::fs::metadata(upper.unwrap()).unwrap().uid()
    }

    fn own_folder(&self, id: i64) -> PathBuf {
        folders::content(&self.snapshots.dir, SnapshotId(id))
    }
}

/// The labels of a layer that is to be unpacked as `target`.
fn lazy_labels(target: &str) -> BTreeMap<String, String> {
    let cri = |name: &str| format!("containerd.io/snapshot/cri.{name}");
    let mut labels: BTreeMap<_, _> = ["image-ref", "manifest-digest", "layer-digest"]
        .map(|name| (cri(name), "some".to_owned()))
        .into();
    labels.insert(TARGET.to_owned(), target.to_owned());
    labels
}

/// The labels of a user namespace whose root is `root` outside.
fn ids(root: u32) -> BTreeMap<String, String> {
    let label = |kind| format!("containerd.io/snapshot/{kind}mapping");
    ["uid", "gid"].map(|kind| (label(kind), format!("0:{root}:65536"))).into()
}

fn is_mapped(mount: &Mount, root: u32) -> bool {
    let option = |kind: &str| mount.options.contains(&format!("{kind}map=0:{root}:65536"));
    option("uid") && option("gid")
}

#[test]
fn what_is_below_is_mapped_and_the_folder_on_it_belongs_to_the_root_of_the_user_namespace() {
    let case = Case::new();
    let mount = case.prepare("one", "lazy", 100_000).unwrap();
    assert!(is_mapped(&mount, 100_000), "{mount:?}");
    assert_eq!(Case::owner(&mount), 100_000);
    assert_eq!(case.snapshots.mounts("one", Patience::Images).unwrap(), mount);
    let other = case.prepare("two", "lazy", 200_000).unwrap();
    assert!(is_mapped(&other, 200_000) && Case::owner(&other) == 200_000, "{other:?}");
    // The root of an image may be somebody else's.
    std::os::unix::fs::chown(case.own_folder(1), Some(5), Some(5)).unwrap();
    assert_eq!(Case::owner(&case.prepare("three", "lazy", 100_000).unwrap()), 100_005);
}

/// As containerd does that was told nothing of `remap-ids`: the labels are the same.
#[test]
fn what_was_given_other_owners_is_not_mapped_again() {
    let case = Case::new();
    let copy = case.snapshots.create(
        Kind::Active,
        ("copy-remap", "lazy"),
        &BTreeMap::new(),
        Patience::Images,
    );
    let upper = case.own_folder(2);
    assert_eq!(Case::owner(&copy.unwrap()), 0);
    std::os::unix::fs::chown(upper, Some(100_000), Some(100_000)).unwrap();
    case.commit("copy-remap", "copy", "lazy");
    let mount = case.prepare("one", "copy", 100_000).unwrap();
    assert!(!is_mapped(&mount, 100_000), "{mount:?}");
    assert_eq!(Case::owner(&mount), 100_000);
    assert_eq!(case.snapshots.mounts("one", Patience::Images).unwrap(), mount);
}

/// containerd cannot before 2.3.
#[test]
fn unpacked_layers_on_lazy_ones_are_shown_by_our_own_mounts() {
    let case = Case::new();
    case.snapshots
        .create(Kind::Active, ("work", "lazy"), &BTreeMap::new(), Patience::Images)
        .unwrap();
    for (id, file) in [(1, "lower"), (2, "upper")] {
        std::fs::write(case.own_folder(id).join(file), file).unwrap();
    }
    case.commit("work", "upper", "lazy");
    // What a snapshot of the same number has left, which was not to be.
    let other = IdMapping::of(&ids(5)).unwrap().unwrap();
    case.snapshots.mapped.show(SnapshotId(3), &[SnapshotId(1), SnapshotId(2)], &other).unwrap();
    let mount = case.prepare("one", "upper", 100_000).unwrap();
    let mapped = case.root.path().join("mapped");
    let [upper, lower] = ["3/0", "3/1"].map(|place| mapped.join(place));
    let expected = format!("lowerdir={}:{}", upper.display(), lower.display());
    assert!(mount.options.contains(&expected) && !is_mapped(&mount, 100_000), "{mount:?}");
    assert_eq!(Case::owner(&mount), 100_000);
    for file in [upper.join("upper"), lower.join("lower")] {
        assert_eq!(std::fs::metadata(&file).unwrap().uid(), 100_000);
        let error = std::fs::write(&file, "").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
    let shown = || [&upper, &lower].map(|place| sys::mount::location(place).unwrap());
    let before = shown();
    assert_eq!(case.snapshots.mounts("one", Patience::Images).unwrap(), mount);
    assert_eq!(shown(), before, "once");
    // As after a reboot.
    sys::mount::unmount(&upper, sys::mount::Unmount::Now).unwrap();
    assert!(!upper.join("upper").exists());
    case.snapshots.mounts("one", Patience::Images).unwrap();
    assert!(upper.join("upper").exists());
    case.snapshots.remove("one").unwrap();
    assert!(std::fs::read_dir(&mapped).unwrap().next().is_none());
    assert!(case.own_folder(2).join("upper").exists());
}

#[test]
fn the_image_below_a_container_is_found_by_the_folder_it_writes_to() {
    let case = Case::new();
    let make = |key, parent| {
        case.snapshots.create(Kind::Active, (key, parent), &BTreeMap::new(), Patience::Images)
    };
    make("work", "lazy").unwrap();
    case.commit("work", "upper", "lazy");
    make("on", "upper").unwrap();
    make("alone", "").unwrap();
    let below = |id| case.snapshots.image_below(&case.own_folder(id)).unwrap();
    assert_eq!(below(3), Some(case.own_folder(1)));
    assert_eq!(below(2), Some(case.own_folder(1)));
    assert_eq!([4, 9].map(below), [None, None]);
    for other in ["/", "/elsewhere/3/fs"] {
        assert_eq!(case.snapshots.image_below(Path::new(other)).unwrap(), None);
    }
}

#[test]
fn what_may_take_long_is_left_to_whoever_may_wait() {
    let case = Case::new();
    let labels = ids(0);
    let make = |key, parent, patience| {
        case.snapshots.create(Kind::Active, (key, parent), &labels, patience)
    };
    let waits = |result: Result<Mount, StoreError>| {
        assert!(matches!(result, Err(StoreError::Waits)), "{result:?}");
    };
    let before = case.snapshots.list().unwrap();
    waits(make("one", "lazy", Patience::Disk));
    assert_eq!(case.snapshots.list().unwrap(), before);
    let mount = make("one", "lazy", Patience::Images).unwrap();
    waits(case.snapshots.mounts("one", Patience::Disk));
    assert_eq!(case.snapshots.mounts("one", Patience::Images).unwrap(), mount);
    // There is no image below it.
    let mount = make("two", "", Patience::Disk).unwrap();
    assert_eq!(case.snapshots.mounts("two", Patience::Disk).unwrap(), mount);
    let unpacked = |target: &str| {
        let labels = lazy_labels(target);
        case.snapshots.create(Kind::Active, ("extract-another", "lazy"), &labels, Patience::Disk)
    };
    waits(unpacked("another"));
    let known = unpacked("lazy");
    assert!(matches!(known, Err(StoreError::Exists(_))), "{known:?}");
}

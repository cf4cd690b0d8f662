//! Indexes that are damaged, belong to something else, or lie.

use std::ops::Range;
use std::path::PathBuf;

use oci::soci::{SociIndex, ZtocEntry};
use oci::span_index::{SpanIndex, SpanIndexEntry};
use oci::{Descriptor, Digest};
use serde_json::Value;
use testkit::registry::{Fault, RequestLog, Scope, Times};

use crate::setup::{Setup, check, image};

/// The zTOC of the larger layer in the index store of a root folder.
fn stored(setup: &Setup, root: &str) -> PathBuf {
    let entries = std::fs::read_dir(setup.path(root).join("index")).unwrap();
    let ztocs = entries.map(|entry| entry.unwrap().path());
    let ztocs = ztocs.filter(|path| path.extension().is_some_and(|end| end == "ztoc"));
    ztocs.max_by_key(|path| path.metadata().unwrap().len()).unwrap()
}

/// Builds the index of `name` on another machine, lets `change` have its blob, and pushes it. Returns
/// the digest of the blob that other machines fetch.
#[track_caller]
fn push_changed(setup: &Setup, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Digest {
    let succeeds = |arguments: &[&str]| {
        let output = setup.run_at("builder", arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    succeeds(&["index", "build", name]);
    let path = stored(setup, "builder");
    let mut blob = std::fs::read(&path).unwrap();
    change(&mut blob);
    std::fs::write(&path, &blob).unwrap();
    let note = format!(r#"{{"ztoc":"{}","origin":"built","streamed":false}}"#, Digest::of(&blob));
    std::fs::write(path.with_extension("json"), note).unwrap();
    succeeds(&["index", "push", name]);
    setup.registry.clear_requests();
    assert!(setup.run_at("viewer", &["index", "show", name]).status.success());
    // Beside the configuration and the other layer's, which are smaller.
    let requests = setup.registry.requests().into_iter().filter(RequestLog::is_blob);
    let largest = requests.max_by_key(|request| request.bytes_sent).unwrap();
    largest.path.rsplit('/').next().unwrap().parse().unwrap()
}

fn index_line(setup: &Setup, name: &str) -> String {
    let explained: Value = setup.ok(&["explain", name]);
    explained["index"].as_str().unwrap().to_owned()
}

#[test]
fn a_damaged_index_of_the_registry_is_not_used() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "damaged", 4, 1 << 20);
    let ztoc = push_changed(&setup, &name, |_as_it_is| {});
    setup.registry.faults().inject(
        Scope::Blob(ztoc),
        Times::Always,
        Fault::FlipBodyByte { offset: 2000 },
    );
    check(&setup.mount(&name, "mnt", &[]), &contents);
    let said = index_line(&setup, &name);
    assert!(said.contains("in part") && said.contains(&ztoc.to_string()), "{said}");
}

#[test]
fn a_damaged_index_of_this_machine_is_replaced() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "damaged", 4, 1 << 20);
    push_changed(&setup, &name, |_as_it_is| {});
    setup.index(&name);
    let path = stored(&setup, "root");
    let right = std::fs::read(&path).unwrap();
    for damage in [&right[..1000], b"", &[&right[..right.len() - 1], b"x"].concat()] {
        std::fs::write(&path, damage).unwrap();
        let dir = setup.mount(&name, "mnt", &[]);
        check(&dir, &contents);
        assert_eq!(
            index_line(&setup, &name),
            "index from a referrer of the image (Hermes); 2 of 2 layers have one"
        );
        assert!(std::fs::read(&path).unwrap() == right);
        setup.ok(&["umount", dir.to_str().unwrap()]);
        setup.ok(&["cache", "prune"]);
    }
}

/// The digests of an image's manifest, of its lower layer and of its upper one, and the zTOC of that.
struct Inspected {
    manifest: Digest,
    base: Digest,
    layer: Digest,
    ztoc: Vec<u8>,
}

fn inspect(setup: &Setup, name: &str) -> Inspected {
    let output = setup.run_at("inspector", &["index", "build", name]);
    let built: Value = serde_json::from_slice(&output.stdout).unwrap();
    let digest = |value: &Value| value.as_str().unwrap().parse().unwrap();
    let layer = |at: usize| digest(&built["layers"][at]["digest"]);
    let ztoc = std::fs::read(stored(setup, "inspector")).unwrap();
    Inspected { manifest: digest(&built["manifest"]), base: layer(0), layer: layer(1), ztoc }
}

/// Lets the registry say that `ztoc` is the index of `layer` of the image `name`.
fn refer(setup: &Setup, (name, manifest): (&str, Digest), layer: Digest, ztoc: &[u8]) {
    let entry = ZtocEntry {
        digest: setup.registry.put_blob(ztoc.to_vec()),
        size: ztoc.len() as u64,
        layer_digest: layer,
        layer_media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        span_size: 4 << 20,
        disable_xattrs: false,
    };
    let image = Descriptor::new(oci::media_type::OCI_MANIFEST, manifest, 1);
    let index = SociIndex::v1(&image, vec![entry]);
    setup.registry.put_blob(oci::soci::CONFIG_BYTES.to_vec());
    setup.registry.put_manifest(name, None, oci::media_type::OCI_MANIFEST, index.to_bytes());
}

/// What an index of Hermes' says of a layer with this zTOC.
fn entry(
    setup: &Setup,
    layer: Digest,
    ztoc: &[u8],
    start: impl IntoIterator<Item = Range<u64>>,
) -> SpanIndexEntry {
    let frame = zstd::encode_all(ztoc, 1).unwrap();
    SpanIndexEntry {
        layer,
        size: frame.len() as u64,
        digest: setup.registry.put_blob(frame),
        plain_size: ztoc.len() as u64,
        streamed: false,
        windows: None,
        start: start.into_iter().collect(),
    }
}

/// Lets the registry say that these are Hermes' index of the image `name`.
fn refer_all(setup: &Setup, (name, manifest): (&str, Digest), entries: Vec<SpanIndexEntry>) {
    let image = Descriptor::new(oci::media_type::OCI_MANIFEST, manifest, 1);
    let index = SpanIndex::new(&image, entries);
    setup.registry.put_blob(oci::soci::CONFIG_BYTES.to_vec());
    setup.registry.put_manifest(name, None, oci::media_type::OCI_MANIFEST, index.to_bytes());
}

#[test]
fn what_a_start_needs_of_a_layer_comes_while_the_index_of_another_is_under_way() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "early", 4, 1 << 20);
    let refs = inspect(&setup, &name);
    let upper = entry(&setup, refs.layer, &refs.ztoc, Some(1 << 20..2 << 20));
    let lower = entry(&setup, refs.base, b"of the other layer, and it never comes", None);
    let never = Scope::Blob(lower.digest);
    refer_all(&setup, ("early", refs.manifest), vec![upper, lower]);
    setup.registry.faults().inject(never, Times::Always, Fault::Stall { after: 10 });
    setup.registry.clear_requests();
    std::thread::scope(|scope| {
        let mounting = scope.spawn(|| setup.mount(&name, "mnt", &[]));
        setup.until("the layer whose index is there is asked for", || {
            let requests = setup.registry.requests();
            let of_layer = |request: &&RequestLog| {
                request.path.contains(&refs.layer.to_string()) && request.bytes_sent > 0
            };
            requests.iter().find(of_layer).map(drop)
        });
        assert!(!mounting.is_finished());
        setup.registry.faults().clear();
        setup.registry.faults().release_stalled();
        check(&mounting.join().unwrap(), &contents);
    });
    let said = index_line(&setup, &name);
    assert!(said.contains("in part"), "{said}");
}

#[test]
fn an_index_of_something_else_is_not_used() {
    let setup = Setup::new();
    let (other, _) = image(&setup, "other", 3, 1 << 20);
    setup.index(&other);
    let ztoc = std::fs::read(stored(&setup, "root")).unwrap();
    let unrelated = Digest::of(b"a layer of another image");
    for (repository, of_other_image, word) in
        [("a", true, "1 of 2 layers have one"), ("b", false, "made for a blob of")]
    {
        let (name, contents) = image(&setup, repository, 4, 1 << 20);
        let refs = inspect(&setup, &name);
        let layer = if of_other_image { unrelated } else { refs.layer };
        refer(&setup, (repository, refs.manifest), layer, &ztoc);
        let dir = setup.mount(&name, repository, &[]);
        check(&dir, &contents);
        let said = index_line(&setup, &name);
        assert!(said.contains(word), "{said}");
        setup.ok(&["umount", dir.to_str().unwrap()]);
        std::fs::remove_dir_all(setup.path("root/index")).unwrap();
        std::fs::create_dir(setup.path("root/index")).unwrap();
    }
}

#[test]
fn an_index_that_names_a_start_outside_its_layers_is_as_good_as_another() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "hints", 4, 1 << 20);
    let refs = inspect(&setup, &name);
    let start = [0..u64::MAX, u64::MAX - 1..u64::MAX, 1 << 40..1 << 41, 5000..5001];
    let entry = entry(&setup, refs.layer, &refs.ztoc, start);
    refer_all(&setup, ("hints", refs.manifest), vec![entry]);
    check(&setup.mount(&name, "mnt", &[]), &contents);
    let said = index_line(&setup, &name);
    assert!(said.contains("(Hermes); 1 of 2 layers have one"), "{said}");
}

#[test]
fn an_index_that_was_revoked_is_not_fetched_again() {
    let setup = Setup::new();
    let (name, contents) = image(&setup, "lying", 4, 1 << 20);
    let ztoc = push_changed(&setup, &name, |blob| {
        let limits = ztoc::Limits::default();
        let mut lying = ztoc::Ztoc::parse(blob, &limits).unwrap();
        // It promises another mode for a file; the bytes of all spans are right.
        lying.toc.last_mut().unwrap().mode ^= 0o22;
        *blob = lying.to_bytes(blob).unwrap();
    });
    let dir = setup.mount(&name, "mnt", &[]);
    let revoked = setup.until("the index is revoked", || {
        let explained = setup.ok(&["explain", &name]);
        let layers = explained["layers"].as_array()?;
        layers.iter().find_map(|layer| layer["revoked"].as_str().map(str::to_owned))
    });
    setup.ok(&["umount", "--lazy", dir.to_str().unwrap()]);
    // As long as anybody uses it, new mounts share its layers.
    setup.until("the mount is gone", || {
        setup.status()["mounts"].as_array()?.is_empty().then_some(())
    });
    setup.registry.clear_requests();
    let dir = setup.mount(&name, "again", &[]);
    check(&dir, &contents);
    let said = index_line(&setup, &name);
    assert!(said.contains("was revoked") && said.contains(&revoked), "{said}");
    let asked = setup.registry.requests();
    let asked = asked.iter().filter(|request| request.path.contains(&ztoc.to_string()));
    assert_eq!(asked.count(), 0);
}

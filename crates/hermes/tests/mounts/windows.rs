//! Indexes of long layers, whose windows lie in a blob of their own.

use std::path::Path;

use oci::Digest;
use serde_json::Value;
use testkit::registry::{Fault, RequestLog, Scope, Times};

use crate::setup::{Setup, check, forget_pages, image_from};

/// Many spans in few bytes.
const BUILD: &[&str] = &["index", "build", "--span-size", "65536"];

/// An image whose index was built and pushed by another machine.
struct Sample {
    name: String,
    contents: Vec<(String, Vec<u8>)>,
    /// The blob with the windows of its upper layer.
    windows: Digest,
    windows_size: u64,
    /// What the other machine said of its push.
    pushed: Value,
}

fn run_at(setup: &Setup, root: &str, arguments: &[&str]) -> Vec<u8> {
    let output = setup.run_at(root, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn json_at(setup: &Setup, root: &str, arguments: &[&str]) -> Value {
    serde_json::from_slice(&run_at(setup, root, arguments)).unwrap()
}

/// The longest file with this ending in the index store of a root folder.
fn longest(root: &Path, ending: &str) -> Option<std::path::PathBuf> {
    let entries = std::fs::read_dir(root.join("index")).unwrap();
    let files = entries.map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == ending));
    files.max_by_key(|path| path.metadata().unwrap().len())
}

fn sample(setup: &Setup) -> Sample {
    let (name, contents) = image_from(setup, "long", 0..12, 1 << 20);
    run_at(setup, "builder", &[BUILD, &[&name]].concat());
    let pushed = json_at(setup, "builder", &["index", "push", &name]);
    let windows = std::fs::read(longest(&setup.path("builder"), "windows").unwrap()).unwrap();
    setup.registry.clear_requests();
    let windows_size = windows.len() as u64;
    Sample { name, contents, windows: Digest::of(&windows), windows_size, pushed }
}

/// Unmounts the only mount, and throws its layers away. What is known of its index stays.
fn forget(setup: &Setup, dir: &Path) {
    setup.ok(&["umount", dir.to_str().unwrap()]);
    setup.until("the layers have gone", || {
        setup.ok(&["cache", "prune"]);
        setup.ok(&["cache", "ls"])["layers"].as_array()?.is_empty().then_some(())
    });
}

fn requests_for(setup: &Setup, blob: &Digest) -> Vec<RequestLog> {
    let requests = setup.registry.requests().into_iter();
    requests.filter(|request| request.path.contains(&blob.to_string())).collect()
}

#[test]
fn windows_come_when_their_spans_are_read_and_are_kept() {
    for backend in ["erofs", "erofs-loop", "fuse"] {
        let setup = Setup::new();
        let Sample { name, contents, windows, .. } = sample(&setup);
        let arguments = ["--backend", backend, "--completion", "never"];
        let dir = setup.mount(&name, "mnt", &arguments);
        assert_eq!(requests_for(&setup, &windows).len(), 0, "the mount waited for windows");
        check(&dir, &contents[..1]);
        let first = requests_for(&setup, &windows);
        assert!(!first.is_empty() && first.iter().all(|request| request.range.is_some()));
        // Whoever adopts the mount goes on with what is there of them.
        setup.kill_daemon();
        check(&dir, &contents);
        forget(&setup, &dir);
        setup.registry.clear_requests();
        forget_pages();
        check(&setup.mount(&name, "mnt", &arguments), &contents);
        assert_eq!(requests_for(&setup, &windows).len(), 0, "windows came again");
    }
}

#[test]
fn commands_have_all_windows_of_an_index() {
    let setup = Setup::new();
    let Sample { name, contents, pushed, .. } = sample(&setup);
    let at = |arguments: &[&str]| run_at(&setup, "viewer", arguments);
    assert!(at(&["index", "get-file", &name, &contents[7].0]) == contents[7].1);
    let verified = json_at(&setup, "viewer", &["index", "verify", &name]);
    let layers = verified["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["identical"] == true), "{verified}");
    // A copy of the index is that index, for Hermes and for SOCI.
    let again = json_at(&setup, "viewer", &["index", "push", &name]);
    assert_eq!(again["own"]["digest"], pushed["own"]["digest"]);
    assert_eq!(again["index"]["digest"], pushed["index"]["digest"]);
    let path = longest(&setup.path("viewer"), "windows").unwrap();
    at(&["index", "rm", &name]);
    assert!(!path.exists(), "windows stay");
}

#[test]
fn a_wrong_window_is_no_wrong_byte() {
    let setup = Setup::new();
    let Sample { name, contents, windows, windows_size, .. } = sample(&setup);
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    let flip = |times, offset| {
        let fault = Fault::FlipBlobByte { offset };
        setup.registry.faults().inject(Scope::Blob(windows), times, fault);
    };
    // Of the second span, which lies in the first file, and of the last one.
    let last = windows_size - 1;
    flip(Times::Next(1), 100);
    flip(Times::Always, last);
    let (wrong, others) = contents.split_last().unwrap();
    check(&dir, others);
    assert!(setup.status()["failed_spans"].as_u64().unwrap() > 0, "no window was wrong");
    assert!(std::fs::read(dir.join(&wrong.0)).is_err(), "a span was made without its window");
    assert!(setup.log().contains("the window of span"), "{}", setup.log());
    setup.registry.faults().clear();
    check(&dir, &contents);
}

#[test]
fn damaged_windows_of_this_machine_are_fetched_again() {
    let setup = Setup::new();
    let Sample { name, contents, windows, .. } = sample(&setup);
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    check(&dir, &contents);
    forget(&setup, &dir);
    let path = longest(&setup.in_root(""), "windows").unwrap();
    let right = std::fs::read(&path).unwrap();
    assert_eq!(Digest::of(&right), windows);
    let damaged: Vec<u8> = right.iter().map(|byte| byte ^ 1).collect();
    std::fs::write(&path, &damaged[..damaged.len() / 2]).unwrap();
    forget_pages();
    check(&setup.mount(&name, "mnt", &["--completion", "never"]), &contents);
    assert!(std::fs::read(&path).unwrap() == right, "they are not mended");
}

#[test]
fn an_image_whose_index_has_lost_its_windows_is_read_all_the_same() {
    let setup = Setup::new();
    let Sample { name, contents, windows, .. } = sample(&setup);
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    check(&dir, &contents[..1]);
    assert!(setup.registry.delete_blob(windows));
    check(&dir, &contents);
    let said = "the windows of the index are gone";
    assert_eq!(setup.log().matches(said).count(), 1, "{}", setup.log());
    // A machine that has none of them.
    forget(&setup, &dir);
    setup.ok(&["index", "rm", &name]);
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    check(&dir, &contents[9..]);
    check(&dir, &contents);
}

#[test]
fn an_index_that_was_built_here_needs_no_windows_of_others() {
    let setup = Setup::new();
    let (name, contents) = image_from(&setup, "long", 0..12, 1 << 20);
    setup.ok(&[BUILD, &[&name]].concat());
    let path = longest(&setup.in_root(""), "windows").unwrap();
    let right = std::fs::read(&path).unwrap();
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    check(&dir, &contents);
    assert_eq!(requests_for(&setup, &Digest::of(&right)).len(), 0);
    // Nobody else has them.
    forget(&setup, &dir);
    std::fs::write(&path, vec![0; right.len()]).unwrap();
    forget_pages();
    check(&setup.mount(&name, "mnt", &["--completion", "never"]), &contents);
    let said = setup.fails(3, &["index", "push", &name]);
    assert!(said.contains("hermes index build"), "{said}");
}

//! `hermes index …` against a registry on loopback that can misbehave.

#![expect(clippy::unwrap_used, reason = "shared parts of tests, which fail by panicking")]

use std::process::{Command, Output, Stdio};

use oci::Digest;
use serde_json::Value;
use tempfile::TempDir;
use testkit::image::{
    Compression, Content, ImageBuilder, ImageRefs, LayerBuilder, SparseContent, SparseFormat,
    Texture,
};
use testkit::registry::{Fault, Options, Registry, Scope, Times};

const GZIP: Compression = Compression::Gzip { level: 6 };

/// A registry with one image, and a root folder for Hermes.
struct Setup {
    registry: Registry,
    image: ImageRefs,
    root: TempDir,
}

/// Text that inflates to many spans, `big`, between two small files.
fn base() -> Vec<u8> {
    LayerBuilder::new()
        .dir("etc")
        .file("etc/first", b"one\n".to_vec())
        .file("etc/hidden", b"hidden\n".to_vec())
        .file("big", big())
        .file("etc/last", b"two\n".to_vec())
        .symlink("link", "etc/../etc/last")
        .build()
}

fn big() -> Content {
    Content::generated(7, 3 << 20, Texture::Text)
}

fn top() -> Vec<u8> {
    let sparse = SparseContent {
        pieces: vec![(4096, b"middle".to_vec())],
        size: 10_000,
        format: SparseFormat::Pax10,
    };
    LayerBuilder::new()
        .whiteout("etc/hidden")
        .file("etc/first", b"three\n".to_vec())
        .sparse("sparse", sparse)
        .build()
}

impl Setup {
    fn new(lower: Compression) -> Self {
        let registry = Registry::start(Options::default()).unwrap();
        let image = ImageBuilder::new().layer(base(), lower).layer(top(), GZIP).build();
        let image = image.push_to(&registry, "app", "1").unwrap();
        Self { registry, image, root: TempDir::new().unwrap() }
    }

    fn index(&self, args: &[&str]) -> Output {
        self.index_at("root", args)
    }

    /// Runs with the root folder `root`, as another machine would.
    fn index_at(&self, root: &str, args: &[&str]) -> Output {
        self.command(root, args).output().unwrap()
    }

    fn command(&self, root: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hermes"));
        command
            .arg("--root")
            .arg(self.root.path().join(root))
            .arg("--hosts-dir")
            .arg(self.root.path());
        command.arg("--docker-config").arg(self.root.path().join("none.json"));
        command.args(["--output", "json", "index"]).args(args);
        command
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        done(&self.index(args))
    }

    fn name(&self) -> &str {
        &self.image.reference
    }

    #[track_caller]
    fn build(&self, more: &[&str]) -> Value {
        self.json(&[&["build", "--span-size", "256k"], more, &[self.name()]].concat())
    }
}

#[track_caller]
fn done(output: &Output) -> Value {
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {complaint}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// It failed with `code` and said each of `words`.
#[track_caller]
fn failed(output: &Output, code: i32, words: &[&str]) {
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{complaint}");
    for word in words {
        assert!(complaint.contains(word), "`{word}` is not in: {complaint}");
    }
}

#[track_caller]
fn printed(output: &Output, expected: &[u8]) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == expected, "{} bytes, not {}", output.stdout.len(), expected.len());
}

#[test]
fn what_is_built_is_shown_listed_and_removed() {
    let setup = Setup::new(GZIP);
    let built = setup.build(&[]);
    let layers = built["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[0]["digest"], setup.image.layers[0].to_string());
    assert_eq!(layers[0]["index"]["files"], 4);
    assert_eq!(layers[0]["index"]["span_size"], 256 << 10);
    assert!(layers[0]["index"]["spans"].as_u64().unwrap() > 5);

    let shown = setup.json(&["show", setup.name()]);
    for (layer, built) in shown["layers"].as_array().unwrap().iter().zip(layers) {
        assert_eq!(layer["index"], built["index"]);
    }
    let listed = setup.json(&["list"]);
    assert_eq!(listed["indexes"].as_array().unwrap().len(), 2);

    let first = setup.image.layers[0].to_string();
    assert_eq!(setup.json(&["rm", &first])["removed"], serde_json::json!([first]));
    failed(&setup.index(&["rm", &first]), 3, &["no index on this machine", &first]);
    assert_eq!(setup.json(&["rm", setup.name()])["removed"].as_array().unwrap().len(), 1);
    assert_eq!(setup.json(&["list"])["indexes"], serde_json::json!([]));
}

#[test]
fn an_index_needs_no_second_pass_and_no_file_but_the_index() {
    let setup = Setup::new(GZIP);
    setup.build(&[]);
    for layer in &setup.image.layers {
        let path = format!("/v2/app/blobs/{layer}");
        let requests = setup.registry.requests();
        let gets =
            requests.iter().filter(|request| request.path == path && request.method == "GET");
        assert_eq!(gets.count(), 1, "{layer}");
    }
    let root = setup.root.path().join("root");
    let folders: Vec<_> =
        std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(folders, ["index"]);
}

#[test]
fn layers_below_the_minimum_get_none() {
    let setup = Setup::new(GZIP);
    let built = setup.build(&["--min-layer-size", "100k"]);
    assert!(built["layers"][0]["index"].is_object());
    assert!(built["layers"][1].get("index").is_none());
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_broke() {
    let setup = Setup::new(GZIP);
    let whole = setup.build(&[]);
    let layer = setup.image.layers[0];
    setup.registry.faults().inject(
        Scope::Blob(layer),
        Times::Next(3),
        Fault::Truncate { after: 50_000 },
    );
    setup.registry.clear_requests();
    let resumed = setup.build(&[]);
    assert_eq!(resumed["layers"][0]["index"], whole["layers"][0]["index"]);
    let path = format!("/v2/app/blobs/{layer}");
    let starts: Vec<_> =
        setup.registry.requests().into_iter().filter(|request| request.path == path).collect();
    let starts: Vec<_> =
        starts.iter().filter_map(|request| request.range.map(|range| range.0)).collect();
    assert!(starts.len() >= 4 && starts.is_sorted() && starts[1] > 0, "{starts:?}");
}

#[test]
fn a_layer_with_other_bytes_than_promised_is_refused() {
    let setup = Setup::new(GZIP);
    let layer = setup.image.layers[0];
    setup.registry.faults().flip_byte(layer, 200_000, Times::Always);
    let args = ["build", setup.name()];
    failed(&setup.index(&args), 6, &[&layer.to_string()]);
    let stored = setup.json(&["list"]);
    assert!(
        stored["indexes"]
            .as_array()
            .unwrap()
            .iter()
            .all(|index| index["layer"] != layer.to_string())
    );
}

#[test]
fn a_wrong_diff_id_is_found() {
    let registry = Registry::start(Options::default()).unwrap();
    let mut image = ImageBuilder::new().layer(base(), GZIP).build();
    let (right, wrong) = (image.layers[0].diff_id.to_string(), Digest::of(b"other").to_string());
    let config = String::from_utf8(image.config.to_vec()).unwrap().replace(&right, &wrong);
    let manifest = String::from_utf8(image.manifest.to_vec()).unwrap();
    let digest = Digest::of(config.as_bytes()).to_string();
    image.manifest = manifest.replace(&Digest::of(&image.config).to_string(), &digest).into();
    image.config = config.into();
    let image = image.push_to(&registry, "app", "1").unwrap();
    let setup = Setup { registry, image, root: TempDir::new().unwrap() };
    failed(&setup.index(&["build", setup.name()]), 6, &[&right, &wrong, "configuration"]);
}

#[test]
fn one_file_costs_only_its_spans() {
    let setup = Setup::new(GZIP);
    setup.build(&[]);
    for (path, expected) in [
        ("/etc/first", &b"three\n"[..]),
        ("link", b"two\n"),
        ("big", &big().to_bytes()),
        ("sparse", &[&[0; 4096][..], b"middle", &[0; 10_000 - 4102]].concat()),
    ] {
        printed(&setup.index(&["get-file", setup.name(), path]), expected);
    }
    setup.registry.clear_requests();
    printed(&setup.index(&["get-file", setup.name(), "etc/last"]), b"two\n");
    let path = format!("/v2/app/blobs/{}", setup.image.layers[0]);
    let requests: Vec<_> =
        setup.registry.requests().into_iter().filter(|one| one.path == path).collect();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(requests[0].bytes_sent < 300_000, "{requests:?}");
    failed(
        &setup.index(&["get-file", setup.name(), "etc/hidden"]),
        3,
        &["/etc/hidden does not exist"],
    );
    failed(&setup.index(&["get-file", setup.name(), "etc"]), 1, &["/etc is a directory"]);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let setup = Setup::new(GZIP);
    setup.build(&[]);
    let mut command = setup.command("root", &["get-file", setup.name(), "big"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn no_wrong_byte_of_a_file_is_printed() {
    let setup = Setup::new(GZIP);
    setup.build(&[]);
    let layer = setup.image.layers[0];
    setup.registry.faults().flip_byte(layer, 400_000, Times::Always);
    let output = setup.index(&["get-file", setup.name(), "big"]);
    failed(&output, 6, &["span", "digest"]);
    let right = big().to_bytes();
    assert!(!output.stdout.is_empty() && right.starts_with(&output.stdout));
}

#[test]
fn without_an_index_it_is_said_what_to_do() {
    let setup = Setup::new(GZIP);
    for args in
        [&["show", setup.name()][..], &["get-file", setup.name(), "big"], &["verify", setup.name()]]
    {
        failed(&setup.index(args), 3, &["has no index", "hermes index build"]);
    }
    failed(&setup.index(&["push", setup.name()]), 3, &["hermes index build"]);
    let missing = format!("{}x", setup.name());
    failed(&setup.index(&["build", &missing]), 3, &[]);
}

#[test]
fn a_pushed_index_serves_other_machines() {
    let setup = Setup::new(GZIP);
    let built = setup.build(&["--min-layer-size", "100k"]);
    let pushed = setup.json(&["push", setup.name()]);
    assert_eq!(pushed["index"]["artifactType"], "application/vnd.amazon.soci.index.v1+json");
    let shown = done(&setup.index_at("other", &["show", setup.name()]));
    assert_eq!(shown["layers"][0]["index"]["origin"], "hermes");
    assert_eq!(shown["layers"][0]["index"]["ztoc"], built["layers"][0]["index"]["ztoc"]);
    assert!(shown["layers"][1]["index"].is_null());
    // The small layer without an index decides, too.
    printed(&setup.index_at("other", &["get-file", setup.name(), "etc/first"]), b"three\n");
}

#[test]
fn a_pushed_index_says_what_the_command_needs() {
    let registry = Registry::start(Options::default()).unwrap();
    let host = |path: &str| std::fs::read(path).unwrap();
    let (program, loader) = (host("/bin/true"), host("/lib64/ld-linux-x86-64.so.2"));
    let libc = host("/lib/x86_64-linux-gnu/libc.so.6");
    let script = b"#!/opt/program\n".to_vec();
    let needed = [&script, &program, &loader, &libc].map(|file| file.len() as u64);
    let lower = LayerBuilder::new()
        .file("lib64/ld-linux-x86-64.so.2", loader)
        .file("big", big())
        .file("usr/lib/x86_64-linux-gnu/libc.so.6", libc)
        .symlink("lib", "usr/lib");
    let upper = LayerBuilder::new().file("app", script).file("opt/program", program);
    let image = ImageBuilder::new().layer(lower.build(), GZIP).layer(upper.build(), GZIP);
    let image = image.entrypoint(&["/app"]).build().push_to(&registry, "app", "1").unwrap();
    let setup = Setup { registry, image, root: TempDir::new().unwrap() };
    setup.build(&[]);
    setup.registry.clear_requests();
    let needed: u64 = needed.iter().sum();
    let named = setup.json(&["push", setup.name()])["start_bytes"].as_u64().unwrap();
    // With the header between two that are neighbours.
    assert!((needed..needed + 4096).contains(&named), "{named} bytes for {needed}");
    let requests = setup.registry.requests();
    let fetched: u64 = requests.iter().filter(|r| r.is_blob()).map(|r| r.bytes_sent).sum();
    assert!(fetched < 4 << 20, "{fetched} bytes to find that out");
}

#[test]
fn a_copy_of_an_image_names_its_index() {
    let setup = Setup::new(GZIP);
    failed(&setup.index(&["push", "--version", "2", setup.name()]), 2, &["--tag"]);
    let push = ["push", "--version", "2", "--tag"];
    let convert = |tag: &str, name: &str| setup.index(&[&push[..], &[tag, name]].concat());
    failed(&convert("soci", setup.name()), 3, &["hermes index build"]);
    setup.build(&[]);
    failed(&convert("1", setup.name()), 1, &["not changed"]);
    failed(&convert("no tag", setup.name()), 1, &["no tag"]);
    let pushed = done(&convert("soci", setup.name()));
    assert_eq!(pushed["index"]["artifactType"], "application/vnd.amazon.soci.index.v2+json");
    let copy = pushed["copy"]["image"].as_str().unwrap();
    assert_eq!(copy, setup.name().replace(":1", ":soci"));
    let shown = done(&setup.index_at("other", &["show", copy]));
    assert_eq!(shown["layers"][0]["index"]["origin"], "hermes");
    assert_ne!(shown["manifest"], pushed["manifest"]);
    // The image is as it was, and a copy can be copied again.
    let original = done(&setup.index_at("third", &["build", setup.name()]));
    assert_eq!(original["manifest"], pushed["manifest"]);
    let again = done(&convert("again", copy));
    assert_eq!(again["copy"]["digest"], pushed["copy"]["digest"]);
}

#[test]
fn a_layout_can_hold_a_copy_that_names_its_index() {
    let setup = Setup::new(GZIP);
    let layout = setup.root.path().join("layout");
    let image = ImageBuilder::new().layer(base(), GZIP).build();
    image.write_layout(&layout, "app").unwrap();
    let name = |tag: &str| format!("oci:{}:{tag}", layout.display());
    setup.json(&["build", &name("app")]);
    setup.json(&["push", &name("app")]);
    // Indexes are no images: there is still but one.
    setup.json(&["show", &format!("oci:{}", layout.display())]);
    for _again in 0..2 {
        setup.json(&["push", "--version", "2", "--tag", "soci", &name("app")]);
    }
    let shown = done(&setup.index_at("other", &["show", &name("soci")]));
    assert_eq!(shown["layers"][0]["index"]["origin"], "hermes");
    let root: Value =
        serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
    let tag = |entry: &Value| entry["annotations"]["org.opencontainers.image.ref.name"].is_string();
    let tagged = root["manifests"].as_array().unwrap().iter().filter(|entry| tag(entry));
    assert_eq!(tagged.count(), 2, "{root}");
    failed(&setup.index(&["push", "--version", "2", "--tag", "app", &name("app")]), 1, &[]);
}

#[test]
fn right_indexes_are_verified_whole_or_with_sparse_windows() {
    let setup = Setup::new(GZIP);
    for (more, identical) in [(&[][..], true), (&["--sparse-windows"], false)] {
        setup.build(more);
        let verified = setup.json(&["verify", setup.name()]);
        assert_eq!(verified["layers"][0]["differences"], serde_json::json!([]), "{more:?}");
        assert_eq!(verified["layers"][0]["identical"], identical, "{more:?}");
        printed(&setup.index(&["get-file", setup.name(), "big"]), &big().to_bytes());
    }
}

/// Stores `blob` as the index of a layer, with the note that belongs to it.
fn forge(setup: &Setup, layer: &Digest, blob: &[u8]) {
    let dir = setup.root.path().join("root/index");
    std::fs::write(dir.join(format!("{}.ztoc", layer.hex())), blob).unwrap();
    let note = format!(r#"{{"ztoc":"{}","origin":"referrer","streamed":false}}"#, Digest::of(blob));
    std::fs::write(dir.join(format!("{}.json", layer.hex())), note).unwrap();
}

#[test]
fn an_index_that_lies_is_found_out() {
    let setup = Setup::new(GZIP);
    setup.build(&[]);
    let layer = setup.image.layers[0];
    let right =
        std::fs::read(setup.root.path().join(format!("root/index/{}.ztoc", layer.hex()))).unwrap();
    let ztoc = ztoc::Ztoc::parse(&right, &ztoc::Limits::default()).unwrap();

    let mut toc = ztoc.clone();
    toc.toc[1].mode ^= 0o022;
    let digest = ztoc.spans.digest(ztoc::SpanId(2)).to_string();
    let other = Digest::of(b"other").to_string();
    let text = digest.as_bytes();
    let at = right.windows(text.len()).position(|bytes| bytes == text).unwrap();
    let mut span_digest = right.clone();
    span_digest[at..at + text.len()].copy_from_slice(other.as_bytes());
    let mut window = right.clone();
    let at = ztoc.spans.window(ztoc::SpanId(3)).unwrap().position().unwrap();
    let at = usize::try_from(at).unwrap();
    window[at + 30_000] ^= 1;

    for (blob, word) in [
        (toc.to_bytes(&right).unwrap(), "etc/first"),
        (span_digest, "digest of span 2"),
        (window, "window of span 3"),
    ] {
        forge(&setup, &layer, &blob);
        let output = setup.index(&["verify", setup.name()]);
        failed(&output, 6, &[&layer.to_string()]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let differences = report["layers"][0]["differences"].to_string();
        assert!(differences.contains(word), "{word}: {differences}");
    }
}

#[test]
fn indexes_of_zstd_layers_are_pushed_beside_that_of_soci() {
    let setup = Setup::new(Compression::Zstd { level: 3 });
    let built = setup.build(&[]);
    assert_eq!(built["layers"][0]["index"]["streamed"], true);
    printed(&setup.index(&["get-file", setup.name(), "big"]), &big().to_bytes());
    printed(&setup.index(&["get-file", setup.name(), "etc/first"]), b"three\n");
    let verified = setup.json(&["verify", setup.name()]);
    assert_eq!(verified["layers"][0]["identical"], true);
    let pushed = setup.json(&["push", setup.name()]);
    assert!(pushed["index"].is_object() && pushed["own"].is_object(), "{pushed}");
    let shown = done(&setup.index_at("other", &["show", setup.name()]));
    let index = &shown["layers"][0]["index"];
    assert_eq!((&index["streamed"], &index["origin"]), (&true.into(), &"hermes".into()));
    assert_eq!(index["ztoc"], built["layers"][0]["index"]["ztoc"]);
}

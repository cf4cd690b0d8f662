//! Mirrors, one of which lies.

use testkit::image::Compression;
use testkit::registry::{Fault, Options, Registry, Scope, Times};

use crate::setup::{Setup, check, image, image_in};

const FILES: u64 = 48;
/// Of 4 MiB each, at most.
const SPANS: u64 = FILES / 4 + 1;

/// Makes `servers` stand for the set-up's registry, in this order and before it.
fn mirror(setup: &mut Setup, servers: &[&Registry]) {
    let prefix = setup.registry.reference_prefix();
    let registry = prefix.split('/').next().unwrap();
    let folder = setup.path("hosts").join(registry.replace(':', "_") + "_");
    std::fs::create_dir_all(&folder).unwrap();
    let mut text = format!("server = 'http://{registry}'\n");
    for server in servers {
        let prefix = server.reference_prefix();
        let address = prefix.split('/').next().unwrap();
        text += &format!("[host.'http://{address}']\ncapabilities = ['pull']\n");
    }
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
    let hosts = setup.path("hosts").to_str().unwrap().to_owned();
    setup.global.extend(["--hosts-dir".to_owned(), hosts]);
}

#[test]
fn a_mirror_that_lies_in_ranges_is_left_for_another_one() {
    let mut setup = Setup::new();
    let (name, contents) = image(&setup, "mirrored", FILES, 1 << 20);
    let [liar, honest] = [0, 1].map(|_| {
        let registry = Registry::start(Options::default()).unwrap();
        image_in(&registry, "mirrored", (FILES, 1 << 20), Compression::Gzip { level: 1 });
        registry
    });
    setup.index(&name);
    let before = setup.registry.blob_requests();
    mirror(&mut setup, &[&liar, &honest]);
    let dir = setup.mount(&name, "mnt", &["--completion", "never"]);
    for offset in (0..FILES).map(|n| (n << 20) + 5000) {
        liar.faults().inject(Scope::Blobs, Times::Always, Fault::FlipBodyByte { offset });
    }
    liar.clear_requests();
    honest.clear_requests();
    check(&dir, &contents);
    // What was under way when the first lie was found out, and no more.
    let (lies, answers) = (liar.blob_requests(), honest.blob_requests());
    assert!((1..=4).contains(&lies) && answers > 0, "{lies} {answers}");
    assert_eq!(setup.registry.blob_requests(), before);
    let failed = setup.status()["failed_spans"].as_u64().unwrap();
    assert!((1..=SPANS).contains(&failed), "{failed}");
    assert!(setup.log().contains("gave wrong bytes"), "{}", setup.log());
}

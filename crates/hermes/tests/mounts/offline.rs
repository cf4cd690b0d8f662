//! Images that are known here, and a registry that is away.

use testkit::registry::Outage;

use crate::setup::{Setup, check, image};

#[test]
fn a_known_image_is_mounted_and_run_without_a_registry() {
    let setup = Setup::new();
    let (tag, contents) = image(&setup, "offline", 4, 1 << 20);
    let dir = setup.mount(&tag, "first", &[]);
    setup.until_sealed();
    let digest = setup.status()["mounts"][0]["digest"].as_str().unwrap().to_owned();
    setup.ok(&["umount", dir.to_str().unwrap()]);
    setup.registry.faults().cut(Outage::Refuse);
    let before = setup.registry.requests().len();

    // A digest is not even asked for, whatever tag it was known by.
    let pinned = format!("{}@{digest}", tag.rsplit_once(':').unwrap().0);
    let output = setup.run(&["mount", &pinned, setup.path("pinned").to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("warning"), "{said}");
    check(&setup.path("pinned"), &contents);

    let output = setup.run(&["mount", &tag, setup.path("tag").to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("warning: ") && said.contains(&digest), "{said}");
    check(&setup.path("tag"), &contents);

    // The program is not in the image; that it is looked for says that all else went well.
    let output = setup.run(&["run", "--runtime", "chroot", &pinned, "--", "/data/absent"]);
    assert_eq!(output.status.code(), Some(127), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(setup.registry.requests().len(), before);

    // Nobody knows what this means.
    setup.fails(1, &["mount", &format!("{tag}x"), setup.path("unknown").to_str().unwrap()]);
    setup.registry.faults().restore();
    let output = setup.run(&["mount", &tag, setup.path("again").to_str().unwrap()]);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("warning"));
}

#[test]
fn a_registry_that_answers_decides_what_a_tag_means() {
    let setup = Setup::new();
    let (tag, _) = image(&setup, "moved", 1, 1000);
    setup.mount(&tag, "first", &[]);
    setup.until_sealed();
    let (moved, contents) = image(&setup, "moved", 2, 1000);
    assert_eq!(moved, tag);
    check(&setup.mount(&tag, "second", &[]), &contents);
    // An answer that the image is gone, or not ours, is an answer.
    setup.registry.faults().set_auth(testkit::registry::Auth::Basic(
        testkit::registry::Credentials::new("user", "password"),
    ));
    setup.fails(4, &["mount", &tag, setup.path("third").to_str().unwrap()]);
}

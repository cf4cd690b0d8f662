//! What erofs-utils say of an image.

use crate::image::{ImageFiles, Layer, Made, everything, pattern};

#[track_caller]
fn check(layers: &[Layer]) {
    let files = ImageFiles::new(&Made::new(layers));
    let output = testnode::packaged("fsck.erofs")
        .expect("`cargo xtask setup` has run")
        .args(files.devices.iter().map(|path| format!("--device={}", path.display())))
        // At this verbosity it says that there are no errors; without a path, `--extract` only reads.
        .args(["-d3", "--extract"])
        .arg(&files.image)
        .output()
        .expect("fsck.erofs runs");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("No errors found"), "{said}");
}

#[test]
fn finds_no_errors() {
    check(&everything());
    check(&[]);
}

#[test]
fn finds_no_errors_in_many_files() {
    let mut layer = Layer::default();
    for number in 0..3000 {
        layer.file(&format!("d/{number}"), &pattern(number % 1500, number));
        layer.symlink(&format!("l/{number}"), &"t".repeat(number % 1000 + 1));
    }
    check(&[layer]);
}

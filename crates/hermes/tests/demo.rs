//! The demo, at a small scale: what it claims, and that it leaves nothing behind.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "shared parts of tests, which fail by panicking"
)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

/// A folder for the demo's own, on a disk even where `/tmp` is memory.
fn temporary() -> TempDir {
    let made =
        tempfile::Builder::new().prefix("demo-test-").tempdir_in(env!("CARGO_TARGET_TMPDIR"));
    made.unwrap()
}

const HERMES: &str = env!("CARGO_BIN_EXE_hermes");

/// Runs the demo, by way of other programs if `command` begins with them.
fn demo(command: &[&str], temporary: &Path, arguments: &[&str]) -> Value {
    let output = Command::new(command[0])
        .args(&command[1..])
        .env("TMPDIR", temporary)
        .args(["demo", "--output", "json"])
        .args(arguments)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    assert_eq!(stderr, "", "it is quiet in a pipe");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Mounts below `dir`, processes whose command line names it, and files in it.
fn left_behind(dir: &Path) -> Vec<String> {
    let name = dir.to_str().unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut left: Vec<String> =
        mounts.lines().filter(|line| line.contains(name)).map(str::to_owned).collect();
    for process in std::fs::read_dir("/proc").unwrap() {
        let process = process.unwrap().path();
        // What is not a process, or has just ended, has no command line.
        let command = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(name) {
            left.push(command);
        }
    }
    left.extend(
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path().display().to_string()),
    );
    left
}

#[track_caller]
fn number(report: &Value, pointer: &str) -> f64 {
    report
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("{pointer} of {report}"))
}

#[test]
fn kills_of_the_daemon_cost_no_byte_and_nothing_is_left() {
    let temporary = temporary();
    let scale = ["--image-size", "30m", "--bandwidth", "1gbit", "--latency", "2ms", "--kills", "2"];
    let report = demo(&[HERMES], temporary.path(), &scale);
    assert_eq!(report["wrong_bytes"], 0, "{report}");
    assert_eq!(report["daemon_kills"], 2, "{report}");
    assert_eq!(number(&report, "/link/bandwidth_bits_per_s"), 1e9);
    assert_eq!(report["unprivileged"], false, "{report}");
    assert_eq!(number(&report, "/link/latency_seconds"), 0.002);
    let image = number(&report, "/image_bytes");
    assert!(number(&report, "/layers") >= 3.0, "{report}");
    assert!(number(&report, "/full/bytes_fetched") >= image, "{report}");
    let lazy = number(&report, "/lazy/bytes_fetched");
    assert!(lazy > 0.0 && lazy < image, "{report}");
    // At 1 Gbit/s nothing comes earlier than its bytes do.
    assert!(number(&report, "/full/first_answer_seconds") > image * 8e-9, "{report}");
    assert!(
        number(&report, "/lazy/first_answer_seconds") > number(&report, "/lazy/mount_seconds"),
        "{report}"
    );
    assert!(number(&report, "/lazy/files_touched") > 20.0, "{report}");
    assert!(
        number(&report, "/files_compared") > number(&report, "/lazy/files_touched"),
        "{report}"
    );
    assert!(
        ["erofs", "erofs-loop", "fuse"].iter().any(|backend| report["lazy"]["backend"] == *backend)
    );
    assert_eq!(left_behind(temporary.path()), Vec::<String>::new());
}

#[test]
fn it_works_in_a_user_namespace_through_fuse() {
    let temporary = temporary();
    let command = ["unshare", "--user", "--map-root-user", "--mount", "--", HERMES];
    let scale = ["--image-size", "20m", "--bandwidth", "1gbit", "--latency", "2ms", "--kills", "1"];
    let report = demo(&command, temporary.path(), &scale);
    assert_eq!(report["wrong_bytes"], 0, "{report}");
    assert_eq!(report["daemon_kills"], 1, "{report}");
    assert_eq!(report["lazy"]["backend"], "fuse", "{report}");
    assert_eq!(report["unprivileged"], true, "{report}");
    assert_eq!(left_behind(temporary.path()), Vec::<String>::new());
}

//! Who uses a mount.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The processes whose root, working folder, program or open files lie on the file system mounted at
/// `dir`.
pub(crate) fn of(dir: &Path) -> Vec<i32> {
    let Ok(device) = fs::metadata(dir).map(|metadata| metadata.dev()) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<i32> = processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let lies_there =
                |path: &Path| fs::metadata(path).is_ok_and(|file| file.dev() == device);
            let process = Path::new("/proc").join(pid.to_string());
            let opened = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
            ["root", "cwd", "exe"].iter().any(|link| lies_there(&process.join(link)))
                || opened.into_iter().any(|file| lies_there(&file.path()))
        })
        .collect();
    pids.sort_unstable();
    pids
}

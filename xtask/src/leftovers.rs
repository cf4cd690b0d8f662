//! What a test run leaves behind on the machine, which must be nothing.
//!
//! Everything the run makes can be told from what others make meanwhile: orphans of its processes become
//! children of this one, and its files lie in a folder of its own.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid,
};
use tempfile::TempDir;
use testnode::{Cache, wait_until};

/// Long enough for a busy kernel to clean up after a process.
const GRACE: Duration = Duration::from_secs(10);

/// What a run may use, and must leave empty.
#[derive(Debug)]
pub(crate) struct Footprint {
    /// The temporary folder of all programs of the run. On a disk: tests watch files and back devices
    /// with them, and `/tmp` may be memory.
    temporary: TempDir,
    /// Network interfaces and namespaces before.
    network: Vec<PathBuf>,
    /// Cgroups of nodes that were gone before.
    cgroups: Vec<PathBuf>,
    /// How long what was ended may take to be gone.
    grace: Duration,
}

impl Footprint {
    pub(crate) fn begin(cache: &Cache) -> Result<Self> {
        let temporary = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(cache.folder())
            .context("making the temporary folder of the run")?;
        // From now on a process whose parent died becomes our child instead of that of init.
        set_child_subreaper(Some(getpid())).context("becoming the reaper of the run's orphans")?;
        Ok(Self { temporary, network: network(), cgroups: cgroups(), grace: GRACE })
    }

    /// Makes the program put its temporary files where they are looked for.
    pub(crate) fn confine<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("TMPDIR", self.temporary.path())
    }

    /// Makes a folder for files of the run itself, which it removes when it is done with them.
    pub(crate) fn scratch(&self, name: &str) -> Result<PathBuf> {
        let folder = self.temporary.path().join(name);
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    }

    /// Fails if anything is left, and names it.
    pub(crate) fn end(self, cache: &Cache) -> Result<()> {
        let mut left = Vec::new();
        let waited = wait_until("the end of what was started", self.grace, || {
            left = self.left(cache);
            Ok(left.is_empty())
        });
        if waited.is_err() {
            for (pid, _) in orphans() {
                // It may have ended meanwhile, which is as good.
                kill_process(pid, Signal::KILL).ok();
            }
            bail!("the run left behind:\n  {}", left.join("\n  "));
        }
        println!("nothing is left: no process, mount, device, cgroup, interface or file");
        Ok(())
    }

    fn left(&self, cache: &Cache) -> Vec<String> {
        let mut left = Vec::new();
        let orphans = orphans().into_iter();
        left.extend(orphans.map(|(pid, name)| {
            format!("process {}: {name}; {}", pid.as_raw_pid(), whereabouts(pid))
        }));
        left.extend(mounts(self.temporary.path(), &cache.nodes()));
        left.extend(loop_devices(self.temporary.path(), &cache.nodes()));
        let cgroups = cgroups().into_iter().filter(|path| !self.cgroups.contains(path));
        left.extend(cgroups.map(|path| format!("cgroup: {}{}", path.display(), members(&path))));
        left.extend(
            list(&cache.nodes())
                .into_iter()
                .filter(|path| is_abandoned(path))
                .map(|path| format!("test node: {}", path.display())),
        );
        let network = network().into_iter().filter(|path| !self.network.contains(path));
        left.extend(network.map(|path| format!("network: {}", path.display())));
        left.extend(files(self.temporary.path()));
        left
    }
}

/// Children of this process, whose numbers and names are returned; those that are dead are buried.
///
/// All programs of the run have been waited for, so these are orphans that came to us: see
/// [`Footprint::begin`]. Only their names are looked at, since the kernel lets whoever asks for the
/// arguments of a process wait as long as that process waits for a page.
fn orphans() -> Vec<(Pid, String)> {
    let threads = list(Path::new("/proc/self/task"));
    let lists = threads.iter().map(|t| fs::read_to_string(t.join("children")).unwrap_or_default());
    let text = lists.collect::<Vec<_>>().join(" ");
    let pids = text.split_whitespace().filter_map(|pid| pid.parse().ok()).filter_map(Pid::from_raw);
    let alive = pids.filter(|pid| !matches!(waitpid(Some(*pid), WaitOptions::NOHANG), Ok(Some(_))));
    let named = |pid: Pid| {
        let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid()));
        (pid, name.unwrap_or_default().trim().to_owned())
    };
    alive.map(named).collect()
}

/// What tells where a process came from and why it is still there: its state, its numbers in its pid
/// namespaces, what the kernel does for it, its program, its cgroups, and what it has open.
fn whereabouts(pid: Pid) -> String {
    let folder = PathBuf::from(format!("/proc/{}", pid.as_raw_pid()));
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let status = read("status");
    let wanted = ["State:", "TracerPid:", "NSpid:"];
    let mut facts: Vec<String> = status
        .lines()
        .filter(|line| wanted.iter().any(|field| line.starts_with(field)))
        .map(|line| line.replace('\t', " "))
        .collect();
    facts.push(format!("in {}", read("wchan")));
    facts.push(format!(
        "program {}",
        fs::read_link(folder.join("exe")).unwrap_or_default().display()
    ));
    facts.extend(read("cgroup").lines().map(ToOwned::to_owned));
    let open = list(&folder.join("fd")).into_iter().filter_map(|fd| fs::read_link(fd).ok());
    facts.extend(open.map(|file| format!("open {}", file.display())));
    facts.join(", ")
}

/// Mounts on, and of, files of the run.
fn mounts(temporary: &Path, nodes: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = [temporary, nodes].map(|p| p.to_string_lossy().into_owned());
    let ours = table.lines().filter(|line| below.iter().any(|path| line.contains(path.as_str())));
    ours.map(|line| format!("mount: {line}")).collect()
}

fn loop_devices(temporary: &Path, nodes: &Path) -> Vec<String> {
    let mut left = Vec::new();
    for device in list(Path::new("/sys/block")) {
        let backing = fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default();
        if Path::new(&backing).starts_with(temporary) || Path::new(&backing).starts_with(nodes) {
            left.push(format!("loop device {}: {}", device.display(), backing.trim()));
        }
    }
    left
}

/// Whether a test node's folder is held by no process.
fn is_abandoned(folder: &Path) -> bool {
    let Ok(folder) = fs::File::open(folder) else {
        return false;
    };
    flock(folder.as_fd(), FlockOperation::NonBlockingLockShared).is_ok()
}

/// Cgroups of nodes that are gone.
fn cgroups() -> Vec<PathBuf> {
    let hierarchies = list(Path::new("/sys/fs/cgroup"));
    let candidates = hierarchies.iter().flat_map(|h| list(h)).chain(hierarchies.clone());
    let abandoned = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("hermes-node-") && !Cache::locate().nodes().join(name).exists()
    };
    candidates.filter(abandoned).collect()
}

/// The processes in a cgroup and below it, and what froze them.
fn members(cgroup: &Path) -> String {
    let read = |name: &str| fs::read_to_string(cgroup.join(name)).unwrap_or_default();
    let processes = read("cgroup.procs").split_whitespace().collect::<Vec<_>>().join(" ");
    let children = list(cgroup).into_iter().filter(|path| path.is_dir());
    let below = children.map(|child| format!(", {}{}", child.display(), members(&child)));
    format!(" [{processes}] {}{}", read("freezer.state").trim(), below.collect::<String>())
}

/// Network interfaces and named network namespaces of the host.
fn network() -> Vec<PathBuf> {
    ["/sys/class/net", "/run/netns"].iter().flat_map(|folder| list(Path::new(folder))).collect()
}

/// What lies in the temporary folder.
fn files(temporary: &Path) -> Vec<String> {
    list(temporary).into_iter().map(|path| format!("file: {}", path.display())).collect()
}

/// The entries of a folder; none if it does not exist.
fn list(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set where the test has a process of its own: there every child that it has not started is an
    /// orphan, and none is another test's.
    const ALONE: &str = "XTASK_TEST_ALONE";

    #[test]
    fn an_orphan_and_a_file_that_stay_are_found() {
        if std::env::var_os(ALONE).is_none() {
            let mut alone = Command::new(std::env::current_exe().unwrap());
            alone.args(["--exact", "leftovers::tests::an_orphan_and_a_file_that_stay_are_found"]);
            let output = alone.env(ALONE, "1").output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let cache = Cache::locate();
        let grace = Duration::from_millis(50);
        let footprint = Footprint { grace, ..Footprint::begin(&cache).unwrap() };
        let file = footprint.temporary.path().join("forgotten");
        fs::write(&file, "").unwrap();
        let mut parent = Command::new("sh");
        parent.args(["-c", "sleep 1000 > /dev/null 2>&1 & echo $!"]);
        let pid = String::from_utf8(parent.output().unwrap().stdout).unwrap();
        let orphan = format!("process {}: sleep", pid.trim());

        let error = footprint.end(&cache).unwrap_err().to_string();
        assert!(error.contains(&orphan), "{error}");
        assert!(error.contains(&format!("file: {}", file.display())), "{error}");
        // It was killed, and is buried when somebody looks again.
        let gone = || Ok(!fs::exists(format!("/proc/{}", pid.trim()))? || orphans().is_empty());
        wait_until("the orphan to be gone", GRACE, gone).unwrap();
        assert!(!file.exists());
    }
}

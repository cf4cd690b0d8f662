//! A cgroup of its own for a node, in every hierarchy of the host: version 1, version 2 or both.
//!
//! Containers of a node make theirs below, where removing one folder removes them, and two nodes with
//! containers of the same name do not meet.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait::wait_until;

/// How long the kernel may take to forget the dead processes of a cgroup.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// A mounted cgroup hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub(crate) mount_point: PathBuf,
    /// What `mount -t` and `-o` need to mount it again.
    pub(crate) fs_type: String,
    pub(crate) options: String,
}

/// The hierarchies that the host has mounted.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts =
        fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    Ok(mounts.lines().filter_map(parse_mount).collect())
}

/// A line of `mountinfo`, if it is a cgroup hierarchy at its usual place.
fn parse_mount(line: &str) -> Option<Hierarchy> {
    let (place, kind) = line.split_once(" - ")?;
    let mount_point = place.split(' ').nth(4)?;
    let mut kind = kind.split(' ');
    let fs_type = kind.next()?;
    let options = kind.nth(1)?;
    if !matches!(fs_type, "cgroup" | "cgroup2") || !mount_point.starts_with("/sys/fs/cgroup") {
        return None;
    }
    let options = if fs_type == "cgroup2" {
        String::new()
    } else {
        let named = |o: &str| if o.starts_with("name=") { format!("none,{o}") } else { o.into() };
        let is_controller = |o: &&str| {
            !matches!(*o, "rw" | "ro" | "xattr" | "clone_children" | "noprefix")
                && !o.starts_with("release_agent=")
        };
        options.split(',').filter(is_controller).map(named).collect::<Vec<String>>().join(",")
    };
    Some(Hierarchy { mount_point: mount_point.into(), fs_type: fs_type.into(), options })
}

/// Makes the cgroup `name` in each hierarchy and returns its folders.
pub(crate) fn create(hierarchies: &[Hierarchy], name: &str) -> Result<Vec<PathBuf>> {
    hierarchies.iter().map(|h| create_in(h, name)).collect()
}

fn create_in(hierarchy: &Hierarchy, name: &str) -> Result<PathBuf> {
    let folder = hierarchy.mount_point.join(name);
    hand_down_controllers(&hierarchy.mount_point);
    fs::create_dir(&folder).with_context(|| format!("making the cgroup {}", folder.display()))?;
    // A version 1 cpuset takes no process before it is told which processors and memory it has.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = folder.join(file);
        if hierarchy.fs_type == "cgroup" && own.exists() {
            fs::read(hierarchy.mount_point.join(file))
                .and_then(|value| fs::write(&own, value))
                .with_context(|| format!("setting {}", own.display()))?;
        }
    }
    Ok(folder)
}

/// Lets the children of a version 2 hierarchy's root have all its controllers, as systemd and runc do
/// when they need one. Only some may be possible; runc says which it misses.
fn hand_down_controllers(root: &Path) {
    let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else {
        return; // Version 1, where there is nothing to hand down.
    };
    for controller in controllers.split_whitespace() {
        fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")).ok();
    }
}

/// Gives the cgroup `name` the largest share of processors that there is, against those beside it.
pub(crate) fn raise_share(hierarchies: &[Hierarchy], name: &str) -> Result<()> {
    for hierarchy in hierarchies {
        for (file, largest) in [("cpu.shares", "262144"), ("cpu.weight", "10000")] {
            let own = hierarchy.mount_point.join(name).join(file);
            if own.exists() {
                fs::write(&own, largest).with_context(|| format!("setting {}", own.display()))?;
            }
        }
    }
    Ok(())
}

/// Where the cgroup of version 2 of a node is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UnifiedCgroup {
    /// On the host, the part that the node's own processes are in.
    pub(crate) outside: PathBuf,
    /// In the node, all of it.
    pub(crate) inside: PathBuf,
}

/// The cgroup `name` in the hierarchy of version 2, if there is one.
pub(crate) fn unified(hierarchies: &[Hierarchy], name: &str) -> Option<UnifiedCgroup> {
    let hierarchy = hierarchies.iter().find(|hierarchy| hierarchy.fs_type == "cgroup2")?;
    let inside = hierarchy.mount_point.clone();
    Some(UnifiedCgroup { outside: inside.join(name).join("init"), inside })
}

/// Removes the cgroup `name`, with all below it, from each hierarchy that has it.
pub(crate) fn remove(hierarchies: &[Hierarchy], name: &str) -> Result<()> {
    for hierarchy in hierarchies {
        let folder = hierarchy.mount_point.join(name);
        wait_until(&format!("{} to be empty", folder.display()), REMOVAL_LIMIT, || {
            Ok(remove_tree(&folder))
        })?;
    }
    Ok(())
}

/// Whether the cgroup is gone now.
fn remove_tree(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else {
        return !folder.exists();
    };
    let mut children = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    let emptied = children.all(|child| remove_tree(&child.path()));
    let gone = |e: std::io::Error| e.kind() == ErrorKind::NotFound;
    emptied && fs::remove_dir(folder).map_or_else(gone, |()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expected: Option<(&str, &str, &str)>) {
        let expected = expected.map(|(mount_point, fs_type, options)| Hierarchy {
            mount_point: mount_point.into(),
            fs_type: fs_type.into(),
            options: options.into(),
        });
        assert_eq!(parse_mount(line), expected);
    }

    #[test]
    fn reads_mountinfo() {
        check(
            "31 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
            Some(("/sys/fs/cgroup", "cgroup2", "")),
        );
        check(
            "33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
            Some(("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "cpu,cpuacct")),
        );
        check(
            "34 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd",
            Some(("/sys/fs/cgroup/systemd", "cgroup", "none,name=systemd")),
        );
        check("24 1 0:22 / /proc rw - proc proc rw", None);
        check("35 30 0:30 /a /var/lib/x/cpu rw - cgroup cgroup rw,cpu", None);
        check("", None);
    }
}

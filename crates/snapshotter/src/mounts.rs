//! How a snapshot is mounted: nothing but `bind` and `overlay`, which every containerd can do.

use std::path::Path;

use crate::folders::{content, work};
use crate::store::{Kind, Lineage};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) kind: &'static str,
    pub(crate) source: String,
    pub(crate) options: Vec<String>,
}

/// The mount of an active snapshot or of a view. `options` are overlayfs' beside the folders.
pub(crate) fn of(dir: &Path, lineage: &Lineage, options: &[String]) -> Mount {
    let own = || content(dir, lineage.id).display().to_string();
    let below: Vec<String> =
        lineage.below.parents.iter().map(|id| content(dir, *id).display().to_string()).collect();
    match (lineage.kind, below.as_slice()) {
        (Kind::Active, []) => bind(own(), "rw"),
        (_, []) => bind(own(), "ro"),
        (Kind::View | Kind::Committed, [only]) => bind(only.clone(), "ro"),
        (kind, below) => {
            let mut options = options.to_vec();
            if kind == Kind::Active {
                options.push(format!("workdir={}", work(dir, lineage.id).display()));
                options.push(format!("upperdir={}", own()));
            }
            options.push(format!("lowerdir={}", below.join(":")));
            Mount { kind: "overlay", source: "overlay".to_owned(), options }
        }
    }
}

fn bind(source: String, access: &str) -> Mount {
    Mount { kind: "bind", source, options: vec![access.to_owned(), "rbind".to_owned()] }
}

/// What overlayfs must be told on this machine.
pub(crate) fn overlay_options() -> Vec<String> {
    // Where it is on by default, an upper folder remembers its lower ones, and refuses others.
    let has_index = Path::new("/sys/module/overlay/parameters/index").exists();
    has_index.then(|| "index=off".to_owned()).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Below, SnapshotId};

    #[track_caller]
    fn check(kind: Kind, parents: &[i64], expected: &str) {
        let parents = parents.iter().copied().map(SnapshotId).collect();
        let lineage = Lineage { id: SnapshotId(9), kind, below: Below { parents, lazy: None } };
        let Mount { kind, source, options } =
            of(Path::new("/s"), &lineage, &["index=off".to_owned()]);
        assert_eq!(format!("{kind} {source} {}", options.join(",")), expected);
    }

    #[test]
    fn a_snapshot_is_mounted_over_its_parents() {
        check(Kind::Active, &[], "bind /s/9/fs rw,rbind");
        check(Kind::View, &[], "bind /s/9/fs ro,rbind");
        check(Kind::View, &[4], "bind /s/4/fs ro,rbind");
        check(Kind::View, &[4, 2], "overlay overlay index=off,lowerdir=/s/4/fs:/s/2/fs");
        check(
            Kind::Active,
            &[4, 2],
            "overlay overlay index=off,workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/4/fs:/s/2/fs",
        );
    }
}

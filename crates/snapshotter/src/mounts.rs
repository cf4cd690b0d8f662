//! How a snapshot is mounted: nothing but `bind` and `overlay`, which every containerd can do.

use std::path::Path;

use crate::folders::{content, work};
use crate::ids::{IdMapping, Owners};
use crate::mapped::Mapped;
use crate::store::{Kind, Lineage};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) kind: &'static str,
    pub(crate) source: String,
    pub(crate) options: Vec<String>,
}

/// The mount of an active snapshot or of a view. `options` are overlayfs' beside the folders.
pub(crate) fn of(
    (dir, mapped): (&Path, &Mapped),
    lineage: &Lineage,
    owners: &Owners,
    options: &[String],
) -> Mount {
    let own = || content(dir, lineage.id).display().to_string();
    let parents = &lineage.below.parents;
    let below = match owners {
        Owners::ByUs(_) => mapped.places(lineage.id, parents.len()),
        Owners::Same | Owners::ByContainerd(_) => {
            parents.iter().map(|id| content(dir, *id)).collect()
        }
    };
    let below: Vec<String> = below.iter().map(|path| path.display().to_string()).collect();
    let ids = match owners {
        Owners::ByContainerd(ids) => Some(ids),
        Owners::Same | Owners::ByUs(_) => None,
    };
    let of_ids = ids.map(IdMapping::options).into_iter().flatten();
    match (lineage.kind, below.as_slice()) {
        // Its own folder has the ids that it is to have.
        (Kind::Active, []) => bind(own(), "rw"),
        (_, []) => bind(own(), "ro"),
        (Kind::View | Kind::Committed, [only]) => {
            let mut mount = bind(only.clone(), "ro");
            mount.options.extend(of_ids);
            mount
        }
        (kind, below) => {
            let mut options: Vec<String> = of_ids.chain(options.iter().cloned()).collect();
            if kind == Kind::Active {
                options.push(format!("workdir={}", work(dir, lineage.id).display()));
                options.push(format!("upperdir={}", own()));
            }
            let below = match (below, ids) {
                // To show it with other ids, containerd takes what is mounted on the folder *above* the one named
                // here, and before 2.3 nothing that is mounted further in.
                ([only], Some(_)) => format!("{only}/."),
                _ => below.join(":"),
            };
            options.push(format!("lowerdir={below}"));
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
    fn check_with(owners: &Owners, kind: Kind, parents: &[i64], expected: &str) {
        let parents = parents.iter().copied().map(SnapshotId).collect();
        let lineage = Lineage { id: SnapshotId(9), kind, below: Below { parents, lazy: None } };
        let dir = Path::new("/s");
        let Mount { kind, source, options } =
            of((dir, &Mapped::new(dir)), &lineage, owners, &["index=off".to_owned()]);
        assert_eq!(format!("{kind} {source} {}", options.join(",")), expected);
    }

    #[track_caller]
    fn check(kind: Kind, parents: &[i64], expected: &str) {
        check_with(&Owners::Same, kind, parents, expected);
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

    #[test]
    fn what_is_below_is_mounted_with_the_ids_of_a_user_namespace() {
        let label = |kind: &str| format!("containerd.io/snapshot/{kind}mapping");
        let labels = ["uid", "gid"].map(|kind| (label(kind), "0:5:9".to_owned()));
        let ids = IdMapping::of(&labels.into_iter().collect()).unwrap().unwrap();
        let owners = Owners::ByContainerd(ids.clone());
        let check = |kind, parents: &[i64], expected: &str| {
            check_with(&owners, kind, parents, expected);
        };
        check(Kind::Active, &[], "bind /s/9/fs rw,rbind");
        check(Kind::View, &[4], "bind /s/4/fs ro,rbind,uidmap=0:5:9,gidmap=0:5:9");
        let own = "index=off,workdir=/s/9/work,upperdir=/s/9/fs";
        check(
            Kind::Active,
            &[4],
            &format!("overlay overlay uidmap=0:5:9,gidmap=0:5:9,{own},lowerdir=/s/4/fs/."),
        );
        check(
            Kind::Active,
            &[4, 2],
            &format!("overlay overlay uidmap=0:5:9,gidmap=0:5:9,{own},lowerdir=/s/4/fs:/s/2/fs"),
        );
        check_with(
            &Owners::ByUs(ids),
            Kind::Active,
            &[4, 2],
            &format!("overlay overlay {own},lowerdir=/mapped/9/0:/mapped/9/1"),
        );
    }
}

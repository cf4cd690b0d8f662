//! Which ids outside stand for those in a container's user namespace: what containerd's labels say of it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use sys::namespace::{IdRange, user_namespace};

/// The ids of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IdMapping {
    users: Ranges,
    groups: Ranges,
}

/// Runs of ids, one of which has root.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ranges {
    all: Vec<IdRange>,
    /// Who root is outside.
    root: u32,
}

/// A user and a group, as numbered outside.
pub(crate) type Owner = (u32, u32);

/// Whose what is below a snapshot is, for the snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Owners {
    /// Whose it is.
    Same,
    /// That of a user namespace, by way of containerd, which is told to mount it so.
    ByContainerd(IdMapping),
    /// The same by way of our own mounts.
    ByUs(IdMapping),
}

impl Owners {
    /// The ids, if they are others.
    pub(crate) fn ids(&self) -> Option<&IdMapping> {
        match self {
            Self::Same => None,
            Self::ByContainerd(ids) | Self::ByUs(ids) => Some(ids),
        }
    }
}

/// Labels say nothing that can be a user namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParseIdsError {
    #[error("the label {label} says `{value}`, which is no list of INSIDE:OUTSIDE:COUNT")]
    Malformed { label: &'static str, value: String },
    #[error("a user namespace needs the label {0} too")]
    Missing(&'static str),
    #[error("the label {0} maps no root, whom a container's folders belong to")]
    NoRoot(&'static str),
}

impl IdMapping {
    /// Reads the labels of a snapshot; nothing if it is for no user namespace.
    pub(crate) fn of(labels: &BTreeMap<String, String>) -> Result<Option<Self>, ParseIdsError> {
        let [users, groups] = [USERS, GROUPS].map(|label| {
            let value = labels.get(label).map(String::as_str);
            value.map(|value| Ranges::parse(label, value)).transpose()
        });
        match (users?, groups?) {
            (None, None) => Ok(None),
            (Some(users), Some(groups)) => Ok(Some(Self { users, groups })),
            (None, Some(_)) => Err(ParseIdsError::Missing(USERS)),
            (Some(_), None) => Err(ParseIdsError::Missing(GROUPS)),
        }
    }

    /// Who root is outside.
    pub(crate) fn root(&self) -> Owner {
        (self.users.root, self.groups.root)
    }

    /// Who an owner inside is outside; root if nobody there is.
    pub(crate) fn outside(&self, (user, group): Owner) -> Owner {
        let root = self.root();
        (self.users.outside(user).unwrap_or(root.0), self.groups.outside(group).unwrap_or(root.1))
    }

    /// A user namespace that has them.
    pub(crate) fn namespace(&self) -> io::Result<OwnedFd> {
        user_namespace(&self.users.all, &self.groups.all)
    }

    /// The options by which containerd, from 2.0 on, is told to mount what is below a snapshot with these ids.
    pub(crate) fn options(&self) -> [String; 2] {
        [format!("uidmap={}", self.users), format!("gidmap={}", self.groups)]
    }
}

impl Ranges {
    fn parse(label: &'static str, value: &str) -> Result<Self, ParseIdsError> {
        let all: Option<Vec<_>> = value.split(',').map(parse_range).collect();
        let malformed = || ParseIdsError::Malformed { label, value: value.to_owned() };
        let all = all.ok_or_else(malformed)?;
        let root = all.iter().find_map(|range| outside(*range, 0));
        Ok(Self { root: root.ok_or(ParseIdsError::NoRoot(label))?, all })
    }

    fn outside(&self, id: u32) -> Option<u32> {
        self.all.iter().find_map(|range| outside(*range, id))
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = |range: &IdRange| format!("{}:{}:{}", range.inside, range.outside, range.count);
        f.write_str(&self.all.iter().map(range).collect::<Vec<_>>().join(","))
    }
}

fn parse_range(text: &str) -> Option<IdRange> {
    let numbers = text.split(':').map(|number| number.parse().ok());
    let [inside, outside, count] = *numbers.collect::<Option<Vec<u32>>>()? else { return None };
    // The last id of 32 bits is nobody's.
    let ends = |first: u32| first.checked_add(count).is_some();
    (count > 0 && ends(inside) && ends(outside)).then_some(IdRange { inside, outside, count })
}

fn outside(range: IdRange, id: u32) -> Option<u32> {
    let offset = id.checked_sub(range.inside).filter(|offset| *offset < range.count)?;
    Some(range.outside + offset)
}

/// What containerd calls the users of a snapshot for a user namespace.
const USERS: &str = "containerd.io/snapshot/uidmapping";
/// The groups.
const GROUPS: &str = "containerd.io/snapshot/gidmapping";

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn labels_say_who_is_who() {
        let check = |text: &str, inside: Owner, outside: Owner| {
            let ids = IdMapping::of(&labels(&[(USERS, text), (GROUPS, "0:7:2")])).unwrap().unwrap();
            assert_eq!(ids.outside(inside), outside, "{text}");
            assert_eq!(ids.options(), [format!("uidmap={text}"), "gidmap=0:7:2".to_owned()]);
        };
        check("0:100000:65536", (0, 0), (100_000, 7));
        check("0:100000:65536", (65_535, 1), (165_535, 8));
        // Nobody there: root's.
        check("0:100000:65536", (65_536, 2), (100_000, 7));
        check("0:1000:1,1:200000:10", (3, 0), (200_002, 7));
        check("0:4294967294:1", (0, 0), (4_294_967_294, 7));
    }

    #[test]
    fn labels_that_are_no_user_namespace_are_refused() {
        assert_eq!(IdMapping::of(&labels(&[("other", "0:1:1")])).unwrap(), None);
        let check = |pairs: &[(&str, &str)], expected: &str| {
            let error = IdMapping::of(&labels(pairs)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(&[(USERS, "0:1:1")], GROUPS);
        check(&[(GROUPS, "0:1:1")], USERS);
        check(&[(USERS, "0:1:1"), (GROUPS, "1:2:3")], "no root");
        for text in
            ["", "0:1", "0:1:1,", "0:1:1:1", "0:-1:1", "0:1:0", "0:1:4294967295", "0,ro:1:1"]
        {
            check(&[(USERS, text), (GROUPS, "0:1:1")], &format!("`{text}`"));
        }
    }
}

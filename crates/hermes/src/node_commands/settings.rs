//! What containerd's configuration must say, by its version: keys and values, no files.

use std::fmt;
use std::str::FromStr;

use toml::{Table, Value};

/// The name of the proxy snapshotter.
pub(super) const NAME: &str = "hermes";
/// containerd's own snapshotter.
const OVERLAYFS: &str = "overlayfs";
/// CRI in files of version 2.
const CRI_OF_1: &str = "io.containerd.grpc.v1.cri";
/// CRI's images in files of version 3 and later.
const CRI_OF_2: &str = "io.containerd.cri.v1.images";
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// A version of containerd, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32);

impl Version {
    /// Whether its Transfer Service can tell a proxy snapshotter about layers.
    pub(super) fn transfers_lazily(self) -> bool {
        self >= Self(2, 1)
    }

    /// Whether it mounts what a snapshotter has with other owners than it has there.
    pub(super) fn maps_ids(self) -> bool {
        self >= Self(2, 0)
    }

    /// What `version` of a new configuration file says.
    pub(super) fn of_files(self) -> i64 {
        if self >= Self(2, 0) { 3 } else { 2 }
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut numbers = text.trim_start_matches('v').split(['.', '-', '+', '~']).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Self(major, minor)),
            _ => Err(format!("`{text}` is not a version of containerd")),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Where containerd finds Hermes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) version: Version,
    /// The socket of Hermes.
    pub(super) socket: String,
    /// The folder of its snapshots, where the kubelet looks for the space that images take.
    pub(super) exports_root: String,
    /// Whether images can be shown to user namespaces as if they were theirs; else why not.
    pub(super) maps_ids: Result<(), String>,
}

/// A key, and what it must say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Setting {
    pub(super) path: Vec<String>,
    pub(super) value: Value,
}

/// The keys that a file must have. `written` is what it says now, `effective` what containerd makes of it.
pub(super) fn settings(wanted: &Wanted, written: &Table, effective: &Table) -> Vec<Setting> {
    let version = file_version(written).unwrap_or_else(|| wanted.version.of_files());
    let mut all = Vec::new();
    let mut add = |path: &[&str], value: Value| {
        all.push(Setting { path: path.iter().map(|key| (*key).to_owned()).collect(), value });
    };
    if file_version(written).is_none() {
        add(&["version"], version.into());
    }
    add(&["proxy_plugins", NAME, "type"], "snapshot".into());
    add(&["proxy_plugins", NAME, "address"], wanted.socket.as_str().into());
    if let Some(list) = capabilities(wanted, written) {
        add(&CAPABILITIES, list);
    }
    let exports = ["proxy_plugins", NAME, "exports"];
    add(&[&exports[..], &["root"]].concat(), wanted.exports_root.as_str().into());
    let lazily = wanted.version.transfers_lazily();
    if lazily {
        // A string, not a boolean.
        add(&[&exports[..], &[ANNOTATIONS]].concat(), "true".into());
    }
    let cri: &[&str] = match version {
        ..=2 => &["plugins", CRI_OF_1, "containerd"],
        _ => &["plugins", CRI_OF_2],
    };
    add(&[cri, &["snapshotter"]].concat(), NAME.into());
    add(&[cri, &["disable_snapshot_annotations"]].concat(), false.into());
    let runtimes = [cri, &["runtimes"]].concat();
    if wanted.version >= Version(2, 0) && version <= 2 && get(written, &runtimes).is_none() {
        // Without it, containerd 2 ignores the whole table when it translates the file.
        let runtime = get(written, &[cri, &["default_runtime_name"]].concat());
        let runtime = runtime.and_then(Value::as_str).unwrap_or("runc");
        add(&[&runtimes[..], &[runtime, "runtime_type"]].concat(), "io.containerd.runc.v2".into());
    }
    if lazily {
        add(&["plugins", TRANSFER, "unpack_config"], unpacks(written, effective));
    }
    all
}

/// What containerd is to believe that Hermes can, beside what it is told already; nothing if that is nothing.
fn capabilities(wanted: &Wanted, written: &Table) -> Option<Value> {
    let old = get(written, &CAPABILITIES).and_then(Value::as_array);
    let mut list = old.cloned().unwrap_or_default();
    list.retain(|name| name.as_str() != Some(REBASE));
    let is_meant = |name: &Value| name.as_str() == Some(REMAP_IDS);
    match &wanted.maps_ids {
        Ok(()) if list.iter().any(is_meant) => {}
        Ok(()) => list.push(REMAP_IDS.into()),
        Err(_) => list.retain(|name| !is_meant(name)),
    }
    (old.is_some() || !list.is_empty()).then_some(Value::Array(list))
}

/// What the Transfer Service unpacks for: what it does already, and Hermes. A list that is given replaces
/// containerd's own, which is not shown.
fn unpacks(written: &Table, effective: &Table) -> Value {
    let path = ["plugins", TRANSFER, "unpack_config"];
    let list = |table| get(table, &path).and_then(Value::as_array).filter(|list| !list.is_empty());
    let entry = |snapshotter: &str| {
        let keys = [("platform", "linux"), ("snapshotter", snapshotter)];
        Value::Table(keys.map(|(key, value)| (key.to_owned(), value.into())).into_iter().collect())
    };
    let mut list = list(written)
        .or_else(|| list(effective))
        .cloned()
        .unwrap_or_else(|| vec![entry(OVERLAYFS)]);
    if !list.iter().any(is_for_hermes) {
        list.push(entry(NAME));
    }
    Value::Array(list)
}

fn is_for_hermes(entry: &Value) -> bool {
    entry.get("snapshotter").and_then(Value::as_str) == Some(NAME)
}

/// What the Transfer Service does with images for Hermes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Transfer {
    /// It refuses them.
    #[default]
    Refuses,
    /// It pulls them whole.
    PullsWhole,
    /// It says which layers it is about to fetch.
    TellsOfLayers,
}

/// What containerd's effective configuration says about Hermes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Effective {
    /// The address of the proxy snapshotter, if there is one.
    pub(super) address: Option<String>,
    pub(super) exports_root: Option<String>,
    /// What containerd believes that Hermes can.
    pub(super) capabilities: Vec<String>,
    /// What the Transfer Service does with images for Hermes.
    pub(super) transfer: Transfer,
    /// The snapshotter of CRI, unless there is no CRI.
    pub(super) cri_snapshotter: Option<String>,
    /// Whether CRI tells about layers.
    pub(super) cri_annotates: bool,
}

impl Effective {
    /// Reads the output of `containerd config dump`.
    pub(super) fn of(dump: &Table) -> Self {
        let text = |path: &[&str]| get(dump, path).and_then(Value::as_str).map(str::to_owned);
        let cri = [&["plugins", CRI_OF_2][..], &["plugins", CRI_OF_1, "containerd"]];
        let cri = cri.into_iter().find(|path| get(dump, path).is_some());
        let disabled = get(dump, &["disabled_plugins"]).and_then(Value::as_array);
        let mut disabled = disabled.into_iter().flatten().filter_map(Value::as_str);
        let cri = cri.filter(|_| !disabled.any(|name| name == "cri" || name == CRI_OF_1));
        let of_cri = |key: &'static str| cri.map(|path| [path, &[key]].concat());
        let disables = of_cri("disable_snapshot_annotations");
        let disables = disables.and_then(|path| get(dump, &path)).and_then(Value::as_bool);
        let unpacks = get(dump, &["plugins", TRANSFER, "unpack_config"]).and_then(Value::as_array);
        let tells = text(&["proxy_plugins", NAME, "exports", ANNOTATIONS]);
        let capabilities = get(dump, &CAPABILITIES).and_then(Value::as_array);
        let capabilities = capabilities.into_iter().flatten().filter_map(Value::as_str);
        Self {
            address: text(&["proxy_plugins", NAME, "address"]),
            exports_root: text(&["proxy_plugins", NAME, "exports", "root"]),
            capabilities: capabilities.map(str::to_owned).collect(),
            transfer: match unpacks.is_some_and(|list| list.iter().any(is_for_hermes)) {
                false => Transfer::Refuses,
                true if tells.as_deref() == Some("true") => Transfer::TellsOfLayers,
                true => Transfer::PullsWhole,
            },
            cri_snapshotter: of_cri("snapshotter").and_then(|path| text(&path)),
            cri_annotates: disables == Some(false),
        }
    }
}

/// What keys say otherwise after a change than before it, other than those about Hermes: `KEY = VALUE`.
pub(super) fn side_effects(before: &Table, after: &Table) -> Vec<String> {
    let (before, after) = (leaves(before), leaves(after));
    let changed = after.iter().filter(|leaf| !before.contains(leaf));
    let gone = before.iter().filter(|(path, _)| !after.iter().any(|(other, _)| other == path));
    let changed = changed.map(|(path, value)| (path, value.to_string()));
    let gone = gone.map(|(path, _)| (path, "not set".to_owned()));
    let others = changed.chain(gone).filter(|(path, _)| !is_ours(path));
    others.map(|(path, value)| format!("{} = {value}", shown(path))).collect()
}

/// Whether a key of the effective configuration is one that Hermes needs otherwise.
fn is_ours(path: &[String]) -> bool {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    match path[..] {
        ["version" | "imports"] | ["proxy_plugins"] | ["proxy_plugins", NAME, ..] => true,
        ["plugins", TRANSFER, "unpack_config", ..] => true,
        ["plugins", CRI_OF_2, key] | ["plugins", CRI_OF_1, "containerd", key] => {
            matches!(key, "snapshotter" | "disable_snapshot_annotations")
        }
        _ => false,
    }
}

fn leaves(table: &Table) -> Vec<(Vec<String>, Value)> {
    let mut all = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) if !inner.is_empty() => {
                all.extend(leaves(inner).into_iter().map(|(mut path, value)| {
                    path.insert(0, key.clone());
                    (path, value)
                }));
            }
            other => all.push((vec![key.clone()], other.clone())),
        }
    }
    all
}

/// The version that a file says it is of.
pub(super) fn file_version(written: &Table) -> Option<i64> {
    written.get("version").and_then(Value::as_integer)
}

/// What a key says.
pub(super) fn get<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, tables) = path.split_last()?;
    tables.iter().try_fold(table, |table, key| table.get(*key)?.as_table())?.get(*last)
}

/// A key as it is written in a file.
pub(super) fn shown(path: &[String]) -> String {
    let is_bare = |key: &str| key.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    let keys = path.iter().map(|key| match is_bare(key) {
        true => key.clone(),
        false => format!("{key:?}"),
    });
    keys.collect::<Vec<_>>().join(".")
}

const CAPABILITIES: [&str; 3] = ["proxy_plugins", NAME, "capabilities"];
/// That a snapshotter has what is below a snapshot mounted with the ids of the snapshot's labels.
pub(super) const REMAP_IDS: &str = "remap-ids";
/// That a layer can be unpacked before its parent; one that needs no unpacking would lose all below it.
pub(super) const REBASE: &str = "rebase";
const ANNOTATIONS: &str = "enable_remote_snapshot_annotations";

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(version: Version) -> Wanted {
        let (socket, exports_root) = ("/run/h.sock".to_owned(), "/var/lib/h".to_owned());
        Wanted { version, socket, exports_root, maps_ids: Ok(()) }
    }

    #[track_caller]
    fn check(version: Version, written: &str, expected: &[&str]) {
        let written: Table = toml::from_str(written).unwrap();
        let settings = settings(&wanted(version), &written, &Table::new());
        let shown: Vec<String> = settings
            .iter()
            .map(|setting| format!("{} = {}", shown(&setting.path), setting.value))
            .filter(|line| !line.starts_with("proxy_plugins.hermes."))
            .collect();
        assert_eq!(shown, expected);
    }

    #[test]
    fn each_version_gets_its_own_keys() {
        let cri_1 = "plugins.\"io.containerd.grpc.v1.cri\".containerd";
        let cri_2 = "plugins.\"io.containerd.cri.v1.images\"";
        let of_1 = [
            format!("{cri_1}.snapshotter = \"hermes\""),
            format!("{cri_1}.disable_snapshot_annotations = false"),
        ];
        let [first, second] = of_1.each_ref().map(String::as_str);
        check(Version(1, 6), "", &["version = 2", first, second]);
        check(Version(1, 7), "version = 2", &[first, second]);
        let of_2 = of_1.each_ref().map(|line| line.replace(cri_1, cri_2));
        let [third, fourth] = of_2.each_ref().map(String::as_str);
        check(Version(2, 0), "", &["version = 3", third, fourth]);
        let list = |entries: &str| {
            format!("plugins.\"io.containerd.transfer.v1.local\".unpack_config = [{entries}]")
        };
        let entry = |name: &str| format!("{{ platform = \"linux\", snapshotter = \"{name}\" }}");
        let both = list(&format!("{}, {}", entry("overlayfs"), entry("hermes")));
        check(Version(2, 4), "version = 4", &[third, fourth, &both]);
        let runtime = format!("{cri_1}.runtimes.kata.runtime_type = \"io.containerd.runc.v2\"");
        let text = format!("version = 2\n[{cri_1}]\ndefault_runtime_name = 'kata'\n");
        check(Version(2, 1), &text, &[first, second, &runtime, &both]);
        let text = format!("version = 2\n[{cri_1}.runtimes.runc]\n");
        check(Version(2, 1), &text, &[first, second, &both]);
        let text = "version = 3\n[plugins.'io.containerd.transfer.v1.local']\n\
                    unpack_config = [{platform='linux', snapshotter='other'}]";
        let list = list(&format!("{}, {}", entry("other"), entry("hermes")));
        check(Version(2, 1), text, &[third, fourth, &list]);
    }

    #[test]
    fn only_what_hermes_can_is_said_of_it() {
        let check = |maps_ids: Result<(), String>, list: Option<&str>, expected: Option<&str>| {
            let wanted = Wanted { maps_ids, ..wanted(Version(2, 1)) };
            let list = list.map(|list| format!("[proxy_plugins.hermes]\ncapabilities = {list}"));
            let written = toml::from_str(&list.unwrap_or_default()).unwrap();
            let list = capabilities(&wanted, &written).map(|list| list.to_string());
            assert_eq!(list.as_deref(), expected);
        };
        let not = || Err("an old kernel".to_owned());
        check(Ok(()), None, Some(r#"["remap-ids"]"#));
        check(Ok(()), Some("['remap-ids', 'other']"), Some(r#"["remap-ids", "other"]"#));
        check(Ok(()), Some("['rebase', 'other']"), Some(r#"["other", "remap-ids"]"#));
        check(not(), None, None);
        check(not(), Some("['remap-ids', 'rebase']"), Some("[]"));
    }

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (text, expected) in [
            ("1.6.20~ds1", Ok(Version(1, 6))),
            ("v2.4.2", Ok(Version(2, 4))),
            ("2.1.9+unknown", Ok(Version(2, 1))),
            ("v2.0-rc.1", Ok(Version(2, 0))),
            ("unknown", Err("`unknown` is not a version of containerd".to_owned())),
        ] {
            assert_eq!(text.parse(), expected, "{text}");
        }
    }

    #[test]
    fn what_changes_besides_is_seen() {
        let before = "a = 1\n[plugins.x]\nb = 2\nc = 3\n[plugins.'io.containerd.cri.v1.images']\n\
                      snapshotter = 'overlayfs'\n";
        let after = "a = 1\n[plugins.x]\nb = 4\n[proxy_plugins.hermes]\naddress = 'x'\n\
                     [plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'hermes'\n";
        let [before, after] = [before, after].map(|text| toml::from_str(text).unwrap());
        assert_eq!(side_effects(&before, &after), ["plugins.x.b = 4", "plugins.x.c = not set"]);
        assert_eq!(side_effects(&before, &before), [""; 0]);
    }
}

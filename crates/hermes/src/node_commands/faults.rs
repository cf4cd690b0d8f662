//! What can be wrong with containerd's configuration and with the service: from what they say to sentences.

use serde::Serialize;
use toml::{Table, Value};

use super::settings::{
    Effective, NAME, REBASE, REMAP_IDS, Transfer, Version, Wanted, file_version, get,
};

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Fault {
    /// Its name, which stays the same.
    pub(super) id: &'static str,
    /// What is wrong, and what comes of it.
    pub(super) what: String,
    /// What to do.
    pub(super) remedy: String,
}

impl Fault {
    pub(super) fn new(
        id: &'static str,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { id, what: what.into(), remedy: remedy.into() }
    }
}

/// What is wrong with containerd's configuration. `written` is its file, `effective` what came of it.
pub(super) fn of_configuration(
    wanted: &Wanted,
    written: &Table,
    effective: &Effective,
) -> Vec<Fault> {
    let Wanted { version, socket, exports_root, .. } = wanted;
    let mut faults = Vec::new();
    let mut fault = |id, what: String| faults.push(Fault::new(id, what, INSTALL));
    match &effective.address {
        None => fault("proxy-missing", format!("containerd has no proxy snapshotter `{NAME}`")),
        Some(address) if address != socket => fault(
            "proxy-address",
            format!("containerd looks for Hermes at {address}, but it listens at {socket}"),
        ),
        Some(_) => {}
    }
    match &effective.exports_root {
        // Before 1.7 the key may not be known, and then it does not come out either.
        None if *version < Version(1, 7) || effective.address.is_none() => {}
        Some(root) if root == exports_root => {}
        root => fault(
            "exports-root",
            format!(
                "containerd says that images lie in {}, but they lie in {exports_root}: the kubelet's figures of \
                 disk space are wrong, and so are its decisions",
                root.as_deref().unwrap_or("a folder that is not there")
            ),
        ),
    }
    faults.extend(of_capabilities(wanted, effective));
    match effective.cri_snapshotter.as_deref() {
        None => {}
        Some(NAME) if effective.cri_annotates => {}
        Some(NAME) => faults.extend(cri_is_not_told(wanted, effective)),
        Some(other) if is_lost_in_translation(*version, written) => faults.push(Fault::new(
            "cri-lost-in-translation",
            format!(
                "containerd {version} ignores what its file of version 2 says of CRI's snapshotter, because the \
                 table `containerd.runtimes` is not there: Pods run on `{other}`"
            ),
            "run `hermes node install`, or `containerd config migrate` after adding the table",
        )),
        Some(other) => faults.push(Fault::new(
            "cri-snapshotter",
            format!("CRI uses the snapshotter `{other}`: no Pod has lazy images"),
            INSTALL,
        )),
    }
    let is_said = faults.iter().any(|fault| fault.id.starts_with("cri-transfer"));
    if version.transfers_lazily() && effective.address.is_some() && !is_said {
        faults.extend(ctr_is_not_told(effective.transfer));
    }
    faults
}

/// What containerd believes that Hermes can.
fn of_capabilities(wanted: &Wanted, effective: &Effective) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut fault = |id, what: String| faults.push(Fault::new(id, what, INSTALL));
    let is_told = |name: &str| effective.capabilities.iter().any(|told| told == name);
    match (&wanted.maps_ids, is_told(REMAP_IDS)) {
        (Ok(()), false) if effective.address.is_some() => fault(
            "user-namespaces",
            "containerd does not know that Hermes can show an image to a user namespace (capability `remap-ids`): \
             it copies the whole image for each Pod with `hostUsers: false`"
                .to_owned(),
        ),
        (Err(why), true) => fault(
            "user-namespaces",
            format!(
                "containerd believes that Hermes can show an image to a user namespace (capability `remap-ids`), \
                 and no Pod with `hostUsers: false` starts: {why}"
            ),
        ),
        (Ok(()) | Err(_), _) => {}
    }
    if is_told(REBASE) {
        fault(
            "rebase",
            "containerd believes that Hermes takes layers before their parents (capability `rebase`): images that \
             it unpacks so lose layers"
                .to_owned(),
        );
    }
    faults
}

/// CRI has Hermes' snapshotter, and does not say by itself which layers it is about to fetch.
fn cri_is_not_told(wanted: &Wanted, effective: &Effective) -> Option<Fault> {
    let version = wanted.version;
    let through = format!(
        "disable_snapshot_annotations is true, so CRI of containerd {version} pulls through the Transfer Service"
    );
    let (id, what) = match effective.transfer {
        _ if !version.transfers_lazily() => (
            "cri-annotations",
            format!(
                "disable_snapshot_annotations is true, which is the default of containerd {version}: CRI does not \
                 tell Hermes about layers, and pulls every image whole"
            ),
        ),
        Transfer::Refuses => (
            "cri-transfer-unpack",
            format!(
                "{through}, which does not unpack for `{NAME}`: every pull fails with `no unpack platforms defined`"
            ),
        ),
        Transfer::PullsWhole => (
            "cri-transfer-annotations",
            format!(
                "{through}, which does not tell Hermes about layers: every image is pulled whole"
            ),
        ),
        Transfer::TellsOfLayers => return None,
    };
    Some(Fault::new(id, what, INSTALL))
}

/// `ctr` pulls through the Transfer Service.
fn ctr_is_not_told(transfer: Transfer) -> Option<Fault> {
    let (id, what) = match transfer {
        Transfer::Refuses => (
            "transfer-unpack",
            format!(
                "the Transfer Service does not unpack for `{NAME}`: `ctr image pull --snapshotter {NAME}` fails \
                 with `no unpack platforms defined`"
            ),
        ),
        Transfer::PullsWhole => (
            "transfer-annotations",
            "the Transfer Service does not tell Hermes about layers, because \
             `enable_remote_snapshot_annotations` is not the string \"true\": `ctr` pulls every image whole"
                .to_owned(),
        ),
        Transfer::TellsOfLayers => return None,
    };
    Some(Fault::new(id, what, INSTALL))
}

/// Whether a file asks for Hermes where containerd 2 does not look without a table of runtimes.
fn is_lost_in_translation(version: Version, written: &Table) -> bool {
    let cri = ["plugins", "io.containerd.grpc.v1.cri", "containerd"];
    let of_cri = |key| get(written, &[&cri[..], &[key]].concat());
    version >= Version(2, 0)
        && file_version(written) == Some(2)
        && of_cri("snapshotter").and_then(Value::as_str) == Some(NAME)
        && of_cri("runtimes").is_none()
}

/// What is wrong with the service, by what `systemctl show` says of it.
pub(super) fn of_service(shown: &str) -> Vec<Fault> {
    let property = |name: &str| {
        let mut pairs = shown.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| *key == name).map_or("", |(_, value)| value)
    };
    if property("LoadState") != "loaded" {
        let what = "systemd has no hermes.service: nothing starts Hermes when this machine starts";
        return vec![Fault::new("service-missing", what, INSTALL)];
    }
    let mut faults = Vec::new();
    let mut fault = |id, what: String| faults.push(Fault::new(id, what, UNIT));
    if property("KillMode") != "process" {
        fault(
            "service-kill-mode",
            format!(
                "hermes.service has KillMode={}: the keeper ends with the daemon, and so do reads of containers",
                property("KillMode")
            ),
        );
    }
    if property("FileDescriptorStoreMax") == "0" {
        fault(
            "service-store",
            "hermes.service has FileDescriptorStoreMax=0: what the keeper holds is lost with it"
                .to_owned(),
        );
    }
    for name in ["PrivateTmp", "PrivateMounts", "ProtectSystem", "ProtectHome", "PrivateDevices"] {
        if !matches!(property(name), "" | "no") {
            let value = property(name);
            fault(
                "service-namespace",
                format!("hermes.service has {name}={value}: containers do not see its mounts"),
            );
        }
    }
    if property("UnitFileState") == "disabled" {
        faults.push(Fault::new(
            "service-disabled",
            "hermes.service is disabled: nothing starts Hermes when this machine starts",
            "run `systemctl enable --now hermes.service`",
        ));
    }
    faults
}

/// The properties that [`of_service`] looks at.
pub(super) const PROPERTIES: &str = "--property=LoadState,UnitFileState,KillMode,FileDescriptorStoreMax,\
PrivateTmp,PrivateMounts,ProtectSystem,ProtectHome,PrivateDevices";

const INSTALL: &str = "run `hermes node install`, and restart containerd";
const UNIT: &str = "use the unit that `hermes node install` writes, without that setting";

#[cfg(test)]
mod tests {
    use super::*;

    fn right() -> Effective {
        Effective {
            address: Some("/run/h.sock".to_owned()),
            exports_root: Some("/var/lib/h".to_owned()),
            capabilities: vec![REMAP_IDS.to_owned()],
            transfer: Transfer::TellsOfLayers,
            cri_snapshotter: Some(NAME.to_owned()),
            cri_annotates: true,
        }
    }

    #[track_caller]
    fn check(version: Version, effective: &Effective, expected: &[&str]) {
        check_file(version, "", effective, expected);
    }

    #[track_caller]
    fn check_file(version: Version, written: &str, effective: &Effective, expected: &[&str]) {
        let (socket, exports_root) = ("/run/h.sock".to_owned(), "/var/lib/h".to_owned());
        let wanted = Wanted { version, socket, exports_root, maps_ids: Ok(()) };
        let written = toml::from_str(written).unwrap();
        let faults = of_configuration(&wanted, &written, effective);
        let ids: Vec<&str> = faults.iter().map(|fault| fault.id).collect();
        assert_eq!(ids, expected, "{faults:#?}");
    }

    #[test]
    fn each_misconfiguration_has_its_name() {
        let (v1_6, v1_7, v2_0, v2_4) = (Version(1, 6), Version(1, 7), Version(2, 0), Version(2, 4));
        let name = |text: &str| Some(text.to_owned());
        for version in [v1_6, v1_7, v2_0, v2_4] {
            check(version, &right(), &[]);
            check(version, &Effective { cri_snapshotter: None, ..right() }, &[]);
            let none = Effective { cri_snapshotter: name("overlayfs"), ..Effective::default() };
            check(version, &none, &["proxy-missing", "cri-snapshotter"]);
            let elsewhere = Effective { address: name("/run/x.sock"), ..right() };
            check(version, &elsewhere, &["proxy-address"]);
            let elsewhere = Effective { exports_root: name("/var/lib/x"), ..right() };
            check(version, &elsewhere, &["exports-root"]);
        }
        let silent = || Effective { exports_root: None, ..right() };
        check(v1_6, &silent(), &[]);
        check(v1_7, &silent(), &["exports-root"]);
        let silent = || Effective { cri_annotates: false, ..right() };
        check(v1_7, &silent(), &["cri-annotations"]);
        check(v2_0, &silent(), &["cri-annotations"]);
        check(v2_4, &silent(), &[]);
        let more = Effective { transfer: Transfer::Refuses, ..silent() };
        check(v2_4, &more, &["cri-transfer-unpack"]);
        let more = Effective { transfer: Transfer::PullsWhole, ..silent() };
        check(v2_4, &more, &["cri-transfer-annotations"]);
        let more = Effective { transfer: Transfer::Refuses, ..right() };
        check(v2_4, &more, &["transfer-unpack"]);
        check(v2_0, &more, &[]);
        let more = Effective { transfer: Transfer::PullsWhole, ..right() };
        check(v2_4, &more, &["transfer-annotations"]);
    }

    #[test]
    fn what_containerd_believes_wrongly_is_named() {
        let check = |maps_ids: Result<(), String>, effective: &Effective, expected: &[&str]| {
            let (socket, exports_root) = ("/run/h.sock".to_owned(), "/var/lib/h".to_owned());
            let wanted = Wanted { version: Version(2, 1), socket, exports_root, maps_ids };
            let faults = of_capabilities(&wanted, effective);
            let ids: Vec<&str> = faults.iter().map(|fault| fault.id).collect();
            assert_eq!(ids, expected, "{faults:#?}");
        };
        let not = || Err("an old kernel".to_owned());
        let told = |names: &[&str]| {
            let capabilities = names.iter().map(|&name| name.to_owned()).collect();
            Effective { capabilities, ..right() }
        };
        let copies = || told(&[]);
        check(Ok(()), &right(), &[]);
        check(Ok(()), &copies(), &["user-namespaces"]);
        check(Ok(()), &Effective::default(), &[]);
        check(not(), &right(), &["user-namespaces"]);
        check(not(), &copies(), &[]);
        check(Ok(()), &told(&[REBASE, REMAP_IDS]), &["rebase"]);
    }

    #[test]
    fn a_file_that_is_lost_in_translation_is_named() {
        let effective = Effective { cri_snapshotter: Some("overlayfs".to_owned()), ..right() };
        let cri = "plugins.'io.containerd.grpc.v1.cri'.containerd";
        let text = format!("version = 2\n[{cri}]\nsnapshotter = 'hermes'\n");
        check_file(Version(2, 1), &text, &effective, &["cri-lost-in-translation"]);
        check_file(Version(1, 7), &text, &effective, &["cri-snapshotter"]);
        let text = format!("{text}[{cri}.runtimes.runc]\n");
        check_file(Version(2, 1), &text, &effective, &["cri-snapshotter"]);
    }

    #[test]
    fn settings_of_the_service_are_checked() {
        let check = |change: (&str, &str), expected: &[&str]| {
            let right = "LoadState=loaded\nUnitFileState=enabled\nKillMode=process\n\
                         FileDescriptorStoreMax=8192\nPrivateTmp=no\nProtectSystem=no\n";
            let faults = of_service(&right.replace(change.0, change.1));
            let ids: Vec<&str> = faults.iter().map(|fault| fault.id).collect();
            assert_eq!(ids, expected);
        };
        check(("", ""), &[]);
        check(("loaded", "not-found"), &["service-missing"]);
        check(("KillMode=process", "KillMode=mixed"), &["service-kill-mode"]);
        check(("8192", "0"), &["service-store"]);
        check(("ProtectSystem=no", "ProtectSystem=full"), &["service-namespace"]);
        check(("enabled", "disabled"), &["service-disabled"]);
    }
}

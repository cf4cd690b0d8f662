//! `hermes node check`: what keeps images from being lazy on this machine, each in a sentence with what to do.
//!
//! What containerd's configuration comes to is asked of containerd itself, since its versions read the same
//! file differently.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use toml::Table;

use super::calls::Peer;
use super::containerd::Containerd;
use super::faults::{self, Fault};
use super::install::wanted;
use super::service;
use super::settings::{Effective, NAME};
use crate::args::{GlobalArguments, NodeArguments};
use crate::client;
use crate::config::{Config, USUAL_PLACE, size_of_disk};
use crate::daemon::StatusReport;
use crate::failure::in_full;
use crate::output::{Output, bytes};
use crate::protocol::Request;

/// What was looked at, and what is wrong.
#[derive(Debug, Serialize)]
struct CheckReport {
    /// containerd's version, if there is one.
    containerd: Option<String>,
    faults: Vec<Fault>,
}

/// Checks everything; the exit code is 1 if something is wrong.
pub(super) fn run(
    common: &GlobalArguments,
    output: Output,
    arguments: &NodeArguments,
) -> Result<ExitCode> {
    let root = std::path::absolute(&common.root)?;
    let mut faults = Vec::new();
    let config = config(&mut faults);
    faults.extend(disk(&root));
    faults.extend(service_of_systemd());
    daemon(common, output, &root, &config, &mut faults)?;
    let containerd = match Containerd::find(arguments) {
        Ok(containerd) => {
            let of_it = configuration(&containerd, &config, &root);
            faults.extend(of_it.unwrap_or_else(|err| {
                let remedy = "mend the file; `containerd config dump` says the same";
                vec![Fault::new("containerd-config", in_full(&err), remedy)]
            }));
            running(&arguments.containerd_socket, &mut faults);
            if let Some(address) = &config.containerd.address {
                let is_asked_above = *address == arguments.containerd_socket;
                faults.extend(handed_on_to(address, is_asked_above));
            }
            Some(containerd.full_version)
        }
        Err(err) => {
            faults.push(Fault::new("containerd-missing", in_full(&err), "install containerd"));
            None
        }
    };
    let code = if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    output.result(&CheckReport { containerd, faults }, text)?;
    Ok(code)
}

fn text(report: &CheckReport) -> String {
    if report.faults.is_empty() {
        let version = report.containerd.as_deref().unwrap_or_default();
        return format!("fine, with containerd {version}");
    }
    let line = |fault: &Fault| format!("{}: {}; {}\n", fault.id, fault.what, fault.remedy);
    report.faults.iter().map(line).collect()
}

/// Hermes' own configuration and policies. Without a usable one the rest is compared with the default.
fn config(faults: &mut Vec<Fault>) -> Config {
    let config = Config::read(Path::new(USUAL_PLACE)).unwrap_or_else(|err| {
        let remedy = "mend it, or remove it and run `hermes node install`";
        faults.push(Fault::new("config", in_full(&err), remedy));
        Config::default()
    });
    match crate::policies::read_strictly(&config.containerd.policies) {
        Ok(policies) if policies.is_empty() => faults.push(Fault::new(
            "no-policies",
            format!(
                "there is no policy in {}: no image is lazy",
                config.containerd.policies.display()
            ),
            "write one; see docs/policies.md",
        )),
        Ok(_) => {}
        Err(err) => faults.push(Fault::new("policies", in_full(&err), "mend or remove that file")),
    }
    config
}

/// The file system of the root folder.
fn disk(root: &Path) -> Option<Fault> {
    let Ok(disk) = rustix::fs::statfs(root) else {
        let what = format!("the root folder {} is not there", root.display());
        return Some(Fault::new("root-missing", what, "run `hermes node install`"));
    };
    let (name, why) = match u64::try_from(disk.f_type).unwrap_or_default() {
        OVERLAYFS => ("overlayfs", "containers cannot be put on top of it"),
        TMPFS => ("tmpfs", "containerd would believe in snapshots that a reboot has taken"),
        FUSE => ("a FUSE file system", "containers cannot be put on top of it"),
        NFS => ("NFS", "containers cannot be put on top of it"),
        _ => return None,
    };
    let what = format!("the root folder {} lies on {name}: {why}", root.display());
    Some(Fault::new("root-file-system", what, "put ext4, xfs or btrfs there"))
}

fn service_of_systemd() -> Vec<Fault> {
    if !service::is_there() {
        return Vec::new();
    }
    match service::control(&["show", service::NAME, faults::PROPERTIES]) {
        Ok(shown) => faults::of_service(&shown),
        Err(err) => vec![Fault::new("systemd", in_full(&err), "see whether systemd answers")],
    }
}

/// The daemon: whether it answers containerd and us, and what it says of itself.
fn daemon(
    common: &GlobalArguments,
    output: Output,
    root: &Path,
    config: &Config,
    faults: &mut Vec<Fault>,
) -> Result<()> {
    let socket = &config.containerd.socket;
    let start =
        "start it: `systemctl start hermes`, or `hermes daemon --config /etc/hermes/config.toml`";
    let asked = Peer::connect(socket).and_then(|mut peer| peer.answers_as_snapshotter(NAME));
    if let Err(err) = asked {
        let what = format!("Hermes does not answer containerd: {}", in_full(&err));
        faults.push(Fault::new("daemon-socket", what, start));
    }
    let Some(status) = client::ask::<StatusReport>(common, &output, &Request::Status)? else {
        let what = format!("no daemon serves {}", root.display());
        faults.push(Fault::new("daemon-missing", what, start));
        return Ok(());
    };
    faults.extend(of_status(&status, size_of_disk(root).ok()));
    Ok(())
}

fn of_status(status: &StatusReport, disk: Option<u64>) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut fault = |id, what: String, remedy: &str| faults.push(Fault::new(id, what, remedy));
    if status.keeper.pid.is_none() {
        fault(
            "keeper-missing",
            "no keeper runs: containers do not outlive the daemon".to_owned(),
            "see the daemon's log, which says why it cannot start one",
        );
    }
    if let Some((quota, disk)) = status.quota.zip(disk)
        && quota > disk
    {
        fault(
            "quota",
            format!("the quota of {} is more than the disk has, {}", bytes(quota), bytes(disk)),
            "set `cache.quota` in /etc/hermes/config.toml to less, such as \"80%\"",
        );
    }
    if let Some(room) = &status.room {
        fault("room", room.clone(), "make room on the disk");
    }
    for trouble in &status.policy_trouble {
        let what = format!("the daemon has a policy not in force: {trouble}");
        fault("policy-not-in-force", what, "mend or remove that file");
    }
    if status.policies.is_none() {
        fault(
            "daemon-without-containerd",
            "the daemon that runs does not serve containerd".to_owned(),
            "end it, and start it with `--config /etc/hermes/config.toml`",
        );
    }
    if status.kubelet_asks {
        fault(
            "kubelet-address-missing",
            "the kubelet asks Hermes for images, and Hermes does not know where containerd is: it gets none"
                .to_owned(),
            "set `containerd.address` in /etc/hermes/config.toml, mostly to /run/containerd/containerd.sock, and \
             restart Hermes; or take imageServiceEndpoint out of the kubelet's configuration",
        );
    }
    if status.unavailable.len() == mounts::Backend::ALL.len() {
        let reasons = status.unavailable.iter().map(|(backend, why)| format!("{backend}: {why}"));
        let reasons = reasons.collect::<Vec<_>>().join("; ");
        fault(
            "no-back-end",
            format!("no image can be mounted lazily on this kernel: {reasons}"),
            "load the modules erofs, fuse and loop, or use another kernel; see docs/install.md",
        );
    }
    faults
}

/// What containerd makes of its configuration.
fn configuration(containerd: &Containerd, config: &Config, root: &Path) -> Result<Vec<Fault>> {
    let text = containerd.text()?;
    let written: Table = toml::from_str(&text)?;
    let effective = Effective::of(&containerd.effective(&text, None)?);
    Ok(faults::of_configuration(&wanted(containerd, config, root)?, &written, &effective))
}

/// The containerd that runs: whether it has read its configuration since that was right.
fn running(socket: &Path, faults: &mut Vec<Fault>) {
    match Peer::connect(socket).and_then(|mut peer| peer.has_snapshotter(NAME)) {
        Ok(true) => {}
        Ok(false) if faults.iter().any(|fault| fault.id == "proxy-missing") => {}
        Ok(false) => faults.push(Fault::new(
            "containerd-not-restarted",
            "the containerd that runs does not know Hermes, although its configuration does",
            "restart containerd: `systemctl restart containerd`",
        )),
        Err(err) => {
            let what = format!("containerd cannot be asked: {}", in_full(&err));
            faults.push(Fault::new(
                "containerd-socket",
                what,
                "start it, or say --containerd-socket",
            ));
        }
    }
}

/// Where the kubelet's calls about images are handed on to. What `running` says of the same containerd is not
/// said twice.
fn handed_on_to(address: &Path, is_asked_above: bool) -> Option<Fault> {
    let shown = address.display();
    let remedy = "set `containerd.address` in /etc/hermes/config.toml to the socket of the containerd that serves the \
                  kubelet, mostly /run/containerd/containerd.sock, and restart Hermes; or remove it, if the \
                  kubelet asks containerd itself";
    let mut peer = match Peer::connect(address) {
        Ok(peer) => peer,
        Err(_) if is_asked_above => return None,
        Err(err) => {
            let what = format!(
                "`containerd.address` is {shown}, where nobody answers: a kubelet that asks Hermes for images gets \
                 none: {}",
                in_full(&err)
            );
            return Some(Fault::new("kubelet-address", what, remedy));
        }
    };
    if let Err(err) = peer.serves_kubelet() {
        let what = format!(
            "`containerd.address` is {shown}, where no containerd serves a kubelet: one that asks Hermes for images \
             gets none: {}",
            in_full(&err)
        );
        return Some(Fault::new("kubelet-address", what, remedy));
    }
    if is_asked_above || peer.has_snapshotter(NAME).is_ok_and(|has| has) {
        return None;
    }
    let what = format!(
        "`containerd.address` is {shown}: the containerd there does not know Hermes, and images that the kubelet \
         pulls through it are not lazy"
    );
    Some(Fault::new("kubelet-address", what, remedy))
}

/// Numbers of `statfs(2)`.
const OVERLAYFS: u64 = 0x794c_7630;
const TMPFS: u64 = 0x0102_1994;
const FUSE: u64 = 0x6573_5546;
const NFS: u64 = 0x6969;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_daemon_says_is_judged() {
        let right = || -> StatusReport {
            let json = serde_json::json!({
                "root": "/r", "daemon": {"pid": 1}, "keeper": {"pid": 2}, "mounts": [], "cache_bytes": 0,
                "quota": 80, "policies": 1, "policy_trouble": [], "decisions": {}, "bytes_fetched": 0,
                "requests": 0, "blocked_reads": 0, "failed_spans": 0, "room": null,
            });
            serde_json::from_value(json).unwrap()
        };
        let check = |change: fn(&mut StatusReport), expected: &[&str]| {
            let mut status = right();
            change(&mut status);
            let faults = of_status(&status, Some(100));
            let ids: Vec<&str> = faults.iter().map(|fault| fault.id).collect();
            assert_eq!(ids, expected);
        };
        check(|_| {}, &[]);
        check(|status| status.keeper.pid = None, &["keeper-missing"]);
        check(|status| status.quota = Some(101), &["quota"]);
        check(|status| status.room = Some("the disk is full".to_owned()), &["room"]);
        check(|status| status.policy_trouble.push("x.yaml".to_owned()), &["policy-not-in-force"]);
        check(|status| status.kubelet_asks = true, &["kubelet-address-missing"]);
        check(|status| status.policies = None, &["daemon-without-containerd"]);
        let one = |status: &mut StatusReport| {
            status.unavailable = vec![(mounts::Backend::Erofs, "an old kernel".to_owned())];
        };
        check(one, &[]);
        let all = |status: &mut StatusReport| {
            let none = |backend| (backend, "no module".to_owned());
            status.unavailable = mounts::Backend::ALL.into_iter().map(none).collect();
        };
        check(all, &["no-back-end"]);
    }
}

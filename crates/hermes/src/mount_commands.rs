//! `mount`, `umount`, `status` and `explain`: questions to the daemon.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::args::{
    DaemonTuning, GlobalArguments, MountArguments, StatusArguments, UmountArguments,
};
use crate::client;
use crate::daemon::{
    DecisionReport, ExplainReport, MountReport, ProcessReport, Shortage, StatusReport,
};
use crate::output::{Output, bytes};
use crate::protocol::{MountRequest, MountTuning, Request};

/// Mounts an image.
pub(crate) fn mount(
    common: &GlobalArguments,
    output: Output,
    arguments: &MountArguments,
) -> Result<()> {
    let request = Request::Mount(MountRequest {
        image: absolute_image(&arguments.image)?,
        dir: std::path::absolute(&arguments.dir)?,
        backend: crate::daemon::backend(arguments.backend),
        platform: common.registry.platform.clone(),
        access: crate::registries::access(&common.registry)?,
        tuning: MountTuning {
            completion: arguments.completion,
            deadline: arguments.deadline,
            cache_class: arguments.cache_class,
        },
        command: Vec::new(),
    });
    let mounted: MountReport = client::ask_or_start(common, &output, &arguments.daemon, &request)?;
    output.warnings(&mounted.warnings);
    output.result(&mounted, |mounted| {
        format!("{} on {} through {}", mounted.image, mounted.dir.display(), mounted.backend)
    })
}

/// An image name whose path, if it has one, does not depend on the working folder.
pub(crate) fn absolute_image(image: &str) -> Result<String> {
    use artifacts::ImageName;
    Ok(match image.parse::<ImageName>()? {
        name @ ImageName::Registry(_) => name,
        ImageName::Layout { dir, tag } => ImageName::Layout { dir: std::path::absolute(dir)?, tag },
        ImageName::Archive { file, tag } => {
            ImageName::Archive { file: std::path::absolute(file)?, tag }
        }
    }
    .to_string())
}

/// Unmounts an image.
pub(crate) fn umount(
    common: &GlobalArguments,
    output: Output,
    arguments: &UmountArguments,
) -> Result<()> {
    let dir = std::path::absolute(&arguments.dir)?;
    let request = Request::Umount { dir: dir.clone(), lazy: arguments.lazy };
    if !common.root.is_dir() {
        bail!("{} does not exist; nothing is mounted", common.root.display());
    }
    client::ask_or_start::<Value>(common, &output, &DaemonTuning::default(), &request)?;
    output.result(&serde_json::json!({ "dir": dir }), |_| String::new())
}

/// Shows the daemon and its mounts.
pub(crate) fn status(
    common: &GlobalArguments,
    output: Output,
    arguments: &StatusArguments,
) -> Result<()> {
    loop {
        let status = client::ask(common, &output, &Request::Status)?;
        let status = status.unwrap_or_else(|| no_daemon(&common.root));
        if arguments.watch && !output.is_json() {
            output.bytes(b"\x1b[H\x1b[2J")?;
        }
        output.result(&status, status_text)?;
        if !arguments.watch {
            return Ok(());
        }
        // Ends with the process, on ctrl-c.
        std::thread::park_timeout(Duration::from_secs(1));
    }
}

fn no_daemon(root: &Path) -> StatusReport {
    StatusReport {
        root: root.to_owned(),
        daemon: ProcessReport { pid: None },
        keeper: ProcessReport {
            pid: keeper::Client::connect(&root.join("keeper.sock"))
                .and_then(|keeper| keeper.pid())
                .ok(),
        },
        mounts: Vec::new(),
        cache_bytes: 0,
        quota: None,
        room: None,
        policies: None,
        policy_trouble: Vec::new(),
        unavailable: Vec::new(),
        kubelet_asks: false,
        decisions: BTreeMap::new(),
        bytes_fetched: 0,
        requests: 0,
        blocked_reads: 0,
        failed_spans: 0,
    }
}

fn status_text(status: &StatusReport) -> String {
    let mut text = String::new();
    let pid = |process: &ProcessReport| {
        process.pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string())
    };
    // Writing to a String cannot fail.
    let mut line = |args: std::fmt::Arguments<'_>| writeln!(text, "{args}").unwrap_or_default();
    line(format_args!(
        "daemon {}, keeper {}, cache {}{} in {}",
        pid(&status.daemon),
        pid(&status.keeper),
        bytes(status.cache_bytes),
        status.quota.map_or_else(String::new, |quota| format!(" of {}", bytes(quota))),
        status.root.display()
    ));
    if let Some(room) = &status.room {
        line(format_args!("{room}"));
    }
    if let Some(policies) = status.policies {
        let decisions = status.decisions.iter();
        let images = decisions.map(|(reason, count)| format!("{count} {}", reason.name()));
        let images: Vec<String> = images.collect();
        let images = if images.is_empty() { "none".to_owned() } else { images.join(", ") };
        line(format_args!(
            "containerd is served; policies in force: {policies}; images decided: {images}"
        ));
    }
    for trouble in &status.policy_trouble {
        line(format_args!("a policy is not in force: {trouble}"));
    }
    if status.daemon.pid.is_some() {
        line(format_args!(
            "fetched {} in {} requests; {} reads had to wait, {} attempts failed",
            bytes(status.bytes_fetched),
            status.requests,
            status.blocked_reads,
            status.failed_spans
        ));
    }
    for mount in &status.mounts {
        line(format_args!("{}", mount_text(mount)));
        for file in &mount.waiting_files {
            line(format_args!("    waits for {file}"));
        }
    }
    text
}

fn mount_text(mount: &MountReport) -> String {
    let percent = mount.bytes_present * 100 / mount.bytes_total.max(1);
    let sealed = match (mount.sealed, mount.backend) {
        (false, _) => "",
        (true, mounts::Backend::Fuse) => ", complete: needs no registry",
        (true, _) => ", complete: needs neither registry nor daemon",
    };
    let mut text = format!(
        "{}  {}  {}, {}  {percent} % of {} present{sealed}",
        mount.dir.display(),
        mount.image,
        mount.backend,
        mount.state,
        bytes(mount.bytes_total),
    );
    if mount.waiting_reads > 0 {
        let (reads, seconds) = (mount.waiting_reads, mount.waiting_seconds);
        write!(text, "; {reads} reads wait, the longest for {seconds:.1} s").unwrap_or_default();
    }
    text
}

/// Prints the daemon's metrics.
pub(crate) fn metrics(common: &GlobalArguments, output: Output) -> Result<()> {
    match client::ask::<String>(common, &output, &Request::Metrics)? {
        Some(text) => output.result(&text, Clone::clone),
        None => bail!("no daemon serves {}; there is nothing to measure", common.root.display()),
    }
}

/// Says why an image is lazy or not.
pub(crate) fn explain(common: &GlobalArguments, output: Output, what: &str) -> Result<()> {
    let what = if Path::new(what).is_dir() {
        std::path::absolute(what)?.to_string_lossy().into_owned()
    } else {
        what.to_owned()
    };
    let Some(report) = client::ask::<ExplainReport>(common, &output, &Request::Explain { what })?
    else {
        bail!("no daemon serves {}; nothing is mounted", common.root.display());
    };
    output.result(&report, explain_text)
}

fn decision_text(decision: &DecisionReport) -> String {
    let what = if decision.lazy { "lazy" } else { "unpacked by containerd" };
    let mut text = format!("{}: {what}, reason {}", decision.image, decision.reason.name());
    if let Some(policy) = &decision.policy {
        write!(text, ", policy {policy}").unwrap_or_default();
    }
    if !decision.detail.is_empty() {
        write!(text, ": {}", decision.detail).unwrap_or_default();
    }
    text
}

fn explain_text(report: &ExplainReport) -> String {
    let mut text = String::new();
    let mut line = |args: std::fmt::Arguments<'_>| writeln!(text, "{args}").unwrap_or_default();
    if let Some(decision) = &report.decision {
        line(format_args!("{}", decision_text(decision)));
    }
    let Some(mount) = &report.mount else { return text };
    line(format_args!("{}", mount_text(mount)));
    line(format_args!("index: {}", report.index));
    if let Some(room) = &report.room {
        line(format_args!("{room}"));
    }
    for (backend, why) in &report.unavailable {
        line(format_args!("back end {backend} does not work here: {why}"));
    }
    for layer in &report.layers {
        let state = match (&layer.revoked, layer.sealed, layer.left_out) {
            (Some(why), _, _) => format!("not served, its index is revoked: {why}"),
            (None, true, _) => "complete and proven".to_owned(),
            (None, false, None) => "incomplete".to_owned(),
            (None, false, Some(Shortage::Quota)) => {
                "not completed: the quota cannot hold it".to_owned()
            }
            (None, false, Some(Shortage::Disk)) => {
                "not completed: the disk has too little room".to_owned()
            }
        };
        let order = if layer.in_order && !layer.sealed { ", read in order" } else { "" };
        let (present, total) = (bytes(layer.bytes_present), bytes(layer.bytes_total));
        line(format_args!("layer {}: {present} of {total}, {state}{order}", layer.digest));
    }
    for read in &report.slowest_reads {
        line(format_args!("waited {:.3} s for {} (pid {})", read.seconds, read.file, read.pid));
    }
    text
}

//! `hermes top`: what the mounts of a node do, from second to second.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Serialize;

use crate::args::GlobalArguments;
use crate::client;
use crate::daemon::{MountReport, StatusReport};
use crate::output::{Output, bytes};
use crate::protocol::Request;

/// What happened since the last look.
#[derive(Debug, Serialize)]
struct Look {
    cache_bytes: u64,
    quota: Option<u64>,
    /// Of all mounts.
    bytes_per_second: u64,
    /// Reads that began to wait.
    waits_per_second: u64,
    /// The ones to look at first come first.
    mounts: Vec<Row>,
}

/// A mount.
#[derive(Debug, Serialize)]
struct Row {
    image: String,
    dir: PathBuf,
    backend: String,
    state: String,
    percent_present: u64,
    sealed: bool,
    bytes_per_second: u64,
    waiting_reads: u64,
    waiting_seconds: f64,
    waiting_files: Vec<String>,
}

/// Shows it again every second on a terminal, and once elsewhere.
pub(crate) fn run(common: &GlobalArguments, output: Output) -> Result<()> {
    let ask = || -> Result<(StatusReport, Instant)> {
        match client::ask(common, &output, &Request::Status)? {
            Some(status) => Ok((status, Instant::now())),
            None => bail!("no daemon serves {}; nothing is mounted", common.root.display()),
        }
    };
    let mut before = ask()?;
    let watched = std::io::stdout().is_terminal() && !output.is_json();
    loop {
        // Ends with the process, on ctrl-c.
        std::thread::park_timeout(INTERVAL);
        let now = ask()?;
        let look = Look::new(&before.0, &now.0, now.1 - before.1);
        if watched {
            output.bytes(b"\x1b[H\x1b[2J")?;
        }
        output.result(&look, Look::text)?;
        if !watched {
            return Ok(());
        }
        before = now;
    }
}

impl Look {
    fn new(before: &StatusReport, now: &StatusReport, elapsed: Duration) -> Self {
        let rate = |before: u64, now: u64| {
            // A daemon that was started meanwhile counts from nothing.
            let grown = now.checked_sub(before).unwrap_or(now);
            u64::try_from(u128::from(grown) * 1000 / elapsed.as_millis().max(1)).unwrap_or(u64::MAX)
        };
        let fetched: HashMap<_, _> =
            before.mounts.iter().map(|mount| (&mount.dir, mount.bytes_fetched)).collect();
        let row = |mount: &MountReport| Row {
            image: mount.image.clone(),
            dir: mount.dir.clone(),
            backend: mount.backend.to_string(),
            state: mount.state.clone(),
            percent_present: mount.bytes_present * 100 / mount.bytes_total.max(1),
            sealed: mount.sealed,
            bytes_per_second: rate(
                fetched.get(&mount.dir).copied().unwrap_or_default(),
                mount.bytes_fetched,
            ),
            waiting_reads: mount.waiting_reads,
            waiting_seconds: mount.waiting_seconds,
            waiting_files: mount.waiting_files.clone(),
        };
        let mut mounts: Vec<Row> = now.mounts.iter().map(row).collect();
        mounts.sort_by(|a, b| {
            let urgency = |row: &Row| (row.waiting_reads > 0, row.bytes_per_second, !row.sealed);
            let waits = b.waiting_seconds.total_cmp(&a.waiting_seconds);
            waits.then_with(|| urgency(b).cmp(&urgency(a))).then_with(|| a.image.cmp(&b.image))
        });
        Self {
            cache_bytes: now.cache_bytes,
            quota: now.quota,
            bytes_per_second: rate(before.bytes_fetched, now.bytes_fetched),
            waits_per_second: rate(before.blocked_reads, now.blocked_reads),
            mounts,
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let mut line = |args: std::fmt::Arguments<'_>| writeln!(text, "{args}").unwrap_or_default();
        let quota = self.quota.map_or_else(String::new, |quota| format!(" of {}", bytes(quota)));
        line(format_args!(
            "{}/s from registries, {} reads/s had to wait; cache {}{quota}; {} mounts",
            bytes(self.bytes_per_second),
            self.waits_per_second,
            bytes(self.cache_bytes),
            self.mounts.len(),
        ));
        line(format_args!(
            "{:>8} {:>12} {:>8} {:>8} {:<11} IMAGE",
            "PRESENT", "RATE", "WAITING", "LONGEST", "BACKEND"
        ));
        for row in &self.mounts {
            let present = match row.sealed {
                true => "complete".to_owned(),
                false => format!("{} %", row.percent_present),
            };
            let longest = match row.waiting_reads {
                0 => String::new(),
                _ => format!("{:.1} s", row.waiting_seconds),
            };
            let state = if row.state == "served" { "" } else { &row.state };
            line(format_args!(
                "{present:>8} {:>10}/s {:>8} {longest:>8} {:<11} {} {state}",
                bytes(row.bytes_per_second),
                row.waiting_reads,
                row.backend,
                row.image,
            ));
            for file in &row.waiting_files {
                line(format_args!("{:39} waits for {file}", ""));
            }
        }
        text
    }
}

const INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn status(fetched: u64, waits: u64, mounts: &[(&str, u64, u64, f64)]) -> StatusReport {
        let mount = |(image, fetched, waiting, seconds): &(&str, u64, u64, f64)| {
            json!({
                "image": image, "digest": format!("sha256:{}", "0".repeat(64)), "dir": image,
                "backend": "erofs", "state": "served", "bytes_total": 200, "bytes_present": 50,
                "bytes_fetched": fetched, "sealed": false, "waiting_reads": waiting,
                "waiting_seconds": seconds, "waiting_files": ["/a"],
            })
        };
        let mounts: Vec<Value> = mounts.iter().map(mount).collect();
        serde_json::from_value(json!({
            "root": "/r", "daemon": {"pid": 1}, "keeper": {"pid": 2}, "mounts": mounts,
            "cache_bytes": 7, "quota": 70, "room": null, "policies": null, "policy_trouble": [],
            "decisions": {}, "bytes_fetched": fetched, "requests": 0, "blocked_reads": waits,
            "failed_spans": 0,
        }))
        .unwrap()
    }

    #[test]
    fn those_who_wait_come_first_and_rates_are_by_the_second() {
        let before = status(1000, 10, &[("a", 500, 0, 0.0), ("b", 500, 0, 0.0), ("c", 0, 0, 0.0)]);
        let now = status(3000, 14, &[("a", 500, 0, 0.0), ("b", 2500, 0, 0.0), ("c", 0, 2, 1.5)]);
        let look = Look::new(&before, &now, Duration::from_secs(2));
        assert_eq!((look.bytes_per_second, look.waits_per_second), (1000, 2));
        let rows: Vec<(&str, u64)> =
            look.mounts.iter().map(|row| (row.image.as_str(), row.bytes_per_second)).collect();
        assert_eq!(rows, [("c", 0), ("b", 1000), ("a", 0)]);
        let text = look.text();
        assert!(text.contains("25 %") && text.contains("waits for /a"), "{text}");
    }

    #[test]
    fn a_daemon_that_was_restarted_counts_from_nothing() {
        let look = Look::new(&status(9000, 90, &[]), &status(500, 3, &[]), INTERVAL);
        assert_eq!((look.bytes_per_second, look.waits_per_second), (500, 3));
    }
}

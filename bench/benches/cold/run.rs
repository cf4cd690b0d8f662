//! One cold start, and warm ones after it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use testnode::{Link, LinkShape, Node, wait_until};

use crate::images::Image;
use crate::probe::{Start, first_answer};
use crate::stage::Stage;
use crate::systems::{Contestant, HERMES_ROOT};

/// How long a container may take to end.
const LIMIT: Duration = Duration::from_secs(60);
/// How long an image may take to be complete after the first answer.
const SEAL_LIMIT: Duration = Duration::from_secs(120);
/// Warm starts after a cold one; the last of them counts, those before it warm up.
const N_WARM: usize = 3;

/// What is started, and over which link.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cell<'a> {
    pub(crate) image: Image,
    pub(crate) link: LinkShape,
    pub(crate) contestant: &'a Contestant,
    pub(crate) warm: Warm,
    /// Where logs are kept, if anywhere.
    pub(crate) logs: Option<&'a Path>,
}

/// Whether the image is started again when all of it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Warm {
    /// It is, by systems that can.
    Measured,
    /// It is not.
    LeftOut,
}

/// What one cold start took.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ColdStart {
    /// How many programs of the machine wanted to run in the minute before.
    pub(crate) load: f64,
    /// From the command to the kernel running the container's program.
    pub(crate) running_seconds: f64,
    /// From the command to the first good answer.
    pub(crate) answer_seconds: f64,
    /// What had come over the link by then, and gone.
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    /// Packets and bursts that the link's queue dropped.
    pub(crate) dropped: u64,
    /// As `answer_seconds`, of a later start with a warm page cache.
    pub(crate) warm_seconds: Option<f64>,
    /// As `running_seconds`, of that start.
    pub(crate) warm_running_seconds: Option<f64>,
    pub(crate) hermes: Option<HermesFigures>,
}

/// What Hermes says of a cold start.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct HermesFigures {
    /// From the command until the last byte of the whole image was there, each span checked, if that came
    /// about.
    pub(crate) whole_seconds: Option<f64>,
    /// From the command until it was read once more, proven and on the disk, too.
    pub(crate) sealed_seconds: Option<f64>,
    /// What had come over the link by then.
    pub(crate) bytes_in_sealed: u64,
    /// What the daemon had computed by the first answer, since it was started.
    pub(crate) daemon_cpu_seconds: f64,
    /// `hermes status` right after the first answer.
    pub(crate) status: Value,
    /// `hermes explain` at that time.
    pub(crate) explain: Value,
}

/// Starts an image on a node that has nothing of it.
pub(crate) fn cold_start(stage: &Stage, cell: Cell<'_>) -> Result<ColdStart> {
    let near = stage.near()?;
    let link = near.link_to(&stage.far, cell.link)?;
    stage.forget_files(cell.contestant.system, cell.image)?;
    let running = cell.contestant.start(&near)?;
    let node = RunningNode { near: &near, cell };
    let began_at = SystemTime::now();
    let result = node.measure(stage, &link, began_at);
    if let Some(logs) = cell.logs {
        node.keep_logs(logs, began_at, result.as_ref().ok())?;
    }
    drop(running);
    result
}

/// A node with a system's daemons in it.
struct RunningNode<'a> {
    near: &'a Node,
    cell: Cell<'a>,
}

impl RunningNode<'_> {
    fn measure(&self, stage: &Stage, link: &Link, began_at: SystemTime) -> Result<ColdStart> {
        let Cell { image, contestant, warm, .. } = self.cell;
        let load = load_average()?;
        let (bytes_in, bytes_out) = (link.inbound().bytes, link.outbound().bytes);
        let script = contestant.cold_start(image, &stage.registry);
        let begin = Instant::now();
        let (mut command, start) = self.start(&script, begin)?;
        let traffic = link.inbound();
        let mut cold = ColdStart {
            load,
            running_seconds: start.running.as_secs_f64(),
            answer_seconds: start.answered.as_secs_f64(),
            bytes_in: traffic.bytes - bytes_in,
            bytes_out: link.outbound().bytes - bytes_out,
            dropped: traffic.dropped,
            warm_seconds: None,
            warm_running_seconds: None,
            hermes: None,
        };
        if contestant.system.is_hermes() {
            let figures = self.hermes_figures(began_at)?;
            let bytes_in_sealed = link.inbound().bytes - bytes_in;
            cold.hermes = Some(HermesFigures { bytes_in_sealed, ..figures });
        }
        self.end(&mut command, start)?;
        if warm == Warm::Measured && contestant.system.has_warm_start() {
            let warm = self.warm_start()?;
            cold.warm_seconds = Some(warm.answered.as_secs_f64());
            cold.warm_running_seconds = Some(warm.running.as_secs_f64());
        }
        Ok(cold)
    }

    /// Gives the user's command and waits for the first answer.
    fn start(&self, script: &str, begin: Instant) -> Result<(Child, Start)> {
        let Cell { image, contestant, .. } = self.cell;
        let log = File::options().create(true).append(true).open(self.near.path(COMMAND_LOG));
        let log = log.context("opening the log of a command")?;
        let mut command = self.near.command("env");
        command.arg(format!("PATH={}", contestant.path()));
        command.args(["bash", "-euc", script]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut command = command.spawn().context("giving the user's command")?;
        let start = first_answer(self.near, image, &mut command, begin).with_context(|| {
            let said = std::fs::read_to_string(self.near.path(COMMAND_LOG)).unwrap_or_default();
            format!("starting {} with {}:\n{said}", image.name(), contestant.name)
        })?;
        Ok((command, start))
    }

    /// Kills the container's program and waits for the command to notice.
    fn end(&self, command: &mut Child, start: Start) -> Result<()> {
        self.near.run("kill", &["-KILL", &start.pid.to_string()])?;
        wait_until("the container's end", LIMIT, || Ok(command.try_wait()?.is_some()))
    }

    fn warm_start(&self) -> Result<Start> {
        let Cell { image, contestant, .. } = self.cell;
        let mut last = None;
        for number in 0..N_WARM {
            let script = contestant.next_start(image, &format!("warm-{number}"));
            let (mut command, start) = self.start(&script, Instant::now())?;
            last = Some(start);
            self.end(&mut command, start)?;
        }
        last.context("there are warm starts")
    }

    fn hermes_figures(&self, began_at: SystemTime) -> Result<HermesFigures> {
        let status = self.ask_hermes(&["status"])?;
        let daemon_cpu_seconds = bench::process::cpu_seconds(
            &self.near.path(&format!("/proc/{}", status["daemon"]["pid"])),
        )?;
        let dir = status["mounts"][0]["dir"].as_str().unwrap_or_default().to_owned();
        let explain = self.ask_hermes(&["explain", &dir])?;
        let n_layers = explain["layers"].as_array().map_or(0, Vec::len);
        // Nothing is asked meanwhile: that would take time from what is measured.
        let mut seals = Vec::new();
        let sealed = wait_until("the image to be sealed", SEAL_LIMIT, || {
            seals = self.last_changes("sealed")?;
            Ok(seals.len() >= n_layers)
        });
        let since = |times: Vec<SystemTime>| {
            let last = times.into_iter().max().filter(|_| sealed.is_ok())?;
            Some(last.duration_since(began_at).unwrap_or_default().as_secs_f64())
        };
        Ok(HermesFigures {
            whole_seconds: since(self.last_changes("data")?),
            sealed_seconds: since(seals),
            bytes_in_sealed: 0,
            daemon_cpu_seconds,
            status,
            explain,
        })
    }

    /// When a file of the layers in the cache was changed, of those that have it: `data` changes with each
    /// span that comes, and `sealed` is there once the layer is.
    fn last_changes(&self, file: &str) -> Result<Vec<SystemTime>> {
        let layers = self.near.path(HERMES_ROOT).join("cache/layers");
        let layers = std::fs::read_dir(&layers).context("listing the layers of the cache")?;
        let files = layers.flatten().map(|layer| std::fs::metadata(layer.path().join(file)));
        Ok(files.flatten().map(|file| file.modified()).collect::<io::Result<_>>()?)
    }

    fn ask_hermes(&self, what: &[&str]) -> Result<Value> {
        let args = [&["--root", HERMES_ROOT, "--output", "json"], what].concat();
        let answer = self.near.run(&self.cell.contestant.hermes(), &args)?;
        serde_json::from_str(&answer).context("reading an answer of hermes")
    }

    /// Copies what the daemons and the command said, for whoever wants to know where time goes.
    fn keep_logs(&self, to: &Path, began_at: SystemTime, cold: Option<&ColdStart>) -> Result<()> {
        std::fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
        let stem = format!("{}-{}", self.cell.image.name(), self.cell.contestant.name);
        let write = |name: &str, text: &str| {
            let file = to.join(format!("{stem}-{name}.log"));
            std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
        };
        for name in ["containerd", "soci", "soci15"] {
            write(name, &self.near.log(name))?;
        }
        write("hermes", &timeline(&self.near.log("hermes"), began_at, cold))?;
        let said = std::fs::read_to_string(self.near.path(COMMAND_LOG)).unwrap_or_default();
        write("command", &said)
    }
}

/// Lines of a log of Hermes, each with the seconds since the command in front, and what was seen from
/// outside between them.
fn timeline(log: &str, began_at: SystemTime, cold: Option<&ColdStart>) -> String {
    let since_midnight = |time: SystemTime| {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        since.as_secs_f64().rem_euclid(DAY)
    };
    let begin = since_midnight(began_at);
    let mut lines: Vec<(f64, String)> = Vec::new();
    for line in log.lines() {
        let at =
            time_of_day(line).map(|time| (time - begin + DAY / 2.0).rem_euclid(DAY) - DAY / 2.0);
        // What has no time of its own belongs to the line before it.
        let at = at.or_else(|| lines.last().map(|(at, _)| *at));
        lines.push((at.unwrap_or_default(), line.to_owned()));
    }
    let whole = cold.and_then(|cold| cold.hermes.as_ref()?.whole_seconds);
    let sealed = cold.and_then(|cold| cold.hermes.as_ref()?.sealed_seconds);
    for (at, what) in [
        (cold.map(|cold| cold.running_seconds), "the program runs"),
        (cold.map(|cold| cold.answer_seconds), "the first answer"),
        (whole, "the image is whole"),
        (sealed, "the image is sealed"),
    ] {
        lines.extend(at.map(|at| (at, format!("--- {what} ---"))));
    }
    lines.sort_by(|a, b| a.0.total_cmp(&b.0));
    lines.iter().map(|(at, line)| format!("{at:+9.3} {line}\n")).collect()
}

/// The seconds since midnight at the head of a line such as `2026-01-31T12:34:56.789012Z  INFO …`.
fn time_of_day(line: &str) -> Option<f64> {
    let (_, time) = line.split_whitespace().next()?.strip_suffix('Z')?.split_once('T')?;
    let mut fields = time.split(':').map(|field| field.parse::<f64>().ok());
    let (hours, minutes, seconds) = (fields.next()??, fields.next()??, fields.next()??);
    Some((hours * 60.0 + minutes) * 60.0 + seconds)
}

const DAY: f64 = 86_400.0;
/// How many programs wanted to run, over the last minute.
fn load_average() -> Result<f64> {
    let load = std::fs::read_to_string("/proc/loadavg").context("reading the load")?;
    load.split(' ').next().unwrap_or_default().parse().context("reading the load")
}

const COMMAND_LOG: &str = "/srv/command.log";

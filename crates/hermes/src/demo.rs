//! `hermes demo`: packs an image of this machine's own files, and starts a program in it twice: after a
//! full pull, and lazily, while the daemon is killed again and again.

mod node;
mod pack;
mod play;
mod pull;
mod report;
mod scene;
mod stop;

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use artifacts::Image;
use policy::Completion;
use rustix::fs::Access;
use tempfile::TempDir;

use self::node::Node;
use self::play::{Play, hash_files};
use self::report::{Full, Lazy, Report};
use self::scene::Scene;
use self::stop::Stop;
use crate::args::{DemoArguments, GlobalArguments};
use crate::failure::Exit;
use crate::output::{Output, bytes};
use crate::protocol::{MountRequest, MountTuning};
use crate::run::{MountedImage, Program, Rootfs, config_of, in_user_namespace};

/// Shows it all.
pub(crate) fn run(
    common: &GlobalArguments,
    output: Output,
    arguments: &DemoArguments,
) -> Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        return again_in_a_user_namespace(output);
    }
    let stop = Stop::hold()?;
    let work = workplace()?;
    let shown = show(common, output, arguments, &stop, work.path());
    let cleaned = work.close().context("removing the demo's folder");
    let report = shown?;
    cleaned?;
    output.result(&report, Report::text)?;
    let code = if report.wrong_bytes == 0 { 0 } else { Exit::Corrupt.code() };
    Ok(ExitCode::from(code))
}

fn show(
    common: &GlobalArguments,
    output: Output,
    arguments: &DemoArguments,
    stop: &Stop,
    work: &Path,
) -> Result<Report> {
    let scene = match &arguments.image {
        Some(image) => Scene::of_image(common, image, work)?,
        None => Scene::packed(common, output, arguments, stop, work)?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("starting threads")?;
    let stage = Stage { scene: &scene, output, arguments, stop, work };
    let (image, full) = stage.full_pull(&runtime)?;
    let lazy = stage.lazily()?;
    let wrong = differences(&full.lines, &lazy.lines);
    for line in wrong.iter().take(10) {
        tracing::error!(line, "differs between the full pull and the lazy mount");
    }
    Ok(Report {
        image: scene.image.clone(),
        image_bytes: image.bytes(),
        layers: image.layers.len(),
        link: scene.link(arguments),
        lazy: lazy.figures,
        full: full.figures,
        files_compared: full.lines.len(),
        daemon_kills: lazy.kills,
        wrong_bytes: wrong.len(),
        unprivileged: in_user_namespace(),
    })
}

/// What both ways of starting need.
struct Stage<'a> {
    scene: &'a Scene,
    output: Output,
    arguments: &'a DemoArguments,
    stop: &'a Stop,
    work: &'a Path,
}

struct FullRun {
    figures: Full,
    lines: Vec<String>,
}

struct LazyRun {
    figures: Lazy,
    lines: Vec<String>,
    kills: u32,
}

impl Stage<'_> {
    /// Downloads and unpacks everything, then starts the program.
    fn full_pull(&self, runtime: &tokio::runtime::Runtime) -> Result<(Image, FullRun)> {
        self.output
            .note("full pull: downloading and unpacking every layer, then starting the program");
        self.scene.forget_traffic();
        let begin = Instant::now();
        let unpacked = self.work.join("unpacked");
        let image = runtime.block_on(self.stop.race(async {
            let (origin, image) = self.scene.resolve().await?;
            pull::pull(&origin, &image, &unpacked, &self.work.join("downloads")).await?;
            Ok(image)
        }))?;
        let dir = self.work.join("full");
        let rootfs = Rootfs::over(&unpacked, &dir)?;
        let program = Program::of(&image.config, &self.arguments.command, rootfs.path())?;
        let mut play =
            Play::start(&dir, rootfs.path(), &self.scene.prepare(program, self.batches()))?;
        let (answered, _line) = play.first_answer(self.stop)?;
        let figures = Full {
            first_answer_seconds: answered.duration_since(begin).as_secs_f64(),
            bytes_fetched: self.scene.traffic().unwrap_or_else(|| image.bytes()),
        };
        self.output.note(&format!("  first answer after {:.2} s", figures.first_answer_seconds));
        let lines = if self.scene.reads_by_itself() {
            for _ in 0..self.batches() {
                play.go()?;
            }
            play.finish(self.stop)?
        } else {
            drop(play);
            hash_files(&unpacked, self.stop)?
        };
        Ok((image, FullRun { figures, lines }))
    }

    /// Mounts, starts the program at once, and kills the daemon while it reads.
    fn lazily(&self) -> Result<LazyRun> {
        self.output.note("lazily, with an empty cache: mounting and starting the program at once");
        let node = Node::start(self.scene.common(), self.output)?;
        self.scene.forget_traffic();
        let begin = Instant::now();
        let dir = self.work.join("lazy");
        let mounted = MountedImage::mount(self.scene.common(), self.output, self.request(&dir)?)?;
        let mount_seconds = begin.elapsed().as_secs_f64();
        let rootfs = Rootfs::over(mounted.dir(), &dir)?;
        let config = config_of(&self.scene.common().root, &mounted.report().digest)?;
        let program = Program::of(&config, &self.arguments.command, rootfs.path())?;
        let mut play =
            Play::start(&dir, rootfs.path(), &self.scene.prepare(program, self.batches()))?;
        let (answered, line) = play.first_answer(self.stop)?;
        let at_first_answer = match self.scene.traffic() {
            Some(traffic) => traffic,
            None => node.bytes_fetched()?,
        };
        let first_answer_seconds = answered.duration_since(begin).as_secs_f64();
        self.output.note(&format!(
            "  first answer after {first_answer_seconds:.2} s, {} fetched",
            bytes(at_first_answer)
        ));
        let lines = self.read_while_killing(play, &node, mounted.dir())?;
        let figures = Lazy {
            first_answer_seconds,
            mount_seconds,
            bytes_fetched: at_first_answer,
            bytes_fetched_in_all: self.scene.traffic(),
            backend: mounted.report().backend,
            files_touched: play::files_touched(&line),
        };
        drop(rootfs);
        drop(mounted);
        drop(node);
        Ok(LazyRun { figures, lines, kills: self.arguments.kills })
    }

    fn request(&self, dir: &Path) -> Result<MountRequest> {
        Ok(MountRequest {
            image: self.scene.image.clone(),
            dir: dir.join("lower"),
            backend: crate::daemon::backend(self.arguments.backend),
            platform: self.scene.common().registry.platform.clone(),
            access: crate::registries::access(&self.scene.common().registry)?,
            // Only what is read is fetched: so the daemon has work to do whenever it is killed, and
            // what was fetched is what was needed.
            tuning: MountTuning { completion: Completion::Never, ..MountTuning::default() },
            command: self.arguments.command.clone(),
        })
    }

    fn read_while_killing(&self, mut play: Play, node: &Node, lower: &Path) -> Result<Vec<String>> {
        if !self.scene.reads_by_itself() {
            drop(play);
            return std::thread::scope(|scope| {
                let reading = scope.spawn(|| hash_files(lower, self.stop));
                for _ in 0..self.arguments.kills {
                    self.kill(node)?;
                }
                reading.join().map_err(|_panic| anyhow::anyhow!("reading the image failed"))?
            });
        }
        for _ in 0..self.arguments.kills {
            play.go()?;
            // In the middle of its reads.
            play.next_line(self.stop)?;
            self.kill(node)?;
        }
        play.go()?;
        play.finish(self.stop)
    }

    fn kill(&self, node: &Node) -> Result<()> {
        let paused = node.kill_daemon(self.stop)?;
        self.output.note(&format!(
            "  killed the daemon; another one answered after {:.2} s",
            paused.as_secs_f64()
        ));
        Ok(())
    }

    /// A batch of reads for each kill, and one more.
    fn batches(&self) -> u32 {
        self.arguments.kills + 1
    }
}

/// The lines that are not in both, each file once.
fn differences(full: &[String], lazy: &[String]) -> BTreeSet<String> {
    let path = |line: &String| {
        line.split_once("  ").map_or_else(|| line.clone(), |(_, path)| path.to_owned())
    };
    let (full, lazy): (BTreeSet<_>, BTreeSet<_>) = (full.iter().collect(), lazy.iter().collect());
    let failed = lazy.iter().filter(|line| line.starts_with("failed"));
    full.symmetric_difference(&lazy).chain(failed).map(|line| path(line)).collect()
}

/// A folder of the demo's, on a disk if possible: the kernel's events are not for files in memory.
fn workplace() -> Result<TempDir> {
    let in_memory = |dir: &Path| rustix::fs::statfs(dir).is_ok_and(|found| found.f_type == TMPFS);
    let (preferred, other) = (std::env::temp_dir(), PathBuf::from("/var/tmp"));
    let dir = if in_memory(&preferred) && !in_memory(&other) { other } else { preferred };
    let made = tempfile::Builder::new().prefix("hermes-demo-").tempdir_in(&dir);
    made.with_context(|| format!("making a folder in {}", dir.display()))
}

/// Runs the same command where we are root: as far as FUSE goes, that is enough.
fn again_in_a_user_namespace(output: Output) -> Result<ExitCode> {
    if let Err(err) = rustix::fs::access("/dev/fuse", Access::READ_OK | Access::WRITE_OK) {
        bail!("without root the demo goes through FUSE, but /dev/fuse cannot be opened: {err}");
    }
    output.note(
        "without root: the kernel's own file systems cannot be used, so this goes through FUSE",
    );
    let unshare = crate::args::find_program("unshare")
        .context("the demo needs root, or unshare (util-linux) for a user namespace")?;
    let mut command = Command::new(unshare);
    command.args(["--user", "--map-root-user", "--mount", "--"]);
    command.arg(std::env::current_exe().context("finding our own program")?);
    let err = command.args(std::env::args_os().skip(1)).exec();
    Err(err).context("starting unshare")
}

/// `TMPFS_MAGIC` (statfs(2)).
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

#[cfg(test)]
mod tests {
    use super::differences;

    #[test]
    fn a_file_that_differs_fails_or_is_missing_counts_once() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let full = lines("aa  /a\nbb  /b\ncc  /c\nfailed:13  /d");
        assert!(differences(&full[..3], &full[..3]).is_empty());
        let lazy = lines("aa  /a\nxx  /b\nfailed:13  /d");
        let found: Vec<String> = differences(&full, &lazy).into_iter().collect();
        assert_eq!(found, ["/b", "/c", "/d"]);
    }
}

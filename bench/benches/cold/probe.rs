//! When a container's program exists, and when it answers.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testnode::Node;

use crate::images::Image;

/// Where every image answers.
const PORT: u16 = 8080;
/// How often it is asked.
const INTERVAL: Duration = Duration::from_millis(2);
/// How long a start may take.
const LIMIT: Duration = Duration::from_secs(300);

/// What was seen of a start; times since the command was given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    /// The kernel had begun to run the container's program.
    pub(crate) running: Duration,
    /// That program's process, by its number in the node.
    pub(crate) pid: u32,
    /// The page had arrived, whole.
    pub(crate) answered: Duration,
}

/// Waits for the first good answer of a container that `command`, spawned at `begin`, starts.
pub(crate) fn first_answer(
    node: &Node,
    image: Image,
    command: &mut Child,
    begin: Instant,
) -> Result<Start> {
    let answered = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            be_punctual();
            while !answered.load(Ordering::Relaxed) {
                if let Some(pid) = find_process(node, image.program()) {
                    return Some((begin.elapsed(), pid));
                }
                std::thread::park_timeout(INTERVAL);
            }
            None
        });
        let asked = node.in_network(|| {
            be_punctual();
            ask_until_answered(image, command, begin)
        });
        answered.store(true, Ordering::Relaxed);
        let Ok(running) = watcher.join() else { bail!("watching for a process failed") };
        let answered = asked??;
        let (running, pid) = running.context("it answered, but its process was not seen")?;
        Ok(Start { running, pid, answered })
    })
}

/// A probe that has to wait for a processor sees late what was there before.
fn be_punctual() {
    // Without the right to it the figures are a little worse on a busy machine.
    sys::scheduling::precede_others().ok();
}

fn ask_until_answered(image: Image, command: &mut Child, begin: Instant) -> Result<Duration> {
    loop {
        let answer = ask(image.page());
        let now = begin.elapsed();
        if answer.is_ok_and(|answer| is_good(&answer)) {
            return Ok(now);
        }
        if let Some(status) = command.try_wait().context("waiting for a command")? {
            bail!("it ended before it answered: {status}");
        }
        if now > LIMIT {
            bail!("no answer within {LIMIT:?}");
        }
        std::thread::park_timeout(INTERVAL);
    }
}

/// The whole answer to a request for `page`.
fn ask(page: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(format!("GET {page} HTTP/1.0\r\nHost: node\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn is_good(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.") && answer.get(8..13) == Some(b" 200 ".as_slice())
}

/// The process of the node that the kernel calls `name`, by its number in the node.
///
/// The name, unlike the command line, can be read while the process waits for its first page.
fn find_process(node: &Node, name: &str) -> Option<u32> {
    let entries = fs::read_dir(node.path("/proc")).ok()?;
    entries.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        (read_name(&entry.path())? == name).then_some(pid)
    })
}

fn read_name(process: &Path) -> Option<String> {
    let name = fs::read_to_string(process.join("comm")).ok()?;
    Some(name.trim_end().to_owned())
}

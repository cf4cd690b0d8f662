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

use crate::images::{Image, Question};

/// Where every image answers.
const PORT: u16 = 8080;
/// After what time it is asked again, at least.
const INTERVAL: Duration = Duration::from_millis(2);
/// The part of the time since the command that may pass between two questions: what they cost is taken from
/// the program that is to answer.
const PRECISION: u32 = 200;
/// How long a start may take.
const LIMIT: Duration = Duration::from_secs(900);

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
                // A shell may be another program soon.
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
        let answer = match image.question() {
            Question::Page(page) => ask_page(page),
            Question::Query => ask_database(),
        };
        let now = begin.elapsed();
        if answer.is_ok_and(|is_good| is_good) {
            return Ok(now);
        }
        if let Some(status) = command.try_wait().context("waiting for a command")? {
            bail!("it ended before it answered: {status}");
        }
        if now > LIMIT {
            bail!("no answer within {LIMIT:?}");
        }
        std::thread::park_timeout(INTERVAL.max(begin.elapsed() / PRECISION));
    }
}

/// Whether a request for `page` has a good answer, once all of it has come.
fn ask_page(page: &str) -> io::Result<bool> {
    let mut stream = connect()?;
    stream.write_all(format!("GET {page} HTTP/1.0\r\nHost: node\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer.starts_with(b"HTTP/1.") && answer.get(8..13) == Some(b" 200 ".as_slice()))
}

/// Whether PostgreSQL answers a query with rows. What is said is in chapter 53 of its documentation,
/// "Frontend/Backend Protocol": a letter, a length that counts itself, and the content.
fn ask_database() -> io::Result<bool> {
    const START: &[u8] = b"\0\0\0\x29\0\x03\0\0user\0postgres\0database\0postgres\0\0";
    const QUERY: &[u8] = b"Q\0\0\0\x2dSELECT count(*) FROM pg_catalog.pg_class\0";
    let mut stream = connect()?;
    stream.write_all(START)?;
    // It is ready for a query once it says `Z`, says `D` for a row, and `E` if it refuses.
    let mut asked = false;
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = u64::from(u32::from_be_bytes(length)).saturating_sub(4);
        io::copy(&mut (&stream).take(length), &mut io::sink())?;
        match kind {
            b'Z' if !asked => {
                stream.write_all(QUERY)?;
                asked = true;
            }
            b'D' => return Ok(true),
            b'E' | b'Z' => return Ok(false),
            _ => {}
        }
    }
}

fn connect() -> io::Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
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

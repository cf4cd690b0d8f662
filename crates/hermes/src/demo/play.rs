//! The demo's program while it runs, and what it says.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use oci::Hasher;

use super::stop::{OFTEN, Stop};
use crate::run::{Container, Program, Runtime, Streams};

/// A program in a container.
#[derive(Debug)]
pub(super) struct Play {
    container: Container,
    stdin: Option<ChildStdin>,
    lines: Receiver<(Instant, String)>,
    said: Vec<String>,
}

impl Play {
    /// Starts it; `dir` is made for its files.
    pub(super) fn start(dir: &Path, rootfs: &Path, program: &Program) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let mut container = Container::start(&Runtime::Own, dir, rootfs, program, Streams::Piped)?;
        let stdin = container.stdin.take();
        let stdout = container.stdout.take().context("the program has no output")?;
        let lines = read_lines(stdout)?;
        Ok(Self { container, stdin, lines, said: Vec::new() })
    }

    /// Its first line, and when it came.
    pub(super) fn first_answer(&mut self, stop: &Stop) -> Result<(Instant, String)> {
        match self.receive(stop)? {
            Some(answer) => Ok(answer),
            None => {
                let code = self.container.wait(stop.signals())?;
                bail!("the program ended with {code} before it answered")
            }
        }
    }

    /// Tells it to read a batch of files.
    pub(super) fn go(&mut self) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the program has no input")?;
        stdin.write_all(b"go\n").context("telling the program to go on")
    }

    /// Waits until it says something more; nothing if it has ended.
    pub(super) fn next_line(&mut self, stop: &Stop) -> Result<()> {
        if let Some((_, line)) = self.receive(stop)? {
            self.said.push(line);
        }
        Ok(())
    }

    /// Waits for its end. Returns what it said after its first line.
    pub(super) fn finish(mut self, stop: &Stop) -> Result<Vec<String>> {
        drop(self.stdin.take());
        while let Some((_, line)) = self.receive(stop)? {
            self.said.push(line);
        }
        let code = self.container.wait(stop.signals())?;
        if code != 0 {
            bail!("the program ended with {code}");
        }
        Ok(std::mem::take(&mut self.said))
    }

    fn receive(&self, stop: &Stop) -> Result<Option<(Instant, String)>> {
        loop {
            match self.lines.recv_timeout(OFTEN) {
                Ok(line) => return Ok(Some(line)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => stop.check()?,
            }
        }
    }
}

/// Lines with the moment of their arrival. The thread ends with the program.
fn read_lines(stdout: ChildStdout) -> Result<Receiver<(Instant, String)>> {
    let (sender, lines) = channel();
    let read = move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send((Instant::now(), text)).is_err() {
                return;
            }
            line.clear();
        }
    };
    std::thread::Builder::new()
        .name("program-output".to_owned())
        .spawn(read)
        .context("starting a thread")?;
    Ok(lines)
}

/// The program's own count of the image's files that it had opened when it answered: what its modules
/// were loaded from, and what is mapped into its memory.
pub(super) fn files_touched(answer: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(answer).ok()?.get("files_touched")?.as_u64()
}

/// Digests of the files below `root`, at most of so many bytes: `digest  path`.
pub(super) fn hash_files(root: &Path, stop: &Stop) -> Result<Vec<String>> {
    let mut left = MOST_BYTES;
    let mut lines = Vec::new();
    for path in files_below(root)? {
        stop.check()?;
        let name = Path::new("/").join(path.strip_prefix(root)?);
        let digest = match hash_file(&path, &mut left) {
            Ok(digest) => digest,
            Err(err) => format!("failed:{}", err.raw_os_error().unwrap_or_default()),
        };
        lines.push(format!("{digest}  {}", name.display()));
        if left == 0 {
            break;
        }
    }
    Ok(lines)
}

fn hash_file(path: &Path, left: &mut u64) -> io::Result<String> {
    let mut file = File::open(path)?.take(*left);
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok(hasher.finish().hex());
        }
        hasher.update(&buffer[..len]);
        *left -= len as u64;
    }
}

/// Regular files in the order of their names. Links are not followed.
pub(super) fn files_below(root: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

const MOST_BYTES: u64 = 512 << 20;

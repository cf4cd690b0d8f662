//! The processes that the tests start, and kill: `<role> <root>`.
//!
//! Each tells the test about itself through the socket `test.sock`, and ends when that is closed.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use keeper::{Client, KeeperOptions};
use rustix::event::{PollFd, PollFlags, poll};
use sys::descriptors;
use sys::fanotify::{Event, Group};
use sys::journal::Journal;

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<ExitCode, AnyError> {
    let mut arguments = std::env::args_os().skip(1);
    let role = arguments.next().ok_or("the role is missing")?;
    let root = PathBuf::from(arguments.next().ok_or("the folder is missing")?);
    match role.to_str() {
        Some("keeper") => keep(&root, arguments.collect())?,
        Some("daemon") => serve(&root, "daemon")?,
        Some("filler") => fill(&root)?,
        Some("dying") => drop(report(&root, "dying")?),
        _ => return Ok(ExitCode::FAILURE),
    }
    Ok(ExitCode::SUCCESS)
}

fn keep(root: &Path, respawn: Vec<OsString>) -> Result<(), AnyError> {
    let ready = Some(io::stdin().as_fd().try_clone_to_owned()?);
    let respawn = Some(respawn).filter(|command| !command.is_empty());
    let (socket, pid_file) = (root.join("keeper.sock"), root.join("keeper.pid"));
    Ok(keeper::serve(KeeperOptions { socket, pid_file, respawn, ready })?)
}

/// Tells the test who we are.
fn report(root: &Path, text: &str) -> io::Result<OwnedFd> {
    let test = descriptors::connect(&root.join("test.sock"))?;
    descriptors::send(test.as_fd(), format!("{} {text}", std::process::id()).as_bytes(), &[])?;
    Ok(test)
}

/// Says what the keeper holds; then does what the test says, and ends.
fn serve(root: &Path, role: &str) -> Result<(), AnyError> {
    let keeper = Client::connect(&root.join("keeper.sock"))?;
    keeper.daemon()?;
    let names: Vec<_> = keeper.take_all()?.into_iter().map(|held| held.name).collect();
    let oom_score = std::fs::read_to_string("/proc/self/oom_score_adj")?;
    let text = format!("{role} {} oom={}", names.join(","), oom_score.trim_end());
    let test = report(root, &text)?;
    let mut buffer = [0; 64];
    let received = descriptors::receive(test.as_fd(), &mut buffer)?;
    if &buffer[..received.len] == b"goodbye" {
        keeper.goodbye()?;
    }
    Ok(())
}

/// The first fills nothing: it reads an event and reports it. Its successor takes over and fills.
fn fill(root: &Path) -> Result<(), AnyError> {
    let keeper = Client::connect(&root.join("keeper.sock"))?;
    keeper.daemon()?;
    let mut held = keeper.take_all()?;
    if held.is_empty() {
        let file = OpenOptions::new().read(true).write(true).open(root.join("layer"))?;
        let (group, journal) = (Group::new()?, Journal::create(8)?);
        group.mark(file.as_fd())?;
        keeper.put("file", b"layer 7", file.as_fd())?;
        keeper.put("group", b"", group.as_fd())?;
        keeper.put("journal", b"", journal.as_fd())?;
        let test = report(root, "filler marked")?;
        let event = next_event(&group, &journal, test.as_fd())?;
        event.set_tag(7);
        let _reported = report(root, "filler has an event")?;
        // Until it is killed.
        descriptors::receive(test.as_fd(), &mut [0; 64])?;
        return Ok(());
    }
    let mut take = |name: &str| {
        let index = held.iter().position(|held| held.name == name).ok_or("it is not held")?;
        Ok::<_, AnyError>(held.swap_remove(index).fd)
    };
    let (file, group) = (File::from(take("file")?), Group::from_fd(take("group")?));
    let journal = Journal::open(take("journal")?)?;
    for orphan in journal.orphans() {
        if orphan.tag() != Some(7) {
            return Err("the orphan's file is not known".into());
        }
        answer(group.adopt(orphan, file.as_fd().try_clone_to_owned()?))?;
    }
    let test = report(root, "filler took over")?;
    loop {
        answer(next_event(&group, &journal, test.as_fd())?)?;
    }
}

fn next_event(group: &Group, journal: &Journal, test: BorrowedFd<'_>) -> Result<Event, AnyError> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(test, PollFlags::IN),
        ];
        poll(&mut fds, None)?;
        if !fds[1].revents().is_empty() {
            return Err("the test has ended".into());
        }
        if let Some(event) = group.read_event(journal)? {
            return Ok(event);
        }
    }
}

/// Every byte is an "x".
fn answer(event: Event) -> Result<(), AnyError> {
    let range = event.range();
    let len = usize::try_from(range.end - range.start)?;
    rustix::io::pwrite(event.file(), &vec![b'x'; len], range.start)?;
    Ok(event.allow()?)
}

//! What a program has used up.

use std::io;
use std::process::{Child, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// What a program that has ended used, together with all the programs that it waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// How it ended.
    pub status: ExitStatus,
    /// Processor time.
    pub cpu: Duration,
    /// The most memory that one of these processes had resident, in bytes.
    ///
    /// It is no less than what the calling process had at most: the kernel counts from the fork.
    pub peak_memory: u64,
    /// Bytes that were to be written to disks, counted when pages of files became dirty.
    pub written: u64,
}

/// Waits until `child` has ended.
///
/// # Errors
/// `ECHILD` if somebody else has waited for it.
pub fn wait(child: Child) -> io::Result<Usage> {
    let raw = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    let pid = Pid::from_raw(raw).ok_or(io::ErrorKind::InvalidInput)?;
    // What it wrote can be read as long as nobody has buried it.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    while let Err(err) = waitid(WaitId::Pid(pid), options) {
        if err != rustix::io::Errno::INTR {
            return Err(err.into());
        }
    }
    let written = written(raw)?;
    let mut status = 0;
    // SAFETY: every bit pattern of `struct rusage`, which holds integers only, is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers lead to variables that live until the call returns.
    if unsafe { libc::wait4(raw, &raw mut status, 0, &raw mut usage) } != raw {
        return Err(io::Error::last_os_error());
    }
    // It would be waited for again, in vain.
    drop(child);
    Ok(Usage {
        status: std::os::unix::process::ExitStatusExt::from_raw(status),
        cpu: duration(usage.ru_utime) + duration(usage.ru_stime),
        peak_memory: u64::try_from(usage.ru_maxrss).unwrap_or_default().saturating_mul(1024),
        written,
    })
}

fn written(pid: libc::pid_t) -> io::Result<u64> {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let field = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    field.and_then(|value| value.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn duration(time: libc::timeval) -> Duration {
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::from_secs(seconds)
        + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_a_grandchild_used_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.current_dir(&dir);
        // A shell that waits for another one, which dirties 300 pages and has a large variable.
        let grandchild =
            "head -c 1228800 /dev/zero > file; x=$(head -c 30000000 /dev/zero | tr '\\0' x)";
        shell.args(["-c", "sh -c \"$0\"; exit 7", grandchild]);
        let usage = wait(shell.spawn().unwrap()).unwrap();
        assert_eq!(usage.status.code(), Some(7));
        assert!(usage.peak_memory > 30_000_000, "{usage:?}");
        assert!(usage.cpu > Duration::ZERO && usage.cpu < Duration::from_secs(60), "{usage:?}");
        // A file system without a disk counts nothing; a page that the disk took half full counts once more.
        let of_file = 1_228_800..=1_228_800 + 4 * 4096;
        assert!(usage.written == 0 || of_file.contains(&usage.written), "{usage:?}");
    }
}

//! What the kernel says about a mount that fails.
//!
//! Few file systems write to the log of their configuration context; EROFS and overlayfs explain most
//! refusals in the kernel's own log only. So that log is followed during the attempt.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, SeekFrom};

/// The most lines taken: an error, not a history.
const MAX_LINES: usize = 16;

/// The lines that a file system wrote while it was being mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelLog(pub Vec<String>);

impl std::fmt::Display for KernelLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.0.is_empty() {
            write!(f, " (the kernel says: {})", self.0.join("; "))?;
        }
        Ok(())
    }
}

/// The kernel's log from a moment on.
#[derive(Debug)]
pub(super) struct KernelLogTail {
    fd: OwnedFd,
}

impl KernelLogTail {
    /// From now on. `None` without the right to read it (`CAP_SYSLOG`).
    pub(super) fn new() -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).ok()?;
        rustix::fs::seek(&fd, SeekFrom::End(0)).ok()?;
        Some(Self { fd })
    }

    /// The lines of one file system since then. Those of another mount of the same type made at the
    /// same moment may be among them.
    pub(super) fn lines_of(&self, fstype: &str) -> Vec<String> {
        let mut lines = Vec::new();
        // A record has at most 8192 bytes; EPIPE means that some were overwritten before we came.
        let mut buffer = [0; 8192];
        while lines.len() < MAX_LINES {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(len) if len > 0 => lines.extend(line_of(fstype, &buffer[..len])),
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => break,
            }
        }
        lines
    }
}

/// The text of a record such as `3,812,9130,-;erofs (device loop0): no magic`, if it is about the
/// file system.
fn line_of(fstype: &str, record: &[u8]) -> Option<String> {
    let record = String::from_utf8_lossy(record);
    let (_, text) = record.split_once(';')?;
    let text = text.lines().next()?;
    // overlay calls itself overlayfs there.
    let speaker = if fstype == "overlay" { "overlayfs" } else { fstype };
    let about = text.strip_prefix(speaker)?;
    about.starts_with([':', ' ']).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(fstype: &str, record: &str, expected: Option<&str>) {
        assert_eq!(line_of(fstype, record.as_bytes()).as_deref(), expected, "{record}");
    }

    #[test]
    fn records_of_the_kernel() {
        let erofs = "3,812,9130,-;erofs (device loop0): no magic\n SUBSYSTEM=block\n";
        check("erofs", erofs, Some("erofs (device loop0): no magic"));
        check("ero", erofs, None);
        check("overlay", "3,1,2,-;overlayfs: bad\n", Some("overlayfs: bad"));
        check("fuse", "3,1,2,-;fused: x\n", None);
        check("fuse", "no record", None);
        check("fuse", "3,1,2,-;", None);
    }
}

//! The end of the machine: systemd has stopped its services, tells whatever is left to terminate, and waits
//! for that, a minute and a half if need be.

use std::fs;
use std::path::{Path, PathBuf};

/// Whether systemd has handed over to the program that ends what is left.
pub(crate) fn is_ending() -> bool {
    // Names are cut off at 15 bytes.
    fs::read("/proc/1/comm").is_ok_and(|name| name.starts_with(b"systemd-shutdow"))
}

/// Whether there is a process that may read yet: any but the first one, those of the kernel, and those of this
/// program, which depend on none.
///
/// What a reader would get from a layer that nobody watches any more are zeros.
pub(crate) fn has_readers() -> bool {
    let ours = program(Path::new("/proc/self"));
    let Ok(processes) = fs::read_dir("/proc") else { return true };
    let processes = processes.flatten().filter(|entry| {
        entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok_and(|pid| pid > 1))
    });
    let mut others = processes.filter(|process| program(&process.path()) != ours);
    others.any(|process| fs::read(process.path().join("stat")).is_ok_and(|stat| may_read(&stat)))
}

/// What a process runs. Another build in the same place is another.
fn program(process: &Path) -> Option<PathBuf> {
    fs::read_link(process.join("exe")).ok()
}

/// Whether a process that is described so, as in proc(5), has memory of its own and has not ended.
fn may_read(stat: &[u8]) -> bool {
    // Names may hold anything, also parentheses.
    let end = stat.iter().rposition(|byte| *byte == b')');
    let rest = end.and_then(|end| stat.get(end + 1..)).unwrap_or_default();
    let rest = String::from_utf8_lossy(rest);
    // The third field is the first here.
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let (Some(state), Some(flags)) = (fields.first(), fields.get(6)) else { return false };
    let is_of_the_kernel = flags.parse::<u64>().is_ok_and(|flags| flags & PF_KTHREAD != 0);
    !is_of_the_kernel && !matches!(*state, "Z" | "X")
}

/// `include/linux/sched.h`: a thread of the kernel.
const PF_KTHREAD: u64 = 0x0020_0000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_processes_with_memory_read() {
        let check =
            |stat: &str, expected| assert_eq!(may_read(stat.as_bytes()), expected, "{stat}");
        check("778 (sleep) S 760 778 778 0 -1 4194560 107 0 0 0", true);
        check("778 (sleep) D 760 778 778 0 -1 4194560 107 0 0 0", true);
        check("778 (sleep) Z 760 778 778 0 -1 4194560 107 0 0 0", false);
        check("12 (kworker/0:1) I 2 0 0 0 -1 69238880 0 0 0 0", false);
        check("9 (a) Z 1 (b) S 1 9 9 0 -1 4194304 0 0 0 0", true);
        check("9 (", false);
        check("", false);
    }

    #[test]
    fn this_machine_goes_on() {
        assert!(!is_ending());
    }
}

//! When a thread runs.

use std::io;

/// Lets the calling thread run as soon as it can, before all ordinary threads (`SCHED_FIFO`).
///
/// For threads that wait most of the time: one that never waits takes a whole core.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` and a limit that allows it.
pub fn precede_others() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: PRIORITY };
    // SAFETY: 0 names the calling thread, and the kernel only reads the argument.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Above the ordinary, below what the kernel's own threads use.
const PRIORITY: i32 = 10;

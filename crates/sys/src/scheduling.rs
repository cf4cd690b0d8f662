//! When a thread runs.

use std::io;

/// Lets the calling thread run as soon as it can, before all ordinary threads (`SCHED_FIFO`).
///
/// For threads that wait most of the time: one that never waits takes a whole core.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` and a limit that allows it.
pub fn precede_others() -> io::Result<()> {
    // The kernel's own `struct sched_param`. musl has another, and refuses the call, which POSIX has of
    // processes where the kernel has it of threads.
    let priority: libc::c_int = PRIORITY;
    let number = libc::SYS_sched_setscheduler;
    // SAFETY: 0 names the calling thread, and the kernel only reads what the last argument points to.
    match unsafe { libc::syscall(number, 0, libc::SCHED_FIFO, &raw const priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Above the ordinary, below what the kernel's own threads use.
const PRIORITY: libc::c_int = 10;

//! Reads under way, and ending those whose reader is being killed.
//!
//! A thread that waits for a read which the daemon has already taken cannot be killed: the kernel
//! sends `FUSE_INTERRUPT` once, for the first signal of any kind, and then waits for the answer.
//! Answering `EINTR` to every signal would fail reads of programs that use signals for themselves
//! (the Go runtime does all the time), so it is done only for a thread that is dying. Of a thread
//! that is not, it is looked up again from time to time, since no second message comes.
//!
//! Most reads never get here: those made by read-ahead have no thread of their own, and whoever waits
//! for their pages can be killed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How often the threads that got a signal are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Locks; requests under way are spread over them.
const N_SHARDS: usize = 16;

/// The reads that were not answered yet.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// The waiting thread of each request.
    shards: [Mutex<HashMap<u64, u32>>; N_SHARDS],
    signalled: Mutex<Signalled>,
    n_signalled: AtomicUsize,
}

/// Requests whose thread got a signal, and since when that is known.
#[derive(Debug, Default)]
struct Signalled {
    requests: Vec<(u64, Instant)>,
    /// When to look at them.
    next_look: Option<Instant>,
}

impl Waiting {
    pub(crate) fn insert(&self, unique: u64, pid: u32) {
        self.shard(unique).lock().insert(unique, pid);
    }

    pub(crate) fn remove(&self, unique: u64) -> Option<u32> {
        self.shard(unique).lock().remove(&unique)
    }

    /// Notes that a thread got a signal while it waits for that request.
    pub(crate) fn signal(&self, unique: u64, now: Instant) {
        let mut signalled = self.signalled.lock();
        signalled.requests.push((unique, now));
        signalled.next_look = Some(now);
        self.n_signalled.store(signalled.requests.len(), Ordering::Relaxed);
    }

    /// How long to wait before [`take_dying`](Self::take_dying) is called again.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        (self.n_signalled.load(Ordering::Relaxed) > 0).then_some(LOOK_AGAIN)
    }

    /// The requests to end with `EINTR`, because their thread is being killed or because nobody
    /// here knows them; each is given once.
    pub(crate) fn take_dying(&self, now: Instant) -> Vec<u64> {
        if self.n_signalled.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        let mut signalled = self.signalled.lock();
        if signalled.next_look.is_none_or(|next| now < next) {
            return Vec::new();
        }
        signalled.next_look = Some(now + LOOK_AGAIN);
        let ends = |(unique, since): &mut (u64, Instant)| self.ends(*unique, now - *since);
        let ended: Vec<_> = signalled.requests.extract_if(.., ends).collect();
        self.n_signalled.store(signalled.requests.len(), Ordering::Relaxed);
        ended.into_iter().map(|(unique, _)| unique).collect()
    }

    fn ends(&self, unique: u64, signalled_for: Duration) -> bool {
        let pid = self.shard(unique).lock().get(&unique).copied();
        match pid {
            Some(pid) => is_dying(pid) && self.remove(unique).is_some(),
            // Perhaps the thread that has the request has not come to noting it. If that is not
            // it, the request was answered, and another answer does no harm, or a predecessor took
            // it to its grave on a kernel that cannot send it again.
            None => signalled_for >= LOOK_AGAIN,
        }
    }

    fn shard(&self, unique: u64) -> &Mutex<HashMap<u64, u32>> {
        // The kernel counts in steps of two; the top bit marks a request sent again.
        let shard = usize::try_from((unique >> 1) & 0xff).unwrap_or(0);
        &self.shards[shard % N_SHARDS]
    }
}

/// Whether SIGKILL is pending for a thread. Any signal that ends a process becomes one for each of
/// its threads.
fn is_dying(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .is_ok_and(|status| has_sigkill_pending(&status))
}

fn has_sigkill_pending(status: &str) -> bool {
    let sigkill = 1_u64 << 8;
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    pending
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & sigkill != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigkill_is_bit_eight_of_the_threads_own_mask() {
        let check = |status: &str, expect| assert_eq!(has_sigkill_pending(status), expect);
        check("Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", true);
        check("Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n", false);
        check("SigPnd:\t00000000000000ff\n", false);
        check("SigPnd:\tnonsense\n", false);
        check("", false);
    }

    #[test]
    fn living_threads_are_looked_at_again_and_unknown_requests_once() {
        let waiting = Waiting::default();
        let start = Instant::now();
        let check = |after: Duration, ended: &[u64], timeout: Option<Duration>| {
            assert_eq!(waiting.take_dying(start + after), ended);
            assert_eq!(waiting.timeout(), timeout);
        };
        let unknown = 4;
        waiting.insert(2, std::process::id());
        waiting.signal(2, start);
        waiting.signal(unknown, start);
        check(Duration::ZERO, &[], Some(LOOK_AGAIN));
        check(LOOK_AGAIN / 2, &[], Some(LOOK_AGAIN));
        check(LOOK_AGAIN, &[unknown], Some(LOOK_AGAIN));
        assert_eq!(waiting.remove(2), Some(std::process::id()));
        check(LOOK_AGAIN * 2, &[2], None);
    }
}

//! When spans were used last, and which of them may not go yet.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::RwLockReadGuard;

use super::Layer;

/// Tenths of seconds since the store was opened; 32 bits of them last for 13 years.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn now(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_millis() / TICK_MILLIS).unwrap_or(u32::MAX)
    }
}

/// A duration on the store's clock, rounded up.
pub(crate) fn ticks(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(TICK_MILLIS)).unwrap_or(u32::MAX)
}

/// As long as it lives, no span of the layer is given up. See [`Layer::reading`].
#[derive(Debug)]
pub struct Reading<'a> {
    _guard: RwLockReadGuard<'a, ()>,
}

impl Layer {
    /// Keeps every span where it is, from the look whether it is present until it was read.
    ///
    /// An eviction waits for those who read, for a moment, and new ones wait for it: do not wait for
    /// anything while you hold it, and take no second one in the same thread.
    #[must_use = "what is read without it may be punched at the same moment"]
    pub fn reading(&self) -> Reading<'_> {
        Reading { _guard: self.punching.read() }
    }

    /// Notes that a reader uses the span, and says whether it is present.
    #[must_use = "the span may be missing"]
    pub fn touch(&self, span: u32) -> bool {
        self.note_use(span);
        self.present.contains(span)
    }

    /// Notes that somebody may be on the way to the file who cannot be waited for: nothing is given up
    /// for the store's grace period.
    ///
    /// Such are readers that the kernel let go before it began to ask, those whom an earlier process
    /// let go, and those who are not known.
    pub fn unknown_reader(&self) {
        let grace = self.shared.grace.load(Ordering::Relaxed);
        let until = self.shared.clock.now().saturating_add(grace);
        self.unknown_until.fetch_max(until, Ordering::SeqCst);
    }

    /// Whether nothing is given up for the time being because of [unknown
    /// readers](Self::unknown_reader).
    #[must_use]
    pub fn has_unknown_readers(&self) -> bool {
        self.shared.clock.now() < self.unknown_until.load(Ordering::SeqCst)
    }

    pub(crate) fn last_use(&self, span: u32) -> u32 {
        let at = usize::try_from(span).ok().and_then(|span| self.used.get(span));
        at.map_or(0, |used| used.load(Ordering::SeqCst))
    }

    #[cfg(test)]
    pub(crate) fn set_last_use(&self, span: usize, at: u32) {
        self.used[span].store(at, Ordering::SeqCst);
    }

    /// Whether the span was used within the last `idle` ticks, or may be used by somebody unknown.
    pub(crate) fn is_in_use(&self, span: u32, idle: u32) -> bool {
        let now = self.shared.clock.now();
        now.saturating_sub(self.last_use(span)) < idle || self.has_unknown_readers()
    }

    pub(super) fn note_use(&self, span: u32) {
        let now = self.shared.clock.now();
        if let Some(used) = usize::try_from(span).ok().and_then(|span| self.used.get(span)) {
            used.store(now, Ordering::SeqCst);
        }
        let noted = self.use_noted.load(Ordering::Relaxed);
        let due = now.saturating_sub(noted) >= USE_NOTED_EVERY;
        let swap =
            || self.use_noted.compare_exchange(noted, now, Ordering::Relaxed, Ordering::Relaxed);
        if due && swap().is_ok() {
            self.write_down_use();
        }
    }

    /// The time of the last use is the modification time of the layer's folder. Without it, only the
    /// order of eviction is worse.
    pub(super) fn write_down_use(&self) {
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
        rustix::fs::futimens(&self.folder, &times).ok();
    }
}

/// The last use of a layer is written to disk at most this often, in ticks.
const USE_NOTED_EVERY: u32 = 600;

/// The grace period when none is set: the kernel reads within milliseconds of the permission, unless the
/// reader's share of the CPU is used up.
pub(crate) const GRACE: Duration = Duration::from_mins(1);

const TICK_MILLIS: u128 = 100;

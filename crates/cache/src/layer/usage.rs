//! When spans were used last, and which of them may not go yet.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Layer;

/// Seconds since the store was opened.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn now(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

impl Layer {
    /// Notes that a reader uses the span, and says whether it is present.
    ///
    /// A span that was touched is not evicted for the store's grace period. That bridges the time
    /// from telling the kernel that a reader may go on until it has read.
    #[must_use = "the span may be missing"]
    pub fn touch(&self, span: u32) -> bool {
        self.note_use(span);
        self.present.contains(span)
    }

    pub(crate) fn last_use(&self, span: u32) -> u32 {
        let at = usize::try_from(span).ok().and_then(|span| self.used.get(span));
        at.map_or(0, |used| used.load(Ordering::SeqCst))
    }

    #[cfg(test)]
    pub(crate) fn set_last_use(&self, span: usize, at: u32) {
        self.used[span].store(at, Ordering::SeqCst);
    }

    /// Whether the span was used so lately that its reader may not have read yet.
    pub(crate) fn is_in_use(&self, span: u32) -> bool {
        let idle = self.shared.clock.now().saturating_sub(self.last_use(span));
        idle < self.shared.grace.load(Ordering::Relaxed)
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

/// The last use of a layer is written to disk at most this often, in seconds.
const USE_NOTED_EVERY: u32 = 60;

/// The grace period in seconds when none is set: the kernel reads within milliseconds of the permission, unless
/// the reader's CPU share is used up.
pub(crate) const GRACE_SECONDS: u32 = 60;

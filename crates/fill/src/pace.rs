//! How fast bytes come, and so how many may be on their way without being wanted yet.
//!
//! What was asked for cannot be called back: it is on the link before whatever a reader asks for next.
//! So the less a link carries, the less is asked for ahead.

use std::time::{Duration, Instant};

/// The rate at which bytes arrive.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes a second.
    rate: u64,
    since: Instant,
    bytes: u64,
    /// Whether completion kept the link busy all the time since.
    busy: bool,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { rate: FIRST_RATE, since: now, bytes: 0, busy: true }
    }

    /// Counts bytes that have come; `busy` says whether completion has transfers under way. Readers alone
    /// ask for little at a time, so what they get shows that a link is fast, never that it is slow.
    pub(crate) fn count(&mut self, bytes: u64, busy: bool, now: Instant) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.busy &= busy;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < SAMPLE {
            return;
        }
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX).max(1);
        let rate = self.bytes.saturating_mul(1_000_000) / micros;
        // A pause says nothing about the link: the rate sinks slowly, and only while bytes come.
        let floor = if self.busy { self.rate - self.rate / 8 } else { self.rate };
        self.rate = rate.max(floor);
        self.since = now;
        self.bytes = 0;
        self.busy = true;
    }

    /// What the link carries in `time`.
    fn carries(&self, time: Duration) -> u64 {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.rate.saturating_mul(micros) / 1_000_000
    }

    /// Whether completion stands back, with `missing` bytes to go and readers `quiet` for so long.
    ///
    /// What can be here in a few seconds is the best of all read-ahead. Over a slower link it would take
    /// more from a starting program than it gives.
    pub(crate) fn holds_back(&self, missing: u64, quiet: Duration) -> bool {
        quiet < QUIET && missing > self.carries(SOON)
    }

    /// `limits` for a link of this rate.
    pub(crate) fn limits(&self, limits: plan::Limits) -> plan::Limits {
        let idle_bytes = self.carries(IDLE).clamp(512 << 10, limits.idle_bytes);
        let connections = u64::from(limits.background_connections.max(1));
        plan::Limits {
            idle_bytes,
            background_bytes: (idle_bytes / connections).clamp(256 << 10, limits.background_bytes),
            speculative_bytes: self
                .carries(WAITING)
                .clamp(256 << 10, limits.speculative_bytes.max(256 << 10)),
            ..limits
        }
    }
}

/// Bytes a second until something is known: half a Gbit/s, so that completion begins, and shows.
const FIRST_RATE: u64 = 60_000_000;

/// How long is counted before the rate is looked at.
const SAMPLE: Duration = Duration::from_millis(50);

/// For how long the link may be busy with what nobody waits for: enough to keep it full over round trips
/// of 60 ms.
const IDLE: Duration = Duration::from_millis(60);

/// What completes within this time is not held back.
const SOON: Duration = Duration::from_secs(5);

/// How long no reader must have waited before what is held back goes on.
const QUIET: Duration = Duration::from_millis(500);

/// The same while a reader waits: it keeps the link full over a round trip of 20 ms.
const WAITING: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    /// What is known after bytes came at `rate` for a second.
    fn pace_after_a_second_at(rate: u64) -> Pace {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        for step in 1..=100 {
            pace.count(rate / 100, true, begin + Duration::from_millis(10) * step);
        }
        pace
    }

    fn after_a_second_at(rate: u64) -> plan::Limits {
        let limits = plan::Limits { background_connections: 4, ..plan::Limits::default() };
        pace_after_a_second_at(rate).limits(limits)
    }

    #[test]
    fn completion_stands_back_where_it_would_take_long() {
        let check = |rate, missing, quiet, expected| {
            let pace = pace_after_a_second_at(rate);
            let quiet = Duration::from_millis(quiet);
            assert_eq!(pace.holds_back(missing, quiet), expected, "{rate} {missing} {quiet:?}");
        };
        check(125_000_000, 200_000_000, 0, false);
        check(12_500_000, 200_000_000, 0, true);
        check(12_500_000, 200_000_000, 499, true);
        check(12_500_000, 200_000_000, 500, false);
        check(12_500_000, 50_000_000, 0, false);
    }

    #[test]
    fn a_slow_link_is_kept_free() {
        let limits = after_a_second_at(12_500_000);
        assert_eq!(limits.idle_bytes, 750_000);
        assert_eq!(limits.background_bytes, 256 << 10);
        assert_eq!(limits.speculative_bytes, 256 << 10);
    }

    #[test]
    fn a_fast_link_is_kept_full() {
        let limits = after_a_second_at(125_000_000);
        assert_eq!(limits.idle_bytes, 7_500_000);
        assert_eq!(limits.background_bytes, 7_500_000 / 4);
        assert_eq!(limits.speculative_bytes, 2_500_000);
    }

    #[test]
    fn a_pause_changes_nothing_and_a_slower_link_is_noticed() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        pace.count(10_000_000, true, begin + Duration::from_millis(100));
        assert_eq!(pace.rate, 100_000_000);
        pace.count(1, true, begin + Duration::from_secs(100));
        assert_eq!(pace.rate, 87_500_000);
        pace.count(1, false, begin + Duration::from_secs(101));
        assert_eq!(pace.rate, 87_500_000);
    }
}

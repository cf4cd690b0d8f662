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
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { rate: FIRST_RATE, since: now, bytes: 0 }
    }

    /// Counts bytes that have come.
    pub(crate) fn count(&mut self, bytes: u64, now: Instant) {
        self.bytes = self.bytes.saturating_add(bytes);
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < SAMPLE {
            return;
        }
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX).max(1);
        let rate = self.bytes.saturating_mul(1_000_000) / micros;
        // A pause says nothing about the link: the rate sinks slowly, and only while bytes come.
        self.rate = rate.max(self.rate - self.rate / 8);
        self.since = now;
        self.bytes = 0;
    }

    /// What the link carries in `time`.
    fn carries(&self, time: Duration) -> u64 {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.rate.saturating_mul(micros) / 1_000_000
    }

    /// `limits` for a link of this rate.
    pub(crate) fn limits(&self, limits: plan::Limits) -> plan::Limits {
        let idle_bytes = self.carries(IDLE).clamp(1 << 20, limits.idle_bytes);
        let connections = u64::from(limits.background_connections.max(1));
        plan::Limits {
            idle_bytes,
            background_bytes: (idle_bytes / connections).clamp(512 << 10, limits.background_bytes),
            speculative_bytes: self
                .carries(WAITING)
                .clamp(256 << 10, limits.speculative_bytes.max(256 << 10)),
            ..limits
        }
    }
}

/// Bytes a second until something is known: 160 Mbit/s.
const FIRST_RATE: u64 = 20_000_000;

/// How long is counted before the rate is looked at.
const SAMPLE: Duration = Duration::from_millis(50);

/// For how long the link may be busy with what nobody waits for: enough to keep it full over round trips
/// of 100 ms.
const IDLE: Duration = Duration::from_millis(150);

/// The same while a reader waits: it keeps the link full over a round trip of 20 ms.
const WAITING: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    /// The limits after bytes came at `rate` for a second.
    fn after_a_second_at(rate: u64) -> plan::Limits {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        for step in 1..=100 {
            pace.count(rate / 100, begin + Duration::from_millis(10) * step);
        }
        pace.limits(plan::Limits { background_connections: 4, ..plan::Limits::default() })
    }

    #[test]
    fn a_slow_link_is_kept_free() {
        let limits = after_a_second_at(12_500_000);
        assert_eq!(limits.idle_bytes, 1_875_000);
        assert_eq!(limits.background_bytes, 512 << 10);
        assert_eq!(limits.speculative_bytes, 256 << 10);
    }

    #[test]
    fn a_fast_link_is_kept_full() {
        let limits = after_a_second_at(125_000_000);
        assert_eq!(limits.idle_bytes, 18_750_000);
        assert_eq!(limits.background_bytes, 18_750_000 / 4);
        assert_eq!(limits.speculative_bytes, 2_500_000);
    }

    #[test]
    fn a_pause_changes_nothing_and_a_slower_link_is_noticed() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        pace.count(10_000_000, begin + Duration::from_millis(100));
        assert_eq!(pace.rate, 100_000_000);
        pace.count(1, begin + Duration::from_secs(100));
        assert_eq!(pace.rate, 87_500_000);
    }
}

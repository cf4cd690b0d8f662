//! When a failed request is made again.

use std::hash::{BuildHasher, Hasher as _, RandomState};
use std::time::Duration;

use crate::FetchError;

/// How often and when small requests (resolve, manifests, whole blobs) are made again.
///
/// Ranges of blobs are not: whoever reads them knows how long the reader can wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How many times a request is made at most, over all mirrors each time.
    pub attempts: u32,
    /// The wait before the second attempt; each further one is twice as long.
    pub first_delay: Duration,
    /// The longest wait. A registry that asks for a longer one gets no further attempt.
    pub max_delay: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 4,
            first_delay: Duration::from_millis(200),
            max_delay: Duration::from_secs(20),
        }
    }
}

impl RetryPolicy {
    /// How long to wait after the failure of attempt `n` (counted from 1), or `None` to give up.
    pub(crate) fn delay(&self, n: u32, error: &FetchError, random: u64) -> Option<Duration> {
        if n >= self.attempts || !error.is_transient() {
            return None;
        }
        if let Some(asked) = error.retry_after() {
            return (asked <= self.max_delay).then_some(asked);
        }
        let doubled = self.first_delay.saturating_mul(1 << n.saturating_sub(1).min(20));
        let longest = doubled.min(self.max_delay);
        // Between half and all of it, so that a thousand nodes do not come back at once.
        let thousandths = u32::try_from(500 + random % 501).unwrap_or(1000);
        Some(longest * thousandths / 1000)
    }
}

/// Any number, another one each time.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable(retry_after: Option<u64>) -> FetchError {
        let retry_after = retry_after.map(Duration::from_secs);
        FetchError::TooManyRequests { url: String::new(), retry_after }
    }

    #[test]
    fn waits_double_up_to_a_limit_and_are_spread() {
        let policy = RetryPolicy { attempts: 9, ..RetryPolicy::default() };
        let delay = |n, random| policy.delay(n, &unavailable(None), random).unwrap().as_millis();
        assert_eq!((delay(1, 0), delay(1, 500)), (100, 200));
        assert_eq!((delay(2, 0), delay(2, 500)), (200, 400));
        assert_eq!((delay(8, 0), delay(8, 500)), (10_000, 20_000));
        assert_eq!(policy.delay(9, &unavailable(None), 0), None);
    }

    #[test]
    fn the_registrys_wish_is_honoured_or_the_attempt_given_up() {
        let policy = RetryPolicy::default();
        let seconds = Duration::from_secs;
        assert_eq!(policy.delay(1, &unavailable(Some(3)), 7), Some(seconds(3)));
        assert_eq!(policy.delay(1, &unavailable(Some(0)), 7), Some(seconds(0)));
        assert_eq!(policy.delay(1, &unavailable(Some(3600)), 7), None);
    }

    #[test]
    fn what_will_not_pass_is_not_tried_again() {
        let error = FetchError::NotFound { url: String::new() };
        assert_eq!(RetryPolicy::default().delay(1, &error, 0), None);
    }
}

//! How long things took: counts in classes, as metrics want them.

use std::time::Duration;

/// How long things took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Durations {
    counts: [u64; BOUNDS.len() + 1],
    sum: Duration,
}

impl Durations {
    /// Adds one.
    pub fn add(&mut self, duration: Duration) {
        let class = BOUNDS.partition_point(|bound| *bound < duration);
        if let Some(count) = self.counts.get_mut(class) {
            *count += 1;
        }
        self.sum += duration;
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them together.
    #[must_use]
    pub const fn sum(&self) -> Duration {
        self.sum
    }

    /// For each class how long one took at most, and how many there are; the last has no bound.
    pub fn classes(&self) -> impl Iterator<Item = (Duration, u64)> {
        BOUNDS.into_iter().chain([Duration::MAX]).zip(self.counts)
    }
}

/// From a read that was served at once to one that reached its deadline.
const BOUNDS: [Duration; 12] = [
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_secs(100),
    Duration::from_secs(300),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_falls_into_one_class() {
        let mut durations = Durations::default();
        for millis in [0, 1, 2, 5, 400_000] {
            durations.add(Duration::from_millis(millis));
        }
        let found: Vec<(u128, u64)> = durations
            .classes()
            .filter(|(_, count)| *count > 0)
            .map(|(bound, count)| (bound.as_millis(), count))
            .collect();
        assert_eq!(found, [(1, 2), (5, 2), (Duration::MAX.as_millis(), 1)]);
        assert_eq!((durations.count(), durations.sum().as_millis()), (5, 400_008));
    }
}

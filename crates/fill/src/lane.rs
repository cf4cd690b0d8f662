//! Jobs that wait for a thread.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use parking_lot::{Condvar, Mutex};
use plan::Class;

/// Gives out jobs one by one: the most urgent first, and among those the oldest.
pub(crate) struct Lane<T> {
    queue: Mutex<Queue<T>>,
    filled: Condvar,
}

struct Queue<T> {
    jobs: BinaryHeap<Ranked<T>>,
    pushed: u64,
    closed: bool,
}

struct Ranked<T> {
    rank: (Reverse<Class>, Reverse<u64>),
    job: T,
}

impl<T> PartialEq for Ranked<T> {
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
    }
}
impl<T> Eq for Ranked<T> {}
impl<T> PartialOrd for Ranked<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Ranked<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank.cmp(&other.rank)
    }
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        let queue = Queue { jobs: BinaryHeap::new(), pushed: 0, closed: false };
        Self { queue: Mutex::new(queue), filled: Condvar::new() }
    }
}

impl<T> Lane<T> {
    pub(crate) fn push(&self, class: Class, job: T) {
        let mut queue = self.queue.lock();
        queue.pushed += 1;
        let rank = (Reverse(class), Reverse(queue.pushed));
        queue.jobs.push(Ranked { rank, job });
        drop(queue);
        self.filled.notify_one();
    }

    /// Takes out the jobs that are meant, and leaves the others in their order.
    pub(crate) fn take(&self, is_meant: impl Fn(&T) -> bool) -> Vec<T> {
        let mut queue = self.queue.lock();
        let all = std::mem::take(&mut queue.jobs).into_iter();
        let (taken, left): (Vec<_>, Vec<_>) = all.partition(|ranked| is_meant(&ranked.job));
        queue.jobs = left.into();
        taken.into_iter().map(|ranked| ranked.job).collect()
    }

    /// The next job; waits for one. `None` once the lane is closed.
    pub(crate) fn pop(&self) -> Option<T> {
        let mut queue = self.queue.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(ranked) = queue.jobs.pop() {
                return Some(ranked.job);
            }
            self.filled.wait(&mut queue);
        }
    }

    /// Ends the waiting of those who pop, whatever is left.
    pub(crate) fn close(&self) {
        self.queue.lock().closed = true;
        self.filled.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> Lane<&'static str> {
        let lane = Lane::default();
        lane.push(Class::Background, "whole 1");
        lane.push(Class::ReadAhead, "soon");
        lane.push(Class::Demand, "now 1");
        lane.push(Class::Background, "whole 2");
        lane.push(Class::Demand, "now 2");
        lane
    }

    fn emptied(lane: &Lane<&'static str>, jobs: usize) -> Vec<&'static str> {
        (0..jobs).filter_map(|_| lane.pop()).collect()
    }

    #[test]
    fn the_most_urgent_comes_first_and_then_the_oldest() {
        assert_eq!(emptied(&filled(), 5), ["now 1", "now 2", "soon", "whole 1", "whole 2"]);
    }

    #[test]
    fn what_is_taken_out_is_gone_and_the_others_keep_their_order() {
        let lane = filled();
        let mut taken = lane.take(|job| job.ends_with('1'));
        taken.sort_unstable();
        assert_eq!(taken, ["now 1", "whole 1"]);
        assert_eq!(emptied(&lane, 3), ["now 2", "soon", "whole 2"]);
    }

    #[test]
    fn whoever_waits_when_it_closes_gets_nothing() {
        let lane = Lane::<&str>::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| lane.pop());
            lane.close();
            assert_eq!(waiting.join().unwrap(), None);
        });
        lane.push(Class::Demand, "late");
        assert_eq!(lane.pop(), None);
    }
}

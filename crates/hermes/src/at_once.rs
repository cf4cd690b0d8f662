//! Work on several things at a time that mostly wait.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Does `each` for all of `items` on at most `threads` threads, whichever is free; the results are in the order of
/// the items.
pub(crate) fn at_once<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    each: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(place) else { return done };
            done.push((place, each(item)));
        }
    };
    let mut done: Vec<(usize, R)> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..threads.min(items.len())).map(|_number| scope.spawn(work)).collect();
        let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        ended
            .flat_map(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    done.sort_unstable_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_done_once_and_answered_in_order() {
        for (count, threads) in [(0, 4), (1, 4), (3, 16), (100, 1), (100, 7)] {
            let items: Vec<u32> = (0..count).collect();
            let expected: Vec<u32> = (0..count).map(|item| item * 2).collect();
            assert_eq!(at_once(&items, threads, |item| item * 2), expected, "{count} {threads}");
        }
    }
}

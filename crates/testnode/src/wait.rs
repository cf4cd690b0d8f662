//! Waiting for a condition that nobody announces.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at: short against anything that a test waits for.
const INTERVAL: Duration = Duration::from_millis(5);

/// Looks at `condition` until it holds.
///
/// # Errors
/// Whatever `condition` fails with, at once; and when `limit` has passed without it, an error that
/// names `what` was awaited.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let begin = Instant::now();
    // Nobody sends: the channel is a clock.
    let (_never, pause) = mpsc::channel::<()>();
    loop {
        if condition()? {
            return Ok(());
        }
        if begin.elapsed() >= limit {
            bail!("waited {limit:?} in vain for {what}");
        }
        match pause.recv_timeout(INTERVAL) {
            Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_no_longer_than_needed_and_no_longer_than_allowed() {
        let mut looks = 0;
        let third = |looks: &mut i32| {
            *looks += 1;
            Ok(*looks == 3)
        };
        wait_until("the third look", Duration::from_secs(60), || third(&mut looks)).unwrap();
        assert_eq!(looks, 3);

        let error = wait_until("godot", Duration::from_millis(20), || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("godot"), "{error}");

        let error =
            wait_until("x", Duration::from_secs(60), || bail!("the daemon died")).unwrap_err();
        assert_eq!(error.to_string(), "the daemon died");
    }
}

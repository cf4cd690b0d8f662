//! Ctrl-C: noticed at the next step, so that everything is put away first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sys::signals::{Signal, Signals};

/// Whether the demo was told to stop.
#[derive(Debug)]
pub(super) struct Stop {
    signals: Signals,
    stopped: AtomicBool,
}

impl Stop {
    /// From here on signals only count here.
    pub(super) fn hold() -> Result<Self> {
        let signals = Signals::hold().context("holding signals back")?;
        Ok(Self { signals, stopped: AtomicBool::new(false) })
    }

    /// Fails if a signal has come.
    pub(super) fn check(&self) -> Result<()> {
        while let Some(signal) = self.signals.next()? {
            // The demo does not need its terminal.
            if signal != Signal::Hangup {
                self.stopped.store(true, Ordering::Relaxed);
            }
        }
        if self.stopped.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// As `work` says, or an error as soon as a signal comes.
    pub(super) async fn race<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(OFTEN) => self.check()?,
            }
        }
    }

    /// The signals themselves.
    pub(super) fn signals(&self) -> &Signals {
        &self.signals
    }
}

/// How long a signal may go unnoticed.
pub(super) const OFTEN: Duration = Duration::from_millis(100);

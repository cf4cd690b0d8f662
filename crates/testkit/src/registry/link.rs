//! A link of limited bandwidth and some distance, in the direction from the registry to its clients.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// The way between the registry and its clients.
///
/// All bodies share the bandwidth, a chunk each in turn. Each answer begins one round trip after its
/// request; the first on a connection yet another one later (TCP), or two with TLS (TCP and TLS 1.3).
/// There is no slow start, no loss, and requests cost nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Link {
    /// Bandwidth of the bodies together, in bits per second; `None` is as fast as the machine.
    pub bandwidth_bits_per_s: Option<u64>,
    /// The round-trip time.
    pub latency: Duration,
}

impl Link {
    /// As fast and near as the machine is.
    pub const UNLIMITED: Self = Self { bandwidth_bits_per_s: None, latency: Duration::ZERO };

    /// A link of so many Mbit/s and this round-trip time.
    #[must_use]
    pub const fn mbit_per_s(mbit: u64, latency: Duration) -> Self {
        Self { bandwidth_bits_per_s: Some(mbit.saturating_mul(1_000_000)), latency }
    }

    /// How many bytes are sent in one piece: small enough to be fair, large enough to be cheap.
    pub(super) fn chunk_len(&self) -> usize {
        match self.bandwidth_bits_per_s {
            None => 256 << 10,
            Some(bits) if bits > 2_000_000_000 => 64 << 10,
            Some(bits) if bits < 20_000_000 => 4 << 10,
            Some(_) => 16 << 10,
        }
    }

    /// How long a chunk occupies the link.
    fn occupied(&self, bytes: usize) -> Duration {
        let Some(bits_per_s) = self.bandwidth_bits_per_s else { return Duration::ZERO };
        let nanos = u128::try_from(bytes).unwrap_or(u128::MAX).saturating_mul(8_000_000_000)
            / u128::from(bits_per_s.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// When the link, which all bodies share, is free again.
#[derive(Debug, Clone)]
pub(super) struct Pacer {
    shared: Arc<Mutex<Line>>,
}

#[derive(Debug)]
struct Line {
    link: Link,
    free_at: Instant,
}

impl Pacer {
    pub(super) fn new(link: Link) -> Self {
        Self { shared: Arc::new(Mutex::new(Line { link, free_at: Instant::now() })) }
    }

    pub(super) fn link(&self) -> Link {
        self.shared.lock().link
    }

    /// Changes the link for all chunks to come.
    pub(super) fn set_link(&self, link: Link) {
        *self.shared.lock() = Line { link, free_at: Instant::now() };
    }

    pub(super) fn flow(&self) -> Flow {
        Flow { pacer: self.clone(), timer: None, last: None }
    }

    /// Occupies the link from `from` on, or later if others are before, and says until when.
    fn reserve(&self, from: Instant, bytes: usize) -> Option<Instant> {
        let mut line = self.shared.lock();
        line.link.bandwidth_bits_per_s?;
        let until = line.free_at.max(from) + line.link.occupied(bytes);
        line.free_at = until;
        Some(until)
    }
}

/// One body's way over the link.
///
/// Time is virtual: timers wake us late, and a body that asked for its next chunk right after its last
/// is treated as if it had asked when that one was due. So lateness never adds up, and a client that
/// reads slowly saves up nothing.
#[derive(Debug)]
pub(super) struct Flow {
    pacer: Pacer,
    timer: Option<Timer>,
    /// When the last chunk was due, and when it was really handed on.
    last: Option<(Instant, Instant)>,
}

impl Flow {
    /// Waits until a chunk of so many bytes has passed the link.
    ///
    /// Cancellation: the link stays occupied by the chunk.
    pub(super) async fn pass(&mut self, bytes: usize) -> io::Result<()> {
        let now = Instant::now();
        let asked = match self.last {
            Some((due, handed_on)) => now.min(due + now.saturating_duration_since(handed_on)),
            None => now,
        };
        let Some(due) = self.pacer.reserve(asked, bytes) else { return Ok(()) };
        if due.saturating_duration_since(now) > EARLY {
            sleep_until(&mut self.timer, due).await?;
        } else {
            // Behind time: the others, who are as late, must have their turn all the same.
            tokio::task::yield_now().await;
        }
        self.last = Some((due, Instant::now()));
        Ok(())
    }
}

/// Waits for so long, to some ten microseconds.
pub(super) async fn sleep(duration: Duration) -> io::Result<()> {
    if duration.is_zero() {
        return Ok(());
    }
    sleep_until(&mut None, Instant::now() + duration).await
}

/// Chunks that are due so soon are sent at once, which halves the number of timers at 1 Gbit/s.
const EARLY: Duration = Duration::from_micros(200);

/// A kernel timer. Those of tokio are rounded up to a millisecond: ten chunks at 1 Gbit/s, and five
/// times the round trip in a data centre.
type Timer = AsyncFd<OwnedFd>;

#[expect(
    deprecated,
    reason = "unsound only for types that change their descriptor; the new way is unsafe, which is for `sys` alone"
)]
fn new_timer() -> io::Result<Timer> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    AsyncFd::new(timerfd_create(TimerfdClockId::Monotonic, flags)?)
}

async fn sleep_until(timer: &mut Option<Timer>, due: Instant) -> io::Result<()> {
    let timer = match timer {
        Some(timer) => timer,
        None => timer.insert(new_timer()?),
    };
    loop {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            },
        };
        timerfd_settime(&*timer, TimerfdTimerFlags::empty(), &once)?;
        let mut ready = timer.readable().await?;
        let mut expirations = [0; 8];
        match rustix::io::read(ready.get_inner(), &mut expirations) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
            Err(err) => return Err(err.into()),
        }
    }
}

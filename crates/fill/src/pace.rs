//! How fast bytes come, and so how many may be on their way without being wanted yet.
//!
//! What was asked for cannot be called back: it is on the link before whatever a reader asks for next.
//! So the less a link carries, the less is asked for ahead: what it carries during a round trip, which
//! keeps it busy, and during the time that a reader may be held up. That is also what makes the rate
//! grow to the link's own: as long as there is no queue, more is under way than has come in a round trip.

use std::time::{Duration, Instant};

/// The rate at which bytes arrive.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes a second.
    rate: u64,
    since: Instant,
    bytes: u64,
    /// Whether what nobody waits for kept the link busy all the time since.
    busy: bool,
    /// The shortest times from a request to its first byte: of this period and of the one before.
    trips: [Option<Duration>; 2],
    period_since: Instant,
    /// How much completion may have under way by now.
    completion: u64,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        let (trips, period_since) = ([None; 2], now);
        let completion = FIRST_COMPLETION;
        Self { rate: FIRST_RATE, since: now, bytes: 0, busy: true, trips, period_since, completion }
    }

    /// There is a new layer, of which a program may be about to start: its first reads are those that wait
    /// longest, each for the one before, and over connections that have yet to gain speed. Completion
    /// begins with little again.
    pub(crate) fn begin_anew(&mut self) {
        self.completion = FIRST_COMPLETION;
    }

    /// A request of completion has ended: twice as much may be under way next.
    pub(crate) fn completed(&mut self, bytes: u64) {
        self.completion = self.completion.saturating_add(bytes);
    }

    /// Counts bytes that have come while `in_flight` was under way.
    pub(crate) fn count(
        &mut self,
        bytes: u64,
        in_flight: &plan::InFlight,
        limits: plan::Limits,
        now: Instant,
    ) {
        // Readers alone ask for little at a time: what they get shows that a link is fast, never that it
        // is slow. What nobody waits for keeps it busy, if there is enough of it.
        let enough = self.limits(limits).speculative_bytes / 2;
        let busy = in_flight.background > 0 || in_flight.speculative_bytes >= enough;
        self.count_while(bytes, busy, now);
    }

    fn count_while(&mut self, bytes: u64, busy: bool, now: Instant) {
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

    /// A request's first byte came after `time`.
    pub(crate) fn first_byte(&mut self, time: Duration, now: Instant) {
        if now.saturating_duration_since(self.period_since) > PERIOD {
            self.trips = [None, self.trips[0]];
            self.period_since = now;
        }
        self.trips[0] = Some(self.trips[0].map_or(time, |shortest| shortest.min(time)));
    }

    /// From a request to its first byte where nothing is in its way.
    fn trip(&self) -> Duration {
        self.measured_trip().unwrap_or(FIRST_TRIP)
    }

    fn measured_trip(&self) -> Option<Duration> {
        self.trips.iter().flatten().min().map(|shortest| LONGEST_TRIP.min(*shortest))
    }

    /// How long nothing may come of a request before a reader has it asked for again.
    pub(crate) fn patience(&self) -> Duration {
        // All that is under way takes turns.
        let turn = Duration::from_micros(TURN.saturating_mul(1_000_000) / self.rate.max(1));
        let trips = self.measured_trip().map(|trip| (trip * PATIENT_TRIPS).max(LEAST_PATIENCE));
        trips.unwrap_or(FIRST_PATIENCE).max(turn)
    }

    /// How much a transfer carries while the link carries all that is `under_way`, if it has `left` much more
    /// than that to go, having carried so many bytes in so long: it has lost packets, or its sender is busy.
    pub(crate) fn in_time(
        &self,
        left: u64,
        (carried, took): (u64, Duration),
        under_way: u64,
    ) -> Option<u64> {
        if took < LEAST_PATIENCE {
            return None;
        }
        let link = u128::from(under_way) * 1_000_000 / u128::from(self.rate.max(1));
        let micros = self.trip().as_micros() + link;
        let own = u128::from(carried).saturating_mul(micros) / took.as_micros();
        let own = u64::try_from(own).unwrap_or(u64::MAX);
        (left > own.saturating_mul(MUCH_MORE)).then_some(own)
    }

    /// What the link carries in `time`.
    fn carries(&self, time: Duration) -> u64 {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.rate.saturating_mul(micros) / 1_000_000
    }

    /// How many uncompressed bytes one guess may want: what the link carries in [`GUESS`], at a usual
    /// compression.
    pub(crate) fn reach(&self) -> u64 {
        self.carries(GUESS).saturating_mul(USUAL_RATIO)
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
        let idle_bytes = self.carries(self.trip() + IDLE).clamp(512 << 10, limits.idle_bytes);
        let speculative_bytes = self.carries(self.trip() + WAITING);
        let speculative_bytes =
            speculative_bytes.clamp(256 << 10, limits.speculative_bytes.max(256 << 10));
        let read_ahead_bytes = speculative_bytes / READ_AHEAD_REQUESTS;
        plan::Limits {
            idle_bytes,
            completion_bytes: self.completion.min(idle_bytes),
            read_ahead_bytes: read_ahead_bytes.clamp(256 << 10, limits.read_ahead_bytes),
            background_bytes: (idle_bytes / REQUESTS).clamp(512 << 10, limits.background_bytes),
            speculative_bytes,
            ..limits
        }
    }
}

/// Bytes a second until something is known: half a Gbit/s, so that completion begins, and shows.
const FIRST_RATE: u64 = 60_000_000;

/// How long is counted before the rate is looked at.
const SAMPLE: Duration = Duration::from_millis(50);

/// What nobody waits for is asked for in so many requests at a time: each costs a registry some
/// milliseconds of a processor, whatever its length.
const REQUESTS: u64 = 3;

/// What will be needed soon is asked for in so many at a time, while a reader waits: that is what counts at a
/// start, when each connection has yet to gain speed.
const READ_AHEAD_REQUESTS: u64 = 8;

/// What completion begins with, in compressed bytes.
const FIRST_COMPLETION: u64 = 1 << 20;

/// How long a reader who comes may be held up by what nobody waits for.
const IDLE: Duration = Duration::from_millis(150);

/// How long the link may be busy with a single guess.
const GUESS: Duration = Duration::from_millis(100);

/// Uncompressed bytes to compressed ones.
const USUAL_RATIO: u64 = 3;

/// What completes within this time is not held back.
const SOON: Duration = Duration::from_secs(5);

/// How long no reader must have waited before what is held back goes on.
const QUIET: Duration = Duration::from_millis(500);

/// The same for the next one, while a reader waits.
const WAITING: Duration = Duration::from_millis(60);

/// The round trip until one was measured.
const FIRST_TRIP: Duration = Duration::from_millis(20);

/// A registry that takes longer to answer is not made faster by asking for more.
const LONGEST_TRIP: Duration = Duration::from_millis(200);

/// What TCP needs to find out that a packet is lost, and to send it again, where more follow it.
const PATIENT_TRIPS: u32 = 4;

/// Until a round trip was measured: connections may have to be made first, and tokens to be had.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// What may come of other requests before something comes of one, in bytes: a TLS record for each connection,
/// twice.
const TURN: u64 = 512 << 10;

/// Connections that share a link are seldom as fast as each other.
const MUCH_MORE: u64 = 2;

/// On a short link it is the server's own time that counts.
const LEAST_PATIENCE: Duration = Duration::from_millis(100);

/// How long a round trip is remembered, at least.
const PERIOD: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    /// What is known after bytes came at `rate` for a second.
    fn pace_after_a_second_at(rate: u64) -> Pace {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        for step in 1..=100 {
            pace.count_while(rate / 100, true, begin + Duration::from_millis(10) * step);
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
        assert_eq!(limits.idle_bytes, 2_125_000);
        assert_eq!(pace_after_a_second_at(12_500_000).reach(), 3_750_000);
        assert_eq!(limits.background_bytes, 2_125_000 / 3);
        assert_eq!(limits.speculative_bytes, 1_000_000);
    }

    #[test]
    fn a_fast_link_is_kept_full() {
        let limits = after_a_second_at(125_000_000);
        assert_eq!(limits.idle_bytes, 21_250_000);
        assert_eq!(limits.background_bytes, 21_250_000 / 3);
        assert_eq!(limits.speculative_bytes, 8 << 20);
    }

    #[test]
    fn completion_gains_speed_and_begins_anew_with_a_new_layer() {
        let mut pace = pace_after_a_second_at(125_000_000);
        let mut allowed = || {
            let most = pace.limits(plan::Limits::default()).completion_bytes;
            pace.completed(most);
            most
        };
        let first: Vec<u64> = (0..6).map(|_| allowed()).collect();
        assert_eq!(first, [1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20, 21_250_000]);
        pace.begin_anew();
        assert_eq!(pace.limits(plan::Limits::default()).completion_bytes, 1 << 20);
    }

    #[test]
    fn the_rate_grows_to_that_of_the_link_and_not_beyond() {
        // What is under way comes within a round trip, as long as the link carries it.
        let (trip, link) = (Duration::from_millis(20), 125_000_000_u64);
        let begin = Instant::now();
        let mut pace = Pace { rate: 10_000_000, ..Pace::new(begin) };
        pace.first_byte(trip, begin);
        for step in 1..=100_u32 {
            let under_way = pace.limits(plan::Limits::default()).speculative_bytes;
            let in_a_step = (under_way / 2 * 5).min(link / 20);
            pace.count_while(in_a_step, true, begin + Duration::from_millis(50) * step);
        }
        assert!(pace.rate > link / 10 * 8 && pace.rate <= link, "{}", pace.rate);
    }

    #[test]
    fn patience_grows_with_the_round_trip_and_on_a_slow_link() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        assert_eq!(pace.patience(), FIRST_PATIENCE);
        pace.first_byte(Duration::from_millis(60), begin);
        assert_eq!(pace.patience(), Duration::from_millis(240));
        pace.first_byte(Duration::from_millis(1), begin);
        assert_eq!(pace.patience(), LEAST_PATIENCE);
        pace.rate = 128 << 10;
        assert_eq!(pace.patience(), Duration::from_secs(4));
    }

    #[test]
    fn a_transfer_that_is_slower_by_far_is_left_behind() {
        let mut pace = pace_after_a_second_at(100_000_000);
        pace.first_byte(Duration::from_millis(20), Instant::now());
        let check = |left, carried, took, under_way, expected| {
            let found = pace.in_time(left, (carried, Duration::from_millis(took)), under_way);
            assert_eq!(found, expected, "{left} {carried} {took} {under_way}");
        };
        // Four share the link.
        check(3_000_000, 5_000_000, 200, 32_000_000, None);
        check(3_000_000, 1_000_000, 200, 8_000_000, Some(500_000));
        check(1_000_000, 1_000_000, 200, 8_000_000, None);
        // Too early to say.
        check(3_000_000, 1_000, 99, 8_000_000, None);
        check(u64::MAX, 0, 200, u64::MAX, Some(0));
    }

    #[test]
    fn a_pause_changes_nothing_and_a_slower_link_is_noticed() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        pace.count_while(10_000_000, true, begin + Duration::from_millis(100));
        assert_eq!(pace.rate, 100_000_000);
        pace.count_while(1, true, begin + Duration::from_secs(100));
        assert_eq!(pace.rate, 87_500_000);
        pace.count_while(1, false, begin + Duration::from_secs(101));
        assert_eq!(pace.rate, 87_500_000);
    }
}

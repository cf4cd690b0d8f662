//! One direction of a link: when a packet arrives, or that it does not.

use std::time::{Duration, Instant};

use sys::tun::PACKET_HEADER;

use super::LinkShape;

/// The IP and TCP headers of each segment that a burst is cut into; with TCP's usual time stamps.
const SEGMENT_HEADERS: usize = 52;
/// The least that a queue holds, in bytes: what a router of a short link has.
const MIN_QUEUE: u64 = 512_000;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its last bit reaches the other side.
    Arrives {
        /// When it does.
        due: Instant,
        /// What it takes of the wire.
        bytes: u64,
    },
    /// The queue has no room for it.
    Dropped,
}

/// A wire and the queue in front of it.
#[derive(Debug)]
pub(super) struct Wire {
    bits_per_second: u64,
    delay: Duration,
    queue_bytes: u64,
    /// When all that was put has left the queue.
    free_at: Option<Instant>,
}

impl Wire {
    /// An idle wire, whose queue holds as much as is under way at most.
    pub(super) fn new(shape: LinkShape) -> Self {
        let bits_per_second = shape.bits_per_second.max(1);
        let under_way = bytes_in(bits_per_second, shape.round_trip);
        Self {
            bits_per_second,
            delay: shape.round_trip / 2,
            queue_bytes: under_way.max(MIN_QUEUE),
            free_at: None,
        }
    }

    /// Puts a packet, with its header, on the wire at `now`, which never goes back.
    pub(super) fn put(&mut self, packet: &[u8], now: Instant) -> Fate {
        let bytes = wire_bytes(packet);
        let free_at = self.free_at.map_or(now, |at| at.max(now));
        let waiting = bytes_in(self.bits_per_second, free_at.saturating_duration_since(now));
        if waiting > 0 && waiting + bytes > self.queue_bytes {
            return Fate::Dropped;
        }
        let sent = free_at + time_for(self.bits_per_second, bytes);
        self.free_at = Some(sent);
        Fate::Arrives { due: sent + self.delay, bytes }
    }
}

/// What a packet takes of the wire: a burst is sent as segments, each with headers of its own.
fn wire_bytes(packet: &[u8]) -> u64 {
    let payload = packet.len().saturating_sub(PACKET_HEADER);
    let segment = match packet {
        [_, kind, _, _, low, high, ..] if *kind > 0 => {
            usize::from(u16::from_ne_bytes([*low, *high]))
        }
        _ => 0,
    };
    let more_segments = match segment {
        0 => 0,
        _ => payload.saturating_sub(SEGMENT_HEADERS).div_ceil(segment).saturating_sub(1),
    };
    (payload + more_segments * SEGMENT_HEADERS) as u64
}

fn bytes_in(bits_per_second: u64, time: Duration) -> u64 {
    let bytes = u128::from(bits_per_second) * time.as_nanos() / 8_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

fn time_for(bits_per_second: u64, bytes: u64) -> Duration {
    let nanos = u128::from(bytes) * 8_000_000_000 / u128::from(bits_per_second);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of `payload` bytes, of which `segment` fit into one of the wire's.
    fn packet(payload: usize, segment: u16) -> Vec<u8> {
        let mut packet = vec![0; PACKET_HEADER + payload];
        packet[1] = u8::from(segment > 0);
        packet[4..6].copy_from_slice(&segment.to_ne_bytes());
        packet
    }

    #[test]
    fn bursts_take_the_headers_of_their_segments() {
        for (payload, segment, expected) in [
            (100, 0, 100),
            (1_500, 1_448, 1_500),
            (52 + 2 * 1_448, 1_448, 2 * 1_500),
            (52 + 2 * 1_448 + 1, 1_448, 2 * 1_500 + 53),
            (10, 1_448, 10),
        ] {
            assert_eq!(wire_bytes(&packet(payload, segment)), expected, "{payload} {segment}");
        }
        assert_eq!(wire_bytes(&[]), 0);
    }

    #[test]
    fn packets_are_paced_delayed_and_dropped_at_the_tail() {
        let round_trip = Duration::from_millis(20);
        let mut wire = Wire::new(LinkShape { bits_per_second: 8_000_000, round_trip });
        let begin = Instant::now();
        let mut arrival =
            |at: u64| match wire.put(&packet(1_000, 0), begin + Duration::from_millis(at)) {
                Fate::Arrives { due, bytes: 1_000 } => Some((due - begin).as_millis()),
                Fate::Arrives { bytes, .. } => panic!("{bytes}"),
                Fate::Dropped => None,
            };
        // A millisecond each, one after the other, and 10 ms of way.
        assert_eq!([0, 0, 0].map(&mut arrival), [Some(11), Some(12), Some(13)]);
        // The wire is idle again after a while.
        assert_eq!(arrival(100), Some(111));
        let fates: Vec<_> = (0..600).map(|_| arrival(100)).collect();
        // 512 packets wait, beside the one that is being sent.
        assert_eq!(fates.iter().flatten().count(), 511);
        assert_eq!(fates[600 - 1], None);
        assert_eq!(arrival(200), Some(100 + 10 + 512 + 1));
    }
}

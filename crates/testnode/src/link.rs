//! A link of a given bandwidth and latency between the networks of two nodes, for kernels without
//! `netem` too: a TUN device on each side, and threads of this process that carry packets across.
//!
//! Each packet is paced at the rate, waits in a queue that drops what it cannot hold, and arrives half
//! a round trip later. The devices leave TCP's segmentation undone, so bursts of up to 64 KiB cross in
//! one piece; TCP still counts segments of 1500 bytes, so slow start and congestion window are those of
//! a real link.

mod wire;

use std::io::{self, ErrorKind, PipeWriter};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{Timespec, nanosleep};
use sys::tun::{PACKET_HEADER, TunDevice};

use self::wire::{Fate, Wire};
use crate::node::Node;

/// The address of the node that asked for the link.
pub const NEAR_ADDRESS: &str = "10.77.0.1";
/// The address of the other node.
pub const FAR_ADDRESS: &str = "10.77.0.2";

const DEVICE: &str = "lnk0";
const MTU: &str = "1500";
/// Packets that may wait in the kernel for a thread that carries them: drops are the link's to make.
const KERNEL_QUEUE: &str = "10000";
/// What a packet may have: header, burst, and the IP header in front of it.
const MAX_PACKET: usize = PACKET_HEADER + 65_536 + 1_500;

/// What a link is like, in both directions alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkShape {
    /// Bits that it takes in a second, headers of IP and TCP included; at least 1.
    pub bits_per_second: u64,
    /// What it adds to the time of a packet there and back.
    pub round_trip: Duration,
}

impl FromStr for LinkShape {
    type Err = String;

    /// Reads `1gbit/20ms`, `100mbit/500us` and the like.
    fn from_str(text: &str) -> Result<Self, String> {
        let (rate, round_trip) = text.split_once('/').unwrap_or((text, ""));
        let scaled = |text: &str, units: &[(&str, u64)]| {
            let number = |(unit, factor): &(&str, u64)| {
                text.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*factor)
            };
            units.iter().find_map(number).filter(|n| *n > 0)
        };
        let rates = [("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)];
        let times = [("us", 1), ("ms", 1_000), ("s", 1_000_000)];
        match (scaled(rate, &rates), scaled(round_trip, &times)) {
            (Some(bits_per_second), Some(micros)) => {
                Ok(Self { bits_per_second, round_trip: Duration::from_micros(micros) })
            }
            _ => Err(format!("`{text}` is no link: write a rate and a round trip, as 1gbit/20ms")),
        }
    }
}

/// What has crossed a link in one direction since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes on the wire, with the IP and TCP headers of each segment.
    pub bytes: u64,
    /// Packets and bursts.
    pub packets: u64,
    /// Packets and bursts that the queue could not hold.
    pub dropped: u64,
}

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    packets: AtomicU64,
    dropped: AtomicU64,
}

impl Counters {
    fn read(&self) -> Traffic {
        Traffic {
            bytes: self.bytes.load(Ordering::Relaxed),
            packets: self.packets.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }
}

/// A link between two nodes. Dropping it unplugs it: the devices disappear on both sides.
#[derive(Debug)]
pub struct Link {
    outbound: Arc<Counters>,
    inbound: Arc<Counters>,
    /// Closing it ends the threads.
    lifeline: Option<PipeWriter>,
    threads: Vec<JoinHandle<()>>,
}

impl Node {
    /// Links this node, then at [`NEAR_ADDRESS`], with another, at [`FAR_ADDRESS`]. Both must have a
    /// network of their own, and no other link. TCP in both forgets what it learns of the link, so that
    /// each connection begins like the first.
    ///
    /// # Errors
    /// When the devices cannot be made.
    pub fn link_to(&self, far: &Self, shape: LinkShape) -> Result<Link> {
        let near_end = Arc::new(end(self, NEAR_ADDRESS)?);
        let far_end = Arc::new(end(far, FAR_ADDRESS)?);
        let (ended, lifeline) = io::pipe().context("making a pipe")?;
        let ended = Arc::new(ended);
        let mut link = Link {
            outbound: Arc::default(),
            inbound: Arc::default(),
            lifeline: Some(lifeline),
            threads: Vec::new(),
        };
        let ways = [
            (&near_end, &far_end, link.outbound.clone()),
            (&far_end, &near_end, link.inbound.clone()),
        ];
        for (from, to, counters) in ways {
            let (sender, receiver) = mpsc::channel();
            let (from, to, ended) = (from.clone(), to.clone(), ended.clone());
            let take = move || take(&from, &ended, Wire::new(shape), &counters, &sender);
            for (name, work) in [
                ("link-take", Box::new(take) as Box<dyn FnOnce() + Send>),
                ("link-deliver", Box::new(move || deliver(&to, &receiver))),
            ] {
                let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
                    // Without the right to it the link is only less punctual.
                    sys::scheduling::precede_others().ok();
                    work();
                });
                link.threads.push(thread.context("starting a thread of a link")?);
            }
        }
        Ok(link)
    }
}

impl Link {
    /// What has gone from the node that asked for the link to the other.
    #[must_use]
    pub fn outbound(&self) -> Traffic {
        self.outbound.read()
    }

    /// What has come from the other.
    #[must_use]
    pub fn inbound(&self) -> Traffic {
        self.inbound.read()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        for thread in self.threads.drain(..) {
            // It can only have panicked, and has said so.
            thread.join().ok();
        }
    }
}

/// Makes the device on one side, with its address, up.
fn end(node: &Node, address: &str) -> Result<TunDevice> {
    let device = node
        .in_network(|| TunDevice::create(DEVICE))?
        .with_context(|| format!("making the device {DEVICE} in a node"))?;
    node.run("ip", &["address", "add", &format!("{address}/24"), "dev", DEVICE])?;
    node.run("ip", &["link", "set", DEVICE, "mtu", MTU, "txqueuelen", KERNEL_QUEUE, "up"])?;
    node.write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1")?;
    Ok(device)
}

/// A packet and the moment at which it arrives.
struct Carried {
    due: Instant,
    packet: Vec<u8>,
}

/// Takes what one side sends, until the link is dropped.
fn take(
    device: &TunDevice,
    ended: &impl AsFd,
    mut wire: Wire,
    counters: &Counters,
    sender: &Sender<Carried>,
) {
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        let packet = match device.receive(&mut buffer) {
            Ok(length) => &buffer[..length],
            Err(err) if err.kind() == ErrorKind::WouldBlock => {
                if wait_for_packet(device, ended) {
                    continue;
                }
                return;
            }
            // The device is gone with its node.
            Err(_) => return,
        };
        match wire.put(packet, Instant::now()) {
            Fate::Dropped => {
                counters.dropped.fetch_add(1, Ordering::Relaxed);
            }
            Fate::Arrives { due, bytes } => {
                counters.bytes.fetch_add(bytes, Ordering::Relaxed);
                counters.packets.fetch_add(1, Ordering::Relaxed);
                if sender.send(Carried { due, packet: packet.to_vec() }).is_err() {
                    return;
                }
            }
        }
    }
}

/// Whether there may be a packet; if not, it is over.
fn wait_for_packet(device: &TunDevice, ended: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(device, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
    match poll(&mut fds, None) {
        Ok(_) => fds[1].revents().is_empty(),
        Err(err) => err == rustix::io::Errno::INTR,
    }
}

/// Hands the other side each packet when its time has come.
fn deliver(device: &TunDevice, packets: &Receiver<Carried>) {
    for Carried { due, packet } in packets {
        let early = due.saturating_duration_since(Instant::now());
        if let (false, Ok(early)) = (early.is_zero(), Timespec::try_from(early)) {
            // Woken early by a signal, it is that much early.
            let _left = nanosleep(&early);
        }
        // A device that is down or gone refuses packets, as an unplugged cable would.
        device.send(&packet).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::LinkShape;

    #[track_caller]
    fn check(text: &str, expected: Option<(u64, u128)>) {
        let shape = text.parse::<LinkShape>().ok();
        assert_eq!(shape.map(|s| (s.bits_per_second, s.round_trip.as_micros())), expected);
    }

    #[test]
    fn shapes_are_read_with_their_units() {
        check("1gbit/20ms", Some((1_000_000_000, 20_000)));
        check("100mbit/500us", Some((100_000_000, 500)));
        check("64kbit/1s", Some((64_000, 1_000_000)));
        for text in ["", "1gbit", "/20ms", "1/20ms", "0mbit/1ms", "1gbit/20", "-1gbit/1ms"] {
            check(text, None);
        }
    }
}

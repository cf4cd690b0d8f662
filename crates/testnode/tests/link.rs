//! A link delivers what is sent, no faster than it was told to.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use testnode::{FAR_ADDRESS, LinkShape, Node};

const PORT: u16 = 7_777;
const BYTES: usize = 4 << 20;

#[test]
fn a_link_delivers_everything_and_is_as_slow_as_it_was_told() {
    let (near, far) = (Node::start().unwrap(), Node::start().unwrap());
    let round_trip = Duration::from_millis(20);
    let shape = LinkShape { bits_per_second: 200_000_000, round_trip };
    let link = near.link_to(&far, shape).unwrap();
    let sent: Vec<u8> = (0..BYTES).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();

    let listener = far.in_network(|| TcpListener::bind((FAR_ADDRESS, PORT)).unwrap()).unwrap();
    let begin = Instant::now();
    let (mut stream, connected) = near
        .in_network(|| {
            let stream = TcpStream::connect((FAR_ADDRESS, PORT)).unwrap();
            (stream, begin.elapsed())
        })
        .unwrap();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| listener.accept().unwrap().0.write_all(&sent).unwrap());
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let took = begin.elapsed();

    assert!(received == sent, "{} of {} bytes, or others", received.len(), sent.len());
    assert!(connected >= round_trip, "connected after {connected:?}");
    // 168 ms at this rate. There is no upper limit: the machine may be busy.
    assert!(took >= Duration::from_millis(160), "took {took:?}");
    let (inbound, outbound) = (link.inbound(), link.outbound());
    assert!(inbound.bytes > sent.len() as u64, "{inbound:?}");
    assert!(inbound.packets > 60, "a burst has 64 KiB at most: {inbound:?}");
    assert!(outbound.bytes > 0 && outbound.bytes < inbound.bytes / 10, "{outbound:?}");

    drop(link);
    assert_eq!(near.bash("ip -oneline link | wc -l").unwrap(), "1\n", "the device is gone");
}

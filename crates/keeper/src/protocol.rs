//! The words between keeper and daemon. Values to bytes and back; no sockets.
//!
//! One message is one packet of a unix seqpacket socket: a byte that says what it is, then its
//! fields. A name is preceded by its length in two little-endian bytes; a note is the rest of the
//! packet. A command line is the rest of the packet, with a zero byte after each argument. `Put` and
//! `Held` carry one descriptor. New messages may be added; these keep their form.

use std::os::fd::OwnedFd;

/// The longest name in bytes.
pub const MAX_NAME_LEN: usize = 255;

/// The longest note in bytes.
pub const MAX_NOTE_LEN: usize = 4096;

/// No packet is longer.
pub(crate) const MAX_PACKET_LEN: usize = 1 + 2 + MAX_NAME_LEN + MAX_NOTE_LEN;

/// A descriptor that the keeper holds.
#[derive(Debug)]
pub struct Held {
    /// Its name, unique in the keeper.
    pub name: String,
    /// What the daemon wants to know about it after a restart.
    pub note: Vec<u8>,
    /// A duplicate.
    pub fd: OwnedFd,
}

/// What the daemon asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request<'a> {
    /// Hold the descriptor that comes with this, in place of any other of that name.
    Put { name: &'a str, note: &'a [u8] },
    /// Close the descriptor of that name.
    Remove { name: &'a str },
    /// Send everything.
    List,
    /// Say who you are.
    Ping,
    /// I am the daemon: start me again if I die.
    Daemon,
    /// I end on purpose.
    Goodbye,
    /// Close everything and end.
    Shutdown,
    /// Start the daemon with this command line from now on, or not at all if it is empty.
    Respawn { command: &'a [u8] },
}

/// What the keeper says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply<'a> {
    /// It is done.
    Done,
    /// It was not done.
    Refused(Refusal),
    /// One of what is held; the descriptor comes with this.
    Held { name: &'a str, note: &'a [u8] },
    /// That was the last.
    End,
    /// The keeper's process id.
    Pid(u32),
}

/// Why the keeper did not do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is older than the daemon.
    #[error("it does not know this request")]
    Unknown,
    /// There is no descriptor of that name.
    #[error("it holds nothing of that name")]
    NotHeld,
    /// The packet came without its descriptor: the keeper has no room for more.
    #[error("it received no descriptor; its limit of open files may be reached")]
    NoDescriptor,
}

impl Request<'_> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Put { name, note } => named(1, name, note),
            Self::Remove { name } => named(2, name, &[]),
            Self::List => vec![3],
            Self::Ping => vec![4],
            Self::Daemon => vec![5],
            Self::Goodbye => vec![6],
            Self::Shutdown => vec![7],
            Self::Respawn { command } => [&[8], *command].concat(),
        }
    }
}

impl<'a> Request<'a> {
    pub(crate) fn decode(packet: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = packet.split_first()?;
        match kind {
            1 => name_and_note(rest).map(|(name, note)| Self::Put { name, note }),
            2 => name_and_note(rest).map(|(name, _)| Self::Remove { name }),
            3 => Some(Self::List),
            4 => Some(Self::Ping),
            5 => Some(Self::Daemon),
            6 => Some(Self::Goodbye),
            7 => Some(Self::Shutdown),
            8 => is_command(rest).then_some(Self::Respawn { command: rest }),
            _ => None,
        }
    }
}

impl Reply<'_> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Done => vec![129],
            Self::Refused(refusal) => vec![130, refusal.code()],
            Self::Held { name, note } => named(131, name, note),
            Self::End => vec![132],
            Self::Pid(pid) => [&[133], pid.to_le_bytes().as_slice()].concat(),
        }
    }
}

impl<'a> Reply<'a> {
    pub(crate) fn decode(packet: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = packet.split_first()?;
        match kind {
            129 => Some(Self::Done),
            130 => rest.first().map(|&code| Self::Refused(Refusal::of_code(code))),
            131 => name_and_note(rest).map(|(name, note)| Self::Held { name, note }),
            132 => Some(Self::End),
            133 => rest.first_chunk().map(|pid| Self::Pid(u32::from_le_bytes(*pid))),
            _ => None,
        }
    }
}

impl Refusal {
    fn code(self) -> u8 {
        match self {
            Self::Unknown => 1,
            Self::NotHeld => 2,
            Self::NoDescriptor => 3,
        }
    }

    fn of_code(code: u8) -> Self {
        match code {
            2 => Self::NotHeld,
            3 => Self::NoDescriptor,
            _ => Self::Unknown,
        }
    }
}

/// Whether the keeper can hold something under this name with this note.
pub(crate) fn is_valid(name: &str, note: &[u8]) -> bool {
    (1..=MAX_NAME_LEN).contains(&name.len()) && note.len() <= MAX_NOTE_LEN
}

/// Whether it is arguments with a zero byte after each.
pub(crate) fn is_command(command: &[u8]) -> bool {
    command.len() < MAX_PACKET_LEN && command.last().is_none_or(|last| *last == 0)
}

fn named(kind: u8, name: &str, note: &[u8]) -> Vec<u8> {
    let len = u16::try_from(name.len()).expect("checked by `is_valid` before");
    [&[kind], len.to_le_bytes().as_slice(), name.as_bytes(), note].concat()
}

fn name_and_note(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first_chunk()?;
    let (name, note) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
    let name = std::str::from_utf8(name).ok()?;
    is_valid(name, note).then_some((name, note))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check_request(request: Request<'_>) {
        assert_eq!(Request::decode(&request.encode()), Some(request));
    }

    #[track_caller]
    fn check_reply(reply: Reply<'_>) {
        assert_eq!(Reply::decode(&reply.encode()), Some(reply));
    }

    #[test]
    fn words_without_names_come_back() {
        for request in
            [Request::List, Request::Ping, Request::Daemon, Request::Goodbye, Request::Shutdown]
        {
            check_request(request);
        }
        for command in [&b""[..], b"one\0", b"one\0\0two\0"] {
            check_request(Request::Respawn { command });
        }
        for refusal in [Refusal::Unknown, Refusal::NotHeld, Refusal::NoDescriptor] {
            check_reply(Reply::Refused(refusal));
        }
        for reply in [Reply::Done, Reply::End, Reply::Pid(0), Reply::Pid(u32::MAX)] {
            check_reply(reply);
        }
    }

    /// Daemons and keepers of different versions meet: the bytes must not change.
    #[test]
    fn the_bytes_are_fixed() {
        let put = Request::Put { name: "ab", note: b"xyz" };
        assert_eq!(put.encode(), b"\x01\x02\x00abxyz");
        assert_eq!(Reply::Held { name: "ab", note: b"xyz" }.encode(), b"\x83\x02\x00abxyz");
        assert_eq!(Request::Shutdown.encode(), [7]);
        assert_eq!(Request::Respawn { command: b"a\0b\0" }.encode(), b"\x08a\0b\0");
        assert_eq!(Reply::Pid(258).encode(), [133, 2, 1, 0, 0]);
    }

    #[track_caller]
    fn check_not_a_request(packet: &[u8]) {
        assert_eq!(Request::decode(packet), None);
    }

    #[test]
    fn other_packets_are_refused() {
        check_not_a_request(b"");
        check_not_a_request(b"\x00");
        check_not_a_request(b"\x09");
        check_not_a_request(b"\x08no end");
        check_not_a_request(b"\x01");
        check_not_a_request(b"\x01\x00\x00note without a name");
        check_not_a_request(b"\x01\x05\x00abc");
        check_not_a_request(b"\x01\x01\x00\xff");
        check_not_a_request(&[b"\x01\x00\x01".as_slice(), &[b'x'; 256]].concat());
    }

    proptest! {
        #[test]
        fn words_with_names_come_back(
            name in "\\PC{1,60}",
            note in proptest::collection::vec(any::<u8>(), 0..=MAX_NOTE_LEN),
        ) {
            check_request(Request::Put { name: &name, note: &note });
            check_request(Request::Remove { name: &name });
            check_reply(Reply::Held { name: &name, note: &note });
        }

        #[test]
        fn no_packet_is_too_strange(packet: Vec<u8>) {
            Request::decode(&packet);
            Reply::decode(&packet);
        }
    }
}

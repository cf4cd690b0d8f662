//! Tests of the codecs. Messages are laid out by hand from `linux/fuse.h`.

use super::*;

/// A request with the given opcode and body, as the kernel sends it.
fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(IN_HEADER_LEN + body.len()).unwrap();
    let mut message = Vec::new();
    message.extend_from_slice(&len.to_ne_bytes());
    message.extend_from_slice(&opcode.to_ne_bytes());
    message.extend_from_slice(&(UNIQUE_RESEND | 6).to_ne_bytes());
    message.extend_from_slice(&9_u64.to_ne_bytes());
    for number in [1000_u32, 1001, 4711, 0] {
        message.extend_from_slice(&number.to_ne_bytes());
    }
    message.extend_from_slice(body);
    message
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `needed`: bytes of the body without which it is no request.
#[track_caller]
fn check(opcode: u32, body: &[u8], needed: usize, expect: Operation<'_>) {
    let whole = message(opcode, body);
    let request = Request { unique: UNIQUE_RESEND | 6, ino: 9, pid: 4711, operation: expect };
    assert_eq!(Request::parse(&whole), Ok(request));
    for cut in 0..body.len() {
        let parsed = Request::parse(&message(opcode, &body[..cut])).map(|request| request.unique);
        let unique = UNIQUE_RESEND | 6;
        let expect =
            if cut < needed { Err(ParseRequestError::Body { unique, opcode }) } else { Ok(unique) };
        assert_eq!(parsed.is_ok(), expect.is_ok(), "cut to {cut} bytes: {parsed:?}");
    }
    for cut in 0..whole.len() {
        let error = ParseRequestError::Header { len: cut };
        assert_eq!(Request::parse(&whole[..cut]), Err(error));
    }
}

#[test]
fn requests_are_read_and_short_ones_refused() {
    let read = if cfg!(target_endian = "little") {
        words(&[0, 0, 0x1000, 1, 0x20000, 0, 0, 0, 0, 0])
    } else {
        words(&[0, 0, 1, 0x1000, 0x20000, 0, 0, 0, 0, 0])
    };
    let offset = 0x1_0000_1000;
    let size = 0x20000;
    check(1, b"name\0", 5, Operation::Lookup { name: b"name" });
    check(2, &[0; 8], 0, Operation::Forget);
    check(3, &[0; 16], 0, Operation::Getattr);
    check(5, b"", 0, Operation::Readlink);
    check(14, &[0; 8], 0, Operation::Open);
    check(15, &read, 20, Operation::Read { offset, size });
    check(28, &read, 20, Operation::Readdir { offset, size });
    check(44, &read, 20, Operation::Readdirplus { offset, size });
    check(16, b"", 0, Operation::Modify);
    check(17, b"", 0, Operation::Statfs);
    let getxattr = [words(&[64, 0]), b"user.x\0".to_vec()].concat();
    check(22, &getxattr, getxattr.len(), Operation::Getxattr { name: b"user.x", size: 64 });
    check(23, &words(&[64, 0]), 8, Operation::Listxattr { size: 64 });
    check(36, &7_u64.to_ne_bytes(), 8, Operation::Interrupt { unique: 7 });
    check(38, b"", 0, Operation::Destroy);
    check(4242, b"", 0, Operation::Other { opcode: 4242 });
}

#[test]
fn both_words_of_flags_are_read() {
    let offer =
        |flags| Operation::Init(InitRequest { major: 7, minor: 44, max_readahead: 131_072, flags });
    let low = u32::try_from(init::INIT_EXT).unwrap() | 1;
    let extended = words(&[7, 44, 131_072, low, 1 << 7]);
    check(26, &extended, 20, offer(init::INIT_EXT | 1 | init::HAS_RESEND));
    check(26, &words(&[7, 44, 131_072, 1]), 16, offer(1));
}

#[test]
fn extensions_are_no_part_of_the_body() {
    let mut extended = message(1, b"name\0\0\0\0extra...");
    extended[36..38].copy_from_slice(&1_u16.to_ne_bytes());
    let request = Request::parse(&extended).unwrap();
    assert_eq!(request.operation, Operation::Lookup { name: b"name" });
    extended[36..38].copy_from_slice(&u16::MAX.to_ne_bytes());
    assert!(matches!(Request::parse(&extended), Err(ParseRequestError::Header { .. })));
}

fn an_attr() -> Attr {
    Attr {
        ino: 5,
        size: 513,
        stored: 513,
        mtime: (-2, 7),
        mode: 0o020_644,
        links: 3,
        uid: 10,
        gid: 11,
        device: (0x12, 0x34567),
    }
}

#[test]
fn replies_have_the_lengths_of_their_structures() {
    let check = |expect: usize, write: &dyn Fn(&mut Vec<u8>)| {
        let mut body = Vec::new();
        write(&mut body);
        assert_eq!(body.len(), expect);
    };
    check(104, &|out| answer::attr(out, &an_attr(), Validity::Always));
    check(128, &|out| answer::entry(out, &an_attr(), Validity::Always, Validity::Never));
    check(128, &answer::no_entry);
    check(16, &answer::opened);
    check(80, &|out| answer::statfs(out, &Statfs { bytes: 1, files: 1 }));
    check(8, &|out| answer::xattr_len(out, 3));
    check(64, &|out| out.extend(InitReply::encode_older_major(40)));
}

#[test]
fn attributes_stand_where_the_kernel_looks() {
    let mut body = Vec::new();
    answer::attr(&mut body, &an_attr(), Validity::Never);
    let word = |at: usize| u32::from_ne_bytes(*body[at..].first_chunk().unwrap());
    let long = |at: usize| u64::from_ne_bytes(*body[at..].first_chunk().unwrap());
    assert_eq!((long(0), long(16), long(24), long(32)), (0, 5, 513, 2));
    assert_eq!(long(48).cast_signed(), -2);
    assert_eq!((word(64), word(68), word(72)), (7, 7, 7));
    assert_eq!((word(76), word(80), word(84), word(88)), (0o020_644, 3, 10, 11));
    assert_eq!(word(92), 0x67 | (0x12 << 8) | (0x34500 << 12));
}

#[test]
fn a_directory_buffer_is_never_longer_than_asked_for() {
    for limit in 0..400 {
        let mut out = Vec::new();
        let mut buffer = DirBuffer::new(&mut out, limit);
        let entry = Dirent { ino: 2, next_offset: 3, mode: 0o040_755, name: b"folder" };
        let mut n_pushed = 0;
        while buffer.push_plus(&entry, Some(&an_attr()), Validity::Always, Validity::Always) {
            n_pushed += 1;
        }
        assert_eq!(n_pushed, limit / 160);
        assert_eq!(out.len(), n_pushed * 160);
    }
}

#[test]
fn only_descriptors_of_the_device_are_taken() {
    let other = std::fs::File::open("/dev/null").unwrap();
    let refused = Connection::from_fd(other.into()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
}

//! Passing file descriptors over unix sockets.
//!
//! Everything received is close-on-exec. Messages are never split: on a stream socket one call sends
//! or receives one run of bytes with its descriptors, so callers there frame their own messages.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// The most descriptors that the kernel takes in one message (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 253;

/// Standard input, output and error come before.
const FIRST_INHERITED: RawFd = 3;

const ANCILLARY_LEN: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// What a call to [`receive`] got.
#[derive(Debug)]
pub struct Received {
    /// How many bytes of the buffer were filled. 0 when the other end has closed.
    pub len: usize,
    /// The descriptors that came with them.
    pub fds: Vec<OwnedFd>,
}

/// Sends bytes and descriptors in one message and returns how many bytes were taken: all of them on
/// a seqpacket socket.
///
/// # Errors
/// `EPIPE` if the other end has closed (never a signal), `EINVAL` for more than
/// [`MAX_DESCRIPTORS`] descriptors, `EMSGSIZE`, and `EAGAIN` on a non-blocking socket.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY_LEN];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::INVAL.into());
    }
    let parts = [IoSlice::new(bytes)];
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL)
    })?;
    Ok(sent)
}

/// Receives one message.
///
/// # Errors
/// `InvalidData` if the message did not fit (its descriptors are then closed), `EAGAIN` on a
/// non-blocking socket without a message.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY_LEN];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let fds = ancillary
        .drain()
        .filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message was cut short"));
    }
    Ok(Received { len: message.bytes, fds })
}

/// The process at the other end, as of when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its process id; 0 if it lives in another process namespace.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

/// Asks the kernel who is at the other end of a unix socket.
///
/// # Errors
/// Those of `getsockopt`.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of_as_socklen(&credentials);
    // Not rustix: its `Pid` cannot hold the 0 that stands for a process of another namespace.
    // SAFETY: the pointers are to a `ucred` and its length, which is what SO_PEERCRED writes.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Peer { pid: credentials.pid, uid: credentials.uid, gid: credentials.gid })
}

fn size_of_as_socklen<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).expect("the argument is a few bytes long")
}

/// Makes two seqpacket sockets that are connected to each other.
///
/// # Errors
/// `EMFILE`.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Connects a seqpacket socket to the listener at `path`, which may have 107 bytes.
///
/// # Errors
/// `ECONNREFUSED` if nobody listens there, `ENOENT`, `ENAMETOOLONG`.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket(SocketFlags::CLOEXEC)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Listens at `path` with a non-blocking seqpacket socket. The path must not exist.
///
/// # Errors
/// `EADDRINUSE` if the path exists, `ENAMETOOLONG`.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 64)?;
    Ok(socket)
}

/// Accepts one connection, which is non-blocking.
///
/// # Errors
/// `EAGAIN` if none waits.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::io::retry_on_intr(|| rustix::net::accept_with(listener.as_fd(), flags))?)
}

/// Takes over the descriptors from 3 on, which the program that started this one (systemd) has left
/// open for it, and makes them close-on-exec. Works once.
///
/// To be called at the very start: nothing else may have opened descriptors of these numbers.
///
/// # Errors
/// `EBADF` if one of them is not open, `AlreadyExists` when called again.
pub fn inherited(n_fds: u16) -> io::Result<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    (FIRST_INHERITED..FIRST_INHERITED + RawFd::from(n_fds))
        .map(|number| {
            // SAFETY: only looked at for the length of this call, which fails if it is not open.
            let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
            // SAFETY: it is open, and by the protocol of `sd_listen_fds(3)` ours; `TAKEN` sees to it
            // that it is taken over once.
            Ok(unsafe { OwnedFd::from_raw_fd(number) })
        })
        .collect()
}

fn seqpacket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (here, there) = pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"content", 0).unwrap();
        let fds = vec![file.as_fd(); MAX_DESCRIPTORS];
        assert_eq!(send(here.as_fd(), b"first", &fds).unwrap(), 5);
        assert_eq!(send(here.as_fd(), b"second", &[]).unwrap(), 6);
        let mut buffer = [0; 16];
        let first = receive(there.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..first.len], first.fds.len()), (b"first".as_slice(), MAX_DESCRIPTORS));
        for fd in first.fds {
            assert_eq!(rustix::io::fcntl_getfd(&fd), Ok(rustix::io::FdFlags::CLOEXEC));
            let mut content = [0; 7];
            File::from(fd).read_exact_at(&mut content, 0).unwrap();
            assert_eq!(&content, b"content");
        }
        let second = receive(there.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..second.len], second.fds.len()), (b"second".as_slice(), 0));
        drop(here);
        assert_eq!(receive(there.as_fd(), &mut buffer).unwrap().len, 0);
        let err = send(there.as_fd(), b"x", &[]).expect_err("the other end is closed");
        assert_eq!(err.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn more_than_the_kernel_takes_is_refused() {
        let (here, there) = pair().unwrap();
        let fds = vec![there.as_fd(); MAX_DESCRIPTORS + 1];
        let err = send(here.as_fd(), b"x", &fds).expect_err("too many");
        assert_eq!(err.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn what_does_not_fit_is_not_half_taken() {
        let (here, there) = pair().unwrap();
        send(here.as_fd(), b"too long", &[here.as_fd()]).unwrap();
        send(here.as_fd(), b"next", &[]).unwrap();
        let mut buffer = [0; 4];
        let err = receive(there.as_fd(), &mut buffer).expect_err("it is too long");
        assert_eq!(err.kind(), io::ErrorKind::InvalidData);
        assert_eq!(receive(there.as_fd(), &mut buffer).unwrap().len, 4);
    }

    #[test]
    fn the_kernel_knows_the_peer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = listen(&path).unwrap();
        let err = accept(listener.as_fd()).expect_err("nobody has come");
        assert_eq!(err.kind(), io::ErrorKind::WouldBlock);
        let client = connect(&path).unwrap();
        let server = accept(listener.as_fd()).unwrap();
        let expected = Peer {
            pid: i32::try_from(std::process::id()).unwrap(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        assert_eq!(peer(server.as_fd()).unwrap(), expected);
        assert_eq!(peer(client.as_fd()).unwrap(), expected);
    }
}

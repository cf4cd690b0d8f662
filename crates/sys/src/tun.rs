//! TUN devices: network devices whose other end is a descriptor of ours.
//!
//! Source of formats: `linux/if_tun.h`, `linux/virtio_net.h`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{IntegerSetter, Opcode, Updater};

const TUNSETIFF: Opcode = 0x4004_54CA;
const TUNSETOFFLOAD: Opcode = 0x4004_54D0;

const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

const TUN_F_CSUM: usize = 0x01;
const TUN_F_TSO4: usize = 0x02;
const TUN_F_TSO6: usize = 0x04;
const TUN_F_TSO_ECN: usize = 0x08;

/// The longest name of a device, in bytes.
const MAX_NAME: usize = 15;

/// The bytes of `struct virtio_net_hdr` in front of each packet.
///
/// The second byte is the kind of segmentation that is left to do, 0 for none; bytes 4 and 5 are the
/// payload of a segment, in the machine's order of bytes.
pub const PACKET_HEADER: usize = 10;

/// A network device that hands IP packets to a descriptor and takes them from it.
///
/// It offers checksums and TCP segmentation, so that a burst of up to 64 KiB is one packet; handed
/// over as it is to another such device it arrives as one. Dropping it removes the device.
#[derive(Debug)]
pub struct TunDevice {
    device: OwnedFd,
}

impl TunDevice {
    /// Makes the device `name` in the network namespace of the calling thread. It has no address and
    /// is down.
    ///
    /// # Errors
    /// `EINVAL` if the name is empty or longer than 15 bytes, `EBUSY` if there is such a device,
    /// `EPERM` without `CAP_NET_ADMIN`, and what opening `/dev/net/tun` fails with.
    pub fn create(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let device = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
        let mut request = Request { flags: IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, ..Request::ZERO };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the argument of TUNSETIFF is `struct ifreq`, which the kernel reads and writes.
        let set = unsafe { Updater::<TUNSETIFF, Request>::new(&mut request) };
        // SAFETY: as above.
        unsafe { rustix::ioctl::ioctl(&device, set) }?;
        let offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        // SAFETY: the argument of TUNSETOFFLOAD is a set of flags, not a pointer.
        let set = unsafe { IntegerSetter::<TUNSETOFFLOAD>::new_usize(offloads) };
        // SAFETY: as above.
        unsafe { rustix::ioctl::ioctl(&device, set) }?;
        Ok(Self { device })
    }

    /// Takes the next packet that the namespace sends, with its [`PACKET_HEADER`] bytes of header, and
    /// returns the length of both. Of a packet larger than `buffer` the rest is lost.
    ///
    /// # Errors
    /// `WouldBlock` when there is none: poll the descriptor for reading.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.device, buffer)?)
    }

    /// Hands the namespace a packet, with its header.
    ///
    /// # Errors
    /// `EIO` while the device is down, `EINVAL` for what is no packet.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        // A packet is taken whole or not at all.
        rustix::io::write(&self.device, packet)?;
        Ok(())
    }
}

impl AsFd for TunDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// `struct ifreq`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

impl Request {
    const ZERO: Self = Self { name: [0; 16], flags: 0, rest: [0; 22] };
}

const _: () = assert!(size_of::<Request>() == 40);

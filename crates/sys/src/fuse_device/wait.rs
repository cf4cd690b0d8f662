//! Waiting for a request on a descriptor that many threads share.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec};
use rustix::io::Errno;

use super::Connection;

const REQUEST: u64 = 0;
const STOP: u64 = 1;

/// Ends all waiting threads at once, for good.
#[derive(Debug)]
pub struct Stop(OwnedFd);

impl Stop {
    /// Makes one that is not raised.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(rustix::event::eventfd(0, flags)?))
    }

    /// Wakes every [`Waiter`] made with it, now and later.
    pub fn raise(&self) {
        // It fails only if the counter is at its maximum, and then it is raised.
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).ok();
    }
}

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// There may be a request to read, or the file system was unmounted.
    Request,
    /// [`Stop::raise`] was called.
    Stop,
    /// Neither within the given time.
    Timeout,
}

/// One thread's place at the device. A new request wakes one waiting thread, not all.
#[derive(Debug)]
pub struct Waiter(OwnedFd);

impl Waiter {
    /// Waits for requests of `connection` or for `stop`.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new(connection: &Connection, stop: &Stop) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let one_of_many = EventFlags::IN | EventFlags::EXCLUSIVE;
        epoll::add(&epoll, &connection.device, EventData::new_u64(REQUEST), one_of_many)?;
        epoll::add(&epoll, &stop.0, EventData::new_u64(STOP), EventFlags::IN)?;
        Ok(Self(epoll))
    }

    /// Waits, for at most `timeout` if there is one.
    ///
    /// # Errors
    /// None are known.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Woken> {
        let timeout = timeout.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(time.subsec_nanos()),
        });
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 2];
        let n_events = match epoll::wait(&self.0, &mut events, timeout.as_ref()) {
            Ok(n_events) => n_events,
            Err(Errno::INTR) => return Ok(Woken::Timeout),
            Err(errno) => return Err(errno.into()),
        };
        let is_stop = |event: &Event| event.data.u64() == STOP;
        Ok(match &events[..n_events] {
            [] => Woken::Timeout,
            events if events.iter().any(is_stop) => Woken::Stop,
            _ => Woken::Request,
        })
    }
}

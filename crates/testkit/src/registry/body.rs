//! The bodies of answers: read piece by piece, paced by the link, spoilt by faults.

use std::io;
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::Frame;
use tokio::sync::watch;

use super::connection::Control;
use super::faults::{BodyFaults, Outage, OutageState, Stop};
use super::link::Flow;
use super::log::LogEntry;
use super::store::Blob;

/// The body of an answer.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// No body at all.
pub(super) fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A piece of a blob on its way to a client.
pub(super) struct Transfer {
    pub(super) blob: Blob,
    /// The next byte of the blob, and the one after the last.
    pub(super) at: u64,
    pub(super) end: u64,
    pub(super) faults: BodyFaults,
    pub(super) flow: Flow,
    pub(super) chunk_len: usize,
    pub(super) outage: watch::Receiver<OutageState>,
    pub(super) released: watch::Receiver<u64>,
    pub(super) control: Arc<Control>,
    pub(super) log: Arc<LogEntry>,
}

/// How much of a file is read at once.
const READ_AHEAD: u64 = 256 << 10;

impl Transfer {
    pub(super) fn into_body(self) -> Body {
        let sending = Sending { transfer: self, read: Bytes::new(), sent: 0 };
        let chunks = stream::unfold(Some(sending), |sending| async move {
            let mut sending = sending?;
            match sending.next_chunk().await {
                Ok(None) => None,
                Ok(Some(chunk)) => Some((Ok(Frame::data(chunk)), Some(sending))),
                Err(err) => Some((Err(err), None)),
            }
        });
        StreamBody::new(chunks).boxed_unsync()
    }
}

struct Sending {
    transfer: Transfer,
    /// Bytes that are read and not yet sent.
    read: Bytes,
    sent: u64,
}

impl Sending {
    async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        wait_for_sound(&mut self.transfer.outage).await?;
        let until_stop = match self.transfer.faults.stop {
            Some((after, stop)) if after <= self.sent => {
                self.stop(stop).await?;
                u64::MAX
            }
            Some((after, _)) => after - self.sent,
            None => u64::MAX,
        };
        let left = self.transfer.end.saturating_sub(self.transfer.at);
        let left = left + u64::try_from(self.read.len()).map_err(io::Error::other)?;
        if left == 0 {
            return Ok(None);
        }
        if self.read.is_empty() {
            self.read_ahead().await?;
        }
        let len = usize::try_from(until_stop)
            .unwrap_or(usize::MAX)
            .min(self.transfer.chunk_len)
            .min(self.read.len());
        let chunk = self.read.copy_to_bytes(len);
        let chunk = self.flip(chunk);
        self.transfer.flow.pass(len).await?;
        self.sent += u64::try_from(len).map_err(io::Error::other)?;
        self.transfer.log.sent(len);
        Ok(Some(chunk))
    }

    /// Ends or holds the body as a fault wants it.
    async fn stop(&mut self, stop: Stop) -> io::Result<()> {
        match stop {
            Stop::Stall => {
                self.transfer.released.changed().await.map_err(io::Error::other)?;
                self.transfer.faults.stop = None;
                Ok(())
            }
            Stop::Close => {
                self.transfer.control.flushed().await;
                Err(io::ErrorKind::BrokenPipe.into())
            }
            Stop::Reset => {
                self.transfer.control.flushed().await;
                self.transfer.control.reset_on_close();
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
    }

    async fn read_ahead(&mut self) -> io::Result<()> {
        let at = self.transfer.at;
        let left = self.transfer.end.saturating_sub(at);
        let blob = &self.transfer.blob;
        let (read, len) = if blob.is_in_memory() {
            let len = usize::try_from(left).map_err(io::Error::other)?;
            (blob.read(at, len)?, left)
        } else {
            let piece = left.min(READ_AHEAD);
            let len = usize::try_from(piece).map_err(io::Error::other)?;
            let blob = blob.clone();
            let reading = tokio::task::spawn_blocking(move || blob.read(at, len));
            (reading.await.map_err(io::Error::other)??, piece)
        };
        self.read = read;
        self.transfer.at = at + len;
        Ok(())
    }

    fn flip(&self, chunk: Bytes) -> Bytes {
        let here = |offset: &u64| {
            let at = usize::try_from(offset.checked_sub(self.sent)?).ok()?;
            (at < chunk.len()).then_some(at)
        };
        let flipped: Vec<usize> = self.transfer.faults.flipped.iter().filter_map(here).collect();
        if flipped.is_empty() {
            return chunk;
        }
        let mut spoilt = chunk.to_vec();
        for at in flipped {
            spoilt[at] = !spoilt[at];
        }
        spoilt.into()
    }
}

/// Waits while the network is silent.
pub(super) async fn wait_for_sound(outage: &mut watch::Receiver<OutageState>) -> io::Result<()> {
    outage
        .wait_for(|state| state.outage != Some(Outage::Silence))
        .await
        .map_err(io::Error::other)?;
    Ok(())
}

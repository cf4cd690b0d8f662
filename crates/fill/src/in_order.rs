//! Layers that can only be read from their beginning: one stream, decoded on its way, whose spans
//! become present in order.
//!
//! A pass over the blob begins when a span is wanted. It skips what is present, and goes on to the
//! last span that is missing: having come that far it is the cheapest way to the rest. A transfer that
//! breaks off goes on at its byte. Wrong bytes begin another pass, as the decoder cannot go on from
//! them, and so does a reader who waits for a span behind it once nobody waits ahead.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use index::{ZstdDecoder, ZstdError};
use parking_lot::Mutex;
use plan::{Class, LayerId};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use ztoc::SpanId;

use crate::decode::{self, Buffers};
use crate::engine::Shared;
use crate::error::SpanFault;
use crate::layer::{Layer, WRONG_BYTES_LIMIT};
use crate::room::Room;
use crate::source::SourceError;
use crate::transfer::Urgent;

/// The layers that are read in order: which of them are wanted, and which are being read.
#[derive(Default)]
pub(crate) struct Passes(Mutex<BTreeMap<LayerId, Pass>>);

#[derive(Default)]
struct Pass {
    /// Why another pass is to begin when none runs.
    wanted: Option<Class>,
    activity: Activity,
    signals: Arc<Signals>,
}

/// What a pass is told while it runs.
#[derive(Default)]
struct Signals {
    /// Somebody wants a span.
    demand: Notify,
    /// The layer was taken out of the engine.
    gone: Notify,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Activity {
    #[default]
    Idle,
    Running,
    /// It stays away from a source that failed, and takes up nobody's place meanwhile.
    Pausing,
}

impl Passes {
    pub(crate) fn add(&self, id: LayerId) {
        self.0.lock().insert(id, Pass::default());
    }

    pub(crate) fn remove(&self, id: LayerId) {
        if let Some(pass) = self.0.lock().remove(&id) {
            pass.signals.gone.notify_one();
        }
    }

    /// Notes that a span of the layer is wanted; `false` if it is not one that is read in order.
    pub(crate) fn want(&self, id: LayerId, class: Class) -> bool {
        let mut passes = self.0.lock();
        let Some(pass) = passes.get_mut(&id) else { return false };
        pass.wanted = Some(pass.wanted.map_or(class, |before| before.min(class)));
        pass.signals.demand.notify_one();
        true
    }

    /// The next pass to begin, and why; of those that nobody waits for, `most` may be under way at a
    /// time, all others included.
    pub(crate) fn next(&self, most: u32) -> Option<(LayerId, Class)> {
        let mut passes = self.0.lock();
        let running = passes.values().filter(|pass| pass.activity == Activity::Running).count();
        let idle = passes.iter_mut().filter(|(_, pass)| pass.activity == Activity::Idle);
        let wanted = idle.filter_map(|(id, pass)| Some((pass.wanted?, *id, pass)));
        let (class, id, pass) = wanted.min_by_key(|(class, id, _)| (*class, *id))?;
        if class != Class::Demand && u32::try_from(running).is_ok_and(|running| running >= most) {
            return None;
        }
        pass.wanted = None;
        pass.activity = Activity::Running;
        Some((id, class))
    }

    pub(crate) fn ended(&self, id: LayerId) {
        self.set(id, Activity::Idle);
    }

    fn set(&self, id: LayerId, activity: Activity) {
        if let Some(pass) = self.0.lock().get_mut(&id) {
            pass.activity = activity;
        }
    }

    fn signals(&self, id: LayerId) -> Option<Arc<Signals>> {
        self.0.lock().get(&id).map(|pass| Arc::clone(&pass.signals))
    }
}

/// How a pass ended.
enum Ended {
    /// Nothing is missing from its last span on.
    Complete,
    /// Somebody waits for what it has passed already.
    Behind,
    /// Its bytes were wrong; another one may begin after this time.
    Wrong(Duration),
    /// The layer is no longer in the engine.
    Gone,
}

/// Passes over `layer` until what is wanted of it is present, or it is gone.
pub(crate) async fn run(shared: Arc<Shared>, layer: Arc<Layer>, class: Class) {
    let Some(signals) = shared.passes.signals(layer.id()) else { return };
    tokio::select! {
        () = pass_until_present(&shared, &layer, &signals, class) => {}
        () = signals.gone.notified() => {}
    }
    shared.passes.ended(layer.id());
    shared.work.notify_one();
}

/// For a reader until he has what he waits for, else until everything is there, once.
async fn pass_until_present(
    shared: &Arc<Shared>,
    layer: &Arc<Layer>,
    signals: &Signals,
    class: Class,
) {
    let mut everything = class != Class::Demand;
    let mut wrong = 0;
    while layer.misses_any() && (layer.has_readers() || everything && wrong < WRONG_BYTES_LIMIT) {
        let before = layer.bytes_present();
        match pass(shared, layer, signals).await {
            Ended::Complete => everything = false,
            Ended::Behind => {}
            Ended::Wrong(time) => {
                wrong = if layer.bytes_present() > before { 0 } else { wrong + 1 };
                pause(shared, layer.id(), time).await;
            }
            Ended::Gone => break,
        }
    }
}

async fn pause(shared: &Shared, id: LayerId, time: Duration) {
    shared.passes.set(id, Activity::Pausing);
    shared.work.notify_one();
    tokio::time::sleep(time).await;
    shared.passes.set(id, Activity::Running);
}

/// One pass: what the source gives goes to a thread that decodes, checks and writes it.
async fn pass(shared: &Arc<Shared>, layer: &Arc<Layer>, signals: &Signals) -> Ended {
    let (sender, pieces) = channel(PIECES);
    let reading = Reading::new(Arc::clone(shared), Arc::clone(layer));
    let reading = tokio::task::spawn_blocking(move || reading.take_all(pieces));
    feed(shared, layer, signals, sender).await;
    // Without an answer the runtime is ending.
    reading.await.unwrap_or(Ended::Gone)
}

/// Sends the blob from its first byte to its last, or as long as it is read.
async fn feed(shared: &Shared, layer: &Layer, signals: &Signals, sender: Sender<Bytes>) {
    let mut at = 0;
    loop {
        let failed = tokio::select! {
            received = receive(shared, layer, signals, (&mut at, &sender)) => received.err(),
            () = sender.closed() => None,
        };
        let Some(failed) = failed else { return };
        shared.failed_spans.fetch_add(1, Ordering::Relaxed);
        let time = layer.failed(layer.first_missing_span(), &SpanFault::Source(failed));
        pause(shared, layer.id(), time).await;
    }
}

/// One request: sends what comes, from `at` on.
async fn receive(
    shared: &Shared,
    layer: &Layer,
    signals: &Signals,
    (at, sender): (&mut u64, &Sender<Bytes>),
) -> Result<(), SourceError> {
    let end = layer.blob_bytes();
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let mut stream = layer.spec().source.open(*at..end).await?.bytes;
    let mut urgent = None;
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        let len = piece.len() as u64;
        *at += len;
        shared.received(len);
        layer.count_fetched(len);
        if sender.send(piece).await.is_err() {
            return Ok(());
        }
        if layer.has_readers() {
            urgent.get_or_insert_with(|| Urgent::new(&shared.traffic));
            continue;
        }
        urgent = None;
        while !layer.has_readers() {
            tokio::select! {
                () = shared.traffic.stand_back() => break,
                () = signals.demand.notified() => {}
            }
        }
    }
    if *at >= end {
        return Ok(());
    }
    let cause = format!("the source ended {} bytes early", end - *at);
    Err(SourceError { transient: true, retry_after: None, cause: cause.into() })
}

/// Why a pass goes no further.
enum Stop {
    Complete,
    Behind,
    Gone,
    Fault(SpanFault),
}

impl From<ZstdError> for Stop {
    fn from(err: ZstdError) -> Self {
        Self::Fault(err.into())
    }
}

/// The side of a pass that may block.
struct Reading {
    shared: Arc<Shared>,
    layer: Arc<Layer>,
    /// The span that is being decoded.
    span: SpanId,
    is_present: bool,
    /// How many bytes the blob has made so far.
    at: u64,
    /// What there is of the span, unless it is present.
    collected: Vec<u8>,
    buffers: Buffers,
}

impl Reading {
    fn new(shared: Arc<Shared>, layer: Arc<Layer>) -> Self {
        let span = SpanId(0);
        let is_present = layer.is_present(span);
        let (collected, buffers) = (Vec::new(), Buffers::new());
        Self { shared, layer, span, is_present, at: 0, collected, buffers }
    }

    fn take_all(mut self, pieces: Receiver<Bytes>) -> Ended {
        match self.decode(pieces) {
            Stop::Complete => Ended::Complete,
            Stop::Behind => Ended::Behind,
            Stop::Gone => Ended::Gone,
            Stop::Fault(fault) => {
                self.shared.failed_spans.fetch_add(1, Ordering::Relaxed);
                Ended::Wrong(self.layer.failed(self.span, &fault))
            }
        }
    }

    fn decode(&mut self, mut pieces: Receiver<Bytes>) -> Stop {
        let mut decoder = match ZstdDecoder::new() {
            Ok(decoder) => decoder,
            Err(err) => return err.into(),
        };
        let mut received = 0;
        while let Some(piece) = pieces.blocking_recv() {
            received += piece.len() as u64;
            if let Err(stop) = decoder.push(&piece, &mut |bytes| self.take(bytes)) {
                return stop;
            }
        }
        if received < self.layer.blob_bytes() {
            return Stop::Gone;
        }
        decoder.finish().err().map_or_else(|| self.other_length(), Stop::from)
    }

    /// Takes the next bytes of the tar.
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), Stop> {
        while !bytes.is_empty() {
            if self.span.0 >= self.layer.spec().spans.len() {
                return Err(self.other_length());
            }
            // The index is that of the tar: what is compressed for others is not for it.
            let end = self.layer.spec().spans.compressed_range(self.span).end;
            let room = usize::try_from(end - self.at).unwrap_or(usize::MAX);
            let (piece, rest) = bytes.split_at(room.min(bytes.len()));
            if !self.is_present {
                self.collected.extend_from_slice(piece);
            }
            self.at += piece.len() as u64;
            bytes = rest;
            if self.at == end {
                self.end_span()?;
            }
        }
        Ok(())
    }

    fn end_span(&mut self) -> Result<(), Stop> {
        if !self.is_present {
            self.make()?;
            self.collected.clear();
        }
        self.span.0 += 1;
        if !self.layer.misses_any_from(self.span) {
            return Err(Stop::Complete);
        }
        if self.layer.readers_are_behind(self.span) {
            return Err(Stop::Behind);
        }
        self.is_present = self.layer.is_present(self.span);
        Ok(())
    }

    /// Checks the span and writes it. A cache that does not take it is tried again: the stream waits.
    fn make(&mut self) -> Result<(), Stop> {
        loop {
            match decode::make(&self.layer, self.span, (&self.collected, None), &mut self.buffers) {
                Ok(()) => {
                    self.layer.finished(self.span);
                    return Ok(());
                }
                Err(fault) if fault.is_no_room() => self.wait_for_room(&fault)?,
                Err(fault @ SpanFault::Cache(_)) => {
                    self.shared.failed_spans.fetch_add(1, Ordering::Relaxed);
                    let time = self.layer.failed(self.span, &fault);
                    if !self.shared.pause(time) || self.shared.layer(self.layer.id()).is_none() {
                        return Err(Stop::Gone);
                    }
                }
                Err(fault) => return Err(Stop::Fault(fault)),
            }
        }
    }

    /// Waits until the engine's owner has made room: the stream need not begin again.
    fn wait_for_room(&self, fault: &SpanFault) -> Result<(), Stop> {
        self.shared.failed_spans.fetch_add(1, Ordering::Relaxed);
        self.layer.found_no_room(self.span, fault);
        self.shared.no_room_for(&self.layer, self.span);
        while self.shared.room.get() == Room::None {
            if !self.shared.pause(ROOM_PAUSE) || self.shared.layer(self.layer.id()).is_none() {
                return Err(Stop::Gone);
            }
        }
        Ok(())
    }

    fn other_length(&self) -> Stop {
        let expected = self.layer.spec().spans.compressed_size();
        Stop::Fault(SpanFault::OtherLength { expected })
    }
}

/// How often a stream that waits for room looks for it.
const ROOM_PAUSE: Duration = Duration::from_millis(100);

/// How many pieces of the blob wait to be decoded.
const PIECES: usize = 8;

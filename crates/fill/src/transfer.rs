//! One ranged request: its bytes are cut into spans, and each span goes to be inflated as soon as
//! it is complete.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use ztoc::SpanId;

use crate::buffers::{Buffers, Lent};
use crate::decode::Work;
use crate::engine::Shared;
use crate::error::SpanFault;
use crate::layer::Layer;
use crate::memory;
use crate::source::{Sender, SourceError, Transfer};
use crate::windows;

/// Who is receiving just now. A stream of a whole layer stands back while a reader's bytes arrive; ranged
/// transfers need not, since few enough of their bytes are under way.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    urgent: AtomicUsize,
    quiet: Notify,
}

impl Traffic {
    fn begin(&self) {
        self.urgent.fetch_add(1, Ordering::AcqRel);
    }

    fn end(&self) {
        if self.urgent.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.quiet.notify_waiters();
        }
    }

    /// Waits until no reader's bytes are arriving.
    pub(crate) async fn stand_back(&self) {
        loop {
            let quiet = self.quiet.notified();
            if self.urgent.load(Ordering::Acquire) == 0 {
                return;
            }
            quiet.await;
        }
    }
}

/// A request to make, and the memory that its bytes may take where that is known already.
pub(crate) type Planned = (plan::Job, Option<OwnedSemaphorePermit>);

/// Counts an urgent transfer from its first byte to its end.
pub(crate) struct Urgent<'a>(&'a Traffic);

impl<'a> Urgent<'a> {
    pub(crate) fn new(traffic: &'a Traffic) -> Self {
        traffic.begin();
        Self(traffic)
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Carries out `job`; every span of it ends in [`Shared::span_done`].
pub(crate) async fn run(shared: Arc<Shared>, layer: Arc<Layer>, (job, permit): Planned) {
    let mut cut = Cut::new(Arc::clone(&layer), &job, Arc::clone(&shared.buffers));
    let begin = Instant::now();
    let result = receive(&shared, &layer, (&job, permit), &mut cut).await;
    let (class, spans, bytes) = (job.class, &job.spans, job.bytes.end - job.bytes.start);
    let (digest, took) = (layer.digest(), begin.elapsed());
    tracing::debug!(layer = %digest, ?class, ?spans, bytes, ?took, "a transfer ended");
    shared.transfer_ended(&job);
    if let Err(fault) = result {
        let fault = Arc::new(fault);
        for span in cut.unfinished() {
            if layer.is_usable(span) {
                // It came by another request.
                shared.span_done(&layer, SpanId(span), Ok(()));
                continue;
            }
            let fault = SourceError {
                transient: fault.transient,
                retry_after: fault.retry_after,
                cause: Box::new(Repeated(Arc::clone(&fault))),
            };
            shared.span_done(&layer, SpanId(span), Err(SpanFault::Source(fault)));
        }
    }
}

async fn receive(
    shared: &Arc<Shared>,
    layer: &Arc<Layer>,
    (job, mut permit): (&plan::Job, Option<OwnedSemaphorePermit>),
    cut: &mut Cut,
) -> Result<(), SourceError> {
    let urgent = job.class != plan::Class::Background;
    if !urgent {
        permit = shared.memory.take_background(job.bytes.end - job.bytes.start).await;
    }
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let begun = async {
        let windows = windows::fetch(shared, layer, job.spans.clone());
        // Nothing can be made of a span without its window.
        tokio::try_join!(first_piece(shared, layer, job), windows)
    };
    let begun = or_ask_again(shared, layer, (cut.unfinished(), job.class), begun).await?;
    let ((mut next, opened), mut windows) = begun;
    if job.spans.clone().all(|span| windows.lacks(span)) {
        job.spans.clone().for_each(|span| shared.wait_for_the_one_before(layer, span, job.class));
        return Ok(());
    }
    let Transfer { bytes: mut stream, sender } = opened;
    let sender: Option<Arc<dyn Sender>> = sender.map(Arc::from);
    let (mut receiving, mut carried, since) = (None, 0, Instant::now());
    while let Some(piece) = next {
        if urgent && receiving.is_none() {
            receiving = Some(Urgent::new(&shared.traffic));
        }
        shared.received(piece.len() as u64);
        layer.count_fetched(piece.len() as u64);
        cut.push(&piece, &mut |span, compressed| {
            if layer.is_usable(span.0) {
                return shared.span_done(layer, span, Ok(()));
            }
            if windows.lacks(span.0) {
                return shared.wait_for_the_one_before(layer, span.0, job.class);
            }
            let share = memory::share(&mut permit, compressed.len());
            let window = windows.take(span.0);
            let (layer, sender, class) = (Arc::clone(layer), sender.clone(), job.class);
            let since = Instant::now();
            let work =
                Work { layer, span, compressed, window, sender, class, since, memory: share };
            shared.decode.push(work);
        });
        carried += piece.len() as u64;
        if !urgent {
            leave_if_slow(shared, layer, (cut, &mut permit), (carried, since.elapsed()));
        }
        if cut.is_done() && cut.end < job.spans.end {
            // What comes now is for nobody.
            break;
        }
        let unfinished = (cut.unfinished(), job.class);
        next = or_ask_again(shared, layer, unfinished, stream.next()).await.transpose()?;
    }
    if cut.is_done() { Ok(()) } else { Err(ended_early(cut)) }
}

/// Leaves the end of a transfer to another one, with the memory for it, if this one holds the rest up.
fn leave_if_slow(
    shared: &Shared,
    layer: &Layer,
    (cut, permit): (&mut Cut, &mut Option<OwnedSemaphorePermit>),
    speed: (u64, Duration),
) {
    let missing = cut.missing_bytes();
    let Some(bytes) = shared.enough_of(missing, speed) else { return };
    let far = cut.behind(bytes);
    // From the end: what is left to others is behind all that this one carries.
    let kept = far.clone().rev().find(|span| !shared.leave(layer, *span));
    let end = kept.map_or(far.start, |span| span + 1);
    if end < cut.end {
        tracing::debug!(layer = %layer.digest(), spans = ?(end..cut.end), "slow: left to another request");
        cut.end = end;
        let left = usize::try_from(missing - cut.missing_bytes()).unwrap_or(usize::MAX);
        drop(memory::share(permit, left));
    }
}

/// Asks for a transfer's bytes, and waits for the first of them.
async fn first_piece(
    shared: &Shared,
    layer: &Layer,
    job: &plan::Job,
) -> Result<(Option<Bytes>, Transfer), SourceError> {
    let asked = Instant::now();
    let mut transfer = layer.spec().source.open(job.bytes.clone()).await?;
    let first = transfer.bytes.next().await.transpose()?;
    if first.is_some() {
        shared.first_byte(asked.elapsed());
    }
    Ok((first, transfer))
}

/// Waits for what comes next of a transfer. If that takes long, those of `spans` for which a reader waits, or
/// which are all that is left to come, are asked for once more, over another connection: this one may hang for as
/// long as the source allows.
async fn or_ask_again<T>(
    shared: &Shared,
    layer: &Layer,
    (spans, class): (Range<u32>, plan::Class),
    next: impl Future<Output = T>,
) -> T {
    let mut next = std::pin::pin!(next);
    loop {
        match tokio::time::timeout(shared.patience(), &mut next).await {
            Ok(next) => return next,
            Err(_late) => shared.ask_again(layer, spans.clone(), class),
        }
    }
}

fn ended_early(cut: &Cut) -> SourceError {
    let cause = format!("the source ended {} bytes early", cut.missing_bytes());
    SourceError { transient: true, retry_after: None, cause: cause.into() }
}

/// Cuts a range into spans. Neighbours may share a byte.
struct Cut {
    layer: Arc<Layer>,
    /// The span that is being collected, and the one after the last.
    next: u32,
    end: u32,
    /// Offset in the blob of the next byte.
    position: u64,
    collected: Vec<u8>,
    buffers: Arc<Buffers>,
}

impl Cut {
    fn new(layer: Arc<Layer>, job: &plan::Job, buffers: Arc<Buffers>) -> Self {
        let (next, end) = (job.spans.start, job.spans.end);
        Self { layer, next, end, position: job.bytes.start, collected: Vec::new(), buffers }
    }

    fn push(&mut self, piece: &[u8], emit: &mut dyn FnMut(SpanId, Lent)) {
        let start = self.position;
        self.position += piece.len() as u64;
        while self.next < self.end {
            let range = self.layer.spec().spans.compressed_range(SpanId(self.next));
            let have = range.start + self.collected.len() as u64;
            let from = usize::try_from(have.saturating_sub(start)).unwrap_or(usize::MAX);
            let until = usize::try_from(range.end.saturating_sub(start)).unwrap_or(usize::MAX);
            if from >= piece.len() && have < range.end {
                return;
            }
            if self.collected.capacity() == 0 {
                let len = usize::try_from(range.end - range.start).unwrap_or(0);
                self.collected = self.buffers.take(len);
            }
            self.collected.extend_from_slice(&piece[from.min(piece.len())..until.min(piece.len())]);
            if range.start + (self.collected.len() as u64) < range.end {
                return;
            }
            let whole = std::mem::take(&mut self.collected);
            self.carry_over(&whole, range.end);
            emit(SpanId(self.next), self.buffers.lend(whole));
            self.next += 1;
        }
    }

    /// Keeps the byte that the next span shares with this one.
    fn carry_over(&mut self, whole: &[u8], end: u64) {
        let next = self.next + 1;
        if next < self.end && self.layer.spec().spans.compressed_range(SpanId(next)).start < end {
            let next = self.layer.spec().spans.compressed_range(SpanId(next));
            self.collected = self.buffers.take(usize::try_from(next.end - next.start).unwrap_or(0));
            self.collected.extend(whole.last());
        }
    }

    /// The spans that do not end within the next `bytes`, but for the one that is being collected.
    fn behind(&self, bytes: u64) -> Range<u32> {
        let until = self.position.saturating_add(bytes);
        let spans = &self.layer.spec().spans;
        let is_far = |span: &u32| spans.compressed_range(SpanId(*span)).end > until;
        let first = (self.next.saturating_add(1)..self.end).find(is_far);
        first.unwrap_or(self.end)..self.end
    }

    fn is_done(&self) -> bool {
        self.next >= self.end
    }

    fn unfinished(&self) -> Range<u32> {
        self.next..self.end
    }

    fn missing_bytes(&self) -> u64 {
        let last = SpanId(self.end.saturating_sub(1));
        self.layer.spec().spans.compressed_range(last).end.saturating_sub(self.position)
    }
}

/// One error that several spans share.
#[derive(Debug)]
struct Repeated(Arc<SourceError>);

impl std::fmt::Display for Repeated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.cause.fmt(f)
    }
}

impl std::error::Error for Repeated {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.cause.source()
    }
}

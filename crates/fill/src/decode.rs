//! The threads that turn compressed spans into bytes of the layer's file.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::Instant;

use oci::Digest;
use tokio::sync::OwnedSemaphorePermit;
use ztoc::{SpanDecoder, SpanId};

use crate::buffers::Lent;
use crate::engine::Shared;
use crate::error::SpanFault;
use crate::lane::Lane;
use crate::layer::{Layer, MOST_TAIL};
use crate::source::Sender;
use crate::windows::Given;

/// One span whose compressed bytes have come.
pub(crate) struct Work {
    pub(crate) layer: Arc<Layer>,
    pub(crate) span: SpanId,
    pub(crate) compressed: Lent,
    /// Its window, if that came with them.
    pub(crate) window: Option<Given>,
    /// Who sent them.
    pub(crate) sender: Option<Arc<dyn Sender>>,
    pub(crate) class: plan::Class,
    /// When they had come.
    pub(crate) since: Instant,
    /// Its share of the memory that transfers may take.
    pub(crate) memory: Option<OwnedSemaphorePermit>,
}

/// The pool; its threads end when it is closed.
#[derive(Default)]
pub(crate) struct Pool {
    /// Spans that somebody reads, or soon will.
    urgent: Lane<Work>,
    /// Spans that make a layer whole. Their threads get what the programs of the machine leave of its
    /// processors: a program that starts reads little and computes much.
    patient: Lane<Work>,
}

impl Pool {
    /// Starts `threads` threads in each lane that work for `shared` until the pool is closed.
    pub(crate) fn start(&self, threads: usize, shared: &Arc<Shared>) -> std::io::Result<()> {
        for number in 0..threads {
            for (name, lane) in [("decode", false), ("complete", true)] {
                let shared = Arc::downgrade(shared);
                let name = format!("{name}-{number}");
                thread::Builder::new().name(name).spawn(move || work(&shared, lane))?;
            }
        }
        Ok(())
    }

    pub(crate) fn push(&self, job: Work) {
        // One that was fetched for nobody may be awaited by now.
        let is_patient = job.class == plan::Class::Background && !job.layer.is_awaited(job.span.0);
        self.lane(is_patient).push(job.class, job);
    }

    /// Has spans made first that somebody waits for now, and that had come for nobody.
    pub(crate) fn hurry(&self, layer: plan::LayerId, spans: &[u32]) {
        let is_meant = |job: &Work| job.layer.id() == layer && spans.contains(&job.span.0);
        for job in self.patient.take(is_meant) {
            self.urgent.push(plan::Class::Demand, job);
        }
    }

    pub(crate) fn close(&self) {
        self.urgent.close();
        self.patient.close();
    }

    const fn lane(&self, is_patient: bool) -> &Lane<Work> {
        if is_patient { &self.patient } else { &self.urgent }
    }
}

fn work(shared: &Weak<Shared>, is_patient: bool) {
    if is_patient {
        be_nice();
    }
    let mut buffers = Buffers::new();
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let Some(job) = shared.decode.lane(is_patient).pop() else { return };
        let begin = Instant::now();
        let bytes = (&job.compressed[..], job.window);
        let result = make(&job.layer, job.span, bytes, &mut buffers);
        let (digest, took) = (job.layer.digest(), begin.elapsed());
        let waited = begin - job.since;
        tracing::debug!(layer = %digest, span = job.span.0, ?waited, ?took, "a span was made");
        if let (Err(SpanFault::WrongBytes { expected, found, .. }), Some(sender)) =
            (&result, &job.sender)
        {
            sender.lied(*expected, *found);
        }
        // What waits for memory is looked at when the span is done.
        drop((job.compressed, job.memory));
        shared.span_done(&job.layer, job.span, result);
    }
}

/// Leaves the processors to programs, as far as this thread goes.
pub(crate) fn be_nice() {
    // Of this thread alone. Nobody may be forbidden to be nicer.
    rustix::process::setpriority_process(None, NICENESS).ok();
}

/// What making a span needs, to be used again for the next.
pub(crate) struct Buffers {
    window: Vec<u8>,
    out: Vec<u8>,
}

impl Buffers {
    pub(crate) fn new() -> Self {
        Self { window: Vec::new(), out: vec![0; PIECE] }
    }
}

/// Checks, inflates and writes one span, unless it is there; readers are woken as their bytes are
/// written. Its window is read from where windows are kept unless it is given.
pub(crate) fn make(
    layer: &Layer,
    span: SpanId,
    (compressed, window): (&[u8], Option<Given>),
    buffers: &mut Buffers,
) -> Result<(), SpanFault> {
    let spec = layer.spec();
    let (found, expected) = (Digest::of(compressed), *spec.spans.digest(span));
    if found != expected {
        return Err(SpanFault::WrongBytes { span, found, expected });
    }
    let Some(making) = layer.begin(span) else { return Ok(()) };
    let window = match window {
        Some(Given::Frame(frame)) => index::decompress_window(&frame, &mut buffers.window),
        Some(Given::Plain(window)) => {
            buffers.window = window;
            Ok(())
        }
        None => index::read_window(&spec.spans, span, &spec.windows, &mut buffers.window),
    };
    window.map_err(|source| SpanFault::Window { span, source })?;
    let mut decoder = SpanDecoder::new(&spec.spans, span, compressed, &buffers.window)?;
    let range = spec.spans.uncompressed_range(span);
    let (mut at, mut checksum, mut tail) = (range.start, 0, Vec::new());
    loop {
        let n = decoder.read(&mut buffers.out)?;
        let piece = buffers.out.get(..n).unwrap_or_default();
        if piece.is_empty() {
            break;
        }
        // What comes after the range is behind the archive's end.
        let inside = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(piece.len());
        let (inside, beyond) = piece.split_at(inside);
        tail.extend_from_slice(
            beyond.get(..beyond.len().min(MOST_TAIL - tail.len())).unwrap_or_default(),
        );
        if !inside.is_empty() {
            spec.cache.write_at(at, inside)?;
            at += inside.len() as u64;
            checksum = crc32c::crc32c_append(checksum, inside);
            making.progressed(at);
        }
    }
    if range.end == spec.spans.uncompressed_size() {
        layer.set_tail(span, tail);
    }
    spec.cache.mark_present(span.0, checksum)?;
    Ok(())
}

/// Against a program that computes: a tenth of its share.
const NICENESS: i32 = 10;

/// How much is inflated between two looks at who waits.
const PIECE: usize = 128 * 1024;

//! The engine: which transfers run, and what follows from each.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use oci::Digest;
use parking_lot::{Condvar, Mutex};
use plan::{Class, InFlight, LayerId, Outcome};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use ztoc::SpanId;

use crate::buffers::Buffers;
use crate::decode;
use crate::durations::Durations;
use crate::error::SpanFault;
use crate::in_order::{self, Passes};
use crate::layer::{Layer, LayerSpec, Order, Reader, SlowRead};
use crate::memory::Memory;
use crate::pace::Pace;
use crate::room::{Brake, Room, RoomCell};
use crate::seal::{self, Sealed};
use crate::transfer;

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Transfers at a time.
    pub connections: u32,
    /// How many of them background completion may use; and how many layers that are read in order it
    /// reads at a time.
    pub background_connections: u32,
    /// Compressed bytes in memory at most, without those that a reader waits for.
    pub memory: u32,
    /// Threads that inflate.
    pub decoders: usize,
    /// When to fetch more than was asked for.
    pub rules: plan::Rules,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            connections: 12,
            background_connections: 6,
            memory: 32 << 20,
            decoders: std::thread::available_parallelism().map_or(2, usize::from),
            rules: plan::Rules::default(),
        }
    }
}

/// What the engine tells its owner.
#[derive(Debug, Clone)]
pub enum Event {
    /// A layer is whole and equal to its DiffID.
    Sealed {
        /// The layer's blob.
        layer: Digest,
    },
    /// A whole layer is not what the image promises: its index lied.
    Revoked {
        /// The layer's blob.
        layer: Digest,
        /// The index that lied.
        index: Digest,
        /// What differs.
        why: String,
    },
    /// A write failed for want of room. Nothing is fetched before [`Engine::set_room`].
    NoRoom,
    /// A read that had to wait is over.
    Waited {
        /// What was read, and how long it waited.
        read: SlowRead,
        /// Why it failed, if it did.
        error: Option<String>,
    },
}

/// Figures since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Compressed bytes received.
    pub bytes_fetched: u64,
    /// Ranged requests made.
    pub requests: u64,
    /// Reads that had to wait.
    pub blocked_reads: u64,
    /// Reads that failed.
    pub failed_spans: u64,
    /// How long reads waited, of those that are over.
    pub waits: Durations,
}

pub(crate) struct Shared {
    pub(crate) options: EngineOptions,
    pub(crate) decode: decode::Pool,
    pub(crate) traffic: transfer::Traffic,
    pub(crate) buffers: Arc<Buffers>,
    pub(crate) memory: Memory,
    layers: Mutex<BTreeMap<LayerId, Arc<Layer>>>,
    queue: Mutex<Wanted>,
    pub(crate) passes: Passes,
    retries: Mutex<BinaryHeap<Reverse<(Instant, LayerId, u32)>>>,
    pub(crate) room: RoomCell,
    /// Spans for which there was no room.
    no_room_for: Mutex<Vec<(LayerId, u32)>>,
    pub(crate) work: Notify,
    waiting: AtomicUsize,
    next_layer: AtomicU32,
    bytes_fetched: AtomicU64,
    pace: Mutex<Pace>,
    pub(crate) requests: AtomicU64,
    blocked_reads: AtomicU64,
    pub(crate) failed_spans: AtomicU64,
    last_demand: Mutex<Instant>,
    slowest: Mutex<Vec<SlowRead>>,
    waits: Mutex<Durations>,
    sealer: Mutex<Option<mpsc::Sender<Arc<Layer>>>>,
    closed: Mutex<bool>,
    closing: Condvar,
    tell: Box<dyn Fn(Event) + Send + Sync>,
}

/// What is wanted and what is under way.
struct Wanted {
    queue: plan::Queue,
    in_flight: InFlight,
    limits: plan::Limits,
}

/// The only place that decides, fetches, checks and writes. Dropping it fails all waiting readers.
pub struct Engine {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts the engine's threads, and its tasks on `runtime`. `tell` is called from the thread that
    /// seals, which may wait for a disk; [`Event::NoRoom`] and [`Event::Waited`] from any, and it must not
    /// wait there.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        options: EngineOptions,
        runtime: &Handle,
        tell: Box<dyn Fn(Event) + Send + Sync>,
    ) -> io::Result<Self> {
        let (sealer, to_seal) = mpsc::channel();
        let limits = plan::Limits {
            max_connections: options.connections,
            demand_connections: options.connections.div_ceil(4),
            background_connections: options.background_connections,
            ..plan::Limits::default()
        };
        let shared = Arc::new(Shared {
            decode: decode::Pool::default(),
            traffic: transfer::Traffic::default(),
            buffers: Arc::default(),
            memory: Memory::new(options.memory),
            layers: Mutex::default(),
            queue: Mutex::new(Wanted {
                queue: plan::Queue::new(),
                in_flight: InFlight::default(),
                limits,
            }),
            passes: Passes::default(),
            retries: Mutex::default(),
            room: RoomCell::default(),
            no_room_for: Mutex::default(),
            work: Notify::new(),
            waiting: AtomicUsize::new(0),
            next_layer: AtomicU32::new(0),
            bytes_fetched: AtomicU64::new(0),
            pace: Mutex::new(Pace::new(Instant::now())),
            requests: AtomicU64::new(0),
            blocked_reads: AtomicU64::new(0),
            failed_spans: AtomicU64::new(0),
            last_demand: Mutex::new(Instant::now()),
            slowest: Mutex::default(),
            waits: Mutex::default(),
            sealer: Mutex::new(Some(sealer)),
            closed: Mutex::new(false),
            closing: Condvar::new(),
            tell,
            options,
        });
        shared.decode.start(shared.options.decoders, &shared)?;
        seal::start(to_seal, &shared)?;
        let mut tasks = JoinSet::new();
        tasks.spawn_on(dispatch(Arc::clone(&shared)), runtime);
        Ok(Self { shared, tasks })
    }

    /// Takes on a layer. One that has come whole and proven is sealed as soon as the disk has it.
    #[must_use]
    pub fn add(&self, spec: LayerSpec) -> Arc<Layer> {
        let id = LayerId(self.shared.next_layer.fetch_add(1, Ordering::Relaxed));
        let rules = self.shared.options.rules.clone();
        let layer = Arc::new(Layer::new(id, spec, rules, Arc::downgrade(&self.shared)));
        self.shared.pace.lock().begin_anew();
        match layer.spec().order {
            Order::Any => self.shared.queue.lock().queue.add_layer(id, layer.layout()),
            Order::Stream { .. } => self.shared.passes.add(id),
        }
        self.shared.layers.lock().insert(id, Arc::clone(&layer));
        if layer.cache().proven().is_some() {
            layer.seal_if_whole(&self.shared);
        }
        layer
    }

    /// Lets go of a layer; its readers fail.
    pub fn remove(&self, layer: &Layer) {
        self.shared.queue.lock().queue.forget(layer.id());
        self.shared.passes.remove(layer.id());
        self.shared.layers.lock().remove(&layer.id());
        layer.abandon();
    }

    /// How much room the engine believes to have.
    #[must_use]
    pub fn room(&self) -> Room {
        self.shared.room.get()
    }

    /// What stops this engine while room is made.
    #[must_use]
    pub fn brake(&self) -> Brake {
        Brake(Arc::downgrade(&self.shared))
    }

    /// The uncompressed size of the largest span for which there was no room, or 0.
    #[must_use]
    pub fn needs_room(&self) -> u64 {
        let spans = self.shared.no_room_for.lock().clone();
        let size = |(id, span): (LayerId, u32)| {
            let range = self.shared.layer(id)?.spec().spans.uncompressed_range(SpanId(span));
            Some(range.end - range.start)
        };
        spans.into_iter().filter_map(size).max().unwrap_or_default()
    }

    /// Tells the engine how much room there is. What failed for want of it is tried again.
    pub fn set_room(&self, room: Room) {
        self.shared.room.set(room);
        if matches!(room, Room::None | Room::InTheMaking) {
            return;
        }
        self.shared.want_again(std::mem::take(&mut *self.shared.no_room_for.lock()));
        if room == Room::Enough {
            let layers: Vec<Arc<Layer>> = self.shared.layers.lock().values().cloned().collect();
            layers.iter().for_each(|layer| layer.seal_if_whole(&self.shared));
        }
        self.shared.work.notify_one();
    }

    /// What happened so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            bytes_fetched: self.shared.bytes_fetched.load(Ordering::Relaxed),
            requests: self.shared.requests.load(Ordering::Relaxed),
            blocked_reads: self.shared.blocked_reads.load(Ordering::Relaxed),
            failed_spans: self.shared.failed_spans.load(Ordering::Relaxed),
            waits: *self.shared.waits.lock(),
        }
    }

    /// How long nobody has waited for a byte.
    #[must_use]
    pub fn quiet_for(&self) -> Duration {
        self.shared.quiet_for()
    }

    /// The reads that waited longest, the longest first.
    #[must_use]
    pub fn slowest_reads(&self) -> Vec<SlowRead> {
        self.shared.slowest.lock().clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.tasks.abort_all();
        self.shared.decode.close();
        self.shared.sealer.lock().take();
        *self.shared.closed.lock() = true;
        self.shared.closing.notify_all();
        let layers = std::mem::take(&mut *self.shared.layers.lock());
        for layer in layers.values() {
            layer.abandon();
        }
    }
}

impl Shared {
    pub(crate) fn want(&self, layer: LayerId, spans: &[u32], class: Class) {
        if spans.is_empty() {
            return;
        }
        if self.passes.want(layer, class) {
            self.work.notify_one();
            return;
        }
        let mut wanted = self.queue.lock();
        let want = |span: &u32| {
            wanted.queue.want(layer, *span, class);
        };
        match class {
            // The likeliest come first here, and the latest there.
            Class::ReadAhead => spans.iter().rev().for_each(want),
            Class::Demand | Class::Prefetch | Class::Background => spans.iter().for_each(want),
        }
        drop(wanted);
        if class == Class::Demand {
            self.decode.hurry(layer, spans);
        }
        self.work.notify_one();
    }

    /// How long nothing may come of a request before a reader has it asked for again.
    pub(crate) fn patience(&self) -> Duration {
        self.pace.lock().patience()
    }

    /// Asks once more for those of a transfer's spans for which somebody waits; for all of them if it makes a layer
    /// whole, and nothing else is left to ask for.
    pub(crate) fn ask_again(&self, layer: &Layer, spans: Range<u32>, class: Class) {
        let are_last = class == Class::Background && self.queue.lock().queue.is_empty();
        for span in spans {
            if (are_last || layer.is_awaited(span)) && self.asked_again(layer, span) {
                tracing::debug!(layer = %layer.digest(), span, "nothing comes: asked for again");
            }
        }
    }

    /// Leaves a span to another request than its own. Returns whether that is so: no span is asked for three
    /// times.
    pub(crate) fn leave(&self, layer: &Layer, span: u32) -> bool {
        if layer.is_usable(span) {
            self.queue.lock().queue.done(layer.id(), span..span + 1, Outcome::Done);
            return true;
        }
        self.asked_again(layer, span)
    }

    fn asked_again(&self, layer: &Layer, span: u32) -> bool {
        let is_awaited = layer.is_awaited(span);
        // What does not come counts as under way, and leaves completion little room for more.
        let class = if is_awaited { Class::Demand } else { Class::ReadAhead };
        let is_asked = self.queue.lock().queue.again(layer.id(), span, class);
        self.work.notify_one();
        is_asked
    }

    /// How many more bytes a transfer should carry that has `left` to go, and has carried so many in so long.
    /// `None`: all of them. While others wait to be asked for it holds nothing up; the last ones come sooner over
    /// connections that have nothing to do.
    pub(crate) fn enough_of(&self, left: u64, speed: (u64, Duration)) -> Option<u64> {
        let under_way = {
            let wanted = self.queue.lock();
            let InFlight { demand_bytes, speculative_bytes, .. } = wanted.in_flight;
            wanted.queue.is_empty().then(|| demand_bytes.saturating_add(speculative_bytes))?
        };
        self.pace.lock().in_time(left, speed, under_way)
    }

    pub(crate) fn layer(&self, id: LayerId) -> Option<Arc<Layer>> {
        self.layers.lock().get(&id).cloned()
    }

    pub(crate) fn reader_waits(&self, reader: Reader) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if reader != Reader::OURSELVES {
            self.blocked_reads.fetch_add(1, Ordering::Relaxed);
        }
        *self.last_demand.lock() = Instant::now();
    }

    pub(crate) fn reader_done(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Keeps what a report says of a read.
    pub(crate) fn note(&self, read: &SlowRead) {
        self.waits.lock().add(read.waited);
        let mut slowest = self.slowest.lock();
        let at = slowest.partition_point(|other| other.waited >= read.waited);
        if at < SLOW_READS {
            slowest.insert(at, read.clone());
            slowest.truncate(SLOW_READS);
        }
    }

    /// To be called when the reader has been let go: it does not wait for this too.
    pub(crate) fn tell_of(&self, read: SlowRead, error: Option<String>) {
        (self.tell)(Event::Waited { read, error });
    }

    /// How long nobody has waited for a byte.
    pub(crate) fn quiet_for(&self) -> Duration {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        self.last_demand.lock().elapsed()
    }

    /// Waits until nobody has waited for a byte for `quiet`, or the engine is dropped: then `false`.
    pub(crate) fn wait_for_quiet(&self, quiet: Duration) -> bool {
        let mut closed = self.closed.lock();
        while !*closed && self.quiet_for() < quiet {
            self.closing.wait_for(&mut closed, quiet);
        }
        !*closed
    }

    /// Lets time pass, unless the engine is dropped: then `false`.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        let mut closed = self.closed.lock();
        while !*closed && !self.closing.wait_until(&mut closed, until).timed_out() {}
        !*closed
    }

    /// A span was made, or was not.
    pub(crate) fn span_done(
        &self,
        layer: &Arc<Layer>,
        span: SpanId,
        result: Result<(), SpanFault>,
    ) {
        match result {
            Ok(()) => {
                // First, so that a reader can want it again if it is evicted at the same moment.
                self.queue.lock().queue.done(layer.id(), span.0..span.0 + 1, Outcome::Done);
                layer.finished(span);
            }
            Err(fault) if fault.is_no_room() => {
                self.failed_spans.fetch_add(1, Ordering::Relaxed);
                layer.found_no_room(span, &fault);
                self.queue.lock().queue.done(layer.id(), span.0..span.0 + 1, Outcome::Done);
                self.no_room_for(layer, span);
            }
            Err(fault) => {
                self.failed_spans.fetch_add(1, Ordering::Relaxed);
                let pause = layer.failed(span, &fault);
                self.queue.lock().queue.done(layer.id(), span.0..span.0 + 1, Outcome::Done);
                let due = Instant::now() + pause;
                self.retries.lock().push(Reverse((due, layer.id(), span.0)));
            }
        }
        self.work.notify_one();
    }

    /// The window of a span is nowhere: it is asked for again when the span before it is there.
    pub(crate) fn wait_for_the_one_before(&self, layer: &Layer, span: u32, class: Class) {
        layer.wait_for_the_one_before(span, class);
        self.queue.lock().queue.done(layer.id(), span..span + 1, Outcome::Done);
        let before = span.saturating_sub(1);
        if layer.is_usable(before) {
            self.go_on_behind(layer, before);
        } else {
            self.want(layer.id(), &[before], class);
        }
    }

    /// Asks for the span behind one that is there, if it waits for that.
    pub(crate) fn go_on_behind(&self, layer: &Layer, span: u32) {
        if let Some(class) = layer.who_waits_for(span) {
            self.want(layer.id(), &[span.saturating_add(1)], class);
        }
    }

    /// A request's first byte came after `time`.
    pub(crate) fn first_byte(&self, time: Duration) {
        self.pace.lock().first_byte(time, Instant::now());
    }

    /// How many uncompressed bytes one guess may want.
    pub(crate) fn reach(&self) -> u64 {
        self.pace.lock().reach()
    }

    /// Compressed bytes have come.
    pub(crate) fn received(&self, bytes: u64) {
        self.bytes_fetched.fetch_add(bytes, Ordering::Relaxed);
        let (in_flight, limits) = {
            let wanted = self.queue.lock();
            (wanted.in_flight, wanted.limits)
        };
        self.pace.lock().count(bytes, &in_flight, limits, Instant::now());
    }

    /// A span could not be written for want of room.
    pub(crate) fn no_room_for(&self, layer: &Layer, span: SpanId) {
        self.no_room_for.lock().push((layer.id(), span.0));
        self.no_room();
    }

    /// A write failed for want of room.
    fn no_room(&self) {
        if matches!(self.room.set(Room::None), Room::Enough | Room::InTheMaking) {
            tracing::error!(
                "the disk of the layer cache is full: reads of missing bytes wait, and nothing else is fetched"
            );
        }
        (self.tell)(Event::NoRoom);
    }

    /// The next transfer that the limits allow.
    fn next_job(&self) -> Option<transfer::Planned> {
        let mut wanted = self.queue.lock();
        let Wanted { queue, in_flight, limits } = &mut *wanted;
        let mut limits = self.pace.lock().limits(*limits);
        limits.memory_bytes = self.memory.left_ahead();
        if self.holds_back(queue) {
            limits.background_connections = 0;
        }
        let limits = self.room.get().within(&limits)?;
        let job = queue.next(in_flight, &limits)?;
        count(in_flight, &job, |count| count + 1, |bytes, more| bytes + more);
        let bytes = job.bytes.end - job.bytes.start;
        let permit = match job.class {
            // It waits for its own.
            Class::Background => None,
            Class::Demand | Class::Prefetch | Class::ReadAhead => self.memory.take_ahead(bytes),
        };
        Some((job, permit))
    }

    /// The next layer to read in order, and why.
    fn next_pass(&self) -> Option<(LayerId, Class)> {
        match self.room.get() {
            Room::Enough => self.passes.next(self.options.background_connections),
            Room::Scarce => self.passes.next(0),
            Room::InTheMaking | Room::None => None,
        }
    }

    fn holds_back(&self, queue: &plan::Queue) -> bool {
        self.pace.lock().holds_back(queue.background_bytes(), self.quiet_for())
    }

    /// A transfer's connection is free again.
    pub(crate) fn transfer_ended(&self, job: &plan::Job) {
        if job.class == Class::Background {
            self.pace.lock().completed(job.bytes.end - job.bytes.start);
        }
        let mut wanted = self.queue.lock();
        count(&mut wanted.in_flight, job, |count| count - 1, |bytes, less| bytes - less);
        drop(wanted);
        self.work.notify_one();
    }

    pub(crate) fn seal(&self, id: LayerId) {
        let Some(layer) = self.layer(id) else { return };
        if let Some(sealer) = &*self.sealer.lock() {
            // The sealing thread ends only with the engine.
            sealer.send(layer).ok();
        }
    }

    pub(crate) fn seal_done(self: &Arc<Self>, layer: &Layer, sealed: Result<(), Sealed>) {
        let digest = *layer.digest();
        match sealed {
            Ok(()) => {
                tracing::info!(layer = %digest, bytes = layer.bytes(), "layer sealed");
                (self.tell)(Event::Sealed { layer: digest });
            }
            Err(Sealed::Closing) => {}
            Err(Sealed::Interrupted) => {
                layer.seal_later();
                if layer.is_completing() {
                    layer.complete();
                } else {
                    layer.seal_if_whole(self);
                }
            }
            Err(Sealed::TailUnknown) => layer.fetch_tail(self),
            Err(Sealed::Io(err)) if cache::is_no_room(&err) => {
                layer.seal_later();
                self.no_room();
            }
            Err(Sealed::Io(err)) => {
                // The bytes are there and are served as before; sealing is tried at the next start.
                tracing::error!(layer = %digest, error = %err, "layer cannot be sealed");
            }
            Err(Sealed::Differs(why)) => {
                tracing::error!(layer = %digest, why, "index revoked: the layer is not what the image promises");
                layer.revoke(&why);
                let index = *layer.spec().cache.index();
                (self.tell)(Event::Revoked { layer: digest, index, why });
            }
        }
    }

    /// Tells late readers, and asks again for what failed. Returns whether anything is pending.
    fn sweep(&self) {
        let now = Instant::now();
        let layers: Vec<Arc<Layer>> = self.layers.lock().values().cloned().collect();
        for layer in &layers {
            layer.expire(now);
        }
        let mut due = Vec::new();
        let mut retries = self.retries.lock();
        while let Some(Reverse((at, id, span))) = retries.peek().copied() {
            if at > now {
                break;
            }
            retries.pop();
            due.push((id, span));
        }
        drop(retries);
        self.want_again(due);
    }

    /// Asks again for spans that failed: as demand if somebody waits for them.
    fn want_again(&self, spans: Vec<(LayerId, u32)>) {
        let mut by_class: HashMap<(LayerId, Class), Vec<u32>> = HashMap::new();
        for (id, span) in spans {
            let Some(layer) = self.layer(id) else { continue };
            let class = if layer.is_awaited(span) { Class::Demand } else { Class::Background };
            by_class.entry((id, class)).or_default().push(span);
        }
        for ((id, class), spans) in by_class {
            self.want(id, &spans, class);
        }
    }

    fn needs_sweeping(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
            || !self.retries.lock().is_empty()
            || self.holds_back(&self.queue.lock().queue)
    }
}

/// Starts transfers as long as there are connections and something is wanted.
async fn dispatch(shared: Arc<Shared>) {
    let mut transfers = JoinSet::new();
    loop {
        while let Some(planned) = shared.next_job() {
            match shared.layer(planned.0.layer) {
                Some(layer) => {
                    transfers.spawn(transfer::run(Arc::clone(&shared), layer, planned));
                }
                None => shared.transfer_ended(&planned.0),
            }
        }
        while let Some((id, class)) = shared.next_pass() {
            if let Some(layer) = shared.layer(id) {
                transfers.spawn(in_order::run(Arc::clone(&shared), layer, class));
            }
        }
        tokio::select! {
            () = shared.work.notified() => {}
            Some(_) = transfers.join_next() => {}
            () = tokio::time::sleep(SWEEP), if shared.needs_sweeping() => shared.sweep(),
        }
    }
}

/// Changes the figures of `job`'s class.
fn count(
    in_flight: &mut InFlight,
    job: &plan::Job,
    connections: impl Fn(u32) -> u32,
    bytes: impl Fn(u64, u64) -> u64,
) {
    let size = job.bytes.end - job.bytes.start;
    match job.class {
        Class::Demand => {
            in_flight.demand = connections(in_flight.demand);
            in_flight.demand_bytes = bytes(in_flight.demand_bytes, size);
        }
        Class::Prefetch | Class::ReadAhead => {
            in_flight.read_ahead = connections(in_flight.read_ahead);
            in_flight.speculative_bytes = bytes(in_flight.speculative_bytes, size);
        }
        Class::Background => {
            in_flight.background = connections(in_flight.background);
            in_flight.background_bytes = bytes(in_flight.background_bytes, size);
            in_flight.speculative_bytes = bytes(in_flight.speculative_bytes, size);
        }
    }
}

/// How precisely deadlines and pauses are kept.
const SWEEP: Duration = Duration::from_millis(50);

/// How many slow reads are remembered.
const SLOW_READS: usize = 32;

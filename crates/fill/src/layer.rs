//! One layer as its readers see it: a range is asked for, and somebody is called when it is there.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use oci::Digest;
use parking_lot::Mutex;
use plan::{Class, LayerId};
use ztoc::{SpanId, SpanTable, Toc};

use crate::engine::Shared;
use crate::error::{ReadError, SpanFault};
use crate::gates::{Gate, Gates};
use crate::hint::Files;
use crate::room::Room;
use crate::source::{Source, SourceError};
use crate::windows::Turns;

mod in_order;
mod making;
mod whole;

/// What is called once, when a range is present or never will be. It runs on the thread that made
/// it so, and must not block.
pub type Then = Box<dyn FnOnce(Result<(), ReadError>) + Send>;

/// Who wants a range; for reports only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader {
    /// The reading process, 0 if unknown.
    pub pid: i32,
}

impl Reader {
    /// Whoever runs the engine. No report has these reads: nobody's program waits for them.
    pub const OURSELVES: Self = Self { pid: -1 };
}

/// In which order the spans of a layer can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// In any: each is made from its own bytes of the blob.
    Any,
    /// From the first to the last: the blob is zstd, and the table of spans that of its tar.
    Stream {
        /// Size of the blob in bytes.
        blob_bytes: u64,
    },
}

/// What the engine must know of a layer.
#[derive(Debug)]
pub struct LayerSpec {
    /// Digest of the compressed blob.
    pub digest: Digest,
    /// Digest of the uncompressed tar, as the image's configuration promises.
    pub diff_id: Digest,
    /// Where its spans lie.
    pub spans: Arc<SpanTable>,
    /// In which order they can be had.
    pub order: Order,
    /// The table of contents, to be compared with the tar when the layer is whole. If somebody holds it now,
    /// reads are seen with the files around them from the first on.
    pub toc: Arc<Toc>,
    /// What windows are read from when a span is inflated: the zTOC, or where its windows are apart as much
    /// of their blob as is there.
    pub windows: File,
    /// Where that blob comes from, if they are.
    pub windows_source: Option<Arc<dyn Source>>,
    /// Where its bytes are kept.
    pub cache: Arc<cache::Layer>,
    /// Where its compressed bytes come from.
    pub source: Arc<dyn Source>,
    /// How long a read waits before it fails.
    pub deadline: Duration,
}

struct Waiter {
    range: Range<u64>,
    since: Instant,
    deadline: Instant,
    reader: Reader,
    then: Then,
}

/// A span that did not come.
#[derive(Debug, Default, Clone)]
struct Trouble {
    attempts: u32,
    wrong_bytes: u32,
    last: String,
}

/// Somebody who is told when bytes are there, and does not ask for them.
struct Expected {
    range: Range<u64>,
    then: Box<dyn FnOnce() + Send>,
}

#[derive(Default)]
struct State {
    /// Readers, under the first span that they still miss.
    waiting: BTreeMap<u32, Vec<Waiter>>,
    /// The same of those who read nothing yet.
    expected: HashMap<u32, Vec<Expected>>,
    /// How far the spans in the making have come (absolute uncompressed offsets).
    produced: making::Produced,
    trouble: HashMap<u32, Trouble>,
    sealing: Sealing,
    /// What follows the end of the archive, by the spans that make it, once this daemon has decoded
    /// them.
    tail: BTreeMap<u32, Vec<u8>>,
    /// Spans whose window is nowhere, until the span before each is there; and how much they are wanted.
    behind: HashMap<u32, Class>,
    /// Why the index was found to lie.
    revoked: Option<String>,
}

impl State {
    /// Those who wait, without ourselves.
    fn readers(&self) -> impl Iterator<Item = &Waiter> {
        let all = self.waiting.values().flatten();
        all.filter(|waiter| waiter.reader != Reader::OURSELVES)
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Sealing {
    #[default]
    NotYet,
    UnderWay,
    Done,
}

/// One layer and its readers.
pub struct Layer {
    id: LayerId,
    spec: LayerSpec,
    state: Mutex<State>,
    gates: Gates,
    /// Where its files lie, once its table of contents was read; nothing if that could not be.
    files: OnceLock<Option<Files>>,
    /// Whether everything that is missing is to be fetched.
    completing: AtomicBool,
    read_ahead: Mutex<plan::ReadAhead>,
    bytes_fetched: AtomicU64,
    window_turns: Turns,
    windows_gone: AtomicBool,
    shared: Weak<Shared>,
}

/// A read that took long, for `hermes explain`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlowRead {
    /// Digest of the layer's blob.
    pub layer: Digest,
    /// The bytes of the uncompressed layer.
    pub range: Range<u64>,
    /// How long the reader waited.
    pub waited: Duration,
    /// Who waited, 0 if unknown.
    pub pid: i32,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer")
            .field("id", &self.id)
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

impl Layer {
    pub(crate) fn new(
        id: LayerId,
        spec: LayerSpec,
        rules: plan::Rules,
        shared: Weak<Shared>,
    ) -> Self {
        let layout = Arc::new(Layout(Arc::clone(&spec.spans)));
        let files = spec.toc.get().map(|toc| OnceLock::from(Some(Files::of(&toc))));
        let sealing = if spec.cache.is_sealed() { Sealing::Done } else { Sealing::NotYet };
        Self {
            id,
            spec,
            state: Mutex::new(State { sealing, ..State::default() }),
            gates: Gates::default(),
            files: files.unwrap_or_default(),
            completing: AtomicBool::new(false),
            read_ahead: Mutex::new(plan::ReadAhead::new(rules, layout)),
            bytes_fetched: AtomicU64::new(0),
            window_turns: Turns::default(),
            windows_gone: AtomicBool::new(false),
            shared,
        }
    }

    /// The engine's number of it.
    #[must_use]
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// Digest of the compressed blob.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.spec.digest
    }

    /// Where its bytes are kept.
    #[must_use]
    pub fn cache(&self) -> &Arc<cache::Layer> {
        &self.spec.cache
    }

    /// The file that holds the uncompressed bytes.
    #[must_use]
    pub fn data(&self) -> &File {
        self.spec.cache.data()
    }

    /// Size of the uncompressed layer in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.spec.spans.uncompressed_size()
    }

    /// Uncompressed bytes that are there, those included that are checked before their next use.
    #[must_use]
    pub fn bytes_present(&self) -> u64 {
        self.spec.cache.bytes_present().saturating_add(self.spec.cache.bytes_unchecked())
    }

    /// Compressed bytes that came from the source since the daemon started.
    #[must_use]
    pub fn bytes_fetched(&self) -> u64 {
        self.bytes_fetched.load(Ordering::Relaxed)
    }

    /// Whether the layer is whole and proven equal to its DiffID.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.state.lock().sealing == Sealing::Done
    }

    /// How many reads wait, and since when the longest.
    #[must_use]
    pub fn waiting(&self) -> (usize, Option<Instant>) {
        let state = self.state.lock();
        (state.readers().count(), state.readers().map(|waiter| waiter.since).min())
    }

    /// The ranges that are waited for.
    #[must_use]
    pub fn waiting_ranges(&self) -> Vec<Range<u64>> {
        self.state.lock().readers().map(|waiter| waiter.range.clone()).collect()
    }

    /// Adds somebody who is told when the layer is sealed and when it is opened again, and at once
    /// which of both it is.
    pub fn add_gate(&self, gate: Arc<dyn Gate>) {
        self.gates.add(gate, || self.is_sealed());
    }

    /// Calls `then` when all bytes of `range` are in the layer's file, or with the reason why they
    /// will not be.
    ///
    /// What lies beyond the end of the layer counts as present. If nothing is missing, `then` runs
    /// before this returns.
    pub fn request(self: &Arc<Self>, range: Range<u64>, reader: Reader, then: Then) {
        let range = range.start..range.end.min(self.bytes());
        let Some(shared) = self.shared.upgrade() else {
            return then(Err(ReadError::Gone { layer: self.spec.digest }));
        };
        // Until the reader has been let go; where it reads only then, the front end knows of it.
        let reading = self.spec.cache.reading();
        let mut state = self.state.lock();
        if let Some(last) = &state.revoked {
            let (layer, last) = (self.spec.digest, last.clone());
            drop((state, reading));
            return then(Err(ReadError::Corrupt { layer, last }));
        }
        let Some(first) = self.first_missing(&state, &range) else {
            drop(state);
            then(Ok(()));
            drop(reading);
            if !self.is_sealed() {
                let ahead = self.guess(&shared, |read_ahead| read_ahead.on_hit(&range));
                shared.want(self.id, &self.not_present(ahead), Class::ReadAhead);
            }
            return;
        };
        let missing: Vec<u32> = self
            .spec
            .spans
            .spans_covering(range.clone())
            .filter(|span| span.0 >= first && !self.is_usable(span.0))
            .map(|span| span.0)
            .collect();
        let since = Instant::now();
        let deadline = since + self.spec.deadline;
        let waiter = Waiter { range: range.clone(), since, deadline, reader, then };
        state.waiting.entry(first).or_default().push(waiter);
        drop((state, reading));
        shared.reader_waits(reader);
        // A front end must not wait for its table of contents.
        let files = self.files.get().and_then(Option::as_ref);
        let hint = files.and_then(|files| files.at(&range));
        let ahead = self.guess(&shared, |read_ahead| read_ahead.on_demand(range, hint));
        shared.want(self.id, &missing, Class::Demand);
        shared.want(self.id, &self.not_present(ahead), Class::ReadAhead);
    }

    /// Calls `then` as soon as all bytes of `range` are there, at once if they are. Asks for nothing, and is
    /// forgotten with the layer.
    ///
    /// `then` holds up the thread that has made the last of them.
    pub fn when_present(&self, range: Range<u64>, then: impl FnOnce() + Send + 'static) {
        let range = range.start..range.end.min(self.bytes());
        let expected = Expected { range, then: Box::new(then) };
        let told = self.expect(&mut self.state.lock(), vec![expected]);
        told.into_iter().for_each(|expected| (expected.then)());
    }

    /// Has each wait for the next span that it misses; returns those that miss none.
    fn expect(&self, state: &mut State, expected: Vec<Expected>) -> Vec<Expected> {
        let mut ready = Vec::new();
        for expected in expected {
            match self.first_missing(state, &expected.range) {
                None => ready.push(expected),
                Some(next) => state.expected.entry(next).or_default().push(expected),
            }
        }
        ready
    }

    fn guess(
        &self,
        shared: &Shared,
        guess: impl FnOnce(&mut plan::ReadAhead) -> Vec<u32>,
    ) -> Vec<u32> {
        let mut read_ahead = self.read_ahead.lock();
        read_ahead.set_reach(shared.reach());
        guess(&mut read_ahead)
    }

    /// Makes durable what is present, so that it need not be checked after a reboot.
    ///
    /// # Errors
    /// When the disk refuses; what is present stays usable.
    pub fn flush(&self) -> Result<(), cache::SyncError> {
        self.spec.cache.mark_clean()
    }

    /// Asks for everything that is still missing, behind all readers.
    pub fn complete(&self) {
        let Some(shared) = self.shared.upgrade() else { return };
        self.completing.store(true, Ordering::Relaxed);
        let missing = self.not_present(0..self.spec.spans.len());
        if missing.is_empty() {
            self.seal_if_whole(&shared);
        } else {
            shared.want(self.id, &missing, Class::Background);
        }
    }

    /// Whether everything that is missing was asked for, and nothing was given up since.
    #[must_use]
    pub fn is_completing(&self) -> bool {
        self.completing.load(Ordering::Relaxed)
    }

    /// Whether all bytes of `range` are there.
    pub fn has(&self, range: Range<u64>) -> bool {
        self.first_missing(&self.state.lock(), &range).is_none()
    }

    /// Wants `range` before anybody reads it: behind what readers wait for, ahead of the rest.
    pub fn prefetch(&self, range: Range<u64>) {
        let Some(shared) = self.shared.upgrade() else { return };
        let range = range.start..range.end.min(self.bytes());
        let spans = self.spec.spans.spans_covering(range).map(|span| span.0);
        shared.want(self.id, &self.not_present(spans), Class::Prefetch);
    }

    /// Wants what is worth having before anybody reads: the whole of a small layer.
    pub fn mounted(&self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let ahead = self.read_ahead.lock().on_mount();
        shared.want(self.id, &self.not_present(ahead), Class::ReadAhead);
    }

    /// Why the layer is not what the image promises, if that was found out: all reads fail.
    pub fn revoked(&self) -> Option<String> {
        self.state.lock().revoked.clone()
    }

    pub(crate) fn layout(&self) -> Arc<dyn plan::Spans + Send + Sync> {
        Arc::new(Layout(Arc::clone(&self.spec.spans)))
    }

    pub(crate) fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    pub(crate) fn window_turns(&self) -> &Turns {
        &self.window_turns
    }

    /// The windows of the index do not come, and will not: said once.
    pub(crate) fn windows_are_gone(&self, error: &SourceError) {
        if !self.windows_gone.swap(true, Ordering::Relaxed) {
            let (layer, error) = (self.spec.digest, causes::in_full(error));
            tracing::warn!(%layer, error, "the windows of the index are gone: spans are made one after the other");
        }
    }

    pub(crate) fn wait_for_the_one_before(&self, span: u32, class: Class) {
        let behind = &mut self.state.lock().behind;
        let wanted = behind.entry(span).or_insert(class);
        *wanted = class.min(*wanted);
    }

    /// How much the span behind this one is wanted, if it waits for this one. It does not wait any more.
    pub(crate) fn who_waits_for(&self, span: u32) -> Option<Class> {
        self.state.lock().behind.remove(&span.saturating_add(1))
    }

    pub(crate) fn count_fetched(&self, bytes: u64) {
        self.bytes_fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The spans of `spans` that are not there.
    pub(crate) fn not_present(&self, spans: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let is_missing = |span: &u32| self.spec.cache.state(*span) == cache::SpanState::Missing;
        spans.into_iter().filter(is_missing).collect()
    }

    /// `span` is present for good.
    pub(crate) fn finished(&self, span: SpanId) {
        let reading = self.spec.cache.reading();
        let mut state = self.state.lock();
        state.trouble.remove(&span.0);
        let woken = self.wake(&mut state, span.0);
        let expected = state.expected.remove(&span.0).unwrap_or_default();
        let told = self.expect(&mut state, expected);
        drop(state);
        self.answer(woken, reading);
        told.into_iter().for_each(|expected| (expected.then)());
        self.find_files();
        if let Some(shared) = self.shared.upgrade() {
            shared.go_on_behind(self, span.0);
            self.seal_if_whole(&shared);
        }
    }

    /// From now on reads are seen with the files around them.
    fn find_files(&self) {
        self.files.get_or_init(|| match self.spec.toc.read() {
            Ok(toc) => Some(Files::of(&toc)),
            Err(err) => {
                let (layer, error) = (self.spec.digest, causes::in_full(&err));
                tracing::error!(%layer, error, "what is read of a layer is guessed without its index, and it cannot be sealed");
                None
            }
        });
    }

    /// What follows the end of the archive, if this daemon has decoded all of it; only the beginning
    /// of more than [`MOST_TAIL`].
    pub(crate) fn tail(&self) -> Option<Vec<u8>> {
        let state = self.state.lock();
        let pieces = self.tail_spans().map(|span| state.tail.get(&span));
        pieces
            .collect::<Option<Vec<_>>>()
            .map(|pieces| pieces.into_iter().flatten().copied().collect())
    }

    pub(crate) fn set_tail(&self, span: SpanId, mut tail: Vec<u8>) {
        let pieces = &mut self.state.lock().tail;
        pieces.remove(&span.0);
        tail.truncate(MOST_TAIL.saturating_sub(pieces.values().map(Vec::len).sum()));
        pieces.insert(span.0, tail);
    }

    /// The span in which the archive ends, and those behind it.
    fn tail_spans(&self) -> Range<u32> {
        let spans = &self.spec.spans;
        let end = spans.uncompressed_size();
        let first = spans.ids().rev().take_while(|span| spans.uncompressed_range(*span).end == end);
        first.last().map_or(0, |first| first.0)..spans.len()
    }

    /// Has the last spans made again, since what follows the archive was not kept.
    pub(crate) fn fetch_tail(&self, shared: &Shared) {
        let spans: Vec<u32> = self.tail_spans().collect();
        self.state.lock().sealing = Sealing::NotYet;
        match self.spec.cache.forget(&spans) {
            Ok(()) => shared.want(self.id, &spans, Class::Background),
            Err(err) => {
                tracing::error!(layer = %self.spec.digest, error = %err, "layer cannot be sealed");
            }
        }
    }

    /// An attempt at `span` failed; returns how long to wait before the next one.
    ///
    /// Readers go on waiting, unless all that ever came were wrong bytes: more of those will not
    /// help them, and they are told.
    pub(crate) fn failed(&self, span: SpanId, fault: &SpanFault) -> Duration {
        let mut state = self.state.lock();
        let trouble = state.trouble.entry(span.0).or_default();
        trouble.attempts += 1;
        trouble.wrong_bytes += u32::from(fault.is_wrong_bytes());
        trouble.last = causes::in_full(fault);
        let pause = fault.retry_after().unwrap_or_else(|| backoff(trouble.attempts));
        let (attempts, hopeless) = (trouble.attempts, trouble.wrong_bytes >= WRONG_BYTES_LIMIT);
        let last = trouble.last.clone();
        tracing::warn!(layer = %self.spec.digest, span = span.0, attempts, error = last, "span failed");
        let told = if hopeless {
            state.trouble.remove(&span.0);
            match self.spec.order {
                Order::Any => state.waiting.remove(&span.0).unwrap_or_default(),
                // What follows cannot be had either.
                Order::Stream { .. } => {
                    state.waiting.split_off(&span.0).into_values().flatten().collect()
                }
            }
        } else {
            Vec::new()
        };
        drop(state);
        for waiter in told {
            self.tell(
                waiter,
                Err(ReadError::Corrupt { layer: self.spec.digest, last: last.clone() }),
            );
        }
        pause.min(LONGEST_PAUSE)
    }

    /// `span` could not be written for want of room; it is asked for again when there is some.
    pub(crate) fn found_no_room(&self, span: SpanId, fault: &SpanFault) {
        let mut state = self.state.lock();
        state.trouble.entry(span.0).or_default().last = causes::in_full(fault);
    }

    /// Whether anybody waits for `span`.
    pub(crate) fn is_awaited(&self, span: u32) -> bool {
        self.state.lock().waiting.contains_key(&span)
    }

    /// Tells the readers whose deadline has passed.
    pub(crate) fn expire(&self, now: Instant) {
        let mut late = Vec::new();
        // Whatever keeps one of their spans away keeps away those behind it.
        let in_order = self.is_in_order();
        let mut state = self.state.lock();
        let State { waiting, trouble, .. } = &mut *state;
        for (span, waiters) in waiting.iter_mut() {
            for waiter in waiters.extract_if(.., |waiter| waiter.deadline <= now) {
                let met =
                    trouble.get(span).or_else(|| trouble.values().next().filter(|_| in_order));
                late.push((waiter, met.map(|trouble| trouble.last.clone())));
            }
        }
        waiting.retain(|_, waiters| !waiters.is_empty());
        drop(state);
        let no_room = self.shared.upgrade().is_some_and(|shared| shared.room.get() == Room::None);
        let under_way = if no_room { "the disk is full" } else { "the transfer is under way" };
        for (waiter, last) in late {
            let err = ReadError::Deadline {
                layer: self.spec.digest,
                range: waiter.range.clone(),
                waited: waiter.since.elapsed(),
                last: last.unwrap_or_else(|| under_way.to_owned()),
            };
            self.tell(waiter, Err(err));
        }
    }

    /// Fails all readers, now and later: the bytes are not those of the image.
    pub(crate) fn revoke(&self, why: &str) {
        let mut state = self.state.lock();
        state.revoked = Some(why.to_owned());
        let told: Vec<Waiter> =
            std::mem::take(&mut state.waiting).into_values().flatten().collect();
        drop(state);
        for waiter in told {
            let err = ReadError::Corrupt { layer: self.spec.digest, last: why.to_owned() };
            self.tell(waiter, Err(err));
        }
    }

    /// Fails all readers: the layer is dropped.
    pub(crate) fn abandon(&self) {
        let told: Vec<Waiter> =
            std::mem::take(&mut self.state.lock().waiting).into_values().flatten().collect();
        for waiter in told {
            self.tell(waiter, Err(ReadError::Gone { layer: self.spec.digest }));
        }
    }

    /// The first span of `range` whose bytes are not all there.
    fn first_missing(&self, state: &State, range: &Range<u64>) -> Option<u32> {
        self.spec.spans.spans_covering(range.clone()).map(|span| span.0).find(|&span| {
            !self.is_usable(span) && {
                let needed = range.end.min(self.spec.spans.uncompressed_range(SpanId(span)).end);
                state.produced.until(span).is_none_or(|until| until < needed)
            }
        })
    }

    /// Whether `span` is present; one that an unclean shutdown left behind is looked at first.
    pub(crate) fn is_usable(&self, span: u32) -> bool {
        match self.spec.cache.ensure_present(span) {
            Ok(usable) => usable,
            Err(err) => {
                tracing::error!(layer = %self.spec.digest, span, error = %err, "span cannot be checked");
                false
            }
        }
    }

    /// Takes out the readers of `span` that have all their bytes; the others move on.
    fn wake(&self, state: &mut State, span: u32) -> Woken {
        let mut woken = Woken::default();
        for waiter in state.waiting.remove(&span).unwrap_or_default() {
            match self.first_missing(state, &waiter.range) {
                None => woken.ready.push(waiter),
                Some(next) => {
                    state.waiting.entry(next).or_default().push(waiter);
                    woken.next.push(next);
                }
            }
        }
        woken
    }

    /// Lets readers go whose bytes are all there, as `reading` has made sure since the look.
    fn answer(&self, woken: Woken, reading: cache::Reading<'_>) {
        for waiter in woken.ready {
            self.tell(waiter, Ok(()));
        }
        drop(reading);
        if let Some(shared) = self.shared.upgrade() {
            // Mostly they are wanted already; one that was there may have been evicted meanwhile.
            shared.want(self.id, &woken.next, Class::Demand);
        }
    }

    fn tell(&self, waiter: Waiter, result: Result<(), ReadError>) {
        let Range { start, end } = waiter.range;
        let (layer, waited, pid) = (self.spec.digest, waiter.since.elapsed(), waiter.reader.pid);
        tracing::debug!(%layer, start, end, pid, ?waited, "a read waited");
        let shared = self.shared.upgrade();
        if let Some(shared) = &shared {
            shared.reader_done();
        }
        if waiter.reader == Reader::OURSELVES {
            return (waiter.then)(result);
        }
        let read = SlowRead { layer, range: waiter.range, waited, pid };
        if let Some(shared) = &shared {
            shared.note(&read);
        }
        let error = result.as_ref().err().map(ReadError::to_string);
        if let Some(error) = &error {
            tracing::error!(pid, error, "read failed");
        }
        (waiter.then)(result);
        if let Some(shared) = shared {
            shared.tell_of(read, error);
        }
    }
}

/// What became of the readers of a span.
#[derive(Default)]
struct Woken {
    /// They have all their bytes.
    ready: Vec<Waiter>,
    /// What the others wait for now.
    next: Vec<u32>,
}

/// How long to stay away after the `attempts`th failure.
fn backoff(attempts: u32) -> Duration {
    Duration::from_millis(100).saturating_mul(1 << attempts.min(6)).min(Duration::from_secs(5))
}

/// After so many wrong answers about one span its readers are told instead of kept waiting.
pub(crate) const WRONG_BYTES_LIMIT: u32 = 5;

/// What follows the end of an archive is kept up to this, in bytes; a layer with more is never sealed.
pub(crate) const MOST_TAIL: usize = 1 << 20;

/// However long a source asks us to stay away, we look again after this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A span table as the planner sees it.
struct Layout(Arc<SpanTable>);

impl plan::Spans for Layout {
    fn len(&self) -> u32 {
        self.0.len()
    }

    fn compressed(&self, span: u32) -> Range<u64> {
        self.0.compressed_range(SpanId(span))
    }

    fn uncompressed(&self, span: u32) -> Range<u64> {
        self.0.uncompressed_range(SpanId(span))
    }
}

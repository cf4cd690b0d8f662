//! What to fetch now: the wanted spans of all layers in the order of their urgency.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::{Fetch, Spans};

/// Why a span is wanted; the more urgent, the smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A reader waits for it.
    Demand,
    /// A program needs it, as is known from what it has begun to do.
    Prefetch,
    /// A reader will probably want it soon.
    ReadAhead,
    /// It makes the layer whole.
    Background,
}

/// A layer in the queue; the number is the engine's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub u32);

/// What is being fetched at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFlight {
    /// Connections busy with [`Class::Demand`].
    pub demand: u32,
    /// Connections busy with [`Class::Prefetch`] and [`Class::ReadAhead`].
    pub read_ahead: u32,
    /// Connections busy with [`Class::Background`].
    pub background: u32,
    /// Compressed bytes that are still to come for [`Class::Demand`].
    pub demand_bytes: u64,
    /// Compressed bytes that are still to come for the other classes.
    pub speculative_bytes: u64,
    /// Those of them that are for [`Class::Background`].
    pub background_bytes: u64,
}

/// The bounds of what may be fetched at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections of all classes together.
    pub max_connections: u32,
    /// How many of them only demand may use.
    pub demand_connections: u32,
    /// How many of them background work may use at most.
    pub background_connections: u32,
    /// The longest request that a reader waits for, in compressed bytes.
    pub demand_bytes: u64,
    /// The longest request for [`Class::Prefetch`] and [`Class::ReadAhead`], in compressed bytes. A fresh
    /// connection carries little in its first round trips: what a program needs soon comes over many.
    pub read_ahead_bytes: u64,
    /// The longest request for [`Class::Background`], in compressed bytes.
    pub background_bytes: u64,
    /// While no reader waits: so many compressed bytes may be in flight. A reader who comes then has
    /// to wait for what is on the link already.
    pub idle_bytes: u64,
    /// So many compressed bytes may be in flight for [`Class::Background`], if more than one request is.
    pub completion_bytes: u64,
    /// For so many compressed bytes there is memory beside those that a reader waits for: of
    /// [`Class::Prefetch`] and [`Class::ReadAhead`], and around a span of [`Class::Demand`]. Nothing of the
    /// former is handed out that is longer, so it must be no limit while nothing has taken any.
    pub memory_bytes: u64,
    /// The longest run of unwanted compressed bytes that is fetched to save a request.
    pub max_gap: u64,
    /// While a reader waits: the largest share of the bytes in flight that nobody waits for, in
    /// percent. What is above 100 counts as 100.
    pub speculative_percent: u8,
    /// While a reader waits: so many compressed bytes that nobody waits for may be in flight whatever
    /// their share. One demand alone does not fill a link of some latency.
    pub speculative_bytes: u64,
}

impl Default for Limits {
    /// 16 connections of which 4 are kept for demand and 8 are for background work at most;
    /// requests of 4 MiB, 1 MiB and 8 MiB, 32 MiB of them while nobody waits, all for completion if need be;
    /// gaps of 256 KiB; half of the bytes for speculation, but 8 MiB in any case.
    fn default() -> Self {
        Self {
            max_connections: 16,
            demand_connections: 4,
            background_connections: 8,
            demand_bytes: 4 << 20,
            read_ahead_bytes: 1 << 20,
            background_bytes: 8 << 20,
            idle_bytes: 32 << 20,
            completion_bytes: 32 << 20,
            memory_bytes: u64::MAX,
            max_gap: 256 << 10,
            speculative_percent: 50,
            speculative_bytes: 8 << 20,
        }
    }
}

/// One request to make now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The layer to fetch from.
    pub layer: LayerId,
    /// The most urgent reason for it.
    pub class: Class,
    /// The spans that are in flight from now on; the engine leaves out those that are present.
    pub spans: Range<u32>,
    /// The range of the compressed blob, in bytes.
    pub bytes: Range<u64>,
}

/// What became of spans in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// They are present, or whoever wanted them has been told.
    Done,
    /// They are still wanted, and wait again behind all others of their class.
    Again,
}

/// What wanting a span changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// It was not wanted before.
    Queued,
    /// It was wanted less urgently.
    Promoted,
    /// It was wanted at least as urgently.
    Already,
    /// It is being fetched.
    InFlight,
    /// The layer is not in the queue or has no such span.
    Unknown,
}

/// The place of a wanted span among those of its class.
///
/// Demand and prefetch are served in the order of their arrival, and the first number is 0. So it is for
/// read-ahead, but there the latest comes first: what was guessed long ago and was not wanted since was
/// probably a wrong guess. In background work it is the size of the layer, so that small layers are whole
/// first, until readers show where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    class: Class,
    layer_bytes: u64,
    arrival: u64,
}

struct Layer {
    spans: Arc<dyn Spans + Send + Sync>,
    bytes: u64,
    waiting: BTreeMap<u32, Place>,
    /// Spans in flight, and for whom; `None` where they only fill a gap.
    in_flight: BTreeMap<u32, Option<Class>>,
    /// Those of them that were under way before, and still may be.
    again: BTreeSet<u32>,
}

/// The wanted spans of all layers.
///
/// # Guarantees
///
/// A span is handed out to one [`Job`] at a time, or to two if it is wanted [again](Self::again). Every wanted
/// span is handed out at some time, if what is handed out is reported [`done`](Self::done), the limits allow each
/// class at least one connection, and no more urgent ones come. Demand is served first come, first served, and
/// before everything else. The same calls give the same answers. Every call is O(log n) in the number of wanted
/// spans, for each span that it touches.
#[derive(Default)]
pub struct Queue {
    layers: HashMap<LayerId, Layer>,
    order: BTreeMap<Place, (LayerId, u32)>,
    arrivals: u64,
    /// The last span that a reader had to wait for. Programs read on in the order in which files lie in the
    /// archive, more often than not: background work goes on from there.
    reader: Option<(LayerId, u32)>,
    /// Compressed bytes of the spans that wait for [`Class::Background`].
    background_bytes: u64,
}

impl Queue {
    /// An empty queue.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a layer; nothing of it is wanted yet. A layer that is there already stays as it is.
    pub fn add_layer(&mut self, id: LayerId, spans: Arc<dyn Spans + Send + Sync>) {
        self.layers.entry(id).or_insert_with(|| Layer {
            bytes: spans.compressed_len(),
            spans,
            waiting: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            again: BTreeSet::new(),
        });
    }

    /// Notes that a span is wanted, or wanted more urgently than before. Of several guesses the likeliest is
    /// to be wanted last.
    pub fn want(&mut self, id: LayerId, span: u32, class: Class) -> Wanted {
        let Some(layer) = self.layers.get_mut(&id).filter(|layer| span < layer.spans.len()) else {
            return Wanted::Unknown;
        };
        if class == Class::Demand {
            self.reader = Some((id, span));
        }
        if let Some(flight) = layer.in_flight.get_mut(&span) {
            *flight = Some(flight.map_or(class, |before| before.min(class)));
            return Wanted::InFlight;
        }
        let place = Place {
            class,
            layer_bytes: if class == Class::Background { layer.bytes } else { 0 },
            arrival: match class {
                Class::ReadAhead => u64::MAX - self.arrivals,
                Class::Demand | Class::Prefetch | Class::Background => self.arrivals,
            },
        };
        let bytes = layer.span_bytes(span);
        let answer = match layer.waiting.entry(span) {
            Entry::Vacant(entry) => {
                entry.insert(place);
                Wanted::Queued
            }
            Entry::Occupied(entry) if entry.get().class <= class => return Wanted::Already,
            Entry::Occupied(mut entry) => {
                let before = entry.insert(place);
                self.order.remove(&before);
                if before.class == Class::Background {
                    self.background_bytes -= bytes;
                }
                Wanted::Promoted
            }
        };
        if class == Class::Background {
            self.background_bytes += bytes;
        }
        self.order.insert(place, (id, span));
        self.arrivals += 1;
        answer
    }

    /// Takes back that a span is wanted, because it became present or its readers gave up. A span in
    /// flight stays so, but is not wanted again if that fails.
    pub fn unwant(&mut self, id: LayerId, span: u32) {
        let Some(layer) = self.layers.get_mut(&id) else { return };
        if let Some(flight) = layer.in_flight.get_mut(&span) {
            *flight = None;
        }
        if let Some(place) = layer.waiting.remove(&span) {
            self.order.remove(&place);
            if place.class == Class::Background {
                self.background_bytes -= layer.span_bytes(span);
            }
        }
    }

    /// The most urgent request that the limits allow now.
    ///
    /// The engine calls it again until it answers `None`, and after each change.
    #[must_use = "the spans of a job are in flight from now on"]
    pub fn next(&mut self, now: &InFlight, limits: &Limits) -> Option<Job> {
        // Nothing overtakes the most urgent span: whatever holds that back holds the others back, too.
        let (&Place { class, .. }, &first) = self.order.first_key_value()?;
        let (id, seed) = match class {
            Class::Background => self.behind_the_reader().unwrap_or(first),
            Class::Demand | Class::Prefetch | Class::ReadAhead => first,
        };
        if !has_connection(class, now, limits) {
            return None;
        }
        let (room, longest, memory) = match class {
            Class::Demand => (u64::MAX, limits.demand_bytes.min(limits.memory_bytes), u64::MAX),
            Class::Prefetch | Class::ReadAhead => {
                let longest = limits.read_ahead_bytes.min(limits.memory_bytes);
                (speculative_room(now, limits), longest, limits.memory_bytes)
            }
            Class::Background => (completion_room(now, limits)?, limits.background_bytes, u64::MAX),
        };
        let layer = self.layers.get_mut(&id)?;
        let fetch = layer.assemble(seed, class, room.min(longest), limits.max_gap);
        // One span may be longer than a request, but not than what is left for speculation. Whatever its
        // length, one is always under way while nobody waits.
        let is_idle = now.demand_bytes == 0 && now.speculative_bytes == 0;
        if room < fetch.byte_len().min(limits.background_bytes) && !is_idle {
            return None;
        }
        // What has come and waits to be inflated is not in flight, and is in memory.
        if memory < fetch.byte_len() {
            return None;
        }
        for span in fetch.spans.clone() {
            let place = layer.waiting.remove(&span);
            layer.in_flight.insert(span, place.map(|place| place.class));
            if let Some(place) = place {
                self.order.remove(&place);
                if place.class == Class::Background {
                    self.background_bytes -= layer.span_bytes(span);
                }
            }
        }
        Some(Job { layer: id, class, spans: fetch.spans, bytes: fetch.bytes })
    }

    /// Has a span in flight handed out once more, for `class`: what is under way does not come. Whichever ends
    /// first is reported [`done`](Self::done); what is reported of the other is ignored. Returns whether that is
    /// so: not of a span that is under way a second time.
    pub fn again(&mut self, id: LayerId, span: u32, class: Class) -> bool {
        let Some(layer) = self.layers.get_mut(&id) else { return false };
        if !layer.in_flight.contains_key(&span) || !layer.again.insert(span) {
            return false;
        }
        layer.in_flight.remove(&span);
        self.want(id, span, class);
        true
    }

    /// What a reader would want next, where nothing is wanted but by background work.
    fn behind_the_reader(&self) -> Option<(LayerId, u32)> {
        let (id, span) = self.reader?;
        let (&next, _) = self.layers.get(&id)?.waiting.range(span..).next()?;
        Some((id, next))
    }

    /// Reports spans that were handed out; a job may be reported span by span.
    pub fn done(&mut self, id: LayerId, spans: Range<u32>, outcome: Outcome) {
        for span in spans {
            let Some(layer) = self.layers.get_mut(&id) else { return };
            let flight = layer.in_flight.remove(&span).flatten();
            layer.again.remove(&span);
            if let (Outcome::Again, Some(class)) = (outcome, flight) {
                self.want(id, span, class);
            }
        }
    }

    /// Drops a layer with all that is wanted of it. What is in flight may still be reported, and is
    /// then ignored.
    pub fn forget(&mut self, id: LayerId) {
        let Some(layer) = self.layers.remove(&id) else { return };
        for (&span, place) in &layer.waiting {
            self.order.remove(place);
            if place.class == Class::Background {
                self.background_bytes -= layer.span_bytes(span);
            }
        }
    }

    /// Whether the span is being fetched.
    #[must_use]
    pub fn is_in_flight(&self, id: LayerId, span: u32) -> bool {
        self.layers.get(&id).is_some_and(|layer| layer.in_flight.contains_key(&span))
    }

    /// Compressed bytes that wait to be handed out merely to make layers whole. Neighbours may share one,
    /// which then counts twice.
    #[must_use]
    pub const fn background_bytes(&self) -> u64 {
        self.background_bytes
    }

    /// How many spans wait to be handed out.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether no span waits to be handed out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("layers", &self.layers.len())
            .field("waiting", &self.order.len())
            .finish_non_exhaustive()
    }
}

impl Layer {
    fn span_bytes(&self, span: u32) -> u64 {
        let range = self.spans.compressed(span);
        range.end.saturating_sub(range.start)
    }

    /// The request around `seed`: what follows it, as far as somebody wants it, but not merely to make
    /// the layer whole where a reader waits or soon will; and what is before it only if that is as
    /// urgent, because bytes before the seed keep its reader waiting.
    fn assemble(&self, seed: u32, class: Class, max_bytes: u64, max_gap: u64) -> Fetch {
        let spans: &dyn Spans = &*self.spans;
        let mut fetch = Fetch::of(spans, seed);
        for (&span, place) in self.waiting.range(seed + 1..) {
            let too_late = place.class == Class::Background && class != Class::Background;
            if too_late || self.in_flight.range(fetch.spans.end..span).next().is_some() {
                break;
            }
            let Some(longer) = fetch.with(spans, span, max_bytes, max_gap) else { break };
            fetch = longer;
        }
        for (&span, place) in self.waiting.range(..seed).rev() {
            if span + 1 != fetch.spans.start || place.class != class {
                break;
            }
            let Some(longer) = fetch.with_previous(spans, max_bytes) else { break };
            fetch = longer;
        }
        fetch
    }
}

fn has_connection(class: Class, now: &InFlight, limits: &Limits) -> bool {
    let busy = now.demand.saturating_add(now.read_ahead).saturating_add(now.background);
    let open = limits.max_connections.saturating_sub(limits.demand_connections);
    match class {
        Class::Demand => busy < limits.max_connections,
        Class::Prefetch | Class::ReadAhead => busy < open,
        Class::Background => busy < open && now.background < limits.background_connections,
    }
}

/// How long the next request for background work may be. A request costs a registry some milliseconds
/// whatever its length: this work has the time to wait until there is room for a long one.
fn completion_room(now: &InFlight, limits: &Limits) -> Option<u64> {
    let room = limits.completion_bytes.saturating_sub(now.background_bytes);
    let room = room.min(speculative_room(now, limits));
    let worth_it = limits.background_bytes.min(limits.completion_bytes) / 2;
    (now.background_bytes == 0 || room >= worth_it).then_some(room)
}

/// How long the next request may be for which nobody waits.
fn speculative_room(now: &InFlight, limits: &Limits) -> u64 {
    match (now.demand_bytes, now.speculative_bytes) {
        (0, 0) => u64::MAX,
        (0, under_way) => limits.idle_bytes.saturating_sub(under_way),
        _ => speculative_share(now, limits),
    }
}

/// How many more bytes that nobody waits for may be in flight while a reader waits.
fn speculative_share(now: &InFlight, limits: &Limits) -> u64 {
    let percent = u64::from(limits.speculative_percent.min(100));
    // s / (s + d) <= p / 100, solved for s.
    let share = match 100 - percent {
        0 => u64::MAX,
        rest => {
            let share = u128::from(now.demand_bytes) * u128::from(percent) / u128::from(rest);
            u64::try_from(share).unwrap_or(u64::MAX)
        }
    };
    share.max(limits.speculative_bytes).saturating_sub(now.speculative_bytes)
}

#[cfg(test)]
mod tests;

//! A layer that becomes whole and is sealed, and one that is opened again to give up spans.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use plan::Class;

use super::{Layer, Sealing};
use crate::engine::Shared;
use crate::error::ReopenError;
use crate::room::Room;

impl Layer {
    /// Has every read come to us again, if the layer is sealed. It is not sealed any more then.
    ///
    /// # Errors
    /// When a gate cannot be opened or the disk fails; the layer is sealed as before.
    pub fn reopen(&self) -> Result<(), ReopenError> {
        self.gates.reopen(
            || self.spec.cache.is_sealed(),
            || {
                self.spec.cache.unseal()?;
                self.state.lock().sealing = Sealing::NotYet;
                Ok(())
            },
        )
    }

    /// Gives up spans, to be fetched again when somebody reads them. A sealed layer is
    /// [opened](Self::reopen) for it.
    ///
    /// Those stay that were used within the last `idle`, that a reader waits for, that are being written, or
    /// whose bytes `is_read` says may still be on their way to a reader who was let go. Of a layer that was sealed
    /// nothing goes before the grace time of the cache has passed.
    ///
    /// # Errors
    /// [`ReopenError`]; what is missing then is fetched again like everything else.
    pub fn evict(
        &self,
        spans: &[u32],
        idle: Duration,
        is_read: &dyn Fn(&Range<u64>) -> bool,
    ) -> Result<cache::Evicted, ReopenError> {
        self.reopen()?;
        let in_use = |range: &Range<u64>| self.is_in_use(range) || is_read(range);
        let evicted = self.spec.cache.evict(spans, idle, &in_use)?;
        if !evicted.spans.is_empty() {
            self.completing.store(false, Ordering::Relaxed);
            self.read_ahead.lock().forget(evicted.spans.iter().copied());
        }
        Ok(evicted)
    }

    /// Has spans fetched again, whose bytes were found wrong.
    ///
    /// # Errors
    /// As for [`evict`](Self::evict).
    pub fn refetch(&self, spans: &[u32]) -> Result<(), ReopenError> {
        self.reopen()?;
        self.spec.cache.forget(spans)?;
        if let Some(shared) = self.shared.upgrade() {
            shared.want(self.id, spans, Class::Background);
        }
        Ok(())
    }

    /// Somebody was let go of whom nobody can say when he has read: for the grace time of the cache
    /// nothing is given up.
    pub fn unknown_reader(&self) {
        self.spec.cache.unknown_reader();
    }

    /// Whether a reader waits for any of it, or it is being written.
    fn is_in_use(&self, range: &Range<u64>) -> bool {
        let overlaps = |other: Range<u64>| other.start < range.end && range.start < other.end;
        let state = self.state.lock();
        state.waiting.values().flatten().any(|waiter| overlaps(waiter.range.clone()))
            || state.produced.spans().any(|span| overlaps(self.spec.spans.uncompressed_range(span)))
    }

    /// Notes for good that the layer is whole and proven, and lets reads pass by us.
    pub(crate) fn seal(&self, total_bytes: u64) -> Result<(), cache::SealError> {
        // What takes long comes first: nobody can mount the layer while the gates are told.
        self.spec.cache.mark_clean()?;
        self.gates.seal(|| {
            self.spec.cache.seal(self.spec.diff_id, total_bytes)?;
            self.state.lock().sealing = Sealing::Done;
            Ok(())
        })
    }

    /// The layer was not sealed, but may be later.
    pub(crate) fn seal_later(&self) {
        self.state.lock().sealing = Sealing::NotYet;
    }

    /// Has the layer proven if it is whole. Where room is wanting it would have to be opened again; the
    /// engine comes back to it.
    pub(crate) fn seal_if_whole(&self, shared: &Arc<Shared>) {
        if self.bytes_present() < self.bytes() || shared.room.get() != Room::Enough {
            return;
        }
        let mut state = self.state.lock();
        if state.sealing == Sealing::NotYet && self.spec.cache.first_absent(0).is_none() {
            state.sealing = Sealing::UnderWay;
            drop(state);
            shared.seal(self.id);
        }
    }
}

//! What a pass over a layer asks of it.

use cache::SpanState;
use ztoc::SpanId;

use super::{Layer, Order};

impl Layer {
    /// Whether its spans can only be had from the first to the last.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        matches!(self.spec.order, Order::Stream { .. })
    }

    /// Size of the blob, if it is read in order.
    pub(crate) fn blob_bytes(&self) -> u64 {
        match self.spec.order {
            Order::Any => self.spec.spans.compressed_size(),
            Order::Stream { blob_bytes } => blob_bytes,
        }
    }

    /// Whether anybody waits.
    pub(crate) fn has_readers(&self) -> bool {
        !self.state.lock().waiting.is_empty()
    }

    /// Whether somebody waits for spans before `span`, and nobody for one from there on.
    pub(crate) fn readers_are_behind(&self, span: SpanId) -> bool {
        self.state.lock().waiting.last_key_value().is_some_and(|(last, _)| *last < span.0)
    }

    pub(crate) fn misses_any(&self) -> bool {
        self.misses_any_from(SpanId(0))
    }

    pub(crate) fn misses_any_from(&self, span: SpanId) -> bool {
        self.spec.cache.first_absent(span.0).is_some()
    }

    pub(crate) fn first_missing_span(&self) -> SpanId {
        SpanId(self.spec.cache.first_absent(0).unwrap_or_default())
    }

    /// As [`is_usable`](Self::is_usable), for somebody who will not use it.
    pub(crate) fn is_present(&self, span: SpanId) -> bool {
        match self.spec.cache.state(span.0) {
            SpanState::Present => true,
            SpanState::Unchecked => self.is_usable(span.0),
            SpanState::Missing => false,
        }
    }
}

//! Spans that are being written: readers may have what is written already, and nothing of it is given
//! up meanwhile.

use std::collections::HashMap;

use ztoc::SpanId;

use super::Layer;

/// How far the spans are that are being written.
#[derive(Debug, Default)]
pub(super) struct Produced(HashMap<u32, Progress>);

#[derive(Debug)]
struct Progress {
    /// All bytes of the span before this offset are there.
    until: u64,
    /// By how many threads at once.
    makers: u32,
}

impl Produced {
    /// The offset before which all bytes of `span` are there, if it is being written.
    pub(super) fn until(&self, span: u32) -> Option<u64> {
        self.0.get(&span).map(|progress| progress.until)
    }

    pub(super) fn spans(&self) -> impl Iterator<Item = SpanId> {
        self.0.keys().copied().map(SpanId)
    }
}

/// One thread writes a span as long as this lives.
///
/// It must live until the span is marked present: whoever takes a reader's word from [`Produced`] for
/// a span that was evicted since, or marks one whose beginning was punched, serves zeros.
pub(crate) struct Making<'a> {
    layer: &'a Layer,
    span: SpanId,
}

impl Layer {
    /// Begins to write a span; `None` if it is present.
    pub(crate) fn begin(&self, span: SpanId) -> Option<Making<'_>> {
        // An eviction decides before this or after it, not meanwhile.
        let reading = self.spec.cache.reading();
        if self.is_usable(span.0) {
            return None;
        }
        let start = self.spec.spans.uncompressed_range(span).start;
        let mut state = self.state.lock();
        let unbegun = Progress { until: start, makers: 0 };
        state.produced.0.entry(span.0).or_insert(unbegun).makers += 1;
        drop((state, reading));
        Some(Making { layer: self, span })
    }
}

impl Making<'_> {
    /// The span has been written up to `until`: wakes those who wait for no more.
    pub(crate) fn progressed(&self, until: u64) {
        let reading = self.layer.spec.cache.reading();
        let mut state = self.layer.state.lock();
        if let Some(progress) = state.produced.0.get_mut(&self.span.0) {
            progress.until = progress.until.max(until);
        }
        let woken = self.layer.wake(&mut state, self.span.0);
        drop(state);
        self.layer.answer(woken, reading);
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let produced = &mut self.layer.state.lock().produced.0;
        if let Some(progress) = produced.get_mut(&self.span.0) {
            progress.makers -= 1;
            if progress.makers == 0 {
                produced.remove(&self.span.0);
            }
        }
    }
}

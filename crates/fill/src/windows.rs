//! Windows that lie apart from their zTOC: fetched beside the spans that are inflated with them.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use oci::Digest;
use tokio::sync::Mutex;
use ztoc::{SpanId, WINDOW_SIZE, Window, WindowFrame};

use crate::engine::Shared;
use crate::layer::Layer;
use crate::source::{Source, SourceError, Transfer};

/// The window of a span, and right.
pub(crate) enum Given {
    /// As it came: compressed.
    Frame(Bytes),
    /// Out of the span before.
    Plain(Vec<u8>),
}

/// What there is for the spans of a transfer.
#[derive(Default)]
pub(crate) struct Came {
    given: HashMap<u32, Given>,
    /// Their windows are nowhere until the spans before them are there.
    lacking: HashSet<u32>,
}

impl Came {
    pub(crate) fn take(&mut self, span: u32) -> Option<Given> {
        self.given.remove(&span)
    }

    pub(crate) fn lacks(&self, span: u32) -> bool {
        self.lacking.contains(&span)
    }

    /// Takes what is kept of the windows of these spans, and says whether that is all.
    fn take_in(&mut self, layer: &Layer, spans: Range<u32>) -> bool {
        let missing = self.missing(layer, spans);
        let n_missing = missing.len();
        let kept = missing.into_iter().filter_map(|(span, frame)| {
            let bytes = index::read_frame(frame, &layer.spec().windows).ok()?;
            Some((span.0, Given::Frame(bytes.into())))
        });
        let kept: Vec<_> = kept.collect();
        let is_all = kept.len() == n_missing;
        self.given.extend(kept);
        is_all
    }

    /// Those of these spans that need a window and have none yet.
    fn missing<'l>(&self, layer: &'l Layer, spans: Range<u32>) -> Vec<(SpanId, &'l WindowFrame)> {
        let missing = spans.filter(|span| !self.given.contains_key(span)).map(SpanId);
        missing.filter_map(|span| Some((span, frame(layer, span)?))).collect()
    }
}

/// Who fetches windows of a layer just now, by the number of their group.
#[derive(Debug, Default)]
pub(crate) struct Turns(parking_lot::Mutex<HashMap<u32, Arc<Mutex<()>>>>);

impl Turns {
    fn of(&self, group: u32) -> Arc<Mutex<()>> {
        Arc::clone(self.0.lock().entry(group).or_default())
    }
}

/// Fetches the windows of these spans that are not there yet, and those of their neighbours, which will be
/// wanted soon: a request costs more than a window. One that is wrong is left out, and its span cannot be made.
pub(crate) async fn fetch(
    shared: &Shared,
    layer: &Layer,
    spans: Range<u32>,
) -> Result<Came, SourceError> {
    let mut came = Came::default();
    let Some(source) = &layer.spec().windows_source else { return Ok(came) };
    for group in spans.start / GROUP..spans.end.div_ceil(GROUP) {
        let first = group.saturating_mul(GROUP);
        let all = first..first.saturating_add(GROUP).min(layer.spec().spans.len());
        let wanted = all.start.max(spans.start)..all.end.min(spans.end);
        if came.take_in(layer, wanted.clone()) {
            continue;
        }
        // The neighbours' transfers want the same; one of them may hang.
        let turn = layer.window_turns().of(group);
        let _turn = tokio::time::timeout(shared.patience(), turn.lock()).await;
        if came.take_in(layer, wanted.clone()) {
            continue;
        }
        came.take_in(layer, all.clone());
        match fetch_frames(shared, layer, source.as_ref(), &came.missing(layer, all)).await {
            Ok(frames) => {
                let given = frames.into_iter().map(|(span, frame)| (span, Given::Frame(frame)));
                came.given.extend(given);
            }
            Err(error) if error.transient => return Err(error),
            Err(error) => {
                layer.windows_are_gone(&error);
                for (SpanId(span), _) in came.missing(layer, wanted) {
                    match before(layer, span) {
                        Some(window) => drop(came.given.insert(span, Given::Plain(window))),
                        None => drop(came.lacking.insert(span)),
                    }
                }
            }
        }
    }
    Ok(came)
}

/// The window of a span out of the bytes before it, if they are there.
fn before(layer: &Layer, span: u32) -> Option<Vec<u8>> {
    let spec = layer.spec();
    let end = spec.spans.checkpoint(SpanId(span)).uncompressed;
    let start = end.saturating_sub(WINDOW_SIZE as u64);
    // What follows the archive's end is not kept.
    let is_kept = end <= spec.spans.uncompressed_size();
    let _reading = spec.cache.reading();
    if !is_kept || !layer.has(start..end) {
        return None;
    }
    let mut window = vec![0; WINDOW_SIZE];
    let there = usize::try_from(end - start).ok()?;
    let bytes = window.get_mut(WINDOW_SIZE - there..)?;
    spec.cache.data().read_exact_at(bytes, start).ok()?;
    Some(window)
}

async fn fetch_frames(
    shared: &Shared,
    layer: &Layer,
    source: &dyn Source,
    frames: &[(SpanId, &WindowFrame)],
) -> Result<HashMap<u32, Bytes>, SourceError> {
    let (spec, mut came) = (layer.spec(), HashMap::new());
    let (Some((_, first)), Some((_, last))) = (frames.first(), frames.last()) else {
        return Ok(came);
    };
    let place = first.range.start..last.range.end;
    let Transfer { bytes: mut stream, sender } = source.open(place.clone()).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        shared.received(piece.len() as u64);
        bytes.extend_from_slice(&piece);
    }
    if (bytes.len() as u64) < place.end - place.start {
        return Err(ended_early());
    }
    let bytes = Bytes::from(bytes);
    for (span, frame) in frames {
        let within = |at: u64| usize::try_from(at - place.start).unwrap_or(usize::MAX);
        let bytes = bytes.slice(within(frame.range.start)..within(frame.range.end));
        let found = Digest::of(&bytes);
        if found == frame.digest {
            // On a full disk it is fetched again for the next time.
            if let Err(error) = spec.windows.write_all_at(&bytes, frame.range.start) {
                tracing::debug!(layer = %spec.digest, span = span.0, %error, "a window is not kept");
            }
            came.insert(span.0, bytes);
        } else if let Some(sender) = &sender {
            sender.lied(frame.digest, found);
        }
    }
    Ok(came)
}

fn frame(layer: &Layer, span: SpanId) -> Option<&WindowFrame> {
    match layer.spec().spans.window(span)? {
        Window::Apart(frame) => Some(frame),
        Window::Inside(_) => None,
    }
}

fn ended_early() -> SourceError {
    let cause = "the source of the windows ended early".into();
    SourceError { transient: true, retry_after: None, cause }
}

/// How many windows are fetched with one request: together they are shorter than a span.
const GROUP: u32 = 16;

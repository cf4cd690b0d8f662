//! One layer in an engine, its blob and its windows in memory, and sources that can be held up.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cache::{LayerShape, Store, StoreOptions};
use fill::{
    ByteStream, Engine, EngineOptions, Event, Layer, LayerSpec, Order, ReadError, Reader, Source,
    SourceError, Transfer,
};
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt as _, stream};
use oci::Digest;
use parking_lot::Mutex;
use testkit::image::{Compression, Content, LayerBuilder, Texture, compress};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use ztoc::{Indexer, IndexerOptions, Limits, SpanTable, Ztoc};

pub(crate) const SPAN: u64 = 128 << 10;

/// The parts; dropped in this order.
pub(crate) struct Setup {
    pub(crate) engine: Engine,
    pub(crate) layer: Arc<Layer>,
    pub(crate) cache: Arc<cache::Layer>,
    pub(crate) store: Store,
    pub(crate) source: Arc<Memory>,
    /// Of its windows.
    pub(crate) windows: Arc<Memory>,
    pub(crate) spans: Arc<SpanTable>,
    pub(crate) tar: Arc<Vec<u8>>,
    events: Mutex<Receiver<Event>>,
    _runtime: Runtime,
}

impl Setup {
    /// A layer of about `mib` MiB, with its cache in `root`.
    pub(crate) fn new(root: &Path, mib: u64, deadline: Duration) -> Self {
        Self::with_cache(root, mib, deadline, |store, (layer, _), shape| {
            store.layer(&layer, shape, None).unwrap()
        })
    }

    /// The same of one whose bytes have just been received, and proven.
    pub(crate) fn received(root: &Path, mib: u64, deadline: Duration) -> Self {
        Self::with_cache(root, mib, deadline, |store, (layer, tar), shape| {
            let mut incoming = store.receive(&layer).unwrap();
            incoming.append(tar).unwrap();
            store.keep(incoming, shape).unwrap()
        })
    }

    fn with_cache(
        root: &Path,
        mib: u64,
        deadline: Duration,
        cache: impl FnOnce(&Store, (Digest, &[u8]), LayerShape) -> Arc<cache::Layer>,
    ) -> Self {
        let content = Content::generated(7, mib << 20, Texture::Random);
        let tar = LayerBuilder::new().file("file", content).build();
        let blob = compress(&tar, Compression::Gzip { level: 6 });
        let options = IndexerOptions { span_size: SPAN, ..IndexerOptions::default() };
        let mut indexer = Indexer::new(options).unwrap();
        indexer.push(&blob, &mut |_| {}).unwrap();
        let built = indexer.finish().unwrap();
        let mut windows = Vec::new();
        let document = index::with_windows_apart(&built.ztoc, &built.ztoc_bytes, &mut windows);
        let document = document.unwrap();
        let index = Digest::of(&document);
        let spans = Arc::new(Ztoc::parse(&document, &Limits::default()).unwrap().spans);
        let windows = Arc::new(Memory::new(windows.into()));

        let runtime = Runtime::new().unwrap();
        let (tell, events) = channel();
        let options = EngineOptions { rules: plan::Rules::none(), ..EngineOptions::default() };
        // Nobody hears the last events.
        let tell = Box::new(move |event| tell.send(event).unwrap_or_default());
        let engine = Engine::start(options, runtime.handle(), tell).unwrap();
        let options = StoreOptions { quota: None, boot_id: "boot".to_owned() };
        let store = Store::open(&root.join("cache"), options).unwrap().with_grace(Duration::ZERO);
        let shape = LayerShape {
            bytes: spans.uncompressed_size(),
            spans: spans.ids().map(|span| spans.uncompressed_range(span).start).collect(),
            index,
        };
        assert!(shape.bytes / u64::from(shape.span_count()) < 2 * SPAN, "spans are small");
        let cache = cache(&store, (built.layer_digest, &tar), shape);
        let source = Arc::new(Memory::new(blob.into()));
        let layer = engine.add(LayerSpec {
            digest: built.layer_digest,
            diff_id: built.diff_id,
            spans: Arc::clone(&spans),
            toc: Arc::new(built.ztoc.toc.into()),
            windows: tempfile::tempfile_in(root).unwrap(),
            windows_source: Some(Arc::clone(&windows) as Arc<dyn Source>),
            cache: Arc::clone(&cache),
            source: Arc::clone(&source) as Arc<dyn Source>,
            deadline,
            order: Order::Any,
        });
        let tar = Arc::new(tar);
        Self {
            engine,
            layer,
            cache,
            store,
            source,
            windows,
            spans,
            tar,
            events: Mutex::new(events),
            _runtime: runtime,
        }
    }

    /// The bytes of a span.
    pub(crate) fn range(&self, span: u32) -> Range<u64> {
        self.cache.shape().range(span)
    }

    pub(crate) fn all_spans(&self) -> Vec<u32> {
        (0..self.cache.shape().span_count()).collect()
    }

    /// Gives up what nobody is using.
    pub(crate) fn evict(&self, spans: &[u32]) -> Vec<u32> {
        self.layer.evict(spans, Duration::ZERO, &|_| false).unwrap().spans
    }

    /// Asks for a range; the answer comes later.
    pub(crate) fn request(&self, range: Range<u64>) -> Receiver<Result<Vec<u8>, ReadError>> {
        let (answer, answered) = channel();
        let layer = Arc::clone(&self.layer);
        // As a FUSE server does it: read before the call returns.
        let at = range.clone();
        let then = move |result: Result<(), ReadError>| {
            let found = result.map(|()| {
                let mut bytes = vec![0; usize::try_from(at.end - at.start).unwrap()];
                layer.data().read_exact_at(&mut bytes, at.start).unwrap();
                bytes
            });
            answer.send(found).unwrap_or_default();
        };
        self.layer.request(range, Reader { pid: 0 }, Box::new(then));
        answered
    }

    /// Whether these are the bytes of the layer.
    #[track_caller]
    pub(crate) fn assert_right(&self, range: &Range<u64>, found: &[u8]) {
        let at = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert!(self.tar[at] == *found, "wrong bytes in {range:?}");
    }

    #[track_caller]
    pub(crate) fn check(&self, range: Range<u64>) {
        let found = self.request(range.clone()).recv_timeout(PATIENCE).unwrap().unwrap();
        self.assert_right(&range, &found);
    }

    /// Waits for an event; others that come before are dropped, but for a revocation.
    #[track_caller]
    pub(crate) fn wait_for(&self, wanted: impl Fn(&Event) -> bool) {
        let begin = Instant::now();
        while let Some(left) = PATIENCE.checked_sub(begin.elapsed()) {
            let event = self.events.lock().recv_timeout(left).unwrap();
            assert!(!matches!(event, Event::Revoked { .. }), "{event:?}");
            if wanted(&event) {
                return;
            }
        }
    }

    /// Waits until nothing has been fetched for a while; returns how much was in all.
    pub(crate) fn until_nothing_is_fetched(&self) -> u64 {
        loop {
            let before = self.source.bytes_fetched();
            std::thread::park_timeout(Duration::from_millis(300));
            if self.source.bytes_fetched() == before {
                return before;
            }
        }
    }

    /// Makes the layer whole; `tell` tells the source what becomes of the last request.
    pub(crate) fn complete_and_before_the_last_request(&self, tell: impl FnOnce(&Memory)) {
        self.source.hold_from(self.source.size() - TRAILER);
        self.layer.complete();
        while self.source.bytes_fetched() == 0 {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        tell(&self.source);
        self.source.hold_from(u64::MAX);
    }

    #[track_caller]
    pub(crate) fn until_sealed(&self) {
        self.wait_for(|event| matches!(event, Event::Sealed { .. }));
        assert!(self.layer.is_sealed());
    }
}

/// A blob in memory.
#[derive(Debug)]
pub(crate) struct Memory {
    blob: Bytes,
    /// From which byte on ranges are not given out for the time being.
    held_from: watch::Sender<u64>,
    /// After how many bytes the next request hangs for ever, or becomes slow.
    hang: Mutex<Option<usize>>,
    slow: Mutex<Option<usize>>,
    /// How much slow requests have carried.
    carried_slowly: Arc<AtomicUsize>,
    /// Whether requests are refused for good.
    gone: AtomicBool,
    /// How many requests more get wrong bytes.
    wrong: AtomicUsize,
    fetched: AtomicU64,
}

impl Memory {
    fn new(blob: Bytes) -> Self {
        let (held_from, hang) = (watch::Sender::new(u64::MAX), Mutex::default());
        let (wrong, fetched) = (AtomicUsize::new(0), AtomicU64::new(0));
        let (gone, slow, carried_slowly) = Default::default();
        Self { blob, held_from, hang, slow, carried_slowly, gone, wrong, fetched }
    }

    pub(crate) fn hang_next_after(&self, bytes: usize) {
        *self.hang.lock() = Some(bytes);
    }

    pub(crate) fn slow_down_next_after(&self, bytes: usize) {
        *self.slow.lock() = Some(bytes);
    }

    pub(crate) fn carried_slowly(&self) -> usize {
        self.carried_slowly.load(Ordering::Relaxed)
    }

    pub(crate) fn set_gone(&self, gone: bool) {
        self.gone.store(gone, Ordering::Relaxed);
    }

    pub(crate) fn give_wrong(&self, requests: usize) {
        self.wrong.store(requests, Ordering::Relaxed);
    }

    pub(crate) fn has_hung(&self) -> bool {
        self.hang.lock().is_none()
    }

    pub(crate) fn hold_from(&self, byte: u64) {
        self.held_from.send_replace(byte);
    }

    pub(crate) fn bytes_fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    pub(crate) fn size(&self) -> u64 {
        self.blob.len() as u64
    }
}

impl Memory {
    /// Fifty kilobytes a second.
    fn slowly(
        &self,
        bytes: Bytes,
    ) -> impl Stream<Item = Result<Bytes, SourceError>> + Send + 'static {
        let carried = Arc::clone(&self.carried_slowly);
        stream::unfold(bytes, move |mut rest| {
            let carried = Arc::clone(&carried);
            async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let piece = rest.split_to(rest.len().min(1000));
                carried.fetch_add(piece.len(), Ordering::Relaxed);
                (!piece.is_empty()).then_some((Ok(piece), rest))
            }
        })
    }
}

impl Source for Memory {
    fn open(&self, range: Range<u64>) -> BoxFuture<'_, Result<Transfer, SourceError>> {
        let mut held_from = self.held_from.subscribe();
        Box::pin(async move {
            if self.gone.load(Ordering::Relaxed) {
                let cause = "there is no such blob".into();
                return Err(SourceError { transient: false, retry_after: None, cause });
            }
            // The sender lives as long as this.
            held_from.wait_for(|byte| range.end <= *byte).await.ok();
            let (slow, hang) = (self.slow.lock().take(), self.hang.lock().take());
            self.fetched.fetch_add(range.end - range.start, Ordering::Relaxed);
            let at = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            let mut bytes = self.blob.slice(at);
            let less = |left: usize| left.checked_sub(1);
            if self.wrong.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
                bytes = bytes.iter().map(|byte| !byte).collect();
            }
            if let Some(at) = slow {
                let rest = bytes.split_off(at.min(bytes.len()));
                let bytes = Box::pin(stream::once(async { Ok(bytes) }).chain(self.slowly(rest)));
                return Ok(Transfer { bytes, sender: None });
            }
            bytes.truncate(hang.unwrap_or(usize::MAX));
            let bytes = stream::once(async { Ok(bytes) });
            let bytes = match hang {
                None => Box::pin(bytes) as ByteStream,
                Some(_) => Box::pin(bytes.chain(stream::pending())),
            };
            Ok(Transfer { bytes, sender: None })
        })
    }
}

/// Of gzip, in bytes: it belongs to no span.
const TRAILER: u64 = 16;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

//! A zstd layer in a registry with faults, and engines that read it.

use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cache::{LayerShape, Store, StoreOptions};
use fill::{
    Engine, EngineOptions, Layer, LayerSpec, Order, ReadError, Reader, Source, SourceError,
};
use futures_util::future::BoxFuture;
use futures_util::stream;
use index::{LayerIndex, build_layer};
use oci::{Digest, LayerCompression};
use registry::{BlobStream, Client, ClientOptions, FetchError, Repository};
use tempfile::TempDir;
use testkit::image::{Compression, Content, LayerBuilder, Texture, compress};
use testkit::registry::{Options, Registry};
use tokio::runtime::Runtime;
use ztoc::IndexerOptions;

/// A layer as it lies in the registry, and where its bytes are to go.
pub(crate) struct Setup {
    pub(crate) registry: Registry,
    pub(crate) tar: Vec<u8>,
    pub(crate) blob: Digest,
    pub(crate) blob_bytes: u64,
    index: LayerIndex,
    dir: TempDir,
    /// How many transfers are open.
    pub(crate) open: Arc<AtomicUsize>,
    pub(crate) deadline: Duration,
}

/// An engine with the layer; dropped as suddenly as a process dies.
pub(crate) struct Running {
    pub(crate) layer: Arc<Layer>,
    pub(crate) cache: Arc<cache::Layer>,
    pub(crate) engine: Engine,
    _runtime: Runtime,
    _store: Store,
}

/// The answer to a request, as soon as it is there.
pub(crate) type Answer = mpsc::Receiver<(Result<(), ReadError>, Instant)>;

impl Setup {
    /// A tar of `mib` files of a MiB that cannot be compressed.
    pub(crate) fn new(mib: u64) -> Self {
        let mut layer = LayerBuilder::new();
        for seed in 0..mib {
            layer = layer
                .file(format!("{seed:03}"), Content::generated(seed, 1 << 20, Texture::Random));
        }
        Self::of(layer.build(), |tar| compress(tar, Compression::Zstd { level: 1 }))
    }

    /// A layer whose blob is what `packed` makes of `tar`, and whose index is `tar`'s.
    pub(crate) fn of(tar: Vec<u8>, packed: impl FnOnce(&[u8]) -> Vec<u8>) -> Self {
        let right = compress(&tar, Compression::Zstd { level: 1 });
        let zstd = LayerCompression::Zstd;
        let index = build_layer(right.as_slice(), zstd, IndexerOptions::default(), &mut |_| {});
        let registry = Registry::start(Options::default()).unwrap();
        let packed = packed(&tar);
        Self {
            blob_bytes: packed.len() as u64,
            blob: registry.put_blob(packed),
            registry,
            tar,
            index: index.unwrap(),
            dir: tempfile::tempdir().unwrap(),
            open: Arc::default(),
            deadline: Duration::from_secs(60),
        }
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("layers").join(self.blob.hex()).join("data")
    }

    pub(crate) fn start(&self) -> Running {
        let options = StoreOptions { quota: None, boot_id: "boot".to_owned() };
        let store = Store::open(self.dir.path(), options).unwrap();
        let spans = Arc::new(self.index.ztoc.spans.clone());
        let shape = LayerShape {
            bytes: spans.uncompressed_size(),
            spans: spans.ids().map(|span| spans.uncompressed_range(span).start).collect(),
            index: Digest::of(&self.index.ztoc_bytes),
        };
        let cache = store.layer(&self.blob, shape, None).unwrap();
        let runtime = Runtime::new().unwrap();
        let engine =
            Engine::start(EngineOptions::default(), runtime.handle(), Box::new(|_event| {}))
                .unwrap();
        let mut ztoc = tempfile::tempfile().unwrap();
        ztoc.write_all(&self.index.ztoc_bytes).unwrap();
        let layer = engine.add(LayerSpec {
            digest: self.blob,
            diff_id: self.index.diff_id,
            spans,
            order: Order::Stream { blob_bytes: self.blob_bytes },
            toc: Arc::new(self.index.ztoc.toc.clone().into()),
            windows: ztoc,
            windows_source: None,
            cache: Arc::clone(&cache),
            source: Arc::new(self.source()),
            deadline: self.deadline,
        });
        Running { layer, cache, engine, _runtime: runtime, _store: store }
    }

    fn source(&self) -> Blob {
        let client = Client::new(ClientOptions::default());
        let reference = format!("{}/app:1", self.registry.reference_prefix()).parse().unwrap();
        let (repository, digest) = (client.repository(&reference), self.blob);
        Blob { repository, digest, open: Arc::clone(&self.open) }
    }

    /// Where each transfer of the blob began.
    pub(crate) fn transfers(&self) -> Vec<u64> {
        let requests = self.registry.requests();
        let blobs = requests.iter().filter(|request| request.is_blob());
        blobs.map(|request| request.range.map_or(0, |(first, _)| first)).collect()
    }

    /// Reads back a range that is said to be there.
    #[track_caller]
    pub(crate) fn assert_right(&self, range: Range<u64>) {
        let (start, end) = (index_of(range.start), index_of(range.end));
        let mut found = vec![0; end - start];
        File::open(self.data()).unwrap().read_exact_at(&mut found, range.start).unwrap();
        assert!(found == self.tar[start..end], "wrong bytes in {range:?}");
    }

    /// Reads back everything that counts as present.
    #[track_caller]
    pub(crate) fn assert_right_where_present(&self, running: &Running) {
        for span in running.cache.present_spans().iter() {
            self.assert_right(running.cache.shape().range(span));
        }
    }
}

impl Running {
    /// Asks for a range.
    pub(crate) fn read(&self, range: Range<u64>) -> Answer {
        let (answer, answered) = mpsc::channel();
        let then = move |result| answer.send((result, Instant::now())).unwrap_or_default();
        self.layer.request(range, Reader { pid: 1 }, Box::new(then));
        answered
    }

    /// The bytes of the layer.
    pub(crate) fn all(&self) -> Range<u64> {
        0..self.layer.bytes()
    }

    /// The last byte of the layer.
    pub(crate) fn last(&self) -> Range<u64> {
        self.layer.bytes() - 1..self.layer.bytes()
    }
}

/// Waits for two answers, for a minute each, and says whether the first came first.
#[track_caller]
pub(crate) fn wait_for_both(first: &Answer, second: &Answer) -> bool {
    let wait = |answer: &Answer| answer.recv_timeout(Duration::from_secs(60)).unwrap();
    let ((one, at), (other, later)) = (wait(first), wait(second));
    one.and(other).unwrap();
    at <= later
}

/// Waits for an answer, for a minute.
#[track_caller]
pub(crate) fn wait(answer: &Answer) -> Result<(), ReadError> {
    answer.recv_timeout(Duration::from_secs(60)).expect("an answer within a minute").0
}

/// Asks again and again, for a minute, until there is an answer.
#[track_caller]
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "waited a minute in vain: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn index_of(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// The layer's blob in the registry.
#[derive(Debug)]
struct Blob {
    repository: Repository,
    digest: Digest,
    open: Arc<AtomicUsize>,
}

/// A transfer, counted as long as it is open.
struct Transfer {
    stream: BlobStream,
    open: Arc<AtomicUsize>,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Source for Blob {
    fn open(&self, range: Range<u64>) -> BoxFuture<'_, Result<fill::Transfer, SourceError>> {
        Box::pin(async move {
            let stream = self.repository.blob_stream(&self.digest, range).await.map_err(failed)?;
            self.open.fetch_add(1, Ordering::SeqCst);
            let transfer = Transfer { stream, open: Arc::clone(&self.open) };
            let next = |mut transfer: Transfer| async move {
                let piece: Option<Bytes> = transfer.stream.next().await.map_err(failed)?;
                Ok(piece.map(|piece| (piece, transfer)))
            };
            let bytes = Box::pin(stream::try_unfold(transfer, next));
            Ok(fill::Transfer { bytes, sender: None })
        })
    }
}

fn failed(err: FetchError) -> SourceError {
    SourceError {
        transient: err.is_transient(),
        retry_after: err.retry_after(),
        cause: Box::new(err),
    }
}

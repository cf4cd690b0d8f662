//! The way of spans to an OTLP receiver. Whoever ends a span never waits: what finds no room is counted and
//! dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter as _, SpanProcessor,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::JoinSet;

/// What became of spans.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::daemon) struct Figures {
    /// The receiver has them.
    pub(in crate::daemon) exported: u64,
    /// Nobody has them.
    pub(in crate::daemon) dropped: u64,
}

/// The task that exports.
#[derive(Debug)]
pub(super) struct Export {
    counts: Arc<Counts>,
    finish: Arc<Notify>,
    task: Mutex<JoinSet<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    exported: AtomicU64,
    dropped: AtomicU64,
}

/// Where spans are put when they end.
#[derive(Debug)]
struct Queue {
    sender: Sender<SpanData>,
    counts: Arc<Counts>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.sender.try_send(span).is_err() {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    /// The daemon finishes its [`Export`] itself, and in time.
    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl Export {
    /// Starts to export to `endpoint`, the base address of an OTLP receiver.
    pub(super) fn start(endpoint: &str, runtime: &Handle) -> Result<(SdkTracer, Self)> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(PATIENCE);
        let mut exporter = exporter.build().context("getting ready to export traces")?;
        let resource = resource();
        exporter.set_resource(&resource);
        let (sender, spans) = mpsc::channel(MOST_SPANS);
        let (counts, finish) = (Arc::<Counts>::default(), Arc::<Notify>::default());
        let queue = Queue { sender, counts: Arc::clone(&counts) };
        let provider = SdkTracerProvider::builder().with_span_processor(queue);
        let tracer = provider.with_resource(resource).build().tracer("hermes");
        let mut task = JoinSet::new();
        let from = (spans, Arc::clone(&finish));
        let run = run((exporter, endpoint.to_owned()), from, Arc::clone(&counts));
        task.spawn_on(run, runtime);
        Ok((tracer, Self { counts, finish, task: Mutex::new(task) }))
    }

    pub(super) fn figures(&self) -> Figures {
        Figures {
            exported: self.counts.exported.load(Ordering::Relaxed),
            dropped: self.counts.dropped.load(Ordering::Relaxed),
        }
    }

    /// Exports what is left, and no more afterwards.
    pub(super) async fn finish(&self, patience: Duration) {
        let mut task = std::mem::take(&mut *self.task.lock());
        self.finish.notify_one();
        if tokio::time::timeout(patience, task.join_next()).await.is_err() {
            tracing::warn!("the last traces were not taken in time");
        }
    }
}

/// Exports what comes, in batches, until it is to finish and nothing is left.
async fn run(
    (exporter, endpoint): (SpanExporter, String),
    (mut spans, finish): (Receiver<SpanData>, Arc<Notify>),
    counts: Arc<Counts>,
) {
    let mut is_taken = true;
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            count = spans.recv_many(&mut batch, BATCH) => if count == 0 { return },
            () = finish.notified() => {
                spans.close();
                continue;
            }
        }
        let count = batch.len() as u64;
        let taken = exporter.export(batch).await;
        let counter = if taken.is_ok() { &counts.exported } else { &counts.dropped };
        counter.fetch_add(count, Ordering::Relaxed);
        // Each once: a receiver that is away is so for many batches.
        match &taken {
            Err(err) if is_taken => {
                tracing::warn!(endpoint, error = %err, "traces are not taken, and dropped");
            }
            Ok(()) if !is_taken => tracing::info!("traces are taken again"),
            _ => {}
        }
        is_taken = taken.is_ok();
        // What ends meanwhile goes in one request.
        tokio::select! {
            () = tokio::time::sleep(PAUSE), if !spans.is_closed() => {}
            () = finish.notified() => spans.close(),
            else => {}
        }
    }
}

/// Who tells; `OTEL_RESOURCE_ATTRIBUTES` says more.
fn resource() -> Resource {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    Resource::builder()
        .with_service_name("hermes")
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("host.name", host.trim().to_owned()),
        ])
        .build()
}

/// Spans that wait for their export, at most; an image makes a dozen.
const MOST_SPANS: usize = 2048;

const BATCH: usize = 512;

const PAUSE: Duration = Duration::from_millis(200);

/// How long a batch may take, with all attempts.
const PATIENCE: Duration = Duration::from_secs(5);

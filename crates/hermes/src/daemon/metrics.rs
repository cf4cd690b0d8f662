//! What Prometheus is told: how many, never which. Labels are from closed lists.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use fill::Durations;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use policy::Reason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::Daemon;
use super::report::StatusReport;
use super::traces;

/// What is known at one moment.
#[derive(Debug)]
struct Snapshot {
    status: StatusReport,
    waits: Durations,
    mount_times: Durations,
    revoked: u64,
    spans: traces::Figures,
}

type Labels = [(&'static str, String)];

impl Daemon {
    /// All metrics, in Prometheus' text format.
    pub(super) fn metrics(&self) -> Result<String> {
        let snapshot = Snapshot {
            status: self.status(),
            waits: self.engine.figures().waits,
            mount_times: *self.mount_times.lock(),
            revoked: self.revoked.load(Ordering::Relaxed),
            spans: self.traces.figures(),
        };
        let mut registry = Registry::with_prefix("hermes");
        registry.register_collector(Box::new(snapshot));
        let mut page = String::new();
        text::encode(&mut page, &registry)?;
        Ok(page)
    }
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        page.gauge(
            "build",
            "Always 1; the version is a label",
            [(&[("version", version)][..], 1.0)],
        )?;
        self.containerd(&mut page)?;
        self.mounts(&mut page)?;
        self.network(&mut page)?;
        self.room(&mut page)?;
        let traces::Figures { exported, dropped } = self.spans;
        page.counter("exported_spans", "Spans that the receiver of traces has", one(exported))?;
        page.counter("dropped_spans", "Spans that it did not take, or not in time", one(dropped))
    }
}

impl Snapshot {
    fn containerd(&self, page: &mut Page<'_>) -> fmt::Result {
        let count = |reason| self.status.decisions.get(&reason).copied().unwrap_or_default();
        let decisions =
            Reason::ALL.map(|reason| ([("reason", reason.name().to_owned())], count(reason)));
        let decisions = decisions.iter().map(|(labels, count)| (&labels[..], *count));
        page.counter(
            "decisions",
            "Images that containerd pulled, by why they are lazy or not",
            decisions,
        )?;
        let policies = self.status.policies.unwrap_or_default();
        page.gauge("policies", "Policies in force", one(policies as f64))?;
        let trouble = self.status.policy_trouble.len();
        page.gauge("policy_errors", "What is wrong in the policies' folder", one(trouble as f64))
    }

    fn mounts(&self, page: &mut Page<'_>) -> fmt::Result {
        let mounts = &self.status.mounts;
        let mut kinds: Vec<([(&str, String); 2], u32)> = Vec::new();
        for mount in mounts {
            let kind = [("backend", mount.backend.to_string()), ("state", mount.state.clone())];
            match kinds.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, count)) => *count += 1,
                None => kinds.push((kind, 1)),
            }
        }
        let kinds = kinds.iter().map(|(kind, count)| (&kind[..], f64::from(*count)));
        page.gauge("mounts", "Mounted images", kinds)?;
        let sealed = mounts.iter().filter(|mount| mount.sealed).count();
        page.gauge(
            "mounts_complete",
            "Mounted images that need no registry any more",
            one(sealed as f64),
        )?;
        let total: u64 = mounts.iter().map(|mount| mount.bytes_total).sum();
        page.gauge("mounted_bytes", "Uncompressed bytes of mounted images", one(total as f64))?;
        let present: u64 = mounts.iter().map(|mount| mount.bytes_present).sum();
        page.gauge(
            "mounted_present_bytes",
            "Those of them that are on this machine",
            one(present as f64),
        )?;
        page.histogram("mount_seconds", "Time to mount an image", &self.mount_times)?;
        page.histogram(
            "read_wait_seconds",
            "Time that reads waited for missing bytes",
            &self.waits,
        )?;
        let waiting: u64 = mounts.iter().map(|mount| mount.waiting_reads).sum();
        page.gauge("waiting_reads", "Reads that wait for missing bytes now", one(waiting as f64))?;
        let longest = mounts.iter().map(|mount| mount.waiting_seconds).fold(0.0, f64::max);
        page.gauge(
            "waiting_reads_longest_seconds",
            "How long the first of them has waited",
            one(longest),
        )
    }

    fn network(&self, page: &mut Page<'_>) -> fmt::Result {
        let StatusReport { bytes_fetched, requests, failed_spans, .. } = &self.status;
        page.counter(
            "fetched_bytes",
            "Compressed bytes that came from registries",
            one(*bytes_fetched),
        )?;
        page.counter("fetches", "Ranged requests to registries", one(*requests))?;
        page.counter("failed_fetches", "Attempts at a span that failed", one(*failed_spans))?;
        page.counter("revoked_indexes", "Indexes that were found to lie", one(self.revoked))
    }

    fn room(&self, page: &mut Page<'_>) -> fmt::Result {
        page.gauge(
            "cache_bytes",
            "Disk space that the cache takes",
            one(self.status.cache_bytes as f64),
        )?;
        if let Some(quota) = self.status.quota {
            page.gauge("cache_quota_bytes", "Disk space that it may take", one(quota as f64))?;
        }
        let short = f64::from(u8::from(self.status.room.is_some()));
        page.gauge(
            "room_short",
            "1 if quota or disk are too small for what is mounted",
            one(short),
        )?;
        let keeper = f64::from(u8::from(self.status.keeper.pid.is_some()));
        page.gauge("keeper_up", "1 if the keeper answers", one(keeper))
    }
}

/// A figure without labels.
fn one<T>(value: T) -> [(&'static Labels, T); 1] {
    [(&[], value)]
}

struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge<'l>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (&'l Labels, f64)>,
    ) -> fmt::Result {
        self.family((name, help, MetricType::Gauge), values, |metric, value| {
            metric.encode_gauge(&value)
        })
    }

    fn counter<'l>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (&'l Labels, u64)>,
    ) -> fmt::Result {
        self.family((name, help, MetricType::Counter), values, |metric, value| {
            metric.encode_counter::<NoLabelSet, u64, u64>(&value, None)
        })
    }

    fn family<'l, V>(
        &mut self,
        (name, help, kind): (&str, &str, MetricType),
        values: impl IntoIterator<Item = (&'l Labels, V)>,
        encode: impl Fn(&mut MetricEncoder<'_>, V) -> fmt::Result,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in values {
            match labels {
                [] => encode(&mut metric, value)?,
                labels => encode(&mut metric.encode_family(&labels)?, value)?,
            }
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str, help: &str, durations: &Durations) -> fmt::Result {
        let bound = |bound: Duration| match bound {
            Duration::MAX => f64::MAX,
            bound => bound.as_secs_f64(),
        };
        let classes: Vec<_> =
            durations.classes().map(|(most, count)| (bound(most), count)).collect();
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        let sum = durations.sum().as_secs_f64();
        metric.encode_histogram::<NoLabelSet>(sum, durations.count(), &classes, None)
    }
}

/// A socket for Prometheus. Without one, everything else goes on.
pub(super) async fn listen(address: SocketAddr) -> Option<TcpListener> {
    match TcpListener::bind(address).await {
        Ok(listener) => Some(listener),
        Err(err) => {
            tracing::error!(%address, error = %err, "there are no metrics: cannot listen; `metrics.address` says where");
            None
        }
    }
}

/// Answers Prometheus, for as long as the daemon runs.
pub(super) async fn serve(daemon: Arc<Daemon>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(Arc::clone(&daemon), stream));
                }
                Err(err) => {
                    tracing::debug!(error = %err, "metrics were not asked for after all");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(daemon: Arc<Daemon>, stream: TcpStream) {
    let service = service_fn(move |request| answer(Arc::clone(&daemon), request));
    let mut server = hyper::server::conn::http1::Builder::new();
    let server = server.timer(TokioTimer::new()).header_read_timeout(PATIENCE).keep_alive(false);
    let conversation = server.serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(PATIENCE, conversation).await {
        Ok(Ok(())) => {}
        Ok(Err(err)) => tracing::debug!(error = %err, "metrics were not read"),
        Err(_late) => tracing::debug!("metrics were not read in time"),
    }
}

async fn answer(
    daemon: Arc<Daemon>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            match tokio::task::spawn_blocking(move || daemon.metrics()).await {
                Ok(Ok(page)) => (StatusCode::OK, page),
                _ => (StatusCode::INTERNAL_SERVER_ERROR, "no metrics\n".to_owned()),
            }
        }
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "GET it\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "there is only /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, FORMAT);
    Ok(response)
}

const FORMAT: header::HeaderValue =
    header::HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Prometheus needs one.
const MOST_CONNECTIONS: usize = 16;
const PATIENCE: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

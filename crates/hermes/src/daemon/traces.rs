//! What OpenTelemetry is told: one trace for each image that is pulled and mounted on this node. Without
//! `tracing.endpoint` nothing is made and nobody is asked.

mod export;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use fill::SlowRead;
use mounts::Backend;
use oci::Digest;
use opentelemetry::trace::{
    FutureExt, Link, SpanBuilder, SpanContext, Status, TraceContextExt, Tracer as _,
};
use opentelemetry::{Context, ContextGuard, KeyValue};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use parking_lot::Mutex;
use policy::Reason;
use tokio::runtime::Handle;

use self::export::Export;
use super::decisions::DecisionReport;
use super::images::LoadedImage;
use super::report::file_at;

pub(super) use self::export::Figures;

/// Makes the spans of images.
#[derive(Debug, Default)]
pub(super) struct Traces {
    /// Unset if nobody wants spans.
    on: Option<Exported>,
    /// Where the traces of images began that were pulled, by their manifest.
    pulls: Mutex<HashMap<String, Pulled>>,
    /// What is still to be said of images that are mounted.
    mounted: Mutex<Vec<Mounted>>,
}

#[derive(Debug)]
struct Exported {
    tracer: SdkTracer,
    export: Export,
}

#[derive(Debug)]
struct Pulled {
    span: SpanContext,
    at: Instant,
}

/// A mounted image.
#[derive(Debug)]
struct Mounted {
    image: Weak<LoadedImage>,
    /// The span of its last mount, under which its reads are told.
    span: SpanContext,
    /// How many of them were.
    reads: usize,
    completing: Option<Completing>,
}

/// An image that is not complete.
#[derive(Debug)]
struct Completing {
    /// The span of the mount that began it.
    span: SpanContext,
    since: SystemTime,
    /// Layers that are not sealed.
    missing: HashSet<Digest>,
}

/// The span of a pull, which ends with a decision.
#[derive(Debug)]
pub(super) struct PullSpan {
    context: Context,
    _current: ContextGuard,
}

impl Traces {
    /// Has spans exported to an OTLP receiver, by tasks of `runtime`.
    pub(super) fn start(endpoint: &str, runtime: &Handle) -> anyhow::Result<Self> {
        let (tracer, export) = Export::start(endpoint, runtime)?;
        // For the traces that calls of containerd belong to.
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        Ok(Self { on: Some(Exported { tracer, export }), ..Self::default() })
    }

    /// What became of the spans so far.
    pub(super) fn figures(&self) -> Figures {
        self.on.as_ref().map(|on| on.export.figures()).unwrap_or_default()
    }

    /// Exports what is left, if that is possible within `patience`.
    pub(super) async fn finish(&self, patience: Duration) {
        if let Some(on) = &self.on {
            on.export.finish(patience).await;
        }
    }

    /// Tells of `work` as part of what is told of here.
    pub(super) async fn within<T, E: fmt::Display>(
        &self,
        name: &'static str,
        attributes: impl FnOnce() -> Vec<KeyValue>,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let Some(on) = &self.on else { return work.await };
        let builder = SpanBuilder::from_name(name).with_attributes(attributes());
        on.tell(builder, &Context::current(), work).await
    }

    /// Begins to tell of a pull, if this is its first call: until the decision, what this thread does is
    /// part of it.
    pub(super) fn pull(&self, image: &str, manifest: &str) -> Option<PullSpan> {
        let on = self.on.as_ref()?;
        let mut pulls = self.pulls.lock();
        pulls.retain(|_, pull| pull.at.elapsed() < KEPT);
        let is_known = pulls.get(manifest).is_some_and(|pull| pull.at.elapsed() < A_PULL);
        if is_known || pulls.len() >= MOST_PULLS {
            return None;
        }
        let attributes = [image_name(image), KeyValue::new(MANIFEST, manifest.to_owned())];
        let builder = SpanBuilder::from_name("pull").with_attributes(attributes);
        let span = on.tracer.build_with_context(builder, &Context::current());
        let context = Context::current_with_span(span);
        let span = context.span().span_context().clone();
        pulls.insert(manifest.to_owned(), Pulled { span, at: Instant::now() });
        Some(PullSpan { _current: context.clone().attach(), context })
    }

    /// Tells of the mount of an image: in the trace of whoever asks for it, or in that of its pull.
    pub(super) async fn mount<T, E: fmt::Display>(
        &self,
        image: &str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let Some(on) = &self.on else { return work.await };
        let manifest = image.rsplit_once('@').map_or("", |(_, manifest)| manifest);
        let pull = self.pulls.lock().get(manifest).map(|pull| pull.span.clone());
        let builder = SpanBuilder::from_name("mount").with_attributes([image_name(image)]);
        let here = Context::current();
        match pull {
            Some(pull) if here.has_active_span() => {
                let link = Link::new(pull, Vec::new(), 0);
                on.tell(builder.with_links(vec![link]), &here, work).await
            }
            Some(pull) => on.tell(builder, &here.with_remote_span_context(pull), work).await,
            None => on.tell(builder, &here, work).await,
        }
    }

    /// The image whose mount is told of here is mounted.
    pub(super) fn mounted(&self, image: &Arc<LoadedImage>, backend: Backend) {
        if self.on.is_none() {
            return;
        }
        let context = Context::current();
        let span = context.span();
        let (present, all) = (number(image.bytes_present()), number(image.bytes_total()));
        span.set_attributes([
            KeyValue::new(MANIFEST, image.record.descriptor.digest.to_string()),
            KeyValue::new("hermes.backend", backend.to_string()),
            KeyValue::new(INDEX, image.record.index.clone()),
            KeyValue::new("hermes.bytes", all),
            KeyValue::new("hermes.bytes_present", present),
        ]);
        let span = span.span_context().clone();
        let mut mounted = self.mounted.lock();
        mounted.retain(|other| other.image.strong_count() > 0);
        let known = mounted.iter().position(|other| other.image.as_ptr() == Arc::as_ptr(image));
        let completing = match known.map(|known| mounted.remove(known)) {
            Some(known) => known.completing,
            // Under the lock: what is sealed from now on waits for it.
            None => Completing::new(image, &span),
        };
        mounted.push(Mounted { image: Arc::downgrade(image), span, reads: 0, completing });
    }

    /// A read has waited. The first of a mount is told, and some that waited long or failed.
    pub(super) fn waited(&self, read: &SlowRead, error: Option<&str>) {
        let Some(on) = &self.on else { return };
        let mut mounted = self.mounted.lock();
        // Images share layers, and nobody can say through which of them one is read: most likely through
        // that which starts.
        let found = mounted.iter_mut().rev().find_map(|mounted| {
            let image = mounted.image.upgrade()?;
            let layer = image.layers.iter().find(|layer| *layer.digest() == read.layer).cloned()?;
            Some((mounted, image, layer))
        });
        let Some((mounted, image, layer)) = found else { return };
        let name = match mounted.reads {
            0 => "first-read",
            MOST_READS.. => return,
            _ if read.waited >= SLOW || error.is_some() => "slow-read",
            _ => return,
        };
        mounted.reads += 1;
        let attributes = vec![
            image_name(&image.record.name),
            KeyValue::new("hermes.file", file_at(&image, &layer, read.range.start)),
            KeyValue::new("hermes.layer", read.layer.to_string()),
            KeyValue::new("hermes.bytes", number(read.range.end - read.range.start)),
            KeyValue::new("process.pid", i64::from(read.pid)),
        ];
        on.past(name, (&mounted.span, SystemTime::now() - read.waited), attributes, error);
    }

    /// A layer is complete and proven.
    pub(super) fn sealed(&self, layer: &Digest) {
        let Some(on) = &self.on else { return };
        for mounted in &mut *self.mounted.lock() {
            let Some(completing) = &mut mounted.completing else { continue };
            completing.missing.remove(layer);
            if completing.missing.is_empty()
                && let Some(completing) = mounted.completing.take()
            {
                let image = mounted.image.upgrade();
                completing.end(on, image.as_deref(), None);
            }
        }
    }

    /// A layer is not what its index says.
    pub(super) fn revoked(&self, layer: &Digest, why: &str) {
        let Some(on) = &self.on else { return };
        for mounted in &mut *self.mounted.lock() {
            let is_its = |completing: &mut Completing| completing.missing.contains(layer);
            if let Some(completing) = mounted.completing.take_if(is_its) {
                let image = mounted.image.upgrade();
                completing.end(on, image.as_deref(), Some(why));
            }
        }
    }
}

impl Exported {
    /// Tells of `work`, with all that is told of in it.
    async fn tell<T, E: fmt::Display>(
        &self,
        builder: SpanBuilder,
        parent: &Context,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let span = self.tracer.build_with_context(builder, parent);
        let context = parent.with_span(span);
        let result = work.with_context(context.clone()).await;
        end(&context, result.as_ref().err());
        result
    }

    /// Tells of something that is over.
    fn past(
        &self,
        name: &'static str,
        (parent, since): (&SpanContext, SystemTime),
        attributes: Vec<KeyValue>,
        error: Option<&str>,
    ) {
        let parent = Context::new().with_remote_span_context(parent.clone());
        let builder = SpanBuilder::from_name(name).with_start_time(since);
        let builder = builder.with_attributes(attributes);
        let span = self.tracer.build_with_context(builder, &parent);
        end(&Context::new().with_span(span), error.as_ref());
    }
}

impl Completing {
    /// What an image lacks, if it is to be had.
    fn new(image: &LoadedImage, span: &SpanContext) -> Option<Self> {
        let layers = image.layers.iter().filter(|layer| layer.bytes_present() < layer.bytes());
        let missing: HashSet<Digest> = layers.map(|layer| *layer.digest()).collect();
        let (span, since) = (span.clone(), SystemTime::now());
        (!missing.is_empty()).then_some(Self { span, since, missing })
    }

    fn end(self, on: &Exported, image: Option<&LoadedImage>, error: Option<&str>) {
        let attributes = image.into_iter().flat_map(|image| {
            [
                image_name(&image.record.name),
                KeyValue::new("hermes.bytes", number(image.bytes_total())),
            ]
        });
        on.past("complete", (&self.span, self.since), attributes.collect(), error);
    }
}

impl PullSpan {
    /// Ends it. That an image is not lazy is no error unless something failed.
    pub(super) fn decided(self, decision: &DecisionReport) {
        let span = self.context.span();
        let policy = decision.policy.clone().unwrap_or_default();
        span.set_attributes([
            KeyValue::new("hermes.lazy", decision.lazy),
            KeyValue::new("hermes.reason", decision.reason.name()),
            KeyValue::new("hermes.policy", policy),
        ]);
        if decision.lazy {
            span.set_attribute(KeyValue::new(INDEX, decision.detail.clone()));
        }
        end(&self.context, is_failure(decision.reason).then_some(&decision.detail));
    }
}

/// Notes something on the span of what is done here.
pub(super) fn note(attribute: KeyValue) {
    Context::current().span().set_attribute(attribute);
}

fn end(context: &Context, error: Option<&impl fmt::Display>) {
    let span = context.span();
    if let Some(error) = error {
        span.set_status(Status::error(format!("{error:#}")));
    }
    span.end();
}

/// Whether this keeps an image from being lazy that somebody wanted lazy, and that could be.
const fn is_failure(reason: Reason) -> bool {
    match reason {
        Reason::BadIndex
        | Reason::RegistryUnavailable
        | Reason::RegistrySlow
        | Reason::Unauthorized
        | Reason::OtherLayer
        | Reason::Local => true,
        Reason::Indexed
        | Reason::Streamed
        | Reason::NoPolicy
        | Reason::Paused
        | Reason::Excluded
        | Reason::OtherPlatform
        | Reason::Eager
        | Reason::NoIndex
        | Reason::Unsupported => false,
    }
}

fn image_name(image: &str) -> KeyValue {
    KeyValue::new("container.image.name", image.to_owned())
}

/// As OpenTelemetry has numbers.
pub(super) fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

const MANIFEST: &str = "oci.manifest.digest";

/// Where an index came from.
pub(super) const INDEX: &str = "hermes.index";

/// Layers of one pull are asked for within this.
const A_PULL: Duration = Duration::from_mins(1);

/// A mount belongs to the trace of a pull that is not older.
const KEPT: Duration = Duration::from_hours(1);

/// Pulls in that time that are told; a node has fewer.
const MOST_PULLS: usize = 1000;

/// Reads that waited so long are told one by one.
const SLOW: Duration = Duration::from_secs(1);

/// But not more of a mount.
const MOST_READS: usize = 16;

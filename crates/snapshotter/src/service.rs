//! containerd's calls, and what their answers mean to it.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use causes::in_full;
use futures_util::{Stream, stream};
use opentelemetry::Context;
use opentelemetry::propagation::Extractor;
use prost_types::{FieldMask, Timestamp};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::metadata::{KeyRef, MetadataMap};
use tonic::{Code, Request, Response, Status};

use crate::api::snapshots::snapshots_server::{Snapshots as Api, SnapshotsServer};
use crate::api::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info as ApiInfo, Kind as ApiKind, ListSnapshotsRequest,
    ListSnapshotsResponse, MountsRequest, MountsResponse, PrepareSnapshotRequest,
    PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse,
    UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
    ViewSnapshotRequest, ViewSnapshotResponse,
};
use crate::api::types;
use crate::filter::{Filter, ParseFilterError};
use crate::images::{Images, V1, V1Alpha2};
use crate::mounts::Mount;
use crate::snapshots::{Patience, Snapshots};
use crate::store::{Info, Kind, StoreError, Update};

/// containerd's calls cannot be served any more.
#[derive(Debug, thiserror::Error)]
#[error("serving containerd")]
pub struct ServeError(#[from] tonic::transport::Error);

/// Serves containerd on `listener`, and the kubelet as `images` says, until `stop` is ready; calls that have
/// begun are answered then. Short calls are carried out on the thread that they come in by, which waits for the
/// disk now and then: the runtime should be for nothing else.
///
/// # Errors
/// When the socket fails.
pub async fn serve(
    listener: UnixListener,
    snapshots: Arc<Snapshots>,
    images: Images,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let service = SnapshotsServer::new(Service { snapshots })
        .max_decoding_message_size(MOST_MESSAGE)
        .max_encoding_message_size(MOST_MESSAGE);
    let incoming = UnixListenerStream::new(listener);
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .add_service(images.service::<V1>())
        .add_service(images.service::<V1Alpha2>());
    Ok(server.serve_with_incoming_shutdown(incoming, stop).await?)
}

struct Service {
    snapshots: Arc<Snapshots>,
}

/// A call that cannot be done.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Filter(#[from] ParseFilterError),
    #[error("`{0}` cannot be changed; only labels can")]
    Field(String),
    #[error("a snapshot to change is missing in the request")]
    NoInfo,
}

impl CallError {
    /// What containerd acts upon.
    fn code(&self) -> Code {
        match self {
            Self::Store(err) => match err {
                StoreError::Missing(_) => Code::NotFound,
                StoreError::Exists(_) => Code::AlreadyExists,
                StoreError::ParentNotCommitted { .. }
                | StoreError::OtherParent { .. }
                | StoreError::Ids(_) => Code::InvalidArgument,
                StoreError::NotActive { .. }
                | StoreError::NoMounts { .. }
                | StoreError::HasChildren(_) => Code::FailedPrecondition,
                StoreError::Folder(err) if err.kind() == io::ErrorKind::StorageFull => {
                    Code::ResourceExhausted
                }
                StoreError::Mount { .. } | StoreError::Waits => Code::Unavailable,
                StoreError::Folder(_) | StoreError::Database(_) => Code::Internal,
            },
            Self::Filter(_) | Self::Field(_) | Self::NoInfo => Code::InvalidArgument,
        }
    }
}

impl Service {
    /// Carries out a call, here if it need not wait for an image: then it is over sooner than another thread would
    /// wake up. The calls behind it would wait anyway: there is one store.
    async fn call<T: Send + 'static>(
        &self,
        name: &'static str,
        key: String,
        work: impl Fn(&Snapshots, &str, Patience) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, Status> {
        let begin = Instant::now();
        match work(&self.snapshots, &key, Patience::Disk) {
            Err(CallError::Store(StoreError::Waits)) => {
                let work =
                    move |snapshots: &Snapshots, key: &str| work(snapshots, key, Patience::Images);
                self.call_aside(name, key, work).await
            }
            result => answer((name, &key), begin, result),
        }
    }

    /// Carries out a call where it may wait.
    async fn call_aside<T: Send + 'static>(
        &self,
        name: &'static str,
        key: String,
        work: impl FnOnce(&Snapshots, &str) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, Status> {
        let (snapshots, begin) = (Arc::clone(&self.snapshots), Instant::now());
        let work = move || answer((name, &key), begin, work(&snapshots, &key));
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|panic| Err(Status::internal(format!("{name}: {panic}"))))
    }
}

/// What a call is answered, which the log hears of.
fn answer<T>(
    (name, key): (&str, &str),
    begin: Instant,
    result: Result<T, CallError>,
) -> Result<T, Status> {
    let took = begin.elapsed();
    match &result {
        Ok(_) => tracing::debug!(call = name, key, ?took, "containerd was answered"),
        Err(err)
            if matches!(
                err.code(),
                Code::Internal | Code::ResourceExhausted | Code::Unavailable
            ) =>
        {
            tracing::error!(call = name, key, error = in_full(err), "a call failed");
        }
        Err(err) => {
            tracing::debug!(call = name, key, ?took, error = %err, "containerd was refused");
        }
    }
    result.map_err(|err| Status::new(err.code(), in_full(&err)))
}

#[tonic::async_trait]
impl Api for Service {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let trace = trace_of(request.metadata());
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let labels = sorted(labels);
        let create = move |snapshots: &Snapshots, key: &str, patience| {
            let _within = trace.clone().attach();
            Ok(snapshots.create(Kind::Active, (key, &parent), &labels, patience)?)
        };
        let mounts = vec![self.call("Prepare", key, create).await?.into()];
        Ok(Response::new(PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<ViewSnapshotRequest>,
    ) -> Result<Response<ViewSnapshotResponse>, Status> {
        let trace = trace_of(request.metadata());
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let labels = sorted(labels);
        let create = move |snapshots: &Snapshots, key: &str, patience| {
            let _within = trace.clone().attach();
            Ok(snapshots.create(Kind::View, (key, &parent), &labels, patience)?)
        };
        let mounts = vec![self.call("View", key, create).await?.into()];
        Ok(Response::new(ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<MountsRequest>,
    ) -> Result<Response<MountsResponse>, Status> {
        let trace = trace_of(request.metadata());
        let key = request.into_inner().key;
        let mounts = move |snapshots: &Snapshots, key: &str, patience| {
            let _within = trace.clone().attach();
            Ok(snapshots.mounts(key, patience)?)
        };
        let mounts = vec![self.call("Mounts", key, mounts).await?.into()];
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(
        &self,
        request: Request<CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { key, name, labels, parent, .. } = request.into_inner();
        let labels = sorted(labels);
        let commit = move |snapshots: &Snapshots, key: &str| {
            Ok(snapshots.commit(key, (&name, &parent), &labels)?)
        };
        self.call_aside("Commit", key, commit).await.map(Response::new)
    }

    async fn remove(
        &self,
        request: Request<RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        let remove = |snapshots: &Snapshots, key: &str| Ok(snapshots.remove(key)?);
        self.call_aside("Remove", key, remove).await.map(Response::new)
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let stat = |snapshots: &Snapshots, key: &str, _| Ok(snapshots.stat(key)?);
        let info = self.call("Stat", key, stat).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info.into()) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        let info = info.unwrap_or_default();
        let (key, labels) = (info.name, info.labels);
        let update = move |snapshots: &Snapshots, key: &str| {
            if key.is_empty() {
                return Err(CallError::NoInfo);
            }
            Ok(snapshots.update(key, change(labels, update_mask)?)?)
        };
        let info = self.call_aside("Update", key, update).await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(info.into()) }))
    }

    type ListStream =
        Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send + 'static>>;

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        let list = move |snapshots: &Snapshots, _: &str| {
            let filters = filters.iter().map(|filter| Filter::parse(filter));
            let filters = filters.collect::<Result<Vec<_>, _>>()?;
            let is_meant = |info: &Info| {
                filters.is_empty() || filters.iter().any(|filter| filter.matches(info))
            };
            let meant = snapshots.list()?.into_iter().filter(is_meant);
            Ok(meant.map(ApiInfo::from).collect::<Vec<_>>())
        };
        let found = self.call_aside("List", String::new(), list).await?;
        let answers = found
            .chunks(INFOS_AT_A_TIME)
            .map(|some| Ok(ListSnapshotsResponse { info: some.to_vec() }));
        let answers: Vec<_> = answers.collect();
        Ok(Response::new(Box::pin(stream::iter(answers))))
    }

    async fn usage(
        &self,
        request: Request<UsageRequest>,
    ) -> Result<Response<UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = |snapshots: &Snapshots, key: &str| Ok(snapshots.usage(key)?);
        let usage = self.call_aside("Usage", key, usage).await?;
        let [size, inodes] =
            [usage.bytes, usage.inodes].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
        Ok(Response::new(UsageResponse { size, inodes }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        let clean_up = |snapshots: &Snapshots, _: &str| {
            snapshots.clean_up();
            Ok(())
        };
        self.call_aside("Cleanup", String::new(), clean_up).await.map(Response::new)
    }
}

/// What a request to change labels means. A mask without paths stands for all that can change, and a label
/// of the mask that has no value is to go.
fn change(labels: HashMap<String, String>, mask: Option<FieldMask>) -> Result<Update, CallError> {
    let paths = mask.unwrap_or_default().paths;
    if paths.is_empty() || paths.iter().any(|path| path == "labels") {
        if let Some(other) = paths.iter().find(|path| label_of(path).is_none() && *path != "labels")
        {
            return Err(CallError::Field(other.clone()));
        }
        return Ok(Update::Replace(sorted(labels)));
    }
    let set = paths.iter().map(|path| {
        let label = label_of(path).ok_or_else(|| CallError::Field(path.clone()))?;
        Ok((label.to_owned(), labels.get(label).cloned().unwrap_or_default()))
    });
    Ok(Update::Set(set.collect::<Result<_, CallError>>()?))
}

fn label_of(path: &str) -> Option<&str> {
    path.strip_prefix("labels.")
}

/// Labels with an empty value are none.
/// The trace that a call belongs to, if containerd has one and this process wants to know.
fn trace_of(metadata: &MetadataMap) -> Context {
    opentelemetry::global::get_text_map_propagator(|known| known.extract(&Headers(metadata)))
}

struct Headers<'a>(&'a MetadataMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        let ascii = |key| match key {
            KeyRef::Ascii(key) => Some(key.as_str()),
            KeyRef::Binary(_) => None,
        };
        self.0.keys().filter_map(ascii).collect()
    }
}

fn sorted(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

impl From<Mount> for types::Mount {
    fn from(mount: Mount) -> Self {
        let Mount { kind, source, options } = mount;
        Self { r#type: kind.to_owned(), source, target: String::new(), options }
    }
}

impl From<Info> for ApiInfo {
    fn from(info: Info) -> Self {
        let kind = match info.kind {
            Kind::View => ApiKind::View,
            Kind::Active => ApiKind::Active,
            Kind::Committed => ApiKind::Committed,
        };
        Self {
            name: info.name,
            parent: info.parent.unwrap_or_default(),
            kind: kind.into(),
            created_at: Some(timestamp(info.created)),
            updated_at: Some(timestamp(info.updated)),
            labels: info.labels.into_iter().collect(),
        }
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// containerd's own limit, each way.
const MOST_MESSAGE: usize = 16 << 20;

/// As many as containerd's own service puts into one message.
const INFOS_AT_A_TIME: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    fn map<M: FromIterator<(String, String)>>(pairs: &[(&str, &str)]) -> M {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_mask_says_which_labels_are_meant() {
        let check = |paths: &[&str], expected: Update| {
            let paths = paths.iter().map(|path| (*path).to_owned()).collect();
            let labels = map(&[("a", "1"), ("b.c", "2")]);
            assert_eq!(change(labels, Some(FieldMask { paths })).unwrap(), expected);
        };
        let all = || Update::Replace(map(&[("a", "1"), ("b.c", "2")]));
        check(&[], all());
        check(&["labels"], all());
        check(&["labels.a"], Update::Set(map(&[("a", "1")])));
        check(&["labels.b.c", "labels.gone"], Update::Set(map(&[("b.c", "2"), ("gone", "")])));
        assert_eq!(change(map(&[("a", "1")]), None).unwrap(), Update::Replace(map(&[("a", "1")])));
    }

    #[test]
    fn nothing_but_labels_can_change() {
        for paths in [["parent", "labels.a"], ["labels", "kind"]] {
            let paths = paths.map(str::to_owned).to_vec();
            let error = change(HashMap::new(), Some(FieldMask { paths })).unwrap_err();
            assert!(matches!(error, CallError::Field(_)), "{error}");
        }
    }
}

//! The few questions that are put to containerd, and to Hermes as containerd would: gRPC over a unix socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

/// Somebody who answers on a socket.
pub(super) struct Peer {
    runtime: Runtime,
    grpc: Grpc<Channel>,
}

/// A container of containerd.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Container {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "3")]
    pub(super) image: String,
    #[prost(string, tag = "6")]
    pub(super) snapshotter: String,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct VersionResponse {
    #[prost(string, tag = "1")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Filters {
    #[prost(string, repeated, tag = "1")]
    filters: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Names {
    #[prost(message, repeated, tag = "1")]
    names: Vec<Name>,
}

#[derive(Clone, PartialEq, Message)]
struct Name {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Plugins {
    #[prost(message, repeated, tag = "1")]
    plugins: Vec<Plugin>,
}

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "2")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Containers {
    #[prost(message, repeated, tag = "1")]
    containers: Vec<Container>,
}

#[derive(Clone, PartialEq, Message)]
struct StatSnapshot {
    #[prost(string, tag = "1")]
    snapshotter: String,
    #[prost(string, tag = "2")]
    key: String,
}

impl Peer {
    /// Connects.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let context = || format!("connecting to {}", socket.display());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()));
        let endpoint = endpoint.with_context(context)?.timeout(PATIENCE).connect_timeout(PATIENCE);
        let channel = runtime.block_on(endpoint.connect()).with_context(context)?;
        let grpc = Grpc::new(channel).max_decoding_message_size(MOST_BYTES);
        Ok(Self { runtime, grpc })
    }

    /// containerd's version.
    pub(super) fn version(&mut self) -> Result<String> {
        let path = "/containerd.services.version.v1.Version/Version";
        let answer: VersionResponse = self.call("", path, Empty {})?;
        Ok(answer.version)
    }

    /// Whether the running containerd knows a snapshotter of this name.
    pub(super) fn has_snapshotter(&mut self, name: &str) -> Result<bool> {
        let path = "/containerd.services.introspection.v1.Introspection/Plugins";
        let filters = vec![format!("type==io.containerd.snapshotter.v1,id=={name}")];
        let answer: Plugins = self.call("", path, Filters { filters })?;
        Ok(answer.plugins.iter().any(|plugin| plugin.id == name))
    }

    /// Whether the kubelet is served here: containerd's plugin for it may be switched off.
    pub(super) fn serves_kubelet(&mut self) -> Result<()> {
        self.call("", "/runtime.v1.RuntimeService/Version", Empty {}).map(|Empty {}| ())
    }

    /// The containers on this snapshotter, each with its namespace.
    pub(super) fn containers_on(&mut self, snapshotter: &str) -> Result<Vec<(String, Container)>> {
        let path = "/containerd.services.namespaces.v1.Namespaces/List";
        let names: Names = self.call("", path, Empty {})?;
        let mut all = Vec::new();
        for Name { name } in names.names {
            let path = "/containerd.services.containers.v1.Containers/List";
            let answer: Containers = self.call(&name, path, Filters { filters: Vec::new() })?;
            let mut containers = answer.containers;
            containers.retain(|container| container.snapshotter == snapshotter);
            all.extend(containers.into_iter().map(|container| (name.clone(), container)));
        }
        Ok(all)
    }

    /// Asks a snapshotter about a snapshot that is not there.
    pub(super) fn answers_as_snapshotter(&mut self, name: &str) -> Result<()> {
        let path = "/containerd.services.snapshots.v1.Snapshots/Stat";
        let key = "hermes-node-check".to_owned();
        let request = StatSnapshot { snapshotter: name.to_owned(), key };
        match self.call_for_status::<_, Empty>("", path, request) {
            Err(status) if status.code() != Code::NotFound => {
                Err(status).with_context(|| format!("calling {path}"))
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn call<Q, A>(&mut self, namespace: &str, path: &'static str, request: Q) -> Result<A>
    where
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
    {
        let answer = self.call_for_status(namespace, path, request);
        answer.with_context(|| format!("calling {path}"))
    }

    fn call_for_status<Q, A>(
        &mut self,
        namespace: &str,
        path: &'static str,
        request: Q,
    ) -> Result<A, Status>
    where
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
    {
        let mut request = Request::new(request);
        if !namespace.is_empty() {
            let value = MetadataValue::try_from(namespace);
            let value = value.map_err(|err| Status::invalid_argument(err.to_string()))?;
            request.metadata_mut().insert("containerd-namespace", value);
        }
        let Self { runtime, grpc } = self;
        runtime.block_on(async {
            grpc.ready().await.map_err(|err| Status::unavailable(causes::in_full(&err)))?;
            let codec = ProstCodec::<Q, A>::default();
            let answer = grpc.unary(request, PathAndQuery::from_static(path), codec).await?;
            Ok(answer.into_inner())
        })
    }
}

const PATIENCE: Duration = Duration::from_secs(10);

/// A list of some thousand containers, each with its specification.
const MOST_BYTES: usize = 256 << 20;

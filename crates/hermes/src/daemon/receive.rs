//! Layers of which nothing is known: read once from their beginning, kept, and indexed on the way.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use artifacts::{ImageLayer, IndexStore, Origin};
use cache::KeepError;
use futures_util::{StreamExt, TryStreamExt};
use index::LayerIndex;
use oci::Digest;
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::images::shape_of;
use super::traces::number;
use super::{Daemon, Progress};
use crate::stream;

/// The layers that are being received; each at most once at a time, and few enough of all images for the
/// memory that they take.
pub(super) struct Receiving {
    layers: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    at_once: Semaphore,
}

impl Default for Receiving {
    fn default() -> Self {
        Self { layers: Mutex::default(), at_once: Semaphore::new(LAYERS_AT_A_TIME) }
    }
}

impl Receiving {
    fn of(&self, layer: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut layers = self.layers.lock();
        layers.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(layers.entry(*layer).or_default())
    }
}

impl Daemon {
    /// Receives layers, several at a time. Each has an index and is whole in the cache afterwards, where
    /// what it returns keeps it open: the engine seals it. Those that were finished before a failure stay.
    ///
    /// *Cancellation:* layers under way leave nothing.
    pub(super) async fn receive(
        &self,
        origin: &Origin,
        mut layers: Vec<&ImageLayer>,
        progress: Progress<'_>,
    ) -> Result<Vec<Arc<cache::Layer>>> {
        // The one that takes longest begins first. One that the image has twice comes once.
        layers.sort_by_key(|layer| (Reverse(layer.size), layer.digest));
        layers.dedup_by_key(|layer| layer.digest);
        let (done, total) = (AtomicU64::new(0), layers.iter().map(|layer| layer.size).sum());
        let what = match layers.len() {
            1 => "reading a layer without an index".to_owned(),
            count => format!("reading {count} layers without an index"),
        };
        let count = |bytes| {
            let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            progress(&what, done, total);
        };
        let attributes = || {
            let layers = number(layers.len() as u64);
            vec![
                KeyValue::new("hermes.layers", layers),
                KeyValue::new("hermes.bytes", number(total)),
            ]
        };
        let each: Vec<_> =
            layers.iter().map(|layer| self.receive_layer(origin, layer, &count)).collect();
        let all = futures_util::stream::iter(each).buffer_unordered(LAYERS_AT_A_TIME);
        let kept = all.try_filter_map(|layer| std::future::ready(Ok(layer)));
        self.traces.within("fetch", attributes, kept.try_collect()).await
    }

    async fn receive_layer(
        &self,
        origin: &Origin,
        layer: &ImageLayer,
        count: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<Arc<cache::Layer>>> {
        let turn = self.receiving.of(&layer.digest);
        let _turn = turn.lock().await;
        let _place = self.receiving.at_once.acquire().await.context("receiving a layer")?;
        if self.indexes.load(&layer.digest)?.is_some() {
            // Another mount has received it meanwhile.
            count(layer.size);
            return Ok(None);
        }
        let incoming =
            self.store.receive(&layer.digest).context("starting a layer of the cache")?;
        let incoming = Arc::new(Mutex::new(incoming));
        let file = Arc::clone(&incoming);
        let write = move |bytes: &[u8]| Ok(file.lock().append(bytes)?);
        let options = stream::received_options(layer);
        let built = stream::index_layer(origin, layer, options, write, count).await?;
        let (store, indexes, layer) =
            (Arc::clone(&self.store), self.indexes.clone(), layer.clone());
        let keep = move || keep(&layer, built, incoming, &store, &indexes);
        tokio::task::spawn_blocking(keep).await.context("keeping a layer")?
    }
}

/// Stores the layer's index, and then the layer. Neither waits for the disk.
fn keep(
    layer: &ImageLayer,
    built: LayerIndex,
    incoming: Arc<Mutex<cache::Incoming>>,
    store: &cache::Store,
    indexes: &IndexStore,
) -> Result<Option<Arc<cache::Layer>>> {
    let bytes = built.uncompressed_total;
    let stored = stream::save(built, layer, indexes)?;
    let incoming = Arc::into_inner(incoming).context("the layer is still being written")?;
    let kept = match store.keep(incoming.into_inner(), shape_of(&stored)) {
        Ok(kept) => Some(kept),
        // A mount that has it goes on with what it has.
        Err(KeepError::InUse { .. }) => None,
        Err(err) => return Err(err).with_context(|| format!("keeping layer {}", layer.digest)),
    };
    tracing::info!(layer = %layer.digest, bytes, "layer received");
    Ok(kept)
}

/// Each takes some connections, a thread, and the memory of what came ahead and of what its compression looks
/// back at.
const LAYERS_AT_A_TIME: usize = 6;

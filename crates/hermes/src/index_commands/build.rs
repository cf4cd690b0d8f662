//! `index build`: each layer streamed once, several at a time.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Result;
use artifacts::{Image, ImageLayer, IndexStore, Origin};
use futures_util::{StreamExt, TryStreamExt, stream};
use oci::Digest;
use serde::Serialize;
use ztoc::SpanOptions;

use super::{IndexReport, Session};
use crate::args::BuildArguments;
use crate::output::bytes;
use crate::stream::{build_options, index_layer, save};

#[derive(Serialize)]
struct BuildReport {
    image: String,
    manifest: Digest,
    /// In the order of the image, each layer once.
    layers: Vec<LayerReport>,
    seconds: f64,
}

#[derive(Serialize)]
struct LayerReport {
    digest: Digest,
    /// Compressed bytes.
    size: u64,
    /// Nothing for a layer below the minimum size.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<IndexReport>,
    seconds: f64,
}

/// Builds and stores the indexes of an image.
pub(super) async fn build(session: &Session<'_>, arguments: &BuildArguments) -> Result<()> {
    let begin = Instant::now();
    let (origin, image) = session.image(&arguments.image).await?;
    let indexes = session.indexes()?;
    let progress = session.output.progress();
    let layers = unique_layers(&image);
    let large = |layer: &&ImageLayer| layer.size >= arguments.min_layer_size;
    let total = layers.iter().copied().filter(large).map(|layer| layer.size).sum();
    let done = AtomicU64::new(0);
    let count = |bytes| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        progress.show("indexing", done, total);
    };
    let soci =
        SpanOptions { span_size: arguments.span_size, sparse_windows: arguments.sparse_windows };
    let work = layers.iter().map(|layer| async {
        if !large(layer) {
            return Ok(LayerReport {
                digest: layer.digest,
                size: layer.size,
                index: None,
                seconds: 0.0,
            });
        }
        build_layer(&origin, layer, build_options(layer, soci), &indexes, &count).await
    });
    let built = stream::iter(work).buffered(arguments.parallel.max(1)).try_collect().await?;
    drop(progress);
    let report = BuildReport {
        image: image.name,
        manifest: image.descriptor.digest,
        layers: built,
        seconds: begin.elapsed().as_secs_f64(),
    };
    session.output.result(&report, text)
}

/// The layers of an image; one that it has several times, once.
pub(super) fn unique_layers(image: &Image) -> Vec<&ImageLayer> {
    let mut seen = HashSet::new();
    image.layers.iter().filter(|layer| seen.insert(layer.digest)).collect()
}

async fn build_layer(
    origin: &Origin,
    layer: &ImageLayer,
    options: ztoc::IndexerOptions,
    indexes: &IndexStore,
    count: &(dyn Fn(u64) + Sync),
) -> Result<LayerReport> {
    let begin = Instant::now();
    let indexed = index_layer(origin, layer, options, |_| Ok(()), count).await?;
    let stored = save(indexed, layer, indexes)?;
    Ok(LayerReport {
        digest: layer.digest,
        size: layer.size,
        index: Some(IndexReport::new(&stored)?),
        seconds: begin.elapsed().as_secs_f64(),
    })
}

fn text(report: &BuildReport) -> String {
    let lines = report.layers.iter().map(|layer| {
        let what = match &layer.index {
            Some(index) => format!("{} in {:.1} s", index.text(), layer.seconds),
            None => "below the minimum size, no index".to_owned(),
        };
        format!("{}  {}: {what}\n", layer.digest, bytes(layer.size))
    });
    lines.collect()
}

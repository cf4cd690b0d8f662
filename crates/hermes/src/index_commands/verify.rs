//! `index verify`: layers read whole and compared with what their indexes say.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use artifacts::{ImageLayer, IndexStore, Origin, StoredIndex, find_indexes, have_windows};
use futures_util::{StreamExt, TryStreamExt, stream};
use oci::Digest;
use serde::Serialize;
use ztoc::IndexerOptions;
use ztoc::{Limits, ReadTocError, SpanId, TocEntry, Ztoc};

use super::build::unique_layers;
use super::{Session, corrupt, no_index};
use crate::failure::{Exit, Failure};
use crate::stream::index_layer;

#[derive(Serialize)]
struct VerifyReport {
    image: String,
    manifest: Digest,
    /// Each layer once.
    layers: Vec<LayerReport>,
}

#[derive(Serialize)]
struct LayerReport {
    digest: Digest,
    indexed: bool,
    /// Whether a fresh build gives the same document to the byte.
    identical: bool,
    /// Nothing if all is right.
    differences: Vec<String>,
}

/// Reads all layers of an image and compares.
pub(super) async fn verify(session: &Session<'_>, name: &str) -> Result<()> {
    let (origin, image) = session.image(name).await?;
    let store = session.indexes()?;
    let found =
        find_indexes(&origin, (&image.descriptor, &image.manifest), &store, &|_, _, _| {}).await?;
    if found.layers.iter().all(Option::is_none) {
        return Err(no_index(&image, &found.reason));
    }
    let layers = unique_layers(&image);
    let (progress, done) = (session.output.progress(), AtomicU64::new(0));
    let total = layers.iter().map(|layer| layer.size).sum();
    let count = |bytes| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        progress.show("verifying", done, total);
    };
    let work = layers.iter().map(|layer| verify_layer(&origin, layer, &store, &count));
    let layers: Vec<LayerReport> =
        stream::iter(work).buffered(LAYERS_AT_A_TIME).try_collect().await?;
    drop(progress);
    let wrong: Vec<String> = layers
        .iter()
        .filter(|layer| !layer.differences.is_empty())
        .map(|layer| layer.digest.to_string())
        .collect();
    let report = VerifyReport { image: image.name, manifest: image.descriptor.digest, layers };
    session.output.result(&report, text)?;
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(corrupt(format!("not as promised: {}", wrong.join(", "))))
    }
}

async fn verify_layer(
    origin: &Origin,
    layer: &ImageLayer,
    store: &IndexStore,
    count: &(dyn Fn(u64) + Sync),
) -> Result<LayerReport> {
    let stored = store.load(&layer.digest)?;
    let mut options = IndexerOptions::default();
    if let Some(stored) = &stored {
        options.span_size = stored.ztoc.spans.span_size();
        options.build_tool.clone_from(&stored.ztoc.build_tool);
    }
    let mut report = LayerReport {
        digest: layer.digest,
        indexed: stored.is_some(),
        identical: false,
        differences: Vec::new(),
    };
    let fresh = match index_layer(origin, layer, options.clone(), |_| Ok(()), count).await {
        Ok(fresh) => fresh,
        Err(err) => match err.downcast::<Failure>() {
            Ok(Failure { exit: Exit::Corrupt, message }) => {
                report.differences.push(message);
                return Ok(report);
            }
            Ok(other) => return Err(other.into()),
            Err(other) => return Err(other),
        },
    };
    let Some(stored) = stored else { return Ok(report) };
    have_windows(origin, &stored).await?;
    let own = store.whole(&layer.digest)?;
    report.identical = own == fresh.ztoc_bytes;
    if report.identical {
        return Ok(report);
    }
    report.differences = differences(&stored, &fresh.ztoc)?;
    let others = other_windows(&own, &fresh.ztoc, &fresh.ztoc_bytes)?;
    if report.differences.is_empty() && !others.is_empty() {
        // Windows may have been reduced to what is referred to; whether rightly, only another pass
        // that reduces them tells.
        let sparse = IndexerOptions { sparse_windows: true, ..options };
        let sparse = index_layer(origin, layer, sparse, |_| Ok(()), &|_| {}).await?;
        let reduced = other_windows(&own, &sparse.ztoc, &sparse.ztoc_bytes)?;
        let wrong = others.iter().find(|span| reduced.contains(span));
        let message =
            |span: &SpanId| format!("the window of span {} is not what precedes it", span.0);
        report.differences.extend(wrong.map(message));
    }
    Ok(report)
}

/// What the stored index says otherwise than `fresh`, windows aside.
fn differences(stored: &StoredIndex, fresh: &Ztoc) -> Result<Vec<String>, ReadTocError> {
    let mut found = Vec::new();
    let mut compare = |what: &str, has: u64, should: u64| {
        if has != should {
            found.push(format!("{what}: the index says {has}, the layer {should}"));
        }
    };
    let (ztoc, spans, toc) = (&stored.ztoc, &stored.ztoc.spans, stored.toc.read()?);
    compare("compressed size", ztoc.compressed_size, fresh.compressed_size);
    compare("uncompressed size", ztoc.uncompressed_size, fresh.uncompressed_size);
    compare("spans", spans.len().into(), fresh.spans.len().into());
    compare("entries", toc.len() as u64, fresh.toc.len() as u64);
    let both = || spans.ids().zip(fresh.spans.ids()).map(|(span, _)| span);
    if let Some(span) = both().find(|span| spans.checkpoint(*span) != fresh.spans.checkpoint(*span))
    {
        let (has, should) = (spans.checkpoint(span), fresh.spans.checkpoint(span));
        found.push(format!(
            "checkpoint of span {}: the index says {has:?}, the layer {should:?}",
            span.0
        ));
    }
    if let Some(span) = both().find(|span| spans.digest(*span) != fresh.spans.digest(*span)) {
        let (has, should) = (spans.digest(span), fresh.spans.digest(span));
        found.push(format!("digest of span {}: the index says {has}, the layer {should}", span.0));
    }
    let entries = toc.iter().zip(&fresh.toc);
    if let Some((has, should)) = entries.into_iter().find(|(has, should)| has != should) {
        found.push(entry_difference(has, should));
    }
    Ok(found)
}

fn entry_difference(has: &TocEntry, should: &TocEntry) -> String {
    let name = should.name.escape_ascii();
    if has.name == should.name {
        format!("entry {name}: the index says {has:?}, the layer {should:?}")
    } else {
        format!("entry {name} of the layer is {} in the index", has.name.escape_ascii())
    }
}

/// The spans whose windows in the document `own` are not those of `fresh`.
fn other_windows(own: &[u8], fresh: &Ztoc, blob: &[u8]) -> Result<BTreeSet<SpanId>> {
    let stored = Ztoc::parse_without_toc(own, &Limits::default())?;
    let differs = |span: &SpanId| stored.window(own, *span) != fresh.window(blob, *span);
    Ok(fresh.spans.ids().filter(differs).collect())
}

fn text(report: &VerifyReport) -> String {
    let mut text = String::new();
    for layer in &report.layers {
        let verdict = match (layer.differences.is_empty(), layer.indexed, layer.identical) {
            (false, ..) => "WRONG",
            (true, false, _) => "layer right, no index",
            (true, true, true) => "right, index identical to a fresh one",
            (true, true, false) => "right",
        };
        text.push_str(&format!("{}  {verdict}\n", layer.digest));
        for difference in &layer.differences {
            text.push_str(&format!("    {difference}\n"));
        }
    }
    text
}

const LAYERS_AT_A_TIME: usize = 2;

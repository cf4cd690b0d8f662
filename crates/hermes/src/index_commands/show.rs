//! `index show`: what there is for each layer of an image.

use anyhow::Result;
use artifacts::find_indexes;
use oci::Digest;
use serde::Serialize;

use super::{IndexReport, Session, no_index};
use crate::output::bytes;

#[derive(Serialize)]
struct ShowReport {
    image: String,
    manifest: Digest,
    /// Where the indexes came from, in a sentence.
    reason: String,
    /// In the order of the image.
    layers: Vec<LayerReport>,
}

#[derive(Serialize)]
struct LayerReport {
    digest: Digest,
    /// Compressed bytes.
    size: u64,
    index: Option<IndexReport>,
}

/// Shows the indexes of an image; those that the registry has are stored on the way.
pub(super) async fn show(session: &Session<'_>, name: &str) -> Result<()> {
    let (origin, image) = session.image(name).await?;
    let found = find_indexes(
        &origin,
        (&image.descriptor, &image.manifest),
        &session.indexes()?,
        &|_, _, _| {},
    )
    .await?;
    if found.layers.iter().all(Option::is_none) {
        return Err(no_index(&image, &found.reason));
    }
    let mut layers = Vec::new();
    for (layer, index) in image.layers.iter().zip(&found.layers) {
        let index = index.as_ref().map(IndexReport::new).transpose()?;
        layers.push(LayerReport { digest: layer.digest, size: layer.size, index });
    }
    let manifest = image.descriptor.digest;
    let report = ShowReport { image: image.name, manifest, reason: found.reason, layers };
    session.output.result(&report, text)
}

fn text(report: &ShowReport) -> String {
    let mut text = format!("{} ({})\n{}\n", report.image, report.manifest, report.reason);
    for layer in &report.layers {
        let what = match &layer.index {
            Some(index) => format!("{} ({})", index.text(), index.origin),
            None => "no index".to_owned(),
        };
        text.push_str(&format!("{}  {}: {what}\n", layer.digest, bytes(layer.size)));
    }
    text
}

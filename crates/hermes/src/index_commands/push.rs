//! `index push`: beside the image, or with a copy of the image's manifest.

use anyhow::{Result, bail};
use artifacts::{ImageName, PushIndexError, PushedIndexes, push_converted, push_indexes};
use oci::{Descriptor, Digest};
use serde::Serialize;

use super::{Session, not_found, start_ranges};
use crate::args::PushArguments;

#[derive(Serialize)]
struct PushReport {
    image: String,
    manifest: Digest,
    /// The SOCI index; nothing if all layers are zstd.
    index: Option<Descriptor>,
    /// Hermes' own, of all layers.
    own: Descriptor,
    /// How many bytes of the tars it names that the image's own command needs to start.
    start_bytes: u64,
    /// With version 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: Option<CopyReport>,
}

/// The manifest that names the index.
#[derive(Serialize)]
struct CopyReport {
    image: String,
    manifest: Digest,
    digest: Digest,
}

/// Pushes the indexes of an image.
pub(super) async fn push(session: &Session<'_>, arguments: &PushArguments) -> Result<()> {
    let (origin, image) = session.image(&arguments.image).await?;
    let copy_name = match (arguments.version, &arguments.tag) {
        (2, Some(tag)) => Some((tag, with_tag(origin.name(), tag)?)),
        (_, Some(_)) => bail!("only --version 2 makes a copy that can have a tag"),
        _ => None,
    };
    let indexes = session.indexes()?;
    let start = start_ranges(&origin, &image, &indexes).await?;
    let pushed = match &copy_name {
        None => push_indexes(&origin, &image, &indexes, &start).await.map(|pushed| (pushed, None)),
        Some((tag, name)) => {
            push_converted(&origin, &image, (&indexes, &start), tag).await.map(|copy| {
                let (manifest, digest) = (copy.manifest.digest, copy.root.digest);
                (copy.indexes, Some(CopyReport { image: name.to_string(), manifest, digest }))
            })
        }
    };
    let (PushedIndexes { soci: index, own }, copy) = match pushed {
        Err(err @ PushIndexError::Nothing(_)) => return Err(not_found(err.to_string())),
        other => other?,
    };
    let manifest = image.descriptor.digest;
    let start_bytes = start.values().flatten().map(|range| range.end - range.start).sum();
    let report = PushReport { image: image.name, manifest, index, own, start_bytes, copy };
    session.output.result(&report, |report| {
        let copy = report.copy.iter().map(|copy| format!("{}  {}", copy.image, copy.digest));
        let pushed = report.index.iter().chain([&report.own]);
        let pushed = pushed.map(|pushed| pushed.digest.to_string());
        copy.chain(pushed).collect::<Vec<_>>().join("\n")
    })
}

/// The same place with another tag, which must not be the image's own: that stays what it is.
fn with_tag(name: &ImageName, tag: &str) -> Result<ImageName> {
    Ok(match name {
        ImageName::Registry(reference) => {
            let Ok(other) = reference.with_tag(tag) else {
                bail!("`{}` is no tag", tag.escape_debug());
            };
            if other.target() == reference.target() {
                bail!("{name} is the image itself, which is not changed; choose another --tag");
            }
            ImageName::Registry(other)
        }
        ImageName::Layout { tag: Some(own), .. } if own == tag => {
            bail!("{name} is the image itself, which is not changed; choose another --tag")
        }
        ImageName::Layout { dir, .. } => {
            ImageName::Layout { dir: dir.clone(), tag: Some(tag.to_owned()) }
        }
        ImageName::Archive { .. } => bail!("an archive is not changed; unpack it into a folder"),
    })
}

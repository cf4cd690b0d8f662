//! What names of images meant when a registry was asked last: for digests, which never mean anything
//! else, and for a registry that is away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use artifacts::{FoundManifest, ImageName, Origin};
use oci::{Digest, Platform};
use serde::{Deserialize, Serialize};

use super::images::{ImageRecord, replace};

/// An image, and what the user should know of how it was found.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) found: FoundManifest,
    /// Set where the registry was not there to say what the name means now.
    pub(super) warning: Option<String>,
}

/// What a name meant.
#[derive(Debug, Serialize, Deserialize)]
struct Meaning {
    name: String,
    platform: String,
    manifest: Digest,
}

/// Finds the image of `origin` for `platform`. The registry is not asked for what a digest names and
/// the daemon of `root` knows; if it cannot be reached, a tag means what it meant last.
pub(super) async fn resolve(root: &Path, origin: &Origin, platform: &Platform) -> Result<Resolved> {
    let name = origin.name();
    if name.digest().is_some()
        && let Some((found, _)) = recall(root, name, platform)
    {
        return Ok(Resolved { found, warning: None });
    }
    let unreachable = match origin.find(platform).await {
        Ok(found) => {
            remember(root, name, platform, &found.descriptor.digest)
                .context("writing down what the image's name means")?;
            return Ok(Resolved { found, warning: None });
        }
        Err(err) if err.is_unreachable() => err,
        Err(err) => return Err(err.into()),
    };
    let Some((found, when)) = recall(root, name, platform) else { return Err(unreachable.into()) };
    let (digest, why) = (found.descriptor.digest, crate::failure::in_full(&unreachable.into()));
    let ago = indicatif::HumanDuration(when.elapsed().unwrap_or_default());
    let warning = format!(
        "using {digest}, which is what {name} meant {ago} ago: now it cannot be asked for: {why}"
    );
    tracing::warn!("{warning}");
    Ok(Resolved { found, warning: Some(warning) })
}

/// What `name` meant for `platform`, and when it was asked for.
fn recall(
    root: &Path,
    name: &ImageName,
    platform: &Platform,
) -> Option<(FoundManifest, SystemTime)> {
    let path = path_of(root, name, platform);
    let meaning = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let meant = meaning.map(|meaning: Meaning| meaning.manifest);
    // Also one that was mounted by another name; not an index, which is nobody's manifest.
    let manifest = meant.or_else(|| name.digest())?;
    let record = ImageRecord::load(root, &manifest).ok()?;
    if !record.config.platform().runs_on(platform) {
        return None;
    }
    let when = fs::metadata(&path).and_then(|metadata| metadata.modified());
    let ImageRecord { descriptor, manifest, config, .. } = record;
    let found = FoundManifest { descriptor, manifest, config: Some(config) };
    Some((found, when.unwrap_or(SystemTime::UNIX_EPOCH)))
}

fn remember(
    root: &Path,
    name: &ImageName,
    platform: &Platform,
    manifest: &Digest,
) -> io::Result<()> {
    let path = path_of(root, name, platform);
    let (name, platform) = (name.to_string(), platform.to_string());
    let meaning = Meaning { name, platform, manifest: *manifest };
    replace(&path, &meaning)
}

fn path_of(root: &Path, name: &ImageName, platform: &Platform) -> PathBuf {
    let key = Digest::of(format!("{name} {platform}").as_bytes());
    root.join(FOLDER).join(format!("{}.json", key.hex()))
}

const FOLDER: &str = "names";

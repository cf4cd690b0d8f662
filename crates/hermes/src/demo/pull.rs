//! A full pull, as containerd does it: three layers at a time, unpacked in order as they arrive.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use artifacts::{Image, ImageLayer, Origin};
use flate2::bufread::MultiGzDecoder;
use oci::{Hasher, LayerCompression};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use crate::run::in_user_namespace;
use crate::stream;

/// Unpacks `image` into `rootfs`; layers are kept in `downloads` until they are unpacked.
pub(super) async fn pull(
    origin: &Origin,
    image: &Image,
    rootfs: &Path,
    downloads: &Path,
) -> Result<()> {
    for dir in [rootfs, downloads] {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let permits = Arc::new(Semaphore::new(AT_A_TIME));
    let (mut tasks, mut arriving) = (JoinSet::new(), Vec::new());
    for (number, layer) in image.layers.iter().enumerate() {
        let (origin, layer, permits) = (origin.clone(), layer.clone(), Arc::clone(&permits));
        let file = downloads.join(number.to_string());
        let (tell, arrived) = oneshot::channel();
        arriving.push(arrived);
        tasks.spawn(async move {
            // It is never closed.
            let _permit = permits.acquire_owned().await.ok();
            // Nobody listens if another layer has failed.
            tell.send(download(&origin, &layer, file).await).ok();
        });
    }
    for (layer, arrived) in image.layers.iter().zip(arriving) {
        let file = arrived.await.context("a download was given up")??;
        let (compression, rootfs) = (layer.compression, rootfs.to_owned());
        let unpacked = tokio::task::spawn_blocking(move || {
            unpack(&file, compression, &rootfs)?;
            Ok::<_, anyhow::Error>(fs::remove_file(&file)?)
        });
        unpacked.await?.with_context(|| format!("unpacking layer {}", layer.digest))?;
    }
    Ok(())
}

async fn download(origin: &Origin, layer: &ImageLayer, file: PathBuf) -> Result<PathBuf> {
    let (sender, mut pieces) = stream::pieces();
    let path = file.clone();
    let write = tokio::task::spawn_blocking(move || -> io::Result<_> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut hasher = Hasher::new();
        while let Some(piece) = pieces.blocking_recv() {
            hasher.update(&piece);
            out.write_all(&piece)?;
        }
        out.flush()?;
        Ok(hasher.finish())
    });
    stream::send(origin, layer, 0..layer.size, sender, &|_bytes| {}).await?;
    let digest = write.await?.with_context(|| format!("writing {}", file.display()))?;
    if digest != layer.digest {
        bail!("layer {} came with the content of {digest}", layer.digest);
    }
    Ok(file)
}

/// Unpacks one layer over those before it.
fn unpack(file: &Path, compression: LayerCompression, rootfs: &Path) -> Result<()> {
    let file = BufReader::with_capacity(1 << 20, File::open(file)?);
    let tar: Box<dyn Read> = match compression {
        LayerCompression::Gzip => Box::new(MultiGzDecoder::new(file)),
        LayerCompression::Zstd => Box::new(zstd::Decoder::with_buffer(file)?),
        LayerCompression::None => Box::new(file),
    };
    let mut archive = tar::Archive::new(tar);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(true);
    // Other owners do not exist in our user namespace.
    archive.set_preserve_ownerships(!in_user_namespace());
    let mut unpacked = HashSet::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let (parent, name) = (path.parent().unwrap_or_else(|| Path::new("")), path.file_name());
        let hidden = name.and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(".wh."));
        match hidden {
            Some(".wh..opq") => hide_others(&rootfs.join(parent), parent, &unpacked)?,
            Some(hidden) => remove(&rootfs.join(parent).join(hidden))?,
            None => {
                entry.unpack_in(rootfs).with_context(|| format!("unpacking {}", path.display()))?;
                unpacked.insert(path);
            }
        }
    }
    Ok(())
}

/// Removes what an opaque folder has from the layers below.
fn hide_others(dir: &Path, name: &Path, unpacked: &HashSet<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if !unpacked.contains(&name.join(entry.file_name())) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(err) => Err(err),
    };
    match removed {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

const AT_A_TIME: usize = 3;

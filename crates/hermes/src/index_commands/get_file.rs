//! `index get-file`: one file of an image, from the spans that hold it.

use std::io::{self, ErrorKind, Stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use artifacts::{Image, ImageLayer, IndexStore, Origin, StoredIndex, find_indexes, have_windows};
use parking_lot::Mutex;
use tree::{FileData, ResolveError};
use ztoc::IndexerOptions;
use ztoc::SpanOptions;

use super::span_bytes::{FileWriter, from_spans};
use super::{Session, no_index, not_found, tree_of};
use crate::stream::{build_options, index_layer, save};

/// Prints a file's bytes as they are.
pub(super) async fn get_file(session: &Session<'_>, name: &str, path: &str) -> Result<()> {
    let (origin, image) = session.image(name).await?;
    let indexes = complete_indexes(session, &origin, &image).await?;
    let data = {
        match tree_of(&indexes).get()?.resolve(path.as_bytes()) {
            Ok((_, data)) => data.clone(),
            Err(err @ ResolveError::Missing { .. }) => return Err(not_found(err.to_string())),
            Err(err) => return Err(err.into()),
        }
    };
    match print(&origin, &image, indexes, &data).await {
        // Whoever read our output has seen enough.
        Err(err) if is_broken_pipe(&err) => Ok(()),
        other => other,
    }
}

/// An index of every layer. Tools leave small layers out of an image's index; without them nobody
/// knows which files they hide, so they are indexed now.
async fn complete_indexes(
    session: &Session<'_>,
    origin: &Origin,
    image: &Image,
) -> Result<Vec<StoredIndex>> {
    let store = session.indexes()?;
    let found =
        find_indexes(origin, (&image.descriptor, &image.manifest), &store, &|_, _, _| {}).await?;
    if found.layers.iter().all(Option::is_none) {
        return Err(no_index(image, &found.reason));
    }
    let without = image.layers.iter().zip(&found.layers).filter(|(_, index)| index.is_none());
    let total = without.map(|(layer, _)| layer.size).sum();
    let (progress, done) = (session.output.progress(), AtomicU64::new(0));
    let count = |bytes| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        progress.show("indexing layers without an index", done, total);
    };
    let mut complete = Vec::new();
    for (layer, index) in image.layers.iter().zip(found.layers) {
        complete.push(match index {
            Some(index) => index,
            None => index_now(origin, layer, &store, &count).await?,
        });
    }
    Ok(complete)
}

async fn index_now(
    origin: &Origin,
    layer: &ImageLayer,
    store: &IndexStore,
    count: &(dyn Fn(u64) + Sync),
) -> Result<StoredIndex> {
    // Twice in an image, it has one by now.
    if let Some(index) = store.load(&layer.digest)? {
        return Ok(index);
    }
    let options = build_options(layer, SpanOptions::default());
    let indexed = index_layer(origin, layer, options, |_| Ok(()), count).await?;
    Ok(save(indexed, layer, store)?)
}

async fn print(
    origin: &Origin,
    image: &Image,
    indexes: Vec<StoredIndex>,
    data: &FileData,
) -> Result<()> {
    let number = usize::try_from(data.layer).unwrap_or(usize::MAX);
    let index = indexes.into_iter().nth(number);
    let (Some(layer), Some(index)) = (image.layers.get(number), index) else {
        anyhow::bail!("the file lies in layer {number}, which the image does not have");
    };
    let file = FileWriter::new(io::stdout(), data);
    if file.wanted().is_empty() {
        let mut file = file;
        return Ok(file.finish()?);
    }
    if index.streamed {
        from_beginning(origin, layer, file).await
    } else {
        have_windows(origin, &index).await?;
        from_spans(origin, layer, Arc::new(index), file).await.map(drop)
    }
}

/// A layer without spans is read to its end: only then is it known to be right.
async fn from_beginning(
    origin: &Origin,
    layer: &ImageLayer,
    file: FileWriter<Stdout>,
) -> Result<()> {
    let file = Arc::new(Mutex::new(file));
    let (writer, mut at) = (Arc::clone(&file), 0);
    let sink = move |bytes: &[u8]| {
        writer.lock().push(at, bytes)?;
        at += bytes.len() as u64;
        Ok(())
    };
    index_layer(origin, layer, IndexerOptions::default(), sink, &|_| {}).await?;
    Ok(file.lock().finish()?)
}

fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == ErrorKind::BrokenPipe)
}

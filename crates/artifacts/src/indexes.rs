//! The index of an image: looked for here, then where the image lies.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use causes::in_full;
use futures_util::StreamExt;
use futures_util::stream;
use oci::soci::{self, SociIndex, Version};
use oci::span_index::{self, SpanIndex, WindowsBlob};
use oci::{Descriptor, Digest, LayerCompression, Manifest};
use ztoc::Window;

use crate::index_store::{IndexOrigin, IndexStore, StoreIndexError, StoredIndex, StoredWindows};
use crate::local::MAX_DOCUMENT;
use crate::origin::{Origin, OriginError};

/// What there is for each layer of an image, in the order of its layers.
#[derive(Debug)]
pub struct FoundIndexes {
    /// The index of each layer, or none.
    pub layers: Vec<Option<StoredIndex>>,
    /// In a sentence for the user: where they came from, or why there are none.
    pub reason: String,
    /// How the search ended.
    pub outcome: IndexOutcome,
    /// What a remote index says of the start of the image's own command, if one was asked for: the place of
    /// a layer, and a range of its tar in bytes. Nobody has checked it.
    pub start: Vec<(usize, Range<u64>)>,
}

/// How the search for an image's index ended.
#[derive(Debug)]
pub enum IndexOutcome {
    /// All of it is in the store.
    Stored,
    /// There is one where the image lies; of what can be used of it, there is what there is.
    Remote,
    /// There is none where the image lies.
    Absent,
    /// It cannot be said, or had.
    Failed(OriginError),
}

/// Is told of the index of a layer as soon as it is there, while those of other layers may still be on their
/// way: the layer's place, its index, and what a remote index says of the start of the image's own command,
/// as ranges of the layer's tar in bytes, which nobody has checked.
pub type IndexCame<'a> = &'a (dyn Fn(usize, &StoredIndex, &[Range<u64>]) + Sync);

impl FoundIndexes {
    const fn without_start(
        layers: Vec<Option<StoredIndex>>,
        reason: String,
        outcome: IndexOutcome,
    ) -> Self {
        Self { layers, reason, outcome, start: Vec::new() }
    }
}

/// Finds an index for each layer of the image with this manifest: in the store, then by the manifest's
/// annotation, then among the referrers. What is found remotely is stored. `came` is told of each layer's
/// index unless all of them are in the store.
///
/// An image without an index, or with one that cannot be had or used, is no error: the reason says
/// what was met.
///
/// # Errors
/// When the store itself fails.
pub async fn find_indexes(
    origin: &Origin,
    (descriptor, manifest): (&Descriptor, &Manifest),
    store: &IndexStore,
    came: IndexCame<'_>,
) -> Result<FoundIndexes, StoreIndexError> {
    let (found, room) = look_in_store(manifest, store)?;
    if found.layers.iter().all(Option::is_some) {
        return Ok(found);
    }
    let mut layers = found.layers;
    let remote = match remote_index(origin, descriptor, manifest).await {
        Ok(Some(found)) => found,
        Ok(None) => {
            let reason = "no index in the registry: neither annotation nor referrer".to_owned();
            return Ok(FoundIndexes::without_start(layers, reason, IndexOutcome::Absent));
        }
        Err(err) => {
            let reason = format!("the registry's index cannot be used: {}", in_full(&err));
            return Ok(FoundIndexes::without_start(layers, reason, IndexOutcome::Failed(err)));
        }
    };
    for (place, (layer, index)) in manifest.layers.iter().zip(&layers).enumerate() {
        let start = remote.start_in(&layer.digest);
        index.iter().for_each(|index| came(place, index, start));
    }
    let fill = (&mut layers[..], came);
    let reason = fetch_ztocs(origin, manifest, store, (&remote, room), fill).await?;
    let (start, outcome) = (remote.start(manifest), IndexOutcome::Remote);
    Ok(FoundIndexes { layers, reason, outcome, start })
}

/// The windows of an index cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchWindowsError {
    /// They do not come.
    #[error(
        "fetching the windows of an index, which are not all here; `hermes index build` makes it again"
    )]
    Origin(#[from] OriginError),
    /// The disk does not take them.
    #[error("storing the windows of an index")]
    Write(#[source] io::Error),
}

/// Fetches the windows of an index, if they are apart and not all there: what reads a layer without the
/// engine needs them here.
///
/// # Errors
/// [`FetchWindowsError`].
pub async fn have_windows(origin: &Origin, index: &StoredIndex) -> Result<(), FetchWindowsError> {
    let Some(StoredWindows { file, blob }) = &index.windows else { return Ok(()) };
    let spans = &index.ztoc.spans;
    let is_here = |span| match spans.window(span) {
        Some(Window::Apart(frame)) => index::read_frame(frame, file).is_ok(),
        Some(Window::Inside(_)) | None => true,
    };
    if spans.ids().all(is_here) {
        return Ok(());
    }
    let bytes = origin.sized_blob(&blob.digest, blob.size.min(MAX_ZTOC)).await?;
    file.write_all_at(&bytes, 0).map_err(FetchWindowsError::Write)
}

/// The indexes of the layers of an image that are in the store.
///
/// # Errors
/// When the store fails.
pub fn stored_indexes(
    manifest: &Manifest,
    store: &IndexStore,
) -> Result<FoundIndexes, StoreIndexError> {
    Ok(look_in_store(manifest, store)?.0)
}

fn look_in_store(
    manifest: &Manifest,
    store: &IndexStore,
) -> Result<(FoundIndexes, Room), StoreIndexError> {
    let mut layers = Vec::with_capacity(manifest.layers.len());
    let mut room = Room::default();
    for layer in &manifest.layers {
        let stored = store.load(&layer.digest)?;
        room.take(stored.as_ref().map_or(0, StoredIndex::toc_bytes))?;
        layers.push(stored);
    }
    let (have, all) = (layers.iter().flatten().count(), layers.len());
    let reason = match have == all {
        true => "an index of every layer is on this machine".to_owned(),
        false => format!("indexes of {have} of {all} layers are on this machine"),
    };
    Ok((FoundIndexes::without_start(layers, reason, IndexOutcome::Stored), room))
}

/// An index that lies beside an image.
#[derive(Debug)]
enum RemoteIndex {
    Hermes(SpanIndex),
    Soci(SociIndex, IndexOrigin),
}

/// The index that the image's place has for it.
async fn remote_index(
    origin: &Origin,
    descriptor: &Descriptor,
    manifest: &Manifest,
) -> Result<Option<RemoteIndex>, OriginError> {
    let annotated = soci::index_of(manifest);
    let types = [span_index::ARTIFACT_TYPE, Version::V1.artifact_type()];
    let referrers = origin.referrers(&descriptor.digest, &types).await;
    let found = match (&annotated, referrers) {
        (Some(_), Err(err)) => {
            tracing::debug!(image = %origin.name(), error = %err, "referrers cannot be listed");
            Vec::new()
        }
        (_, referrers) => referrers?,
    };
    let of_type =
        |wanted: &str| found.iter().find(|entry| entry.artifact_type.as_deref() == Some(wanted));
    if let Some(own) = of_type(span_index::ARTIFACT_TYPE) {
        match read_span_index(origin, own).await {
            Ok(index) => return Ok(Some(RemoteIndex::Hermes(index))),
            Err(err) => {
                tracing::debug!(image = %origin.name(), error = %err, "Hermes' index is gone");
            }
        }
    }
    if let Some(digest) = annotated {
        let descriptor = Descriptor::new(oci::media_type::OCI_MANIFEST, digest, 0);
        match read_index(origin, &descriptor).await {
            Ok(index) => return Ok(Some(RemoteIndex::Soci(index, IndexOrigin::Annotation))),
            // The image was copied without its index; a referrer may be there all the same.
            Err(err) => {
                tracing::debug!(image = %origin.name(), error = %err, "annotated index is gone");
            }
        }
    }
    match of_type(Version::V1.artifact_type()) {
        Some(first) => {
            let index = read_index(origin, first).await?;
            Ok(Some(RemoteIndex::Soci(index, IndexOrigin::Referrer)))
        }
        None => Ok(None),
    }
}

async fn read_index(origin: &Origin, descriptor: &Descriptor) -> Result<SociIndex, OriginError> {
    let bytes = origin.document(descriptor).await?;
    SociIndex::from_bytes(&bytes).map_err(|err| not_an_index(origin, descriptor, &err))
}

async fn read_span_index(
    origin: &Origin,
    descriptor: &Descriptor,
) -> Result<SpanIndex, OriginError> {
    let bytes = origin.document(descriptor).await?;
    SpanIndex::from_bytes(&bytes).map_err(|err| not_an_index(origin, descriptor, &err))
}

fn not_an_index(
    origin: &Origin,
    descriptor: &Descriptor,
    why: &dyn std::fmt::Display,
) -> OriginError {
    OriginError::NotAnImage {
        image: format!("index {} of {}", descriptor.digest, origin.name()),
        why: why.to_string(),
    }
}

/// A zTOC that an index names.
#[derive(Debug, Clone)]
struct RemoteZtoc {
    digest: Digest,
    /// Bytes of the blob.
    size: u64,
    /// Bytes of the zTOC, if the blob is compressed.
    plain_size: Option<u64>,
    streamed: bool,
    windows: Option<WindowsBlob>,
    from: IndexOrigin,
}

impl RemoteIndex {
    fn ztoc(&self, layer: &Digest) -> Option<RemoteZtoc> {
        match self {
            Self::Hermes(index) => index.entry(layer).map(|entry| RemoteZtoc {
                digest: entry.digest,
                size: entry.size,
                plain_size: Some(entry.plain_size),
                streamed: entry.streamed,
                windows: entry.windows,
                from: self.origin(),
            }),
            Self::Soci(index, _) => index.ztoc_for_layer(layer).map(|entry| RemoteZtoc {
                digest: entry.digest,
                size: entry.size,
                plain_size: None,
                streamed: false,
                windows: None,
                from: self.origin(),
            }),
        }
    }

    /// What the start of the image's own command needs of a layer.
    fn start_in(&self, layer: &Digest) -> &[Range<u64>] {
        let Self::Hermes(index) = self else { return &[] };
        index.entry(layer).map_or(&[], |entry| &entry.start)
    }

    fn start(&self, manifest: &Manifest) -> Vec<(usize, Range<u64>)> {
        let of_layer = |(place, layer): (usize, &Descriptor)| {
            self.start_in(&layer.digest).iter().map(move |range| (place, range.clone()))
        };
        manifest.layers.iter().enumerate().flat_map(of_layer).collect()
    }

    const fn origin(&self) -> IndexOrigin {
        match self {
            Self::Hermes(_) => IndexOrigin::Hermes,
            Self::Soci(_, from) => *from,
        }
    }
}

fn is_stream(layer: &Descriptor) -> bool {
    LayerCompression::from_media_type(&layer.media_type) == Ok(LayerCompression::Zstd)
}

/// Fetches the zTOCs that are missing, several at a time, and says how it went.
async fn fetch_ztocs(
    origin: &Origin,
    manifest: &Manifest,
    store: &IndexStore,
    (index, mut room): (&RemoteIndex, Room),
    (layers, came): (&mut [Option<StoredIndex>], IndexCame<'_>),
) -> Result<String, StoreIndexError> {
    let mut wanted = Vec::new();
    let mut largest = 1;
    let mut trouble = None;
    for (place, layer) in manifest.layers.iter().enumerate() {
        let missing = layers.get(place).is_some_and(Option::is_none);
        let ztoc = index.ztoc(&layer.digest).filter(|ztoc| ztoc.streamed == is_stream(layer));
        if let (true, Some(ztoc)) = (missing, ztoc) {
            match store.revocation(&ztoc.digest)? {
                None => {
                    largest = largest.max(ztoc.plain_size.unwrap_or(ztoc.size).min(MAX_ZTOC));
                    let layer = (layer.digest, layer.size);
                    wanted.push(have_ztoc(origin.clone(), store.clone(), place, ztoc, layer));
                }
                Some(why) => {
                    let layer = layer.digest;
                    trouble = Some(format!("the index of layer {layer} was revoked: {why}"));
                }
            }
        }
    }
    let at_a_time = usize::try_from(ZTOC_BYTES_AT_A_TIME / largest).unwrap_or(usize::MAX);
    let at_a_time = at_a_time.clamp(1, ZTOCS_AT_A_TIME);
    let mut answers = stream::iter(wanted).buffer_unordered(at_a_time);
    while let Some((place, answer)) = answers.next().await {
        match (answer, layers.get_mut(place)) {
            (Ok(stored), Some(slot)) => {
                room.take(stored.toc_bytes())?;
                let layer = manifest.layers.get(place);
                came(place, &stored, layer.map_or(&[], |layer| index.start_in(&layer.digest)));
                *slot = Some(stored);
            }
            (Err(ZtocError::Store(err @ StoreIndexError::Unusable { .. })), _) => {
                trouble = Some(err.to_string());
            }
            (Err(ZtocError::Store(err)), _) => return Err(err),
            (Err(ZtocError::Origin(err)), _) => trouble = Some(in_full(&err)),
            (Ok(_), None) => {}
        }
    }
    let (have, from) = (layers.iter().flatten().count(), index.origin());
    Ok(match trouble {
        None => format!("index from {from}; {have} of {} layers have one", layers.len()),
        Some(why) => format!("index from {from}, in part: {why}"),
    })
}

/// A zTOC is not in the store after all.
enum ZtocError {
    Origin(OriginError),
    Store(StoreIndexError),
}

/// Fetches a zTOC and stores it. What that computes is off the threads that wait for the network.
async fn have_ztoc(
    origin: Origin,
    store: IndexStore,
    place: usize,
    ztoc: RemoteZtoc,
    layer: (Digest, u64),
) -> (usize, Result<StoredIndex, ZtocError>) {
    let blob = match origin.sized_blob(&ztoc.digest, ztoc.size.min(MAX_ZTOC)).await {
        Ok(blob) => blob,
        Err(err) => return (place, Err(ZtocError::Origin(err))),
    };
    let name = origin.name().to_string();
    let keep = move || keep_ztoc(&name, &store, &ztoc, &blob, layer);
    let kept = tokio::task::spawn_blocking(keep).await;
    (place, kept.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())))
}

fn keep_ztoc(
    image: &str,
    store: &IndexStore,
    ztoc: &RemoteZtoc,
    blob: &Bytes,
    (layer, layer_size): (Digest, u64),
) -> Result<StoredIndex, ZtocError> {
    let bytes = match ztoc.plain_size {
        Some(plain_size) => {
            // A frame of a few bytes can claim anything.
            let most = layer_size.saturating_add(LEAST_MAX_ZTOC).min(MAX_ZTOC);
            decompress(blob, plain_size.min(most)).map_err(|err| {
                let image = format!("zTOC {} of {image}", ztoc.digest);
                ZtocError::Origin(OriginError::NotAnImage { image, why: err.to_string() })
            })?
        }
        None => blob.clone(),
    };
    let stored = match (ztoc.streamed, &ztoc.windows) {
        (true, _) => store.save_streamed(&layer, &bytes, ztoc.from),
        (false, None) => store.save(&layer, layer_size, &bytes, ztoc.from),
        (false, Some(windows)) => {
            store.save_without_windows(&layer, layer_size, &bytes, windows, ztoc.from)
        }
    };
    let stored = stored.map_err(ZtocError::Store)?;
    if ztoc.plain_size.is_some() {
        store.came_in(&layer, &ztoc.digest).map_err(ZtocError::Store)?;
    }
    Ok(stored)
}

/// A zstd frame of at most `most` bytes once decompressed; more is an error.
fn decompress(frame: &[u8], most: u64) -> io::Result<Bytes> {
    let mut bytes = Vec::new();
    // Memory is taken as it is written to, so a frame that claims much and has little takes little.
    bytes.try_reserve_exact(usize::try_from(most).unwrap_or(usize::MAX))?;
    let decompressed = zstd::bulk::Decompressor::new()?.decompress_to_buffer(frame, &mut bytes);
    decompressed.map_err(|err| {
        io::Error::other(format!("it does not decompress to {most} bytes or less: {err}"))
    })?;
    Ok(bytes.into())
}

const _: () = assert!(MAX_DOCUMENT < MAX_ZTOC);

/// A zTOC of an image layer of 100 GB, with room to spare.
const MAX_ZTOC: u64 = 2 << 30;

/// What a compressed zTOC may come to beside the size of its layer, however small that is.
const LEAST_MAX_ZTOC: u64 = 64 << 20;

const ZTOCS_AT_A_TIME: usize = 8;

/// Each lies in memory until it is stored. One that is larger comes alone.
const ZTOC_BYTES_AT_A_TIME: u64 = 512 << 20;

/// The memory that is left for the tables of contents of an image's layers.
#[derive(Debug, Clone, Copy)]
struct Room {
    left: u64,
}

impl Default for Room {
    fn default() -> Self {
        Self { left: MAX_TOC_BYTES }
    }
}

impl Room {
    fn take(&mut self, bytes: u64) -> Result<(), StoreIndexError> {
        let left = self.left.checked_sub(bytes);
        self.left = left.ok_or(StoreIndexError::TooMuch { limit: MAX_TOC_BYTES })?;
        Ok(())
    }
}

/// One layer at its own limits fits. Names and link targets may lie in the merged tree and in the EROFS
/// image once more.
const MAX_TOC_BYTES: u64 = 768 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_contents_are_limited_together() {
        let mut room = Room::default();
        room.take(700 << 20).unwrap();
        room.take(68 << 20).unwrap();
        let error = room.take(1).expect_err("there is no room left").to_string();
        assert!(error.contains("805306368 bytes of memory"), "{error}");
    }

    #[test]
    fn one_layer_at_its_limits_has_room() {
        let limits = ztoc::Limits::default();
        let smallest = ztoc::TocEntry::new("", ztoc::EntryKind::File).memory_bytes();
        let entries = u64::try_from(limits.entries).unwrap();
        Room::default().take(entries * smallest + limits.text).unwrap();
    }
}

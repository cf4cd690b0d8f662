//! `index build`, `push`, `show`, `get-file`, `verify`, `list` and `rm`: on the indexes of this
//! machine and on images where they lie, without a daemon.

mod build;
mod get_file;
mod push;
mod show;
mod span_bytes;
mod start_ranges;
mod verify;

use std::sync::Arc;

use anyhow::{Context, Result};
use artifacts::{Image, ImageName, IndexStore, Origin, StoredIndex};
use oci::Digest;
use serde::Serialize;
use tree::LaterTree;
use ztoc::EntryKind;

pub(crate) use self::start_ranges::start_ranges;
use crate::args::{GlobalArguments, IndexCommand};
use crate::failure::{Exit, Failure};
use crate::output::{Output, bytes};

/// Carries out one of them.
pub(crate) fn run(common: &GlobalArguments, output: Output, command: &IndexCommand) -> Result<()> {
    let session = Session { common, output };
    match command {
        IndexCommand::Build(arguments) => wait_for(build::build(&session, arguments)),
        IndexCommand::Push(arguments) => wait_for(push::push(&session, arguments)),
        IndexCommand::Show { image } => wait_for(show::show(&session, image)),
        IndexCommand::GetFile { image, path } => {
            wait_for(get_file::get_file(&session, image, path))
        }
        IndexCommand::Verify { image } => wait_for(verify::verify(&session, image)),
        IndexCommand::List => list(&session),
        IndexCommand::Rm { what } => wait_for(remove(&session, what)),
    }
}

/// What the tables of contents of an image's layers come to, the lowest first.
pub(crate) fn tree_of<'i>(indexes: impl IntoIterator<Item = &'i StoredIndex>) -> LaterTree {
    let tables = indexes.into_iter().map(|index| Arc::clone(&index.toc)).collect();
    LaterTree::new(tables, tree::Limits::default())
}

fn wait_for(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.context("starting threads")?.block_on(work)
}

/// What all of these commands work with.
struct Session<'a> {
    common: &'a GlobalArguments,
    output: Output,
}

impl Session<'_> {
    /// The indexes of this machine.
    fn indexes(&self) -> Result<IndexStore> {
        Ok(IndexStore::open(&self.common.root.join("index"))?)
    }

    /// Finds an image where it lies.
    async fn image(&self, name: &str) -> Result<(Origin, Image)> {
        let name: ImageName = name.parse()?;
        let client = crate::registries::client(&crate::registries::access(&self.common.registry)?);
        let origin = Origin::open(&name, &client)?;
        let platform = crate::daemon::platform(self.common.registry.platform.as_deref())?;
        let image = origin.resolve(&platform).await?;
        Ok((origin, image))
    }
}

/// One index of this machine.
#[derive(Debug, Serialize)]
struct IndexReport {
    /// Digest of the zTOC.
    ztoc: Digest,
    /// Its size in bytes.
    ztoc_size: u64,
    /// The size of its windows in bytes, if they are apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    windows_size: Option<u64>,
    /// Where it came from.
    origin: artifacts::IndexOrigin,
    /// Whether the layer can only be read from its beginning: its compression has no checkpoints.
    streamed: bool,
    spans: u32,
    /// Uncompressed bytes between two checkpoints, as they were asked for.
    span_size: u64,
    /// Regular files in the layer.
    files: usize,
    /// Size of the layer's tar in bytes.
    uncompressed: u64,
}

impl IndexReport {
    fn new(index: &StoredIndex) -> Result<Self> {
        let spans = &index.ztoc.spans;
        Ok(Self {
            ztoc: index.digest,
            ztoc_size: index.file.metadata().context("reading a stored index")?.len(),
            windows_size: index.windows.as_ref().map(|windows| windows.blob.size),
            origin: index.origin,
            streamed: index.streamed,
            spans: spans.len(),
            span_size: spans.span_size(),
            files: index.toc.read()?.iter().filter(|entry| entry.kind == EntryKind::File).count(),
            uncompressed: spans.uncompressed_size(),
        })
    }

    fn text(&self) -> String {
        let (files, whole, ztoc_size) =
            (self.files, bytes(self.uncompressed), bytes(self.ztoc_size));
        if self.streamed {
            return format!(
                "{files} files, {whole}; zstd, read only from its beginning, no SOCI index"
            );
        }
        let (spans, span_size, ztoc) = (self.spans, bytes(self.span_size), self.ztoc);
        let windows = self.windows_size.map(|size| format!(" and windows of {}", bytes(size)));
        let windows = windows.unwrap_or_default();
        format!(
            "{files} files, {whole}, {spans} spans of {span_size}, zTOC {ztoc} of {ztoc_size}{windows}"
        )
    }
}

fn not_found(message: String) -> anyhow::Error {
    Failure { exit: Exit::NotFound, message }.into()
}

fn corrupt(message: String) -> anyhow::Error {
    Failure { exit: Exit::Corrupt, message }.into()
}

/// That none of an image's layers has an index, and what to do about it.
fn no_index(image: &Image, reason: &str) -> anyhow::Error {
    let name = &image.name;
    not_found(format!("{name} has no index: {reason}; `hermes index build {name}` makes one"))
}

#[derive(Serialize)]
struct ListedIndex {
    layer: Digest,
    #[serde(flatten)]
    index: IndexReport,
}

#[derive(Serialize)]
struct ListReport {
    indexes: Vec<ListedIndex>,
}

fn list(session: &Session<'_>) -> Result<()> {
    let mut listed = Vec::new();
    // Looking makes nothing.
    if session.common.root.join("index").is_dir() {
        let indexes = session.indexes()?;
        for layer in indexes.list()? {
            if let Some(index) = indexes.load(&layer)? {
                listed.push(ListedIndex { layer, index: IndexReport::new(&index)? });
            }
        }
    }
    session.output.result(&ListReport { indexes: listed }, |report| {
        let lines = report.indexes.iter().map(|listed| {
            format!("{}  {} ({})\n", listed.layer, listed.index.text(), listed.index.origin)
        });
        lines.collect()
    })
}

#[derive(Serialize)]
struct RemoveReport {
    removed: Vec<Digest>,
}

async fn remove(session: &Session<'_>, what: &[String]) -> Result<()> {
    let indexes = session.indexes()?;
    let (mut removed, mut without) = (Vec::new(), Vec::new());
    for name in what {
        let layers = match name.parse::<Digest>() {
            Ok(layer) => vec![layer],
            Err(_not_a_digest) => {
                let (_, image) = session.image(name).await?;
                image.layers.iter().map(|layer| layer.digest).collect()
            }
        };
        let before = removed.len();
        for layer in layers {
            if indexes.remove(&layer)? {
                removed.push(layer);
            }
        }
        if removed.len() == before {
            without.push(name.as_str());
        }
    }
    session.output.result(&RemoveReport { removed }, |report| {
        report.removed.iter().map(|layer| format!("{layer}\n")).collect()
    })?;
    if without.is_empty() {
        return Ok(());
    }
    Err(not_found(format!("no index on this machine: {}", without.join(", "))))
}

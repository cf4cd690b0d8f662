//! Writes a layer's zTOC and prints its digest, to be held against that of `soci create`.
//!
//! `build_ztoc LAYER OUTPUT [SPAN_SIZE [sparse]]`, the latter for sparse windows; gzip, zstd or plain is told from the first bytes.

use std::fs::{self, File};
use std::io::{BufReader, Write as _};

use anyhow::{Context as _, bail};
use index::build_layer;
use oci::{Digest, LayerCompression};
use ztoc::IndexerOptions;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [layer, output, rest @ ..] = args.as_slice() else {
        bail!("usage: build_ztoc LAYER OUTPUT [SPAN_SIZE [sparse]]");
    };
    let mut options = IndexerOptions::default();
    if let Some(span_size) = rest.first() {
        options.span_size = span_size.parse().context("reading SPAN_SIZE")?;
    }
    options.sparse_windows = rest.get(1).is_some_and(|word| word == "sparse");
    let file = File::open(layer).with_context(|| format!("opening {layer}"))?;
    let compression = compression(layer)?;
    let index = build_layer(BufReader::new(file), compression, options, &mut |_bytes| {})?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "layer  {} {}", index.layer_digest, index.layer_size)?;
    writeln!(out, "diffid {} {}", index.diff_id, index.uncompressed_total)?;
    let (ztoc, bytes) = (&index.ztoc, &index.ztoc_bytes);
    fs::write(output, bytes).with_context(|| format!("writing {output}"))?;
    writeln!(out, "ztoc   {} {}", Digest::of(bytes), bytes.len())?;
    writeln!(out, "files  {}, spans {}", ztoc.toc.len(), ztoc.spans.len())?;
    Ok(())
}

fn compression(layer: &str) -> anyhow::Result<LayerCompression> {
    let mut magic = [0; 4];
    let found = std::io::Read::read(&mut File::open(layer)?, &mut magic)?;
    Ok(match &magic[..found] {
        [0x1f, 0x8b, ..] => LayerCompression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => LayerCompression::Zstd,
        _ => LayerCompression::None,
    })
}

//! Makes layers and decodes them.

use std::collections::BTreeSet;
use std::io::Write as _;

use flate2::write::GzEncoder;
use proptest::prelude::*;
use ztoc::{
    BuiltIndex, Compression, DecodeSpanError, IndexError, Indexer, IndexerOptions, Limits,
    SpanDecoder, SpanId,
};

/// A tar with a file for each item, of that content, and padding behind its end.
pub(crate) fn tar_of(contents: &[Vec<u8>], padding: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (number, content) in contents.iter().enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(number as u64);
        builder.append_data(&mut header, format!("files/{number}"), content.as_slice()).unwrap();
    }
    let mut tar = builder.into_inner().unwrap();
    tar.resize(tar.len() + padding, 0);
    tar
}

/// One gzip member.
pub(crate) fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Data that compresses neither well nor not at all, with matches near and far.
pub(crate) fn text(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out: Vec<u8> = Vec::with_capacity(len + 300);
    while out.len() < len {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let pick = (state >> 33) as usize;
        if pick.is_multiple_of(4) && out.len() > 300 {
            let from = pick / 4 % (out.len() - 300);
            out.extend_from_within(from..from + 3 + pick % 290);
        } else {
            out.extend_from_slice(&state.to_le_bytes()[..3 + pick % 5]);
        }
    }
    out.truncate(len);
    out
}

pub(crate) fn options(span_size: u64) -> IndexerOptions {
    IndexerOptions { span_size, ..IndexerOptions::default() }
}

/// Indexes a layer given in pieces, and what it uncompresses to, of which no piece may belong to two
/// spans.
pub(crate) fn try_index(
    layer: &[u8],
    options: IndexerOptions,
    piece: usize,
) -> Result<(BuiltIndex, Vec<u8>), IndexError> {
    let (mut tar, mut edges) = (Vec::new(), BTreeSet::from([0]));
    let mut indexer = Indexer::new(options)?;
    for piece in layer.chunks(piece) {
        indexer.push(piece, &mut |bytes| {
            tar.extend_from_slice(bytes);
            edges.insert(tar.len() as u64);
        })?;
    }
    let built = indexer.finish()?;
    for span in built.ztoc.spans.ids() {
        let start = built.ztoc.spans.checkpoint(span).uncompressed;
        assert!(edges.contains(&start), "the sink got bytes of two spans at once, at {start}");
    }
    Ok((built, tar))
}

pub(crate) fn index(layer: &[u8], options: IndexerOptions) -> BuiltIndex {
    try_index(layer, options, 1 << 16).unwrap().0
}

/// Decodes a span into pieces of `piece` bytes; `blob` is the zTOC's document. Never takes more than
/// 64 MiB.
pub(crate) fn decode(
    index: &ztoc::Ztoc,
    blob: &[u8],
    layer: &[u8],
    span: SpanId,
    piece: usize,
) -> Result<Vec<u8>, DecodeSpanError> {
    let range = index.spans.compressed_range(span);
    // Exactly as long as it must be, and an allocation of its own: reading past it would be found.
    let bytes = layer[range.start as usize..range.end as usize].to_vec().into_boxed_slice();
    let window = index.window(blob, span);
    let mut decoder = SpanDecoder::new(&index.spans, span, &bytes, window)?;
    let mut out = vec![0; piece];
    let mut made = Vec::new();
    loop {
        match decoder.read(&mut out)? {
            0 => return Ok(made),
            len => made.extend_from_slice(&out[..len]),
        }
        assert!(made.len() <= 64 << 20, "the span does not end");
    }
}

/// A layer for property tests: tar, layer, compression.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) tar: Vec<u8>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) compression: Compression,
}

pub(crate) fn layers() -> impl Strategy<Value = Layer> {
    let content = (0_usize..60_000, any::<u64>()).prop_map(|(len, seed)| text(len, seed));
    let contents = proptest::collection::vec(content, 0..6);
    let members = proptest::collection::vec(any::<prop::sample::Index>(), 0..5);
    let padding = prop_oneof![Just(0), Just(9000), Just(200_000)];
    let level = prop_oneof![Just(None), (0_u32..10).prop_map(Some)];
    (contents, padding, level, members).prop_map(|(contents, padding, level, cuts)| {
        let tar = tar_of(&contents, padding);
        let Some(level) = level else {
            return Layer { bytes: tar.clone(), tar, compression: Compression::Uncompressed };
        };
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(tar.len())).collect();
        cuts.extend([0, tar.len()]);
        cuts.sort_unstable();
        let bytes = cuts.windows(2).flat_map(|cut| gzip(&tar[cut[0]..cut[1]], level)).collect();
        Layer { tar, bytes, compression: Compression::Gzip }
    })
}

pub(crate) fn limits() -> Limits {
    Limits::default()
}

#![no_main]
//! A layer that is indexed can be decoded from every span, and a damaged one is no danger.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use libfuzzer_sys::fuzz_target;
use ztoc::{BuiltIndex, IndexError, Indexer, IndexerOptions, SpanDecoder};

fn index(layer: &[u8], span_size: u64, step: usize) -> Result<(BuiltIndex, Vec<u8>), IndexError> {
    let mut tar = Vec::new();
    let mut indexer = Indexer::new(IndexerOptions { span_size, ..IndexerOptions::default() })?;
    for piece in layer.chunks(step) {
        indexer.push(piece, &mut |bytes| tar.extend_from_slice(bytes))?;
    }
    Ok((indexer.finish()?, tar))
}

fn layer(content: &[u8], level: u32) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::new(level % 10)));
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len().try_into().expect("a length fits"));
    // A content that deflate makes little of, many times over: several spans.
    for name in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        tar.append_data(&mut header, name, content).expect("memory takes everything");
    }
    let mut gzip = tar.into_inner().expect("memory takes everything");
    gzip.flush().expect("memory takes everything");
    gzip.finish().expect("memory takes everything")
}

fuzz_target!(|input: (u8, u16, u32, &[u8])| {
    let (step, span_size, level, content) = input;
    let (step, span_size) = (usize::from(step) + 1, u64::from(span_size) + 1);
    // As it is, it is hardly ever a layer: it must only be refused without harm.
    index(content, span_size, step).ok();

    let layer = layer(content, level);
    let (built, tar) = index(&layer, span_size, step).expect("it is a layer");
    assert_eq!(built.ztoc.toc.len(), 8);
    let spans = &built.ztoc.spans;
    for span in spans.ids() {
        let compressed = spans.compressed_range(span);
        let made = spans.uncompressed_range(span);
        let cut = |range: std::ops::Range<u64>| {
            usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
        };
        let window = built.ztoc.window(&built.ztoc_bytes, span);
        let mut decoder =
            SpanDecoder::new(spans, span, &layer[cut(compressed)], window).expect("lengths fit");
        let expected = &tar[cut(made)];
        let mut found = vec![0; expected.len()];
        let mut filled = 0;
        while filled < found.len() {
            let n = decoder.read(&mut found[filled..]).expect("it is not damaged");
            assert_ne!(n, 0, "span {span:?} ends at {filled} of {}", found.len());
            filled += n;
        }
        assert_eq!(found, expected, "span {span:?}");
    }
});

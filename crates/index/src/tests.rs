//! Tests over each compression.

use std::io::Write as _;

use ztoc::Limits;

use super::*;

fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for number in 0_u8..20 {
        let content = vec![number; 20_000];
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, format!("f{number}"), content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    ::zstd::encode_all(bytes, 3).unwrap()
}

fn skippable(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap();
    [&[0x53, 0x2a, 0x4d, 0x18], &len.to_le_bytes()[..], bytes].concat()
}

fn push_all(
    layer: &[u8],
    compression: LayerCompression,
    options: IndexerOptions,
    piece: usize,
) -> Result<(LayerIndex, Vec<u8>), BuildError> {
    let mut out = Vec::new();
    let mut indexer = LayerIndexer::new(compression, options)?;
    for piece in layer.chunks(piece) {
        indexer.push(piece, &mut |bytes| out.extend_from_slice(bytes))?;
    }
    Ok((indexer.finish()?, out))
}

#[track_caller]
fn check(layer: &[u8], compression: LayerCompression) {
    let tar = tar();
    let mut out = Vec::new();
    let sink = &mut |bytes: &[u8]| out.extend_from_slice(bytes);
    let index = build_layer(layer, compression, IndexerOptions::default(), sink).unwrap();
    assert!(out == tar, "the sink got another tar");
    assert_eq!(index.diff_id, Digest::of(&tar));
    assert_eq!(index.layer_digest, Digest::of(layer));
    assert_eq!(index.layer_size, layer.len() as u64);
    assert_eq!(index.uncompressed_total, tar.len() as u64);
    assert_eq!(index.ztoc.toc.len(), 20);
    assert_eq!(index.ztoc.toc[19].offset, 19 * 20_992 + 512);
    assert_eq!(index.is_streamed, compression == LayerCompression::Zstd);
    for piece in [1, 1000] {
        let (cut, out) = push_all(layer, compression, IndexerOptions::default(), piece).unwrap();
        assert!(out == tar && cut.diff_id == index.diff_id);
        assert_eq!(cut.ztoc, index.ztoc);
        assert!(cut.ztoc_bytes == index.ztoc_bytes);
    }
}

#[test]
fn each_compression() {
    let tar = tar();
    check(&tar, LayerCompression::None);
    check(&gzip(&tar), LayerCompression::Gzip);
    check(&frame(&tar), LayerCompression::Zstd);
}

#[test]
fn zstd_of_many_frames() {
    let tar = tar();
    let mut layer = skippable(b"first");
    for part in tar.chunks(50_000) {
        layer.extend(frame(part));
        layer.extend(frame(b""));
        layer.extend(skippable(b""));
    }
    // As zstd:chunked: its table of contents at the end, in a skippable frame.
    layer.extend(skippable(&[7; 500]));
    check(&layer, LayerCompression::Zstd);
}

#[test]
fn the_spans_of_a_streamed_layer_are_short_and_have_digests_of_the_tar() {
    let tar = tar();
    for (asked, expected) in [(100_000, 100_000), (4 << 20, STREAMED_SPAN)] {
        let options = IndexerOptions { span_size: asked, ..IndexerOptions::default() };
        let (index, _) = push_all(&frame(&tar), LayerCompression::Zstd, options, 1000).unwrap();
        let spans = index.ztoc.spans;
        assert_eq!(spans.span_size(), expected);
        for span in spans.ids() {
            let range = spans.compressed_range(span);
            let start = usize::try_from(range.start).unwrap();
            let slice = &tar[start..usize::try_from(range.end).unwrap()];
            assert_eq!(*spans.digest(span), Digest::of(slice), "{span:?}");
        }
    }
}

#[test]
fn damaged_layers_are_refused() {
    let layer = frame(&tar());
    let error = |layer: &[u8], compression| {
        push_all(layer, compression, IndexerOptions::default(), 100).map(|_index| ()).unwrap_err()
    };
    let zstd = |layer: &[u8]| {
        let error = error(layer, LayerCompression::Zstd);
        assert!(matches!(error, BuildError::Zstd { .. }), "{error:?}");
    };
    zstd(&[]);
    zstd(&layer[..layer.len() - 1]);
    zstd(&[&layer[..], b"garbage"].concat());
    zstd(&gzip(&tar()));
    let mut skipped = skippable(&[0; 100]);
    skipped.pop();
    zstd(&[&layer[..], &skipped].concat());
    let not_gzip = error(&layer, LayerCompression::Gzip);
    assert!(matches!(not_gzip, BuildError::Index(IndexError::Inflate { .. })), "{not_gzip:?}");
    let no_tar = error(&frame(&[7; 5000]), LayerCompression::Zstd);
    assert!(matches!(no_tar, BuildError::Index(IndexError::Tar(_))), "{no_tar:?}");
}

#[test]
fn bombs_are_refused_before_they_are_delivered() {
    let tar = tar();
    for (layer, compression) in [
        (gzip(&tar), LayerCompression::Gzip),
        (frame(&tar), LayerCompression::Zstd),
        (tar.clone(), LayerCompression::None),
    ] {
        let limits = Limits { uncompressed: 100_000, ..Limits::default() };
        let options = IndexerOptions { limits, ..IndexerOptions::default() };
        let mut delivered = 0;
        let sink = &mut |bytes: &[u8]| delivered += bytes.len();
        let error = build_layer(layer.as_slice(), compression, options, sink).unwrap_err();
        let too_large = IndexError::TooLarge { limit: 100_000 };
        assert!(matches!(error, BuildError::Index(found) if found == too_large), "{error:?}");
        assert!(delivered <= 100_000, "{delivered} bytes");
    }
}

#[test]
fn windows_beyond_the_bound_are_refused() {
    let mut encoder = ::zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.write_all(&tar()).unwrap();
    let layer = encoder.finish().unwrap();
    let error =
        push_all(&layer, LayerCompression::Zstd, IndexerOptions::default(), 1000).unwrap_err();
    assert!(matches!(error, BuildError::Zstd { .. }), "{error:?}");
}

#[test]
fn a_reader_that_fails_is_told_from_a_bad_layer() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    let options = IndexerOptions::default();
    let error = build_layer(Failing, LayerCompression::Gzip, options, &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuildError::Read(_)), "{error:?}");
}

//! Every span of every layer decodes to its slice of the tar.

use oci::Digest;
use proptest::prelude::*;
use ztoc::{Compression, IndexError, IndexerOptions, Limits, SpanId, SpanOptions, Ztoc};

use crate::make::{Layer, decode, gzip, index, layers, limits, options, tar_of, text, try_index};

/// Holds an index to the layer that it was built from.
fn check(layer: &Layer, options: IndexerOptions, push: usize, read: usize) {
    let (built, tar) = try_index(&layer.bytes, options, push).unwrap();
    assert!(tar == layer.tar, "the sink got another tar");
    assert_eq!(built.diff_id, Digest::of(&layer.tar));
    assert_eq!(built.layer_digest, Digest::of(&layer.bytes));
    assert_eq!(built.layer_size, layer.bytes.len() as u64);
    assert_eq!(built.uncompressed_total, layer.tar.len() as u64);

    let blob = &built.ztoc_bytes;
    let ztoc = Ztoc::parse(blob, &limits()).unwrap();
    assert_eq!(ztoc, built.ztoc);
    assert!(ztoc.to_bytes(blob).unwrap() == *blob, "written again it differs");

    let spans = &ztoc.spans;
    for span in spans.ids() {
        let compressed = spans.compressed_range(span);
        let slice = &layer.bytes[compressed.start as usize..compressed.end as usize];
        assert_eq!(*spans.digest(span), Digest::of(slice), "{span:?}");
        let made = decode(&ztoc, blob, &layer.bytes, span, read).unwrap();
        let start = spans.checkpoint(span).uncompressed;
        let next = spans.ids().find(|next| *next > span);
        let end = next.map_or(layer.tar.len() as u64, |next| spans.checkpoint(next).uncompressed);
        assert!(made == layer.tar[start as usize..end as usize], "{span:?} of {}", spans.len());
        let size = ztoc.uncompressed_size;
        assert_eq!(spans.uncompressed_range(span), start.min(size)..end.min(size), "{span:?}");
    }
    for entry in &ztoc.toc {
        let number: u64 = String::from_utf8(entry.name[6..].to_vec()).unwrap().parse().unwrap();
        assert_eq!(entry.mtime.seconds, i64::try_from(number).unwrap());
        assert!(entry.offset + entry.size <= ztoc.uncompressed_size);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_span_is_its_slice(
        layer in layers(),
        span_size in prop_oneof![Just(1_u64), 1_u64..100_000, Just(4 << 20)],
        sparse_windows in any::<bool>(),
        push in prop_oneof![1_usize..100, Just(1 << 20)],
        read in 1_usize..100_000,
    ) {
        // A span of one byte is one digest for each byte of a plain layer.
        let plain = layer.compression == Compression::Uncompressed;
        let span_size = if plain { span_size.max(500) } else { span_size };
        let compression = layer.compression;
        check(&layer, IndexerOptions { compression, sparse_windows, ..options(span_size) }, push, read);
    }

    #[test]
    fn how_the_layer_is_cut_changes_nothing(
        layer in layers(),
        span_size in 500_u64..100_000,
        sparse_windows in any::<bool>(),
        piece in 1_usize..5000,
    ) {
        let compression = layer.compression;
        let options = IndexerOptions { compression, sparse_windows, ..options(span_size) };
        let (cut, _tar) = try_index(&layer.bytes, options.clone(), piece).unwrap();
        let (whole, _tar) = try_index(&layer.bytes, options, usize::MAX).unwrap();
        prop_assert!(cut.ztoc_bytes == whole.ztoc_bytes);
    }
}

#[test]
fn two_tables_of_one_pass_are_those_of_two_passes() {
    let tar = tar_of(&[text(400_000, 1), text(90_000, 2)], 0);
    let layer = [gzip(&tar[..200_000], 6), gzip(&tar[200_000..], 1)].concat();
    let sparse = IndexerOptions { sparse_windows: true, ..options(30_000) };
    let also = Some(SpanOptions { span_size: 100_000, sparse_windows: false });
    let both = index(&layer, IndexerOptions { also, ..sparse.clone() });
    let (short, long) = (index(&layer, sparse), index(&layer, options(100_000)));
    assert!(both.ztoc_bytes == short.ztoc_bytes && both.ztoc == short.ztoc);
    assert!(both.also == Some(long.ztoc_bytes));
    assert!(short.also.is_none());
}

#[test]
fn sparse_windows_keep_only_what_is_referred_to() {
    let tar = tar_of(&[text(400_000, 1)], 0);
    let layer = gzip(&tar, 6);
    let whole = index(&layer, options(50_000));
    let sparse = index(&layer, IndexerOptions { sparse_windows: true, ..options(50_000) });
    assert_eq!(whole.ztoc.spans, sparse.ztoc.spans);
    let mut kept = 0;
    for span in whole.ztoc.spans.ids().skip(1) {
        let before = whole.ztoc.window(&whole.ztoc_bytes, span);
        let after = sparse.ztoc.window(&sparse.ztoc_bytes, span);
        assert!(before.iter().zip(after).all(|(before, after)| after == before || *after == 0));
        let used = after.iter().filter(|&&byte| byte != 0).count();
        kept += used;
        assert!(used < before.len() * 9 / 10, "{span:?} keeps {used} bytes");
        // The bytes that were dropped were not needed, and some that stayed are.
        let slice = whole.ztoc.spans.uncompressed_range(span);
        let made = decode(&sparse.ztoc, &sparse.ztoc_bytes, &layer, span, 4096).unwrap();
        assert!(made[..] == tar[slice.start as usize..][..made.len()]);
    }
    assert!(kept > 0, "nothing at all is referred to");
}

#[test]
fn spans_are_larger_than_asked_for_and_end_at_blocks() {
    let tar = tar_of(&[text(900_000, 2)], 0);
    let spans = index(&gzip(&tar, 6), options(100_000)).ztoc.spans;
    assert!(spans.len() > 3, "{} spans", spans.len());
    assert!(spans.ids().any(|span| spans.checkpoint(span).bits > 0), "no span shares a byte");
    for span in spans.ids().rev().skip(1) {
        let range = spans.uncompressed_range(span);
        assert!(range.end - range.start > 100_000, "{span:?} makes {range:?}");
    }
}

#[test]
fn headers_with_names_and_extras() {
    let tar = tar_of(&[text(10_000, 3)], 0);
    let encoder = flate2::GzBuilder::new()
        .filename("layer.tar")
        .comment("a comment")
        .extra(vec![1, 2, 3])
        .write(Vec::new(), flate2::Compression::new(6));
    let mut encoder = encoder;
    std::io::Write::write_all(&mut encoder, &tar).unwrap();
    let bytes = encoder.finish().unwrap();
    let spans = index(&bytes, options(4 << 20)).ztoc.spans;
    assert_eq!(spans.header_range(), 0..10 + 5 + 10 + 10);
    check(&Layer { tar, bytes, compression: Compression::Gzip }, options(1000), 7, 1000);
}

#[test]
fn empty_blocks_and_members_make_no_empty_spans() {
    let tar = tar_of(&[text(50_000, 4)], 0);
    // Empty stored blocks come from flushing, before and between data.
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    std::io::Write::flush(&mut encoder).unwrap();
    std::io::Write::flush(&mut encoder).unwrap();
    for part in tar.chunks(20_000) {
        std::io::Write::write_all(&mut encoder, part).unwrap();
        std::io::Write::flush(&mut encoder).unwrap();
        std::io::Write::flush(&mut encoder).unwrap();
    }
    let empty = gzip(&[], 6);
    let bytes = [&empty[..], &encoder.finish().unwrap(), &empty, &empty].concat();
    check(&Layer { tar, bytes, compression: Compression::Gzip }, options(0), 100, 100);
}

#[test]
fn layers_of_nothing() {
    let built = index(&gzip(&[], 6), options(4 << 20));
    assert_eq!((built.ztoc.spans.len(), built.ztoc.toc.len()), (1, 0));
    let made = decode(&built.ztoc, &built.ztoc_bytes, &gzip(&[], 6), SpanId(0), 10).unwrap();
    assert!(made.is_empty());
    let plain = IndexerOptions { compression: Compression::Uncompressed, ..options(4 << 20) };
    let built = index(&[], plain);
    assert!(built.ztoc.spans.is_empty());
    assert_eq!(Ztoc::parse(&built.ztoc_bytes, &limits()).unwrap(), built.ztoc);
}

#[test]
fn layers_that_cannot_be_indexed() {
    let tar = tar_of(&[text(50_000, 5)], 0);
    let layer = gzip(&tar, 6);
    let error = |bytes: &[u8], options: IndexerOptions| {
        try_index(bytes, options, 1000).map(|(built, _tar)| built.diff_id).unwrap_err()
    };
    let default = IndexerOptions::default;
    let truncated = |at: usize| IndexError::Truncated { at: at as u64 };
    assert_eq!(error(&[], default()), truncated(0));
    assert_eq!(error(&layer[..layer.len() - 1], default()), truncated(layer.len() - 1));
    let trailing = error(&[&layer[..], b"garbage!"].concat(), default());
    assert!(matches!(trailing, IndexError::Inflate { .. }), "{trailing:?}");
    let zeros = error(&[&layer[..], &[0; 512]].concat(), default());
    assert!(matches!(zeros, IndexError::Inflate { .. }), "{zeros:?}");
    let no_tar = error(&gzip(&text(5000, 6), 6), default());
    assert!(matches!(no_tar, IndexError::Tar(_)), "{no_tar:?}");
    let bomb = Limits { uncompressed: 10_000, ..limits() };
    let bomb = IndexerOptions { limits: bomb, ..default() };
    assert_eq!(error(&layer, bomb), IndexError::TooLarge { limit: 10_000 });
    let large = IndexerOptions { limits: Limits { ztoc: 30_000, ..limits() }, ..options(1) };
    assert_eq!(error(&layer, large), IndexError::IndexTooLarge);
    let plain = IndexerOptions { compression: Compression::Uncompressed, ..options(0) };
    assert_eq!(error(&tar, plain), IndexError::NoSpanSize);
}

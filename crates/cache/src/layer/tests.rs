//! Layers on a real file system: presence, doubt, eviction, sealing, and crashes at every point.

use std::path::Path;
use std::time::Duration;

use oci::Digest;

use super::*;
use crate::store::OpenLayerError;

mod crashes;
mod full_disk;
mod model;

/// A byte of the layer that all tests use; never 0, so that a hole is never right.
fn byte_at(offset: u64) -> u8 {
    u8::try_from((offset * 31 + offset / 251) % 255 + 1).unwrap()
}

fn bytes_of(range: Range<u64>) -> Vec<u8> {
    range.map(byte_at).collect()
}

fn blob() -> Digest {
    Digest::of(b"blob")
}

/// Six spans whose edges lie within blocks, one of them shorter than a block.
fn shape() -> LayerShape {
    LayerShape {
        bytes: 50_001,
        spans: vec![0, 5000, 12_288, 12_300, 30_000, 45_000],
        index: Digest::of(b"index"),
    }
}

/// Opens the layer that lies in `folder`, in a boot of the machine, with no grace for spans in use.
fn open_in(folder: &Path, boot: &str, shape: LayerShape) -> Result<Layer, OpenLayerError> {
    let shared = Shared {
        boot: BootTag::of(boot),
        clock: Clock::new(),
        grace: AtomicU32::new(0),
        allowance: Allowance::new(None),
    };
    let folder = disk::open_folder(folder).unwrap();
    let shared = Arc::new(shared);
    Opening { digest: blob(), shape, folder, data: None, proven: None, shared }.open()
}

fn open(folder: &Path, boot: &str) -> Layer {
    open_in(folder, boot, shape()).unwrap()
}

/// Evicts spans that nobody reads.
fn evict(layer: &Layer, spans: &[u32]) -> Result<Evicted, EvictError> {
    layer.evict(spans, Duration::ZERO, &|_| false)
}

/// Writes a span in two pieces and marks it present.
fn fill(layer: &Layer, span: u32) -> Result<(), WriteError> {
    let range = layer.shape().range(span);
    let bytes = bytes_of(range.clone());
    let (head, tail) = bytes.split_at(bytes.len() / 2);
    layer.write_at(range.start, head)?;
    layer.write_at(range.start + u64::try_from(head.len()).unwrap(), tail)?;
    layer.mark_present(span, crc32c::crc32c(&bytes))
}

fn fill_all(layer: &Layer) {
    for span in 0..layer.shape().span_count() {
        fill(layer, span).unwrap();
    }
}

fn read_span(layer: &Layer, span: u32) -> Vec<u8> {
    let mut found = Vec::new();
    layer
        .read_range(layer.shape().range(span), &mut |bytes| found.extend_from_slice(bytes))
        .unwrap();
    found
}

#[track_caller]
fn assert_right_where_present(layer: &Layer) {
    for span in layer.present_spans().iter() {
        assert!(
            read_span(layer, span) == bytes_of(layer.shape().range(span)),
            "span {span} is present with wrong bytes"
        );
    }
}

fn states(layer: &Layer) -> String {
    let letter = |span| match layer.state(span) {
        SpanState::Missing => '.',
        SpanState::Unchecked => '?',
        SpanState::Present => '#',
    };
    (0..layer.shape().span_count()).map(letter).collect()
}

#[test]
fn a_shape_knows_its_spans() {
    let shape = shape();
    assert_eq!(shape.range(0), 0..5000);
    assert_eq!(shape.range(5), 45_000..50_001);
    assert_eq!(shape.range(6), 50_001..50_001);
    assert_eq!(shape.covering(&(4999..5001)), 0..2);
    assert_eq!(shape.covering(&(12_288..12_300)), 2..3);
    assert_eq!(shape.covering(&(50_000..90_000)), 5..6);
    assert_eq!(shape.covering(&(50_001..90_000)), 0..0);
    assert_eq!(shape.covering(&(7..7)), 0..0);
}

#[test]
fn a_span_is_present_once_marked() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    assert!(layer.discarded().is_none());
    assert_eq!(states(&layer), "......");
    layer.write_at(0, &bytes_of(0..5000)).unwrap();
    assert_eq!(states(&layer), "......");
    fill(&layer, 0).unwrap();
    fill(&layer, 2).unwrap();
    assert_eq!(states(&layer), "#.#...");
    assert_eq!(layer.bytes_present(), 5012);
    assert_eq!(layer.first_missing(0), Some(1));
    assert_eq!(layer.first_missing(2), Some(3));
    assert_eq!(layer.present_spans().iter().collect::<Vec<_>>(), [0, 2]);
    assert!(layer.touch(0) && !layer.touch(1) && !layer.touch(99));
    assert_eq!(layer.data().metadata().unwrap().len(), 50_001);
    assert_right_where_present(&layer);
}

#[test]
fn what_lies_outside_the_layer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    for (offset, len) in [(50_000, 2), (50_001, 1), (u64::MAX, 1)] {
        let refused = layer.write_at(offset, &vec![1; len]);
        assert!(matches!(refused, Err(WriteError::OutOfBounds { .. })), "{offset}");
    }
    assert!(matches!(layer.mark_present(6, 0), Err(WriteError::OutOfBounds { .. })));
    assert_eq!(layer.data().metadata().unwrap().len(), 50_001);
}

#[test]
fn a_killed_process_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fill(&open(folder.path(), "a"), 3).unwrap();
    let layer = open(folder.path(), "a");
    assert_eq!(states(&layer), "...#..");
    assert_right_where_present(&layer);
}

#[test]
fn after_an_unclean_boot_each_span_is_checked_once() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    // As if the last span had not reached the disk.
    layer.data().write_all_at(&[0; 9], 46_000).unwrap();
    drop(layer);

    let layer = open(folder.path(), "b");
    assert_eq!(states(&layer), "??????");
    assert_eq!(layer.bytes_present(), 0);
    assert!(!layer.is_present(0) && layer.needs_check(0));
    assert!(layer.ensure_present(0).unwrap());
    assert!(layer.check(4).unwrap());
    assert!(!layer.check(5).unwrap());
    assert_eq!(states(&layer), "#???#.");
    drop(layer);

    let layer = open(folder.path(), "b");
    assert_eq!(states(&layer), "#???#.", "what was settled stays so in the same boot");
    drop(layer);
    assert_eq!(states(&open(folder.path(), "c")), "?????.");
}

#[test]
fn after_a_clean_mark_only_later_changes_are_in_doubt() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill(&layer, 0).unwrap();
    fill(&layer, 1).unwrap();
    layer.mark_clean().unwrap();
    fill(&layer, 2).unwrap();
    drop(layer);
    let layer = open(folder.path(), "b");
    assert_eq!(states(&layer), "##?...");
    assert!(layer.check(2).unwrap());
    layer.mark_clean().unwrap();
    drop(layer);
    assert_eq!(states(&open(folder.path(), "c")), "###...");
}

#[test]
fn a_failed_flush_puts_what_was_not_durable_in_doubt() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill(&layer, 0).unwrap();
    layer.mark_clean().unwrap();
    fill(&layer, 1).unwrap();
    let (result, _) = disk::recorder::record(Some(0), || layer.mark_clean());
    assert!(result.is_err());
    assert_eq!(states(&layer), "#.....".replacen('.', "?", 1));
    assert!(layer.check(1).unwrap());
}

#[test]
fn the_map_of_another_index_is_discarded() {
    let folder = tempfile::tempdir().unwrap();
    fill_all(&open(folder.path(), "a"));
    let other = LayerShape { index: Digest::of(b"other"), ..shape() };
    let layer = open_in(folder.path(), "a", other.clone()).unwrap();
    assert!(
        matches!(layer.discarded(), Some(Discarded::OtherIndex { found }) if *found == shape().index)
    );
    assert_eq!(states(&layer), "......");
    assert_eq!(layer.allocated().unwrap(), 0, "its bytes gave their room back");
    drop(layer);

    let longer = LayerShape { bytes: 60_000, ..other };
    let layer = open_in(folder.path(), "a", longer).unwrap();
    assert!(matches!(layer.discarded(), Some(Discarded::OtherSpans)));
    assert_eq!(layer.data().metadata().unwrap().len(), 60_000);
}

#[test]
fn a_damaged_map_is_discarded() {
    let folder = tempfile::tempdir().unwrap();
    for damage in [&b""[..], b"HERMESPM", &[0; 4096]] {
        fill_all(&open(folder.path(), "a"));
        std::fs::write(folder.path().join("map"), damage).unwrap();
        let layer = open(folder.path(), "a");
        assert!(matches!(layer.discarded(), Some(Discarded::Map(MapError::Header))));
        assert_eq!(states(&layer), "......");
    }
}

#[test]
fn a_map_without_its_data_vouches_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.mark_clean().unwrap();
    drop(layer);
    std::fs::remove_file(folder.path().join("data")).unwrap();
    let layer = open(folder.path(), "a");
    assert!(matches!(layer.discarded(), Some(Discarded::Data)));
    assert_eq!(states(&layer), "......");
    fill_all(&layer);
    layer.data().set_len(50_000).unwrap();
    drop(layer);
    let layer = open(folder.path(), "a");
    assert!(matches!(layer.discarded(), Some(Discarded::Data)));
    assert_eq!(states(&layer), "......");
}

#[test]
fn an_evicted_span_gives_its_blocks_back_and_leaves_its_neighbours() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.mark_clean().unwrap();
    let before = layer.allocated().unwrap();
    let evicted = evict(&layer, &[4, 1, 3, 1, 99]).unwrap();
    assert_eq!(evicted.spans, [1, 3, 4]);
    // 8192..12288 of span 1, 16384..40960 of spans 3 and 4.
    assert_eq!(evicted.punched, 4096 + 6 * 4096);
    assert_eq!(layer.allocated().unwrap(), before - evicted.punched);
    assert_eq!(states(&layer), "#.#..#");
    assert_right_where_present(&layer);
    assert!(evict(&layer, &[1]).unwrap().spans.is_empty(), "a missing span is not evicted again");
    drop(layer);
    let layer = open(folder.path(), "b");
    assert_eq!(states(&layer), "#.#..#");
    fill(&layer, 1).unwrap();
    fill(&layer, 4).unwrap();
    assert_right_where_present(&layer);
}

#[test]
fn a_span_in_use_is_not_evicted() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    let nothing = Evicted { spans: Vec::new(), punched: 0 };
    let is_read = |range: &Range<u64>| *range != layer.shape().range(3);
    assert_eq!(layer.evict(&[0, 1], Duration::from_secs(100), &|_| false).unwrap(), nothing);
    assert_eq!(layer.evict(&[0, 1], Duration::ZERO, &is_read).unwrap(), nothing);
    let reading = layer.reading();
    assert_eq!(evict(&layer, &[0, 1]).unwrap(), nothing, "somebody reads");
    drop(reading);
    assert_eq!(layer.losses(), 0);
    assert_eq!(states(&layer), "######");
    assert_eq!(layer.evict(&[2, 3, 4], Duration::ZERO, &is_read).unwrap().spans, [3]);
    assert_eq!((states(&layer).as_str(), layer.losses()), ("###.##", 1));
    layer.shared.grace.store(1000, Ordering::Relaxed);
    layer.unknown_reader();
    assert_eq!(evict(&layer, &[0, 1]).unwrap(), nothing, "somebody may read");
}

#[test]
fn an_unsealed_layer_waits_for_readers_that_nobody_saw() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.seal(Digest::of(b"x"), 50_001).unwrap();
    layer.shared.grace.store(1000, Ordering::Relaxed);
    layer.unseal().unwrap();
    assert!(evict(&layer, &[0]).unwrap().spans.is_empty());
}

#[test]
fn what_is_put_in_doubt_is_checked_before_its_use() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    for span in [0, 1, 4] {
        fill(&layer, span).unwrap();
    }
    layer.mark_clean().unwrap();
    layer.doubt();
    assert_eq!(states(&layer), "??..?.");
    assert_eq!((layer.bytes_present(), layer.bytes_unchecked()), (0, 27_288));
    assert_eq!(layer.first_absent(0), Some(2));
    layer.data().write_all_at(&[0], 6000).unwrap();
    assert!(layer.ensure_present(0).unwrap() && !layer.ensure_present(1).unwrap());
    assert_eq!(states(&layer), "#...?.");
    drop(layer);
    assert_eq!(states(&open(folder.path(), "b")), "#...#.", "the disk is not in doubt");

    let layer = open(folder.path(), "b");
    fill_all(&layer);
    assert_eq!(layer.first_absent(0), None);
    layer.seal(Digest::of(b"x"), 50_001).unwrap();
    layer.doubt();
    assert_eq!(states(&layer), "######");
}

#[test]
fn a_sealed_layer_needs_no_map() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    let diff_id = Digest::of(&bytes_of(0..50_001));
    assert!(matches!(layer.seal(diff_id, 50_000), Err(SealError::TooShort { .. })));
    layer.seal(diff_id, 50_500).unwrap();
    layer.seal(diff_id, 50_500).unwrap();
    assert!(matches!(evict(&layer, &[0]), Err(EvictError::Sealed)));
    assert!(matches!(layer.forget(&[0]), Err(EvictError::Sealed)));
    drop(layer);

    std::fs::remove_file(folder.path().join("map")).unwrap();
    let other = LayerShape { index: Digest::of(b"other"), spans: vec![0, 9000], ..shape() };
    let layer = open_in(folder.path(), "b", other.clone()).unwrap();
    assert!(layer.is_sealed() && layer.discarded().is_none());
    assert_eq!(layer.sealed().unwrap().diff_id, diff_id);
    assert_eq!(states(&layer), "##");
    let report = layer.verify(&mut |_| {}).unwrap();
    assert_eq!(report, Report { spans: 0, bytes: 50_001, ..Report::default() });
    assert!(report.is_sound());
    layer.data().write_all_at(&[0], 20_000).unwrap();
    assert!(!layer.verify(&mut |_| {}).unwrap().is_sound());
    layer.data().write_all_at(&[byte_at(20_000)], 20_000).unwrap();
    layer.unseal().unwrap();
    assert_eq!(evict(&layer, &[0]).unwrap().spans, [0]);
    drop(layer);

    let layer = open_in(folder.path(), "c", other).unwrap();
    assert!(!layer.is_sealed());
    assert_eq!(states(&layer), ".#", "unsealing wrote records for the new index");
    assert!(layer.verify(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn a_layer_is_sealed_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill(&layer, 0).unwrap();
    let refused = layer.seal(Digest::of(b"x"), 50_001);
    assert!(matches!(refused, Err(SealError::Incomplete { span: 1 })));
    assert!(!layer.is_sealed());
    fill_all(&layer);
    layer.detach();
    assert!(matches!(layer.seal(Digest::of(b"x"), 50_001), Err(SealError::Detached)));
}

#[test]
fn an_index_that_contradicts_a_seal_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.seal(Digest::of(b"x"), 50_001).unwrap();
    drop(layer);
    let lying = LayerShape { bytes: 60_000, ..shape() };
    let refused = open_in(folder.path(), "a", lying);
    let Err(OpenLayerError::ContradictsSeal { proven, given }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!((proven, given), (50_001, 60_000));
    assert!(open(folder.path(), "a").is_sealed(), "and does no harm");
}

#[test]
fn an_index_that_counts_in_more_of_the_padding_starts_anew() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.seal(Digest::of(b"x"), 50_688).unwrap();
    drop(layer);
    let padded = LayerShape { bytes: 50_688, ..shape() };
    let layer = open_in(folder.path(), "a", padded).unwrap();
    assert!(!layer.is_sealed() && layer.discarded().is_some());
    assert_eq!(states(&layer), "......");
    assert_eq!(layer.data().metadata().unwrap().len(), 50_688);
}

#[test]
fn a_forgotten_span_keeps_its_bytes_until_it_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.shared.grace.store(1000, Ordering::Relaxed);
    layer.forget(&[5, 99]).unwrap();
    assert_eq!(states(&layer), "#####.");
    assert_eq!(read_span(&layer, 5), bytes_of(45_000..50_001));
    assert!(layer.first_missing(0) == Some(5) && layer.bytes_present() == 45_000);
    fill(&layer, 5).unwrap();
    assert_right_where_present(&layer);
}

#[test]
fn unsealing_gives_a_span_with_a_damaged_record_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.seal(Digest::of(b"x"), 50_001).unwrap();
    drop(layer);
    let map = File::options().write(true).open(folder.path().join("map")).unwrap();
    map.write_all_at(&[0; 16], map::record_offset(6, 2)).unwrap();
    let layer = open(folder.path(), "b");
    assert_eq!(states(&layer), "######");
    layer.unseal().unwrap();
    drop(layer);
    let layer = open(folder.path(), "c");
    assert_eq!(states(&layer), "######");
    assert!(layer.verify(&mut |_| {}).unwrap().is_sound());
}

#[test]
fn a_damaged_marker_leaves_the_map_in_charge() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.seal(Digest::of(b"x"), 50_001).unwrap();
    drop(layer);
    std::fs::write(folder.path().join("sealed"), "{").unwrap();
    let layer = open(folder.path(), "b");
    assert!(matches!(layer.discarded(), Some(Discarded::Marker(_))));
    assert!(!layer.is_sealed());
    assert_eq!(states(&layer), "######");
    assert_right_where_present(&layer);
}

#[test]
fn verifying_finds_rot_where_no_check_was_due() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.mark_clean().unwrap();
    layer.data().write_all_at(&[0], 20_000).unwrap();
    let mut told = Vec::new();
    let report = layer.verify(&mut |bytes| told.push(bytes)).unwrap();
    assert_eq!(told, [5000, 12_288, 12_300, 30_000, 45_000, 50_001]);
    let expected = Report { spans: 6, bytes: 50_001, damaged: vec![3], is_damaged: false };
    assert_eq!(report, expected);
    assert!(!report.is_sound());
    drop(layer);
    assert_eq!(states(&open(folder.path(), "b")), "###.##");
}

#[test]
fn verifying_a_sealed_layer_reports_and_leaves_it() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    fill_all(&layer);
    layer.seal(Digest::of(b"x"), 50_001).unwrap();
    layer.data().write_all_at(&[0], 20_000).unwrap();
    assert_eq!(layer.verify(&mut |_| {}).unwrap().damaged, [3]);
    assert_eq!(states(&layer), "######");
    assert!(layer.is_sealed());
}

#[test]
fn an_empty_layer_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    for spans in [Vec::new(), vec![0]] {
        let shape = LayerShape { bytes: 0, spans, index: Digest::of(b"i") };
        let layer = open_in(folder.path(), "a", shape).unwrap();
        for span in 0..layer.shape().span_count() {
            layer.mark_present(span, 0).unwrap();
        }
        assert_eq!(layer.first_missing(0), None);
        layer.seal(Digest::of(b""), 0).unwrap();
        layer.unseal().unwrap();
    }
}

#[test]
fn threads_that_fill_read_and_evict_see_no_wrong_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let layer = open(folder.path(), "a");
    std::thread::scope(|scope| {
        // One writer for each span, as the engine's single flight has it.
        for span in 0..6 {
            let layer = &layer;
            scope.spawn(move || {
                for _ in 0..200 {
                    if !layer.is_present(span) {
                        fill(layer, span).unwrap();
                    }
                }
            });
        }
        for span in 0..6 {
            let layer = &layer;
            scope.spawn(move || {
                for _ in 0..2000 {
                    let _reading = layer.reading();
                    if layer.is_present(span) {
                        assert!(read_span(layer, span) == bytes_of(layer.shape().range(span)));
                    }
                }
            });
        }
        for first in 0..2 {
            let layer = &layer;
            scope.spawn(move || {
                for round in 0..60 {
                    let spans = [first, (first + round) % 6, 5 - first];
                    evict(layer, &spans).unwrap();
                    layer.mark_clean().unwrap();
                }
            });
        }
    });
    assert_right_where_present(&layer);
    let present = states(&layer);
    let spans = layer.present_spans();
    let bytes = spans.iter().map(|span| {
        let range = layer.shape().range(span);
        range.end - range.start
    });
    assert_eq!(layer.bytes_present(), bytes.sum::<u64>());
    drop(layer);
    let layer = open(folder.path(), "a");
    assert_eq!(states(&layer), present);
    assert_right_where_present(&layer);
}

//! zTOCs that lie: each is refused, or its spans end in an error; none hangs, panics or reads what
//! it must not.

use proptest::prelude::*;
use ztoc::{BuiltIndex, DecodeSpanError, Limits, ParseZtocError, SpanDecoder, SpanId, Ztoc};

use crate::make::{decode, gzip, index, limits, options, tar_of, text};

struct Sample {
    layer: Vec<u8>,
    built: BuiltIndex,
}

/// A layer of several spans, the last of which shares a byte with the one before.
fn sample() -> Sample {
    // How the compressor's blocks fall is its own affair: tried until one fits.
    (0..50)
        .map(|seed| {
            let layer = gzip(&tar_of(&[text(300_000, seed)], 0), 6);
            let built = index(&layer, options(60_000));
            Sample { layer, built }
        })
        .find(|Sample { built, .. }| {
            let spans = &built.ztoc.spans;
            spans.len() > 2 && spans.checkpoint(SpanId(spans.len() - 1)).bits > 0
        })
        .expect("one of fifty layers ends with a span that shares a byte")
}

const RECORD: usize = 32785;

impl Sample {
    fn spans(&self) -> u32 {
        self.built.ztoc.spans.len()
    }

    /// Where in the document the record of a checkpoint begins.
    fn record(&self, span: u32) -> usize {
        let second =
            self.built.ztoc.spans.window(SpanId(1)).unwrap().position().unwrap() as usize - 17;
        second + span as usize * RECORD - RECORD
    }

    fn parse(&self, change: impl FnOnce(&mut Vec<u8>)) -> Result<(Ztoc, Vec<u8>), ParseZtocError> {
        let mut blob = self.built.ztoc_bytes.clone();
        change(&mut blob);
        Ztoc::parse(&blob, &limits()).map(|ztoc| (ztoc, blob))
    }

    /// Decodes a span by an index of which one number was changed.
    fn decode_changed(&self, span: u32, at: usize, value: u64) -> DecodeSpanError {
        let (ztoc, blob) =
            self.parse(|blob| blob[at..at + 8].copy_from_slice(&value.to_le_bytes())).unwrap();
        decode(&ztoc, &blob, &self.layer, SpanId(span), 4096).unwrap_err()
    }
}

#[test]
fn a_span_that_promises_too_much_ends_in_an_error() {
    let sample = sample();
    let second = sample.built.ztoc.spans.checkpoint(SpanId(1)).uncompressed;
    for more in [1, 1000] {
        let error = sample.decode_changed(0, sample.record(1) + 8, second + more);
        assert_eq!(error, DecodeSpanError::Short { span: SpanId(0), missing: more });
    }
}

#[test]
fn a_last_span_that_promises_too_much_ends_in_an_error() {
    let sample = sample();
    for bits_are_shared in [true, false] {
        let span = if bits_are_shared { sample.spans() - 1 } else { 0 };
        let layer = if bits_are_shared { sample.layer.clone() } else { gzip(&text(0, 0), 6) };
        let mut ztoc = if bits_are_shared {
            sample.built.ztoc.clone()
        } else {
            index(&layer, options(1)).ztoc
        };
        let source = if bits_are_shared {
            &sample.built.ztoc_bytes
        } else {
            &index(&layer, options(1)).ztoc_bytes
        };
        ztoc.uncompressed_size += 3000;
        let blob = ztoc.to_bytes(source).unwrap();
        let ztoc = Ztoc::parse(&blob, &limits()).unwrap();
        let error = decode(&ztoc, &blob, &layer, SpanId(span), 1000).unwrap_err();
        assert_eq!(error, DecodeSpanError::Short { span: SpanId(span), missing: 3000 });
    }
}

#[test]
fn spans_are_decoded_from_exactly_their_bytes() {
    let sample = sample();
    let ztoc = &sample.built.ztoc;
    let span = SpanId(sample.spans() - 1);
    let range = ztoc.spans.compressed_range(span);
    let bytes = &sample.layer[range.start as usize..];
    let window = ztoc.window(&sample.built.ztoc_bytes, span);
    let check = |bytes: &[u8], window: &[u8]| {
        let error = SpanDecoder::new(&ztoc.spans, span, bytes, window).unwrap_err();
        assert!(matches!(error, DecodeSpanError::WrongLength { .. }), "{error:?}");
    };
    check(&bytes[..bytes.len() - 1], window);
    check(&[bytes, &[0]].concat(), window);
    check(&[], window);
    check(bytes, &window[1..]);
    check(bytes, &[]);
    SpanDecoder::new(&ztoc.spans, span, bytes, window).unwrap();
}

#[test]
fn other_bytes_than_the_layers_end_in_an_error_or_in_the_right_length() {
    let sample = sample();
    let spans = &sample.built.ztoc.spans;
    for byte in [0x00, 0xff, 0x55] {
        let layer = vec![byte; sample.layer.len()];
        for span in spans.ids().rev().skip(1) {
            let range = spans.uncompressed_range(span);
            match decode(&sample.built.ztoc, &sample.built.ztoc_bytes, &layer, span, 999) {
                Ok(made) => assert_eq!(made.len() as u64, range.end - range.start),
                Err(error) => assert!(!matches!(error, DecodeSpanError::WrongLength { .. })),
            }
        }
    }
}

#[test]
fn counts_that_disagree_are_refused() {
    let sample = sample();
    let head = sample.record(0) - 12;
    for count in [0_u32, 1, sample.spans() - 1, sample.spans() + 2, 1 << 31, u32::MAX] {
        let changed =
            sample.parse(|blob| blob[head..head + 4].copy_from_slice(&count.to_le_bytes()));
        assert!(matches!(changed, Err(ParseZtocError::Inconsistent { .. })), "{count} checkpoints");
    }
}

#[test]
fn checkpoints_out_of_order_are_refused() {
    let sample = sample();
    let check = |at: usize, value: u64| {
        let changed = sample.parse(|blob| blob[at..at + 8].copy_from_slice(&value.to_le_bytes()));
        assert!(matches!(changed, Err(ParseZtocError::Inconsistent { .. })), "{value} at {at}");
    };
    for field in [0, 8] {
        check(sample.record(1) + field, u64::MAX);
        check(sample.record(1) + field, 0);
        check(sample.record(1) + field, 1 << 50);
        check(sample.record(2) + field, 1);
    }
    // What a header can be at most, and where the tar begins.
    check(sample.record(0), 1 << 40);
    check(sample.record(0) + 8, 1);
    let bits = sample.record(1) + 16;
    let changed = sample.parse(|blob| blob[bits] = 8);
    assert!(matches!(changed, Err(ParseZtocError::Inconsistent { .. })));
}

#[test]
fn files_that_overlap_or_leave_the_layer_are_refused() {
    let layer = gzip(&tar_of(&[text(2000, 1), text(2000, 2)], 0), 6);
    let built = index(&layer, options(4 << 20));
    let check = |change: fn(&mut Ztoc)| {
        let mut ztoc = built.ztoc.clone();
        change(&mut ztoc);
        let blob = ztoc.to_bytes(&built.ztoc_bytes).unwrap();
        let error = Ztoc::parse(&blob, &limits()).unwrap_err();
        assert!(matches!(error, ParseZtocError::Inconsistent { .. }), "{error:?}");
    };
    check(|ztoc| ztoc.toc[1].offset = ztoc.toc[0].offset + 1);
    check(|ztoc| ztoc.toc[0].size += 2000);
    check(|ztoc| ztoc.toc[1].size = 1 << 40);
    check(|ztoc| ztoc.toc[1].size = u64::MAX);
    check(|ztoc| ztoc.toc[1].offset = (1 << 63) - 1);
    // Only the order on paper differs: that is put right.
    let mut ztoc = built.ztoc.clone();
    ztoc.toc.reverse();
    let blob = ztoc.to_bytes(&built.ztoc_bytes).unwrap();
    assert_eq!(Ztoc::parse(&blob, &limits()).unwrap().toc, built.ztoc.toc);
}

#[test]
fn limits_are_kept() {
    let layer = gzip(&tar_of(&[text(10, 1), text(10, 2)], 0), 6);
    let blob = index(&layer, options(4 << 20)).ztoc_bytes;
    for limits in [
        Limits { entries: 1, ..limits() },
        Limits { name: 5, ..limits() },
        Limits { text: 10, ..limits() },
        Limits { ztoc: 1000, ..limits() },
    ] {
        let error = Ztoc::parse(&blob, &limits).unwrap_err();
        assert!(matches!(error, ParseZtocError::TooLarge { .. }), "{error:?}");
    }
}

/// A stream without end of empty files costs what the limit allows, and is then refused.
#[test]
fn more_entries_than_the_limit_are_refused_as_they_stream_by() {
    let mut header = tar::Header::new_ustar();
    header.set_path("f").unwrap();
    header.set_cksum();
    let limits = Limits { entries: 10_000, ..limits() };
    let scan = |n_entries: usize| {
        let mut scanner = ztoc::TarScanner::new(limits);
        for _ in 0..n_entries {
            scanner.push(header.as_bytes())?;
        }
        scanner.finish().map(|toc| toc.entries.len())
    };
    assert_eq!(scan(10_000).unwrap(), 10_000);
    let error = scan(10_001).unwrap_err().to_string();
    assert!(error.contains("entries") && error.contains("10000"), "{error}");
}

/// Tiny records take much more memory than their text, and are counted so.
#[test]
fn more_records_than_the_limit_are_refused_as_they_stream_by() {
    let records: Vec<u8> = (0..8000).flat_map(|n| format!("12 {n:06}=x\n").into_bytes()).collect();
    let mut pax = tar::Header::new_ustar();
    pax.set_entry_type(tar::EntryType::XHeader);
    pax.set_size(records.len() as u64);
    pax.set_cksum();
    let mut file = tar::Header::new_ustar();
    file.set_path("f").unwrap();
    file.set_cksum();
    let padding = vec![0; records.len().next_multiple_of(512) - records.len()];
    let entry = [pax.as_bytes(), &records[..], &padding, file.as_bytes()].concat();
    let limits = Limits { text: 3 * (1 + 8000 * (6 + 1 + 96)), ..limits() };
    let mut scanner = ztoc::TarScanner::new(limits);
    for _ in 0..3 {
        scanner.push(&entry).unwrap();
    }
    let error = scanner.push(&entry).unwrap_err().to_string();
    assert!(error.contains("all names and records"), "{error}");
}

/// Where a field of a flatbuffer's table leads to, and where that is written. The root's place is
/// written at the start.
fn follow(blob: &[u8], table: usize, field: usize) -> (usize, usize) {
    let number = |at: usize| u32::from_le_bytes(blob[at..at + 4].try_into().unwrap());
    // The distance is signed.
    let fields = (table as u32).wrapping_sub(number(table)) as usize;
    let field = u16::from_le_bytes(blob[fields + field..][..2].try_into().unwrap());
    let place = table + usize::from(field);
    (place + number(place) as usize, place)
}

/// The limits that count in production, at a document that claims one entry more.
#[test]
fn a_document_of_more_entries_than_the_limit_is_refused_at_once() {
    let blob = index(&gzip(&tar_of(&[text(10, 1)], 0), 6), options(4 << 20)).ztoc_bytes;
    let root = u32::from_le_bytes(blob[..4].try_into().unwrap()) as usize;
    let (toc, _) = follow(&blob, root, 12);
    let (_, place) = follow(&blob, toc, 4);
    for (claimed, expected) in [(2_000_000, "Inconsistent"), (2_000_001, "TooLarge")] {
        let mut blob = blob.clone();
        let vector = blob.len().next_multiple_of(4);
        blob.resize(vector, 0);
        blob[place..place + 4].copy_from_slice(&((vector - place) as u32).to_le_bytes());
        blob.extend(u32::to_le_bytes(claimed));
        blob.resize(blob.len() + 4 * claimed as usize, 0);
        let error = format!("{:?}", Ztoc::parse(&blob, &Limits::default()).unwrap_err());
        assert!(error.starts_with(expected), "{claimed}: {error}");
    }
}

#[test]
fn every_cut_is_answered() {
    let blob = index(&gzip(&tar_of(&[text(10, 1)], 0), 6), options(4 << 20)).ztoc_bytes;
    for len in (0..400).chain(blob.len() - 800..blob.len()) {
        // The end of a buffer may be padding; nothing else is missed.
        let cut = Ztoc::parse(&blob[..len], &limits());
        assert!(cut.is_err() || len + 8 > blob.len(), "{len} of {} bytes", blob.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever was changed outside the windows, the document is read or refused, and what is read
    /// decodes or fails.
    #[test]
    fn mutated_documents_are_answered(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        word in proptest::option::of((any::<prop::sample::Index>(), any::<u32>())),
    ) {
        let layer = gzip(&tar_of(&[text(3000, 1), text(100, 2)], 20_000), 1);
        let built = index(&layer, options(1500));
        let mut blob = built.ztoc_bytes;
        let places: Vec<usize> = {
            // The windows are most of the document, and nothing in them can be wrong.
            let windows: Vec<_> = built.ztoc.spans.ids()
                .filter_map(|span| built.ztoc.spans.window(span)?.position())
                .map(|at| at as usize..at as usize + 32768)
                .collect();
            (0..blob.len() - 4).filter(|at| !windows.iter().any(|w| w.contains(at))).collect()
        };
        for (place, byte) in changes {
            blob[places[place.index(places.len())]] = byte;
        }
        if let Some((place, word)) = word {
            let at = places[place.index(places.len())];
            blob[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        let Ok(ztoc) = Ztoc::parse(&blob, &limits()) else { return Ok(()) };
        for span in ztoc.spans.ids() {
            let range = ztoc.spans.compressed_range(span);
            prop_assert!(range.end <= ztoc.compressed_size);
            if range.end <= layer.len() as u64
                && let Ok(made) = decode(&ztoc, &blob, &layer, span, 5000)
                && let Some(next) = ztoc.spans.ids().find(|next| *next > span)
            {
                let begin = |span| ztoc.spans.checkpoint(span).uncompressed;
                prop_assert_eq!(made.len() as u64, begin(next) - begin(span));
            }
        }
        for pair in ztoc.toc.windows(2) {
            prop_assert!(pair[0].offset + pair[0].size <= pair[1].offset);
        }
    }

    #[test]
    fn any_bytes_are_answered(blob in proptest::collection::vec(any::<u8>(), 0..300)) {
        Ztoc::parse(&blob, &limits()).ok();
    }
}

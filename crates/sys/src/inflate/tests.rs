//! Tests of the inflater wrapper.
use std::io::Write as _;

use super::*;

/// Letters without order: they compress into many blocks, with matches at all distances.
fn sample() -> Vec<u8> {
    let mut state = 1_u64;
    let letters = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        b'a' + u8::try_from(state >> 60).unwrap()
    });
    letters.take(600_000).collect()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Every place where a block ends: compressed and uncompressed position, unused bits.
fn block_ends(blob: &[u8], data_len: usize, piece: usize) -> Vec<(usize, usize, u8, bool)> {
    let mut inflate = Inflate::gzip().unwrap();
    let mut out = vec![0; data_len + 1];
    let (mut at, mut done) = (0, 0);
    let mut found = Vec::new();
    loop {
        let end = (at + piece).min(blob.len());
        let step = inflate.run(&blob[at..end], &mut out[done..], Stop::BlockEnds).unwrap();
        at += step.consumed;
        done += step.produced;
        match step.state {
            State::BlockEnd { unused_bits, last } => found.push((at, done, unused_bits, last)),
            State::StreamEnd => break,
            State::Running => assert!(end < blob.len() || step.produced > 0, "stuck"),
        }
    }
    assert_eq!((at, done), (blob.len(), data_len));
    found
}

#[test]
fn block_ends_do_not_depend_on_the_size_of_the_pieces() {
    let data = sample();
    let blob = gzip(&data);
    let whole = block_ends(&blob, data.len(), usize::MAX >> 1);
    assert!(whole.len() > 5, "the sample has several blocks: {}", whole.len());
    assert_eq!(whole[0], (10, 0, 0, false), "the first place is just after the header");
    assert!(whole.last().unwrap().3, "the last block is flagged");
    for piece in [1, 2, 7, 1000] {
        assert_eq!(block_ends(&blob, data.len(), piece), whole, "pieces of {piece}");
    }
}

#[test]
fn resuming_at_any_block_gives_the_rest() {
    let data = sample();
    let blob = gzip(&data);
    for (at, done, bits, last) in block_ends(&blob, data.len(), 4096) {
        if last {
            continue;
        }
        let mut inflate = Inflate::resume(bits, blob[at - 1], &data[..done]).unwrap();
        let mut out = vec![0; data.len() - done];
        let step = inflate.run(&blob[at..], &mut out, Stop::Anywhere).unwrap();
        assert_eq!(step.produced, out.len());
        assert!(out == data[done..], "output after {done} differs");
    }
}

#[test]
fn window_is_the_last_output() {
    let data = sample();
    let blob = gzip(&data);
    let mut inflate = Inflate::gzip().unwrap();
    let mut out = vec![0; 100_000];
    inflate.run(&blob, &mut out, Stop::Anywhere).unwrap();
    assert!(inflate.window() == data[100_000 - WINDOW_SIZE..100_000]);
}

#[test]
fn two_members_need_a_reset() {
    let data = sample();
    let mut blob = gzip(&data);
    let first = blob.len();
    blob.extend(gzip(b"second"));
    let mut inflate = Inflate::gzip().unwrap();
    let mut out = vec![0; data.len() + 100];
    let step = inflate.run(&blob, &mut out, Stop::Anywhere).unwrap();
    let expected = Step { consumed: first, produced: data.len(), state: State::StreamEnd };
    assert_eq!(step, expected);
    inflate.reset_gzip();
    let step = inflate.run(&blob[first..], &mut out, Stop::Anywhere).unwrap();
    assert_eq!((&out[..step.produced], step.state), (b"second".as_slice(), State::StreamEnd));
}

#[test]
fn no_input_is_no_progress_and_garbage_is_an_error() {
    let mut inflate = Inflate::gzip().unwrap();
    let step = inflate.run(&[], &mut [0; 10], Stop::Anywhere).unwrap();
    assert_eq!(step, Step { consumed: 0, produced: 0, state: State::Running });
    let err = inflate.run(b"not gzip at all", &mut [0; 10], Stop::Anywhere).unwrap_err();
    assert_eq!(err, InflateError::Data("incorrect header check"));
    // zlib streams are refused as well: their trailer has another length.
    let mut inflate = Inflate::gzip().unwrap();
    inflate.run(&[0x78, 0x9c, 0x03, 0x00], &mut [0; 10], Stop::Anywhere).unwrap_err();
}

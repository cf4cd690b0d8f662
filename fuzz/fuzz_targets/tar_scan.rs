#![no_main]
//! A tar reads the same however it is cut into pieces.

use libfuzzer_sys::fuzz_target;
use ztoc::{Limits, TarError, TarScanner, TarToc};

fn scan<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<TarToc, TarError> {
    let mut scanner = TarScanner::new(Limits::default());
    for piece in pieces {
        scanner.push(piece)?;
    }
    scanner.finish()
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let whole = scan(std::iter::once(bytes));
    let pieces = scan(bytes.chunks(usize::from(step) + 1));
    match (whole, pieces) {
        (Ok(whole), Ok(pieces)) => assert_eq!(whole, pieces),
        (Err(_), Err(_)) => {}
        (whole, pieces) => panic!("whole: {whole:?}, in pieces: {pieces:?}"),
    }
});

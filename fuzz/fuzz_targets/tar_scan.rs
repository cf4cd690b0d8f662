#![no_main]
//! A tar reads the same however it is cut into pieces, and however its entries are taken.

use libfuzzer_sys::fuzz_target;
use ztoc::{Limits, TarError, TarScanner, TarToc};

fn scan<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<TarToc, TarError> {
    let mut scanner = TarScanner::new(Limits::default());
    for piece in pieces {
        scanner.push(piece)?;
    }
    scanner.finish()
}

/// The same for somebody who takes the entries as they are found.
fn scan_and_take<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<TarToc, TarError> {
    let mut scanner = TarScanner::new(Limits::default());
    let mut entries = Vec::new();
    for piece in pieces {
        scanner.push(piece)?;
        entries.extend(scanner.take_entries());
    }
    let rest = scanner.finish()?;
    entries.extend(rest.entries);
    Ok(TarToc { entries, archive_size: rest.archive_size })
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let whole = scan(std::iter::once(bytes));
    let pieces = scan_and_take(bytes.chunks(usize::from(step) + 1));
    match (whole, pieces) {
        (Ok(whole), Ok(pieces)) => assert_eq!(whole, pieces),
        (Err(_), Err(_)) => {}
        (whole, pieces) => panic!("whole: {whole:?}, in pieces: {pieces:?}"),
    }
});

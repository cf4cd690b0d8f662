#![no_main]
//! A presence map of any bytes: it is refused, or says the same when it is written again, and no span
//! is present whose record is damaged.

use cache::Map;
use libfuzzer_sys::fuzz_target;

const HEADER_LEN: usize = 64;
const RECORD_LEN: usize = 16;

/// Sets the two checksums of the header, which a mutation seldom gets right.
fn repair(file: &mut [u8]) {
    let Some(count) = file.get(12..16).and_then(|bytes| bytes.try_into().ok()) else { return };
    let starts = usize::try_from(u32::from_le_bytes(count)).expect("a usize holds a u32") * 8;
    let Some(table) = file.get(HEADER_LEN..HEADER_LEN + starts) else { return };
    let crc = crc32c::crc32c(table).to_le_bytes();
    file[56..60].copy_from_slice(&crc);
    let crc = crc32c::crc32c(&file[..60]).to_le_bytes();
    file[60..64].copy_from_slice(&crc);
}

fn check(file: &[u8]) {
    let Ok(map) = Map::decode(file) else { return };
    let written = map.encode();
    assert_eq!(Map::decode(&written).as_ref(), Ok(&map));
    assert_eq!(written.len(), file.len());
    assert_eq!(written[..HEADER_LEN], file[..HEADER_LEN]);
    let n_spans = map.present().count();
    let records = |file: &[u8]| file[file.len() - n_spans * RECORD_LEN..].to_vec();
    let (found, given) = (records(&written), records(file));
    let pairs = found.chunks(RECORD_LEN).zip(given.chunks(RECORD_LEN));
    for (present, (found, given)) in map.present().zip(pairs) {
        assert_eq!(present, found != [0; RECORD_LEN]);
        assert!(!present || found == given, "{found:?} was made of {given:?}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    let mut repaired = bytes.to_vec();
    repair(&mut repaired);
    check(&repaired);
});

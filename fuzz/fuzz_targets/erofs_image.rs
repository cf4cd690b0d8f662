#![no_main]
//! An EROFS image of any bytes is read or refused, as it is and with a head that fits.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, &[u8])| {
    let (as_it_is, bytes) = input;
    let mut image = bytes.to_vec();
    if !as_it_is && image.len() >= 1152 {
        // The magic number, no checksum, blocks of 512 bytes: what a mutation seldom gets right at once.
        image[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
        image[1032] &= !1;
        image[1036] = 9;
    }
    let first = erofs::reader::read_image(&image);
    let second = erofs::reader::read_image(&image);
    assert_eq!(first.is_ok(), second.is_ok());
});

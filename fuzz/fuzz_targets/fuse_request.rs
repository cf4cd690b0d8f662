#![no_main]
//! A FUSE request of any bytes is parsed or refused, as it is and with a length that fits.

use libfuzzer_sys::fuzz_target;
use sys::fuse_device::Request;

fuzz_target!(|bytes: &[u8]| {
    let as_it_is = Request::parse(bytes).is_ok();
    let mut message = bytes.to_vec();
    if let (Some(head), Ok(len)) = (message.first_chunk_mut::<4>(), u32::try_from(bytes.len())) {
        *head = len.to_ne_bytes();
    }
    let fitting = Request::parse(&message).is_ok();
    assert!(fitting || !as_it_is || bytes.len() < 40);
});

//! Messages of the device that are no requests are refused, never a panic.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use proptest::prelude::*;
use sys::fuse_device::{ParseRequestError, Request};

/// A message whose header is right, so that the parser looks at the body.
fn well_headed(opcode: u32, extensions: u16, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + body.len()).unwrap();
    let mut message = Vec::new();
    message.extend_from_slice(&len.to_ne_bytes());
    message.extend_from_slice(&opcode.to_ne_bytes());
    message.extend_from_slice(&[7; 28]);
    message.extend_from_slice(&extensions.to_ne_bytes());
    message.extend_from_slice(&[0; 2]);
    message.extend_from_slice(body);
    message
}

fn length_in(message: &[u8]) -> usize {
    message.first_chunk().map_or(0, |len| usize::try_from(u32::from_ne_bytes(*len)).unwrap())
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(message: Vec<u8>) {
        if message.len() < 40 {
            let refused = Err(ParseRequestError::Header { len: message.len() });
            prop_assert_eq!(Request::parse(&message), refused);
        } else {
            // The length stands in the header, and a random one is wrong.
            prop_assert!(Request::parse(&message).is_err() || message.len() == length_in(&message));
        }
    }

    #[test]
    fn any_body_is_read_or_refused(opcode in 0..64_u32, extensions in 0..9_u16, body: Vec<u8>) {
        let message = well_headed(opcode, extensions, &body);
        let fits = usize::from(extensions) * 8 <= body.len();
        match Request::parse(&message) {
            Ok(request) => prop_assert!(fits && request.unique == 0x0707_0707_0707_0707),
            Err(ParseRequestError::Body { opcode: found, .. }) => {
                prop_assert!(fits && found == opcode);
            }
            Err(ParseRequestError::Header { .. }) => prop_assert!(!fits),
        }
    }
}

//! The engine's layers as a FUSE server wants them.

use std::ops::Range;
use std::sync::Arc;

use fill::{Layer, Reader};
use fuse::{BytesThen, Errno};

/// Asks `layer` for a range on behalf of a FUSE read.
pub(crate) fn read(layer: &Arc<Layer>, range: Range<u64>, then: BytesThen) {
    let file = Arc::clone(layer);
    let start = range.start;
    let answer = move |result: Result<(), fill::ReadError>| match result {
        Ok(()) => then(Ok((file.data(), start))),
        Err(_logged) => then(Err(Errno::IO)),
    };
    layer.request(range, Reader { pid: 0 }, Box::new(answer));
}

/// The layers of one image, numbered from the lowest.
pub(crate) struct ImageLayers(pub(crate) Vec<Arc<Layer>>);

impl fuse::Bytes for ImageLayers {
    fn read(&self, layer: u32, range: Range<u64>, then: BytesThen) {
        match self.0.get(layer as usize) {
            Some(layer) => read(layer, range, then),
            None => then(Err(Errno::IO)),
        }
    }
}

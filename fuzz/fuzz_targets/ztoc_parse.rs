#![no_main]
//! A foreign index: what is accepted is consistent, and is written and read again unchanged.

use libfuzzer_sys::fuzz_target;
use ztoc::{Limits, WINDOW_SIZE, Ztoc};

fuzz_target!(|blob: &[u8]| {
    let limits = Limits::default();
    let Ok(index) = Ztoc::parse(blob, &limits) else { return };
    let mut at = 0;
    for span in index.spans.ids() {
        let range = index.spans.uncompressed_range(span);
        assert!(range.start == at && range.end >= at, "span {span:?} is {range:?}, not from {at}");
        at = range.end;
        assert!(index.spans.compressed_range(span).end <= index.compressed_size);
        assert!(matches!(index.window(blob, span).len(), 0 | WINDOW_SIZE));
    }
    let Ok(written) = index.to_bytes(blob) else { return };
    let again = Ztoc::parse(&written, &limits).expect("our own document is readable");
    assert_eq!(again.toc, index.toc);
    assert_eq!(again.compressed_size, index.compressed_size);
    assert_eq!(again.spans.len(), index.spans.len());
});

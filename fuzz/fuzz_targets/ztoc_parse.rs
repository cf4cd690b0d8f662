#![no_main]
//! A foreign index: what is accepted is consistent, and is written and read again unchanged. And a foreign
//! window: it is one, or refused.

use libfuzzer_sys::fuzz_target;
use ztoc::{Limits, WINDOW_SIZE, Window, WindowFrame, Ztoc};

fuzz_target!(|blob: &[u8]| {
    let mut window = Vec::new();
    if index::decompress_window(blob, &mut window).is_ok() {
        assert_eq!(window.len(), WINDOW_SIZE);
    }
    let limits = Limits::default();
    let Ok(index) = Ztoc::parse(blob, &limits) else { return };
    let (mut at, mut frames) = (0, 0);
    for span in index.spans.ids() {
        let range = index.spans.uncompressed_range(span);
        assert!(range.start == at && range.end >= at, "span {span:?} is {range:?}, not from {at}");
        at = range.end;
        assert!(index.spans.compressed_range(span).end <= index.compressed_size);
        match index.spans.window(span) {
            None => assert!(index.window(blob, span).is_empty()),
            Some(Window::Inside(_)) => assert_eq!(index.window(blob, span).len(), WINDOW_SIZE),
            Some(Window::Apart(frame)) => {
                assert_eq!(frame.range.start, frames);
                frames = frame.range.end;
                assert!(!frame.range.is_empty());
                assert!(frame.range.end - frame.range.start <= WindowFrame::MOST_BYTES);
            }
        }
    }
    assert_eq!(index.spans.windows_apart().unwrap_or_default(), frames);
    let Ok(written) = index.to_bytes(blob) else { return };
    let again = Ztoc::parse(&written, &limits).expect("our own document is readable");
    assert_eq!(again.toc, index.toc);
    assert_eq!(again.compressed_size, index.compressed_size);
    assert_eq!(again.spans.len(), index.spans.len());
});

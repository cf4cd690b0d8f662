//! Windows that lie apart from their zTOC come when they are needed.

use std::ops::Range;
use std::time::Duration;

use fill::ReadError;
use ztoc::{SpanId, Window};

use crate::setup::{PATIENCE, Setup};

fn setup(root: &tempfile::TempDir) -> Setup {
    Setup::new(root.path(), 4, PATIENCE)
}

/// The middle of a span.
fn page(setup: &Setup, span: u32) -> Range<u64> {
    let Range { start, end } = setup.range(span);
    let middle = start.midpoint(end);
    middle..middle + 4096
}

/// The size of the windows of these spans.
fn size(setup: &Setup, spans: Range<u32>) -> u64 {
    let frames = spans.filter_map(|span| {
        let Some(Window::Apart(frame)) = setup.spans.window(SpanId(span)) else { return None };
        Some(frame.range.end - frame.range.start)
    });
    frames.sum()
}

#[test]
fn windows_come_in_groups_and_once() {
    let root = tempfile::tempdir().unwrap();
    let setup = setup(&root);
    setup.check(page(&setup, 0));
    assert_eq!(setup.windows.bytes_fetched(), 0, "the first span needs no window");
    setup.check(page(&setup, 5));
    let group = size(&setup, 0..16);
    assert_eq!(setup.windows.bytes_fetched(), group);
    // Its reader may still be there.
    while setup.evict(&[5]).is_empty() {
        std::thread::yield_now();
    }
    let fetched = setup.source.bytes_fetched();
    setup.check(page(&setup, 5));
    assert!(setup.source.bytes_fetched() > fetched, "the span was there");
    setup.check(page(&setup, 15));
    assert_eq!(setup.windows.bytes_fetched(), group, "a window came again");
    setup.check(setup.range(15).end - 1..setup.range(16).start + 1);
    assert_eq!(setup.windows.bytes_fetched(), size(&setup, 0..32));
}

#[test]
fn a_layer_is_completed_with_all_its_windows() {
    let root = tempfile::tempdir().unwrap();
    let setup = setup(&root);
    setup.layer.complete();
    setup.until_sealed();
    setup.check(0..setup.layer.bytes());
    assert_eq!(setup.windows.bytes_fetched(), setup.spans.windows_apart().unwrap());
}

#[test]
fn a_reader_does_not_wait_for_a_window_that_hangs() {
    for after in [0, 100] {
        let root = tempfile::tempdir().unwrap();
        let setup = setup(&root);
        setup.windows.hang_next_after(after);
        setup.check(page(&setup, 7));
        assert!(setup.windows.has_hung());
    }
}

#[test]
fn of_a_wrong_window_nothing_is_made() {
    let root = tempfile::tempdir().unwrap();
    let setup = setup(&root);
    setup.windows.give_wrong(1);
    setup.check(page(&setup, 3));
    setup.windows.give_wrong(usize::MAX);
    let error = setup.request(page(&setup, 20)).recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("window of span 20"), "{error}");
    setup.windows.give_wrong(0);
    setup.check(page(&setup, 20));
}

#[test]
fn a_window_that_does_not_come_fails_its_readers_in_time() {
    let root = tempfile::tempdir().unwrap();
    let setup = Setup::new(root.path(), 4, Duration::from_secs(1));
    setup.windows.hold_from(0);
    let error = setup.request(page(&setup, 2)).recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(error, ReadError::Deadline { .. }), "{error}");
    setup.windows.hold_from(u64::MAX);
    setup.check(page(&setup, 2));
}

#[test]
fn without_windows_spans_are_made_one_after_the_other() {
    let root = tempfile::tempdir().unwrap();
    let setup = setup(&root);
    setup.check(page(&setup, 20));
    setup.windows.set_gone(true);
    // From the last window that is there, and from the layer's beginning.
    setup.check(page(&setup, 18));
    setup.check(page(&setup, 6));
    setup.layer.complete();
    setup.until_sealed();
    setup.check(0..setup.layer.bytes());
    assert_eq!(setup.windows.bytes_fetched(), size(&setup, 16..32));
}

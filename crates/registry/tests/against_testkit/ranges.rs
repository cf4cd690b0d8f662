//! Ranges of blobs: exactly the bytes, or an error that tells what happened.

use registry::FetchError;
use testkit::registry::{Fault, Scope, Times};

use crate::setup::{content, count, drain, impatient_repository, in_full, read, repository, start};

const LEN: usize = 300_000;
const RANGES: [std::ops::Range<u64>; 7] =
    [0..1, 0..300_000, 1..300_000, 299_999..300_000, 70_000..70_001, 65_535..131_073, 5..5];

fn slice(range: &std::ops::Range<u64>) -> Vec<u8> {
    let (start, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
    content(LEN)[start..end].to_vec()
}

#[tokio::test]
async fn any_range_equals_the_slice_however_it_is_served() {
    for (ignore, redirect) in [(false, false), (true, false), (false, true), (true, true)] {
        let registry = start();
        let blob = registry.put_blob(content(LEN));
        registry.faults().ignore_ranges(ignore);
        registry.faults().redirect_blobs(redirect);
        let repository = repository(&registry);
        for range in RANGES {
            let bytes = read(&repository, &blob, range.clone()).await;
            assert!(bytes == slice(&range), "{range:?}, {ignore} {redirect}");
        }
        assert_eq!(repository.supports_ranges(), !ignore);
    }
}

#[tokio::test]
async fn whether_ranges_are_given_is_learned_and_learned_anew() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    let repository = repository(&registry);
    registry.faults().ignore_ranges(true);
    assert!(repository.supports_ranges());
    read(&repository, &blob, 0..300_000).await;
    assert!(repository.supports_ranges(), "the whole for the whole tells nothing");
    read(&repository, &blob, 0..10).await;
    assert!(!repository.supports_ranges());
    registry.faults().ignore_ranges(false);
    read(&repository, &blob, 0..10).await;
    assert!(repository.supports_ranges());
}

#[tokio::test]
async fn a_blob_of_known_size_is_whole_however_it_is_served() {
    for fault in [None, Some(Fault::IgnoreRange), Some(Fault::Truncate { after: 50_000 })] {
        let registry = start();
        let blob = registry.put_blob(content(LEN));
        if let Some(fault) = fault {
            registry.faults().inject(Scope::Blob(blob), Times::Next(1), fault);
        }
        let repository = repository(&registry);
        let bytes = repository.sized_blob(&blob, LEN as u64).await.unwrap();
        assert!(bytes == content(LEN), "{fault:?}");
    }
}

#[tokio::test]
async fn a_blob_comes_in_parts_which_are_checked_together() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    let repository = repository(&registry);
    repository.sized_blob(&blob, LEN as u64).await.unwrap();
    assert_eq!((registry.requests().len(), registry.bytes_sent()), (4, LEN as u64));

    let lies = registry.faults().flip_byte(blob, 200_000, Times::Always);
    let err = repository.sized_blob(&blob, LEN as u64).await.unwrap_err();
    assert!(matches!(err, FetchError::WrongDigest { .. }), "{err}");
    registry.faults().remove(lies);

    // An index may be wrong about the size.
    let err = repository.sized_blob(&blob, LEN as u64 - 1).await.unwrap_err();
    assert!(matches!(err, FetchError::TooLarge { .. }), "{err}");
    let bytes = repository.sized_blob(&blob, 2 * LEN as u64).await.unwrap();
    assert!(bytes == content(LEN));
}

#[tokio::test]
async fn a_blob_is_not_sent_once_for_each_part_by_a_server_that_ignores_ranges() {
    let registry = start();
    let content = content(32 << 20);
    let blob = registry.put_blob(content.clone());
    registry.faults().ignore_ranges(true);
    let repository = repository(&registry);
    let bytes = repository.sized_blob(&blob, content.len() as u64).await.unwrap();
    assert!(bytes == content);
    // What was on its way when the answers' heads had come, for eight parts, and all of it once.
    let sent = registry.bytes_sent();
    assert!(sent < 3 * content.len() as u64, "{sent}");
}

#[tokio::test]
async fn only_the_range_is_sent() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    let repository = repository(&registry);
    let mut stream = repository.blob_stream(&blob, 100..1100).await.unwrap();
    assert_eq!((stream.total_size(), stream.remaining()), (Some(300_000), 1000));
    assert_eq!(drain(&mut stream).await.0, slice(&(100..1100)));
    assert!(stream.next().await.unwrap().is_none());
    assert_eq!(registry.bytes_sent(), 1000);
}

#[tokio::test]
async fn an_empty_range_asks_nobody() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    let repository = repository(&registry);
    for range in [0..0, 7..7, 400_000..400_000] {
        assert!(read(&repository, &blob, range).await.is_empty());
    }
    assert!(registry.requests().is_empty());
}

#[tokio::test]
async fn a_range_beyond_the_end_is_an_error() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    let repository = repository(&registry);
    for ignore in [false, true] {
        registry.faults().ignore_ranges(ignore);
        for range in [300_000..300_001, 0..300_001, 1 << 40..1 << 41, u64::MAX - 1..u64::MAX] {
            let error = repository.blob_stream(&blob, range.clone()).await.unwrap_err();
            let FetchError::RangeNotSatisfiable { size, .. } = error else {
                panic!("{range:?}: {error:?}");
            };
            assert_eq!(size, Some(300_000), "{range:?}");
        }
    }
}

#[tokio::test]
async fn a_broken_body_gives_what_came_and_then_a_typed_error() {
    for (fault, stalled) in [
        (Fault::Truncate { after: 1000 }, false),
        (Fault::ResetBody { after: 1000 }, false),
        (Fault::Stall { after: 1000 }, true),
    ] {
        let registry = start();
        let blob = registry.put_blob(content(LEN));
        registry.faults().inject(Scope::Blobs, Times::Next(1), fault);
        let repository = match stalled {
            true => impatient_repository(&registry),
            false => repository(&registry),
        };
        let mut stream = repository.blob_stream(&blob, 50..200_000).await.unwrap();
        let (bytes, error) = drain(&mut stream).await;
        assert!(bytes.len() <= 1000 && slice(&(50..200_000)).starts_with(&bytes), "{fault:?}");
        match error.unwrap() {
            FetchError::Stalled { .. } if stalled => {}
            FetchError::Truncated { got, want: 199_950, .. } if !stalled => {
                assert_eq!(got, u64::try_from(bytes.len()).unwrap());
            }
            other => panic!("{fault:?}: {other:?}"),
        }
        assert!(stream.next().await.is_err(), "an error is never followed by an end");
        assert_eq!(registry.requests().len(), 1, "ranges are not retried here");
        registry.faults().clear();
        assert!(read(&repository, &blob, 0..10).await == slice(&(0..10)));
    }
}

#[tokio::test]
async fn a_refused_range_is_not_retried() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    let repository = repository(&registry);
    for (status, expected) in
        [(503, "Unavailable"), (429, "TooManyRequests"), (404, "NotFound"), (418, "Refused")]
    {
        registry.clear_requests();
        registry.faults().fail_next(Scope::Blobs, 1, status);
        let error = repository.blob_stream(&blob, 0..10).await.unwrap_err();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
        assert_eq!(registry.requests().len(), 1);
    }
}

#[tokio::test]
async fn the_place_of_a_blob_is_remembered_until_it_refuses() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    registry.faults().redirect_blobs(true);
    let repository = repository(&registry);
    for range in RANGES {
        read(&repository, &blob, range).await;
    }
    assert_eq!(count(&registry, "GET", "/v2/"), 1);
    assert_eq!(count(&registry, "GET", "/cdn/"), 6);
    for status in [401, 403, 404, 500] {
        registry.clear_requests();
        registry.faults().fail_next(Scope::Cdn, 1, status);
        assert!(read(&repository, &blob, 3..9).await == slice(&(3..9)));
        assert_eq!(count(&registry, "GET", "/v2/"), 1, "{status}");
        assert_eq!(count(&registry, "GET", "/cdn/"), 2, "{status}");
    }
}

#[tokio::test]
async fn a_place_that_refused_is_not_asked_again() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    registry.faults().redirect_blobs(true);
    let repository = repository(&registry);
    read(&repository, &blob, 0..10).await;
    registry.faults().redirect_blobs(false);
    registry.faults().inject(Scope::Cdn, Times::Always, Fault::Status(403));
    registry.clear_requests();
    for _ in 0..3 {
        read(&repository, &blob, 0..10).await;
    }
    assert_eq!((count(&registry, "GET", "/cdn/"), count(&registry, "GET", "/v2/")), (1, 3));

    registry.faults().clear();
    registry.faults().redirect_blobs(true);
    read(&repository, &blob, 0..10).await;
    registry.faults().inject(Scope::Blobs, Times::Next(1), Fault::Truncate { after: 5 });
    let mut stream = repository.blob_stream(&blob, 0..10).await.unwrap();
    assert!(drain(&mut stream).await.1.is_some());
    registry.clear_requests();
    read(&repository, &blob, 0..10).await;
    assert_eq!((count(&registry, "GET", "/cdn/"), count(&registry, "GET", "/v2/")), (1, 1));
}

#[tokio::test]
async fn storage_that_refuses_a_fresh_place_is_unavailable_and_shows_no_signature() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    registry.faults().redirect_blobs(true);
    registry.faults().inject(Scope::Cdn, Times::Always, Fault::Status(403));
    let error = repository(&registry).blob_stream(&blob, 0..10).await.unwrap_err();
    assert!(matches!(error, FetchError::Unavailable { .. }), "{error:?}");
    registry.faults().clear();
    registry.faults().inject(Scope::Cdn, Times::Always, Fault::ResetRequest);
    let reset = repository(&registry).blob_stream(&blob, 0..10).await.unwrap_err();
    registry.faults().clear();
    registry.faults().inject(Scope::Cdn, Times::Always, Fault::Truncate { after: 5 });
    let repository = repository(&registry);
    let mut stream = repository.blob_stream(&blob, 0..10).await.unwrap();
    let source = format!("{:?} {:?}", stream.source(), repository);
    let shown = format!("{stream:?} {source}");
    let truncated = drain(&mut stream).await.1.unwrap();
    for text in [in_full(&error), in_full(&reset), in_full(&truncated), shown] {
        assert!(text.contains("/cdn/") && !text.contains("signature"), "{text}");
    }
}

#[tokio::test]
async fn many_ranges_at_once_share_a_client() {
    let registry = start();
    let blob = registry.put_blob(content(LEN));
    let repository = repository(&registry);
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..30_u64 {
        let repository = repository.clone();
        let range = at * 10_000..(at + 1) * 10_000;
        tasks.spawn(async move { read(&repository, &blob, range.clone()).await == slice(&range) });
    }
    assert!(tasks.join_all().await.into_iter().all(|right| right));
    assert_eq!(registry.bytes_sent(), 300_000);
}

//! The windows of a layer's spans: in its zTOC, or compressed in a blob of their own.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use oci::Digest;
use ztoc::{SpanId, SpanTable, WINDOW_SIZE, Window, WindowFrame, Ztoc, ZtocTooLarge};

/// A window cannot be had from where it lies on this machine, or not be put elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// The disk.
    #[error("reading it")]
    Read(#[source] io::Error),
    /// The bytes have another digest than the zTOC says, or are not there at all.
    #[error("its bytes are not those that the zTOC says")]
    Other,
    /// The bytes are those that the zTOC says, and no window.
    #[error("it does not decompress to a window")]
    Malformed,
    /// The disk, or the memory.
    #[error("writing it")]
    Write(#[source] io::Error),
    /// The zTOC would be too large.
    #[error(transparent)]
    TooLarge(#[from] ZtocTooLarge),
}

/// Puts the windows of a zTOC apart: writes them to `out`, each one zstd frame, and returns the zTOC without them
/// as a document. `blob` is the document of `ztoc`, which is that of a gzip layer and has them inside.
///
/// # Errors
/// [`WindowError::Write`] and [`WindowError::TooLarge`].
///
/// # Panics
/// If the layer is not gzip: other layers have no windows.
pub fn with_windows_apart(
    ztoc: &Ztoc,
    blob: &[u8],
    out: &mut dyn Write,
) -> Result<Vec<u8>, WindowError> {
    ztoc.with_windows_apart(blob, |window| {
        let frame = zstd::bulk::compress(window, LEVEL).map_err(WindowError::Write)?;
        out.write_all(&frame).map_err(WindowError::Write)?;
        Ok(frame)
    })
}

/// The zTOC with its windows inside: as all tools know it. `windows` is the blob of windows of `ztoc`, whole.
///
/// # Errors
/// See [`WindowError`].
pub fn with_windows_inside(ztoc: &Ztoc, windows: &File) -> Result<Vec<u8>, WindowError> {
    ztoc.with_windows_inside(|span| {
        let mut window = Vec::new();
        read_window(&ztoc.spans, span, windows, &mut window)?;
        Ok(window)
    })
}

/// Reads the window of a span: [`WINDOW_SIZE`] bytes, or none where the span needs none. `file` is the zTOC,
/// or of a table whose windows are apart the blob of windows, as far as that is there.
///
/// # Errors
/// See [`WindowError`]. A window in a zTOC is not checked: whoever opened the zTOC did.
pub fn read_window(
    spans: &SpanTable,
    span: SpanId,
    file: &File,
    window: &mut Vec<u8>,
) -> Result<(), WindowError> {
    window.clear();
    match spans.window(span) {
        None => Ok(()),
        Some(Window::Inside(position)) => {
            window.resize(WINDOW_SIZE, 0);
            file.read_exact_at(window, position).map_err(WindowError::Read)
        }
        Some(Window::Apart(frame)) => decompress_window(&read_frame(frame, file)?, window),
    }
}

/// Reads a frame of a blob of windows from a file that has the blob, or what there is of it.
///
/// # Errors
/// [`WindowError::Read`], and [`WindowError::Other`] where the frame is not there.
pub fn read_frame(frame: &WindowFrame, file: &File) -> Result<Vec<u8>, WindowError> {
    let size = frame.range.end.saturating_sub(frame.range.start);
    let mut bytes = vec![0; usize::try_from(size).unwrap_or_default()];
    match file.read_exact_at(&mut bytes, frame.range.start) {
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => Err(WindowError::Other),
        Err(err) => Err(WindowError::Read(err)),
        Ok(()) if Digest::of(&bytes) != frame.digest => Err(WindowError::Other),
        Ok(()) => Ok(bytes),
    }
}

/// The window that a frame of a blob of windows holds.
///
/// # Errors
/// [`WindowError::Malformed`].
pub fn decompress_window(frame: &[u8], window: &mut Vec<u8>) -> Result<(), WindowError> {
    window.reserve_exact(WINDOW_SIZE);
    window.resize(WINDOW_SIZE, 0);
    match zstd::bulk::decompress_to_buffer(frame, window.as_mut_slice()) {
        Ok(WINDOW_SIZE) => Ok(()),
        Ok(_) | Err(_) => Err(WindowError::Malformed),
    }
}

/// How hard windows are compressed. They are short: what more work gives is little.
const LEVEL: i32 = 3;

#[cfg(test)]
mod tests {
    use ztoc::{IndexerOptions, Limits};

    use super::*;

    /// A layer's zTOC, its document, and both with the windows apart.
    struct Sample {
        inside: (Ztoc, Vec<u8>),
        apart: (Ztoc, Vec<u8>),
    }

    fn sample(span_size: u64) -> Sample {
        let mut tar = tar::Builder::new(Vec::new());
        let data: Vec<u8> = (0..80_000_u32).flat_map(|n| format!("{n},").into_bytes()).collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, "file", data.as_slice()).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&tar.into_inner().unwrap()).unwrap();
        let options = IndexerOptions { span_size, ..IndexerOptions::default() };
        let mut indexer = ztoc::Indexer::new(options).unwrap();
        indexer.push(&gzip.finish().unwrap(), &mut |_| {}).unwrap();
        let built = indexer.finish().unwrap();
        let mut windows = Vec::new();
        let document = with_windows_apart(&built.ztoc, &built.ztoc_bytes, &mut windows).unwrap();
        let apart = Ztoc::parse(&document, &Limits::default()).unwrap();
        Sample { inside: (built.ztoc, built.ztoc_bytes), apart: (apart, windows) }
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn windows_are_the_same_wherever_they_lie() {
        let Sample { inside: (inside, document), apart: (apart, windows) } = sample(40_000);
        assert!(windows.len() < document.len() / 2, "they are compressed");
        let (document_file, windows_file) = (file(&document), file(&windows));
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for span in inside.spans.ids() {
            read_window(&inside.spans, span, &document_file, &mut left).unwrap();
            read_window(&apart.spans, span, &windows_file, &mut right).unwrap();
            assert!(left == right, "{span:?}");
        }
        assert_eq!(left.len(), WINDOW_SIZE);
        assert!(with_windows_inside(&apart, &windows_file).unwrap() == document);
    }

    #[test]
    fn what_is_not_there_or_wrong_is_no_window() {
        let Sample { apart: (apart, mut windows), .. } = sample(40_000);
        let last = SpanId(apart.spans.len() - 1);
        let middle = SpanId(2);
        let Some(Window::Apart(frame)) = apart.spans.window(middle) else { panic!("no frame") };
        windows[usize::try_from(frame.range.start).unwrap() + 9] ^= 1;
        windows.pop();
        let (file, mut window) = (file(&windows), Vec::new());
        for span in [middle, last] {
            let error = read_window(&apart.spans, span, &file, &mut window).unwrap_err();
            assert!(matches!(error, WindowError::Other), "{error:?}");
        }
        read_window(&apart.spans, SpanId(1), &file, &mut window).unwrap();
        assert!(matches!(with_windows_inside(&apart, &file), Err(WindowError::Other)));
    }

    #[test]
    fn a_frame_that_makes_no_window_is_refused() {
        let mut window = Vec::new();
        for bytes in [1, WINDOW_SIZE - 1, WINDOW_SIZE + 1, 100 << 20] {
            let frame = zstd::bulk::compress(&vec![0; bytes], LEVEL).unwrap();
            let error = decompress_window(&frame, &mut window).unwrap_err();
            assert!(matches!(error, WindowError::Malformed), "{bytes}: {error:?}");
        }
        decompress_window(b"no frame", &mut window).unwrap_err();
    }
}

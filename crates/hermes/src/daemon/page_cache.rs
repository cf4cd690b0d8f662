//! Reads what a start needs through its mount as soon as it is here, so that the kernel has it when the program
//! comes: a read that finds its bytes in the page cache does not stop to ask us, and the copies are made by
//! another processor.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{Advice, Mode, OFlags, fadvise, openat};
use tree::{NodeId, Tree};

use super::images::LoadedImage;

/// Part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    file: NodeId,
    /// Whole pages of it, as far as it has them.
    range: Range<u64>,
    /// Where they are in the layer, in whole pages of that: what the kernel asks for.
    stored: Range<u64>,
}

/// The mounts that are read just now.
#[derive(Debug, Default)]
pub(super) struct Fills(Mutex<HashMap<PathBuf, Fill>>);

/// How to end one.
#[derive(Debug)]
struct Fill {
    is_over: Arc<AtomicBool>,
    tell: mpsc::Sender<Told>,
    ended: mpsc::Receiver<()>,
}

/// What a reader is told.
#[derive(Debug)]
enum Told {
    /// The part with this number is here.
    Here(usize),
    /// To look whether it is over.
    Wake,
}

impl Fills {
    /// Reads what the index of `image` says of its start, from its mount at `dir`, for as long as a start may take.
    /// Returns at once.
    ///
    /// # Errors
    /// When there is no thread, or nothing is mounted.
    pub(super) fn begin(&self, image: &Arc<LoadedImage>, dir: &Path) -> io::Result<()> {
        let (image, mount) = (Arc::clone(image), sys::mount::detached(dir)?);
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let is_over = Arc::new(AtomicBool::new(false));
        let fill = Fill { is_over: Arc::clone(&is_over), tell: tell.clone(), ended };
        // Bytes of before an unclean end are checked when they are asked for.
        let read = move || {
            let reader = Reader { mount, parts: expect(&image, &tell), told, is_over };
            // Nobody keeps an image for this.
            drop((image, tell));
            reader.run();
            drop((reader, end));
        };
        let mut fills = self.0.lock();
        thread::Builder::new().name("page-cache".to_owned()).spawn(read)?;
        fills.insert(dir.to_owned(), fill);
        Ok(())
    }

    /// Ends it for a mount that is about to go: the kernel keeps that for as long as it is read. Waits a moment for
    /// a part that is being read.
    pub(super) fn end(&self, dir: &Path) {
        let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let Some(fill) = self.0.lock().remove(&dir) else { return };
        fill.is_over.store(true, Ordering::Relaxed);
        // An error says that it has ended.
        if fill.tell.send(Told::Wake).is_ok() {
            fill.ended.recv_timeout(PATIENCE).unwrap_or_default();
        }
    }
}

/// Has `tell` told when the parts of the files are here that are to be read; returns their paths and ranges.
fn expect(image: &LoadedImage, tell: &mpsc::Sender<Told>) -> Vec<(Vec<u8>, Range<u64>)> {
    let mut parts = Vec::new();
    // Whoever mounts it has the tree already.
    let Ok(tree) = image.tree.get() else { return parts };
    for (place, range) in &image.start {
        let Ok(number) = u32::try_from(*place) else { continue };
        for part in parts_of(tree, number, range) {
            let (tell, number) = (tell.clone(), parts.len());
            parts.push((tree.path_of(part.file), part.range));
            // If nobody listens any more the start is over.
            let here = move || tell.send(Told::Here(number)).unwrap_or_default();
            image.layers[*place].when_present(part.stored, here);
        }
    }
    parts
}

/// The files that have bytes in a range of a layer, in parts of [`AT_ONCE`] bytes. Sparse files are left out.
fn parts_of(tree: &Tree, layer: u32, range: &Range<u64>) -> Vec<Part> {
    let files = tree.files_in_layer_order();
    let first = files.partition_point(|file| {
        (file.layer, file.offset.saturating_add(file.size)) <= (layer, range.start)
    });
    let files = files.get(first..).unwrap_or_default().iter();
    let files = files.take_while(|file| file.layer == layer && file.offset < range.end);
    let mut parts = Vec::new();
    for file in files.filter(|file| !is_sparse(tree, file.node)) {
        let wanted = pages(
            range.start.saturating_sub(file.offset)..(range.end - file.offset).min(file.size),
        );
        let mut start = wanted.start;
        while start < wanted.end {
            let end = wanted.end.min(start + AT_ONCE);
            let range = start..end.min(file.size);
            let stored = pages(
                file.offset.saturating_add(range.start)..file.offset.saturating_add(range.end),
            );
            parts.push(Part { file: file.node, range, stored });
            start = end;
        }
    }
    parts
}

/// The bytes of the pages that hold some of `range`.
fn pages(range: Range<u64>) -> Range<u64> {
    range.start / PAGE * PAGE..range.end.div_ceil(PAGE).saturating_mul(PAGE)
}

fn is_sparse(tree: &Tree, file: NodeId) -> bool {
    matches!(&tree.node(file).kind, tree::NodeKind::File(data) if data.sparse.is_some())
}

/// Who reads.
struct Reader {
    /// A view of the mount, which can be unmounted meanwhile.
    mount: OwnedFd,
    /// Paths, and what is read there.
    parts: Vec<(Vec<u8>, Range<u64>)>,
    told: mpsc::Receiver<Told>,
    is_over: Arc<AtomicBool>,
}

impl Reader {
    /// Reads each part when it is here, until all are read or the start is over.
    fn run(&self) {
        let (begun, mut read) = (Instant::now(), 0);
        while read < self.parts.len() {
            let Some(left) = LONGEST.checked_sub(begun.elapsed()) else { return };
            let Ok(told) = self.told.recv_timeout(left) else { return };
            if self.is_over.load(Ordering::Relaxed) {
                return;
            }
            let Told::Here(number) = told else { continue };
            let Some((path, range)) = self.parts.get(number) else { continue };
            if let Err(error) = self.read(path, range) {
                let file = String::from_utf8_lossy(path);
                tracing::debug!(%file, %error, read, "page cache not filled");
                return;
            }
            read += 1;
        }
        tracing::debug!(parts = read, took = ?begun.elapsed(), "page cache filled");
    }

    fn read(&self, path: &[u8], range: &Range<u64>) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat(&self.mount, OsStr::from_bytes(path), flags, Mode::empty())?;
        let len = NonZeroU64::new(range.end - range.start);
        Ok(fadvise(&file, range.start, len, Advice::WillNeed)?)
    }
}

/// What the kernel reads at least, in bytes.
const PAGE: u64 = 4096;

/// What is read with one call, in bytes: so long a program may wait for pages that are being read.
const AT_ONCE: u64 = 512 << 10;

/// How long an unmount waits for a part that is being read.
const PATIENCE: Duration = Duration::from_millis(200);

/// What has not come by then was not needed for the start.
const LONGEST: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use testkit::image::LayerBuilder;
    use tree::StoredFile;

    use super::*;

    #[test]
    fn files_are_read_in_whole_pages_that_the_layer_has() {
        let layer = LayerBuilder::new()
            .file("a", vec![1; 10_000])
            .file("b", vec![2; 100])
            .file("c", vec![3; 1 << 20]);
        let mut scanner = ztoc::TarScanner::new(ztoc::Limits::default());
        scanner.push(&layer.build()).unwrap();
        let entries = scanner.finish().unwrap().entries;
        let tree = Tree::merge(&[&entries], &tree::Limits::default()).unwrap();
        let [a, b, c] = tree.files_in_layer_order() else { panic!("three files") };
        let check = |range: Range<u64>, expected: &[(&StoredFile, Range<u64>)]| {
            let found = parts_of(&tree, 0, &range);
            let ranges: Vec<_> = found.iter().map(|part| (part.file, part.range.clone())).collect();
            let expected: Vec<_> =
                expected.iter().map(|(file, range)| (file.node, range.clone())).collect();
            assert_eq!(ranges, expected, "{range:?}");
            for part in found {
                let file = [a, b, c].into_iter().find(|file| file.node == part.file).unwrap();
                assert!(part.stored.start <= file.offset + part.range.start);
                assert!(part.stored.end >= file.offset + part.range.end);
            }
        };
        check(a.offset..a.offset + 1, &[(a, 0..4096)]);
        check(a.offset + 9000..b.offset + 1, &[(a, 8192..10_000), (b, 0..100)]);
        check(a.offset + 4096..a.offset + 4097, &[(a, 4096..8192)]);
        check(0..a.offset, &[]);
        check(a.offset + 10_000..b.offset, &[]);
        check(b.offset..u64::MAX, &[(b, 0..100), (c, 0..AT_ONCE), (c, AT_ONCE..2 * AT_ONCE)]);
        assert_eq!(parts_of(&tree, 1, &(0..u64::MAX)), []);
    }
}

//! Images written and read back.

mod hostile;
mod refusals;
mod round_trip;

use tree::{Limits, Tree};
use ztoc::{EntryKind, TocEntry};

use crate::{Device, ImageInfo, WriteError, reader::Listing, write_image};

fn entry(kind: EntryKind, name: &[u8]) -> TocEntry {
    TocEntry { offset: 512, device: (1, 3), ..TocEntry::new(name, kind) }
}

fn file(name: &str, offset: u64, size: u64) -> TocEntry {
    TocEntry { offset, size, ..entry(EntryKind::File, name.as_bytes()) }
}

fn merged(entries: &[TocEntry]) -> Tree {
    Tree::merge(&[entries], &Limits::default()).unwrap()
}

/// A layer as large as devices can be.
fn large_device() -> Device {
    Device { tag: "layer".to_owned(), bytes: ((1 << 32) - 2) << 9 }
}

fn written(tree: &Tree) -> Result<(Vec<u8>, ImageInfo), WriteError> {
    let mut image = b"what was there before".to_vec();
    let info = write_image(tree, &[large_device()], &mut image)?;
    assert_eq!(info.bytes, u64::try_from(image.len()).unwrap());
    Ok((image, info))
}

fn listed(entries: &[TocEntry]) -> (Tree, ImageInfo, Listing) {
    let tree = merged(entries);
    let (image, info) = written(&tree).unwrap();
    (tree, info, crate::reader::read_image(&image).unwrap())
}

//! Images that were tampered with: the reader says no, or something harmless, and comes back.

use proptest::{collection::vec, prelude::*};
use ztoc::{EntryKind, SparseMap, TocEntry};

use super::{entry, file, merged, written};
use crate::{
    reader::{ReadError, read_image},
    write::checksum,
};

/// An image with one of everything.
fn sample() -> Vec<u8> {
    let mut entries: Vec<_> = (0..60).map(|number| file(&format!("d/{number}"), 512, 9)).collect();
    let sparse = Some(SparseMap { pieces: vec![(512, 512)], logical_size: 4096 });
    entries.push(TocEntry { sparse, ..file("s", 512, 512) });
    let linkname = vec![b'x'; 600];
    entries.push(TocEntry { linkname, ..entry(EntryKind::Symlink, b"l") });
    let pax = vec![(b"SCHILY.xattr.user.a".to_vec(), b"value".to_vec())];
    entries.push(TocEntry { pax, ..entry(EntryKind::CharDevice, b"c") });
    written(&merged(&entries)).unwrap().0
}

/// Makes the checksum right again, so that more than it is tested.
fn seal(image: &mut [u8]) {
    if image.len() >= 1536 {
        image[1028..1032].fill(0);
        let sum = checksum(&image[1024..1536]);
        image[1028..1032].copy_from_slice(&sum.to_le_bytes());
    }
}

#[track_caller]
fn corrupt(change: impl FnOnce(&mut Vec<u8>), expected: &str) {
    let mut image = sample();
    change(&mut image);
    let error = read_image(&image).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

/// The byte where the root's inode begins: one slot after the device table's block.
const ROOT: usize = 1536 + 32;

#[test]
fn damage_is_named() {
    corrupt(|image| image.truncate(1000), "past the end");
    corrupt(|image| image[1024] = 0, "magic");
    corrupt(|image| image[1500] ^= 1, "checksum");
    let sealed = |at: usize, value: u8| {
        move |image: &mut Vec<u8>| {
            image[at] = value;
            seal(image);
        }
    };
    corrupt(sealed(1024 + 12, 8), "block size");
    corrupt(sealed(1024 + 80, 1), "unknown features");
    corrupt(sealed(ROOT, 0x01 | 1 << 1), "compressed");
    corrupt(sealed(ROOT + 5, 0x80), "the root is not a directory");
    corrupt(sealed(ROOT + 2, 1), "attributes");
    corrupt(sealed(ROOT + 64 + 8, 13), "directory block");
}

#[test]
fn shared_content_is_bounded() {
    // All the files of a directory of many become directories with the content of their parent.
    let mut image = sample();
    let listing = read_image(&image).unwrap();
    let directory = (0..image.len() / 32)
        .map(|slot| 1536 + slot * 32)
        .find(|at| *at > ROOT && image[at + 5] == 0x41)
        .unwrap_or(ROOT);
    let inode = image[directory..directory + 64].to_vec();
    for nid in listing.inodes.keys() {
        let at = 1536 + usize::try_from(*nid).unwrap() * 32;
        if at != directory && at != ROOT {
            image[at..at + 64].copy_from_slice(&inode);
        }
    }
    seal(&mut image);
    assert!(matches!(read_image(&image), Err(ReadError::Corrupt { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_bytes(changes in vec((0..8192_usize, any::<u8>()), 1..20)) {
        let mut image = sample();
        for (at, value) in changes {
            let at = 1024 + at % (image.len() - 1024);
            image[at] = value;
        }
        seal(&mut image);
        drop(read_image(&image));
    }

    #[test]
    fn cut_off(len in 0..16_384_usize) {
        let mut image = sample();
        image.truncate(len % image.len());
        prop_assert!(read_image(&image).is_err());
    }

    #[test]
    fn noise(mut image in vec(any::<u8>(), 1536..4096)) {
        image[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
        image[1036] = 9;
        image[1104..1108].copy_from_slice(&12_u32.to_le_bytes());
        seal(&mut image);
        drop(read_image(&image));
    }
}

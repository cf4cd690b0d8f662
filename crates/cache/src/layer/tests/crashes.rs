//! A process killed before each change, and a power loss after each, which keeps any part of what was
//! not flushed.

use std::collections::BTreeMap;

use super::*;
use crate::disk::recorder::{Change, record};

/// Everything that changes a layer, in one life of it.
fn life(folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let layer = open_in(folder, "a", shape())?;
    let diff_id = Digest::of(&bytes_of(0..50_001));
    for span in 0..4 {
        fill(&layer, span)?;
    }
    layer.mark_clean()?;
    evict(&layer, &[1])?;
    fill(&layer, 1)?;
    evict(&layer, &[0, 2])?;
    layer.mark_clean()?;
    for span in [0, 2, 4, 5] {
        fill(&layer, span)?;
    }
    evict(&layer, &[4])?;
    fill(&layer, 4)?;
    layer.seal(diff_id, 50_001)?;
    layer.unseal()?;
    evict(&layer, &[3, 4])?;
    fill(&layer, 3)?;
    fill(&layer, 4)?;
    layer.seal(diff_id, 50_001)?;
    drop(layer);
    // Another index takes over the sealed bytes.
    let layer = open_in(folder, "a", other_shape())?;
    layer.unseal()?;
    evict(&layer, &[1])?;
    layer.write_at(20_000, &bytes_of(20_000..50_001))?;
    layer.mark_present(1, crc32c::crc32c(&bytes_of(20_000..50_001)))?;
    layer.mark_clean()?;
    Ok(())
}

fn other_shape() -> LayerShape {
    LayerShape { bytes: 50_001, spans: vec![0, 20_000], index: Digest::of(b"other") }
}

#[test]
fn a_process_killed_before_any_change_leaves_no_wrong_bytes() {
    let whole = tempfile::tempdir().unwrap();
    let (result, changes) = record(None, || life(whole.path()));
    result.unwrap();
    for allowed in 0..changes.len() {
        let folder = tempfile::tempdir().unwrap();
        let (result, made) = record(Some(allowed), || life(folder.path()));
        assert!(result.is_err());
        assert_eq!(made.len(), allowed);
        for shape in [shape(), other_shape()] {
            let layer = open_in(folder.path(), "a", shape).unwrap();
            assert_right_where_present(&layer);
            assert!(layer.verify(&mut |_| {}).unwrap().is_sound(), "after {allowed} changes");
        }
    }
}

/// A disk that keeps only what was flushed, and by chance more.
#[derive(Default)]
struct Disk {
    files: Vec<Contents>,
    /// The names after each change of them, the flushed ones first.
    names: Vec<BTreeMap<Name, usize>>,
}

#[derive(Clone, Default)]
struct Contents {
    flushed: Vec<u8>,
    pending: Vec<Change>,
}

impl Disk {
    fn apply(&mut self, change: &Change) {
        let mut names = self.names.last().cloned().unwrap_or_default();
        match change {
            Change::Length { name, bytes: 0 } => {
                names.insert(*name, self.files.len());
                self.files.push(Contents::default());
            }
            Change::Write { name, .. } | Change::Length { name, .. } => {
                self.files[names[name]].pending.push(change.clone());
            }
            Change::Punch { .. } => {
                self.files[names[&Name::Data]].pending.push(change.clone());
            }
            Change::Sync(name) => {
                let file = &mut self.files[names[name]];
                file.flushed = file.after(&mut |_| true);
                file.pending.clear();
            }
            Change::Rename { from, to } => {
                let file = names.remove(from).unwrap();
                names.insert(*to, file);
            }
            Change::Unlink(name) => {
                names.remove(name);
            }
            Change::SyncFolder => self.names.clear(),
        }
        self.names.push(names);
    }

    /// Writes into `folder` what is left after a power loss.
    fn leave(&self, folder: &Path, chance: &mut Chance) {
        let Some(last) = self.names.len().checked_sub(1) else { return };
        for (name, file) in &self.names[chance.below(last + 1)] {
            let keep = chance.below(4);
            let bytes = self.files[*file].after(&mut |_| match keep {
                0 => false,
                1 => true,
                _ => chance.below(2) == 0,
            });
            std::fs::write(folder.join(name.as_str()), bytes).unwrap();
        }
    }
}

impl Contents {
    /// The bytes with those pending blocks that `keeps`.
    fn after(&self, keeps: &mut dyn FnMut(usize) -> bool) -> Vec<u8> {
        let mut bytes = self.flushed.clone();
        for (at, change) in self.pending.iter().enumerate() {
            match change {
                Change::Write { offset, bytes: more, .. } => {
                    let mut offset = usize::try_from(*offset).unwrap();
                    let mut more = more.as_slice();
                    while !more.is_empty() {
                        let (block, rest) = more.split_at(more.len().min(4096 - offset % 4096));
                        if keeps(at) {
                            bytes.resize(bytes.len().max(offset + block.len()), 0);
                            bytes[offset..offset + block.len()].copy_from_slice(block);
                        }
                        offset += block.len();
                        more = rest;
                    }
                }
                Change::Length { bytes: len, .. } if keeps(at) => {
                    bytes.resize(usize::try_from(*len).unwrap(), 0);
                }
                Change::Punch { offset, len } if keeps(at) => {
                    let start = usize::try_from(*offset).unwrap().min(bytes.len());
                    let end = usize::try_from(offset + len).unwrap().min(bytes.len());
                    bytes[start..end].fill(0);
                }
                _ => {}
            }
        }
        bytes
    }
}

/// Numbers that look like chance and are the same in each run (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}

#[test]
fn a_power_loss_after_any_change_leaves_no_wrong_bytes() {
    let whole = tempfile::tempdir().unwrap();
    let (result, changes) = record(None, || life(whole.path()));
    result.unwrap();
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    let mut disk = Disk::default();
    for (at, change) in changes.iter().enumerate() {
        disk.apply(change);
        for _ in 0..6 {
            let folder = tempfile::tempdir().unwrap();
            disk.leave(folder.path(), &mut chance);
            for shape in [shape(), other_shape()] {
                let layer = open_in(folder.path(), "b", shape).unwrap();
                for span in 0..layer.shape().span_count() {
                    layer.check(span).unwrap();
                }
                assert_right_where_present(&layer);
                assert!(!states(&layer).contains('?'), "after change {at}");
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    disk.leave(folder.path(), &mut chance);
    let layer = open_in(folder.path(), "b", other_shape()).unwrap();
    assert_eq!(states(&layer), "##", "what was flushed is there");
}

#[test]
fn a_sealed_layer_survives_a_power_loss() {
    let whole = tempfile::tempdir().unwrap();
    let (_, changes) = record(None, || {
        let layer = open(whole.path(), "a");
        fill_all(&layer);
        layer.seal(Digest::of(b"tar"), 50_001).unwrap();
    });
    let mut disk = Disk::default();
    for change in &changes {
        disk.apply(change);
    }
    let mut chance = Chance(7);
    for _ in 0..40 {
        let folder = tempfile::tempdir().unwrap();
        disk.leave(folder.path(), &mut chance);
        let layer = open(folder.path(), "b");
        assert!(layer.is_sealed());
        assert_right_where_present(&layer);
    }
}

/// A layer is received, and sealed or not; then the power fails.
fn receive_and_lose_power(is_sealed: bool, check: impl Fn(&Layer)) {
    let root = tempfile::tempdir().unwrap();
    let options = crate::StoreOptions { quota: None, boot_id: "a".to_owned() };
    let store = crate::Store::open(root.path(), options).unwrap();
    let (_, changes) = record(None, || {
        let mut incoming = store.receive(&blob()).unwrap();
        incoming.append(&bytes_of(0..12_300)).unwrap();
        incoming.append(&bytes_of(12_300..50_100)).unwrap();
        let layer = store.keep(incoming, shape()).unwrap();
        if is_sealed {
            layer.seal(Digest::of(b"tar"), layer.proven().unwrap()).unwrap();
        }
    });
    let mut disk = Disk::default();
    for change in &changes {
        disk.apply(change);
    }
    let mut chance = Chance(11);
    for _ in 0..40 {
        let folder = tempfile::tempdir().unwrap();
        disk.leave(folder.path(), &mut chance);
        let layer = open(folder.path(), "b");
        check(&layer);
        assert_right_where_present(&layer);
    }
}

#[test]
fn a_received_layer_survives_a_power_loss_once_it_is_sealed() {
    receive_and_lose_power(true, |layer| {
        assert!(layer.is_sealed() && layer.verify(&mut |_| {}).unwrap().is_sound());
    });
}

#[test]
fn a_power_loss_before_that_leaves_no_wrong_bytes_of_it() {
    let lost = std::cell::Cell::new(false);
    receive_and_lose_power(false, |layer| {
        assert!(!layer.is_sealed());
        for span in 0..layer.shape().span_count() {
            if !layer.ensure_present(span).unwrap() {
                lost.set(true);
            }
        }
    });
    assert!(lost.get(), "the disk of this test loses what was not flushed");
}

#[test]
fn the_disk_of_these_tests_loses_what_was_not_flushed() {
    let mut disk = Disk::default();
    let write = |bytes: &[u8]| Change::Write { name: Name::Data, offset: 0, bytes: bytes.to_vec() };
    disk.apply(&Change::Length { name: Name::Data, bytes: 0 });
    disk.apply(&write(b"old"));
    disk.apply(&Change::Sync(Name::Data));
    disk.apply(&Change::SyncFolder);
    disk.apply(&write(b"new"));
    let mut chance = Chance(1);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        let folder = tempfile::tempdir().unwrap();
        disk.leave(folder.path(), &mut chance);
        seen.insert(std::fs::read(folder.path().join("data")).unwrap());
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [b"new".to_vec(), b"old".to_vec()]);
}

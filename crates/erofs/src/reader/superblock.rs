//! The superblock and the device table.

use super::{
    ReadError,
    bytes::{Fields, Source},
};
use crate::{
    format::{
        DEVICE_SLOT_BYTES, DEVICE_TAG_BYTES, FEATURE_COMPAT_SB_CHKSUM,
        FEATURE_INCOMPAT_CHUNKED_FILE, FEATURE_INCOMPAT_DEVICE_TABLE, INODE_SLOT_BYTES, MAGIC,
        SUPER_BYTES, SUPER_OFFSET,
    },
    write::checksum,
};

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// log2 of the bytes of a block, 9 to 16.
    pub block_bits: u8,
    /// The root directory's inode.
    pub root_nid: u64,
    /// How many inodes there are.
    pub n_inodes: u64,
    /// How many blocks the image itself has.
    pub n_blocks: u32,
    /// The block from which inode numbers count.
    pub first_inode_block: u32,
    /// Seconds and nanoseconds of inodes that have no time of their own.
    pub epoch: (i64, u32),
    /// Identity.
    pub uuid: [u8; 16],
    /// The extra devices.
    pub devices: Vec<DeviceSlot>,
}

/// An extra device of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSlot {
    /// What the image calls it, without the zeros at the end.
    pub tag: Vec<u8>,
    /// How many blocks it has.
    pub n_blocks: u32,
    /// Its first block's address where all devices are one.
    pub unified_address: u32,
}

impl Superblock {
    /// The bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        1 << self.block_bits
    }

    /// The byte where an inode begins; past every image if there can be no such inode.
    pub(super) fn inode_at(&self, nid: u64) -> u64 {
        let first = u64::from(self.first_inode_block).saturating_mul(self.block_bytes());
        nid.saturating_mul(INODE_SLOT_BYTES).saturating_add(first)
    }
}

pub(super) fn read(source: &Source<'_>) -> Result<Superblock, ReadError> {
    let start = u64::try_from(SUPER_OFFSET).unwrap_or(u64::MAX);
    let corrupt = |what| ReadError::Corrupt { at: start, what };
    let raw = source.get(start, u64::try_from(SUPER_BYTES).unwrap_or(u64::MAX))?;
    if raw.u32_at(0) != MAGIC {
        return Err(corrupt("it has no EROFS magic number"));
    }
    let block_bits = raw.u8_at(12);
    if !(9..=16).contains(&block_bits) {
        return Err(corrupt("its block size is impossible"));
    }
    let known = FEATURE_INCOMPAT_CHUNKED_FILE | FEATURE_INCOMPAT_DEVICE_TABLE;
    if raw.u32_at(80) & !known != 0 {
        return Err(ReadError::Unsupported { what: "unknown features" });
    }
    if raw.u32_at(8) & FEATURE_COMPAT_SB_CHKSUM != 0 {
        check(source, start, block_bits, raw.u32_at(4))?;
    }
    Ok(Superblock {
        block_bits,
        root_nid: u64::from(raw.u16_at(14)),
        n_inodes: raw.u64_at(16),
        n_blocks: raw.u32_at(36),
        first_inode_block: raw.u32_at(40),
        epoch: (raw.u64_at(24).cast_signed(), raw.u32_at(32)),
        uuid: raw.array(48),
        devices: read_devices(source, raw)?,
    })
}

fn check(source: &Source<'_>, at: u64, block_bits: u8, expected: u32) -> Result<(), ReadError> {
    let block = 1_u64 << block_bits;
    let len = block.checked_sub(at).filter(|len| *len > 0).unwrap_or(block);
    let mut covered = source.get(at, len)?.to_vec();
    if let Some(field) = covered.get_mut(4..8) {
        field.fill(0);
    }
    if checksum(&covered) != expected {
        return Err(ReadError::Corrupt { at, what: "the checksum is wrong" });
    }
    Ok(())
}

fn read_devices(source: &Source<'_>, raw: &[u8]) -> Result<Vec<DeviceSlot>, ReadError> {
    if raw.u32_at(80) & FEATURE_INCOMPAT_DEVICE_TABLE == 0 {
        return Ok(Vec::new());
    }
    let slot = u64::try_from(DEVICE_SLOT_BYTES).unwrap_or(u64::MAX);
    let at = u64::from(raw.u16_at(88)).saturating_mul(slot);
    let table = source.get(at, u64::from(raw.u16_at(86)).saturating_mul(slot))?;
    let devices = table.chunks_exact(DEVICE_SLOT_BYTES).map(|slot| {
        let tag = slot.get(..DEVICE_TAG_BYTES).unwrap_or_default();
        let zeros = tag.iter().rev().take_while(|byte| **byte == 0).count();
        DeviceSlot {
            tag: tag.get(..tag.len().saturating_sub(zeros)).unwrap_or_default().to_vec(),
            n_blocks: slot.u32_at(64),
            unified_address: slot.u32_at(68),
        }
    });
    Ok(devices.collect())
}

//! Paths of entries, and the table of the nodes' names.

use crate::{NodeId, error::EntryError};

/// A name that hides: what follows the prefix is the name hidden in lower layers.
pub(crate) const WHITEOUT: &[u8] = b".wh.";
/// Names that AUFS keeps for itself; all but [`OPAQUE`] mean nothing here.
pub(crate) const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Hides all lower children of the directory it is in.
pub(crate) const OPAQUE: &[u8] = b".wh..wh..opq";

/// The longest name of one file that Linux takes.
const MAX_COMPONENT_BYTES: usize = 255;

/// The components of `path` after the lexical rules of Go's `path.Clean("/" + path)`: `..` takes the
/// name before it away and stops at the root.
pub(crate) fn clean(path: &[u8]) -> Vec<&[u8]> {
    let mut components = Vec::new();
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop();
            }
            name => components.push(name),
        }
    }
    components
}

/// As [`clean`], of an entry's name: refuses what cannot be a path.
pub(crate) fn entry_path(name: &[u8], max_bytes: usize) -> Result<Vec<&[u8]>, EntryError> {
    if name.contains(&0) {
        return Err(EntryError::BadName);
    }
    let components = clean(name);
    check_path_len(components.iter().map(|component| component.len()), max_bytes)?;
    Ok(components)
}

/// Whether components of those lengths make a path that can exist.
pub(crate) fn check_path_len(
    lens: impl Iterator<Item = usize>,
    max_bytes: usize,
) -> Result<(), EntryError> {
    let mut bytes = 0;
    for len in lens {
        bytes += len + 1;
        if len > MAX_COMPONENT_BYTES || bytes > max_bytes {
            return Err(EntryError::NameTooLong);
        }
    }
    Ok(())
}

/// One name for each node, packed: a million small allocations less.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NameTable {
    bytes: Vec<u8>,
    /// Where each name ends.
    ends: Vec<usize>,
}

impl NameTable {
    /// Adds the name of the next node.
    pub(crate) fn push(&mut self, name: &[u8]) {
        self.bytes.extend_from_slice(name);
        self.ends.push(self.bytes.len());
    }

    pub(crate) fn get(&self, id: NodeId) -> &[u8] {
        let start = id.index().checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[id.index()]]
    }
}

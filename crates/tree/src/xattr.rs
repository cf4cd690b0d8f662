//! Which extended attributes of an entry the image keeps.

use std::collections::BTreeMap;

use ztoc::{EntryKind, TocEntry};

use crate::{Xattr, error::EntryError};

/// Linux' `XATTR_NAME_MAX`.
const MAX_NAME_BYTES: usize = 255;
/// Linux' `XATTR_SIZE_MAX`.
const MAX_VALUE_BYTES: usize = 65_536;

/// The attributes of `entry` that the image keeps, sorted by name.
pub(crate) fn kept(entry: &TocEntry) -> Result<Vec<Xattr>, EntryError> {
    let mut kept = BTreeMap::new();
    for (name, value) in entry.xattrs().filter(|(name, _)| is_kept(entry.kind, name)) {
        if name.len() > MAX_NAME_BYTES || value.len() > MAX_VALUE_BYTES || name.contains(&0) {
            return Err(EntryError::BadXattr);
        }
        kept.insert(Box::from(name), Box::from(value));
    }
    Ok(kept.into_iter().collect())
}

/// Keeps what a read-only file system can serve. Overlay's own attributes are dropped: an image that
/// brings them would redirect or hide files of the overlay mounted on it. So are `user.` ones of what
/// is neither file nor directory, which Linux lets nobody set or read.
fn is_kept(kind: EntryKind, name: &[u8]) -> bool {
    if matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default") {
        return true;
    }
    let is_in = |space: &[u8]| name.len() > space.len() && name.starts_with(space);
    let may_have_user = matches!(kind, EntryKind::File | EntryKind::Directory);
    (is_in(b"user.") && may_have_user)
        || is_in(b"security.")
        || (is_in(b"trusted.") && !name.starts_with(b"trusted.overlay."))
}

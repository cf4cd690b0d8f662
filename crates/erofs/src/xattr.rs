//! The extended attributes that follow an inode.

use tree::Node;

use crate::{
    error::NodeError,
    format::{XATTR_ENTRY_BYTES, XATTR_HEADER_BYTES, XATTR_PREFIXES},
};

/// Bytes of the attributes of a node; 0 if it has none.
pub(crate) fn body_bytes(node: &Node) -> Result<u64, NodeError> {
    if node.xattrs.is_empty() {
        return Ok(0);
    }
    let mut bytes = XATTR_HEADER_BYTES;
    for (name, value) in &node.xattrs {
        let (_, suffix) = split(name).ok_or(NodeError::XattrsTooLarge)?;
        if suffix.len() > usize::from(u8::MAX) || value.len() > usize::from(u16::MAX) {
            return Err(NodeError::XattrsTooLarge);
        }
        let entry = (XATTR_ENTRY_BYTES + suffix.len() + value.len()).next_multiple_of(4);
        bytes += u64::try_from(entry).expect("at most 2^17");
    }
    if count(bytes).is_none() {
        return Err(NodeError::XattrsTooLarge);
    }
    Ok(bytes)
}

/// `i_xattr_icount` for a body of that many bytes.
pub(crate) fn count(body_bytes: u64) -> Option<u16> {
    match body_bytes.checked_sub(XATTR_HEADER_BYTES) {
        None => Some(0),
        Some(entries) => u16::try_from(1 + entries / 4).ok(),
    }
}

/// The body, whose size is [`body_bytes`].
pub(crate) fn body(node: &Node) -> Vec<u8> {
    let mut body = vec![0; 12];
    for (name, value) in &node.xattrs {
        let (prefix, suffix) = split(name).expect("body_bytes has seen it");
        body.push(u8::try_from(suffix.len()).expect("body_bytes has seen it"));
        body.push(prefix);
        let value_len = u16::try_from(value.len()).expect("body_bytes has seen it");
        body.extend_from_slice(&value_len.to_le_bytes());
        body.extend_from_slice(suffix);
        body.extend_from_slice(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    body
}

/// The number of a name's prefix, and the rest of the name.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(number, prefix)| Some((*number, name.strip_prefix(*prefix)?)))
}

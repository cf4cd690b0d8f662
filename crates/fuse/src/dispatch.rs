//! From a request to the file system's answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use sys::fuse_device::{DirBuffer, Errno, Operation, ParseRequestError, Request, Validity, answer};

use crate::filesystem::{DirSink, Filesystem, Ino, Names, Xattrs};
use crate::reply::ReadReply;
use crate::session::Shared;

/// Answers one message of the kernel, or starts to. `scratch` is only there to be used again.
pub(crate) fn serve(
    shared: &Arc<Shared>,
    fs: &Arc<dyn Filesystem>,
    message: &[u8],
    scratch: &mut Vec<u8>,
) {
    let request = match Request::parse(message) {
        Ok(request) => request,
        Err(error) => {
            tracing::error!(%error, "cannot read a message of the kernel");
            if let ParseRequestError::Body { unique, .. } = error {
                shared.reply(unique, Err(Errno::INVAL));
            }
            return;
        }
    };
    match request.operation {
        // Numbers mean the same for ever, so there is nothing to forget.
        Operation::Forget => {}
        Operation::Interrupt { unique } => shared.waiting.signal(unique, Instant::now()),
        Operation::Read { offset, size } => {
            let reply = ReadReply::new(Arc::clone(shared), request.unique, request.pid);
            let range = offset..offset.saturating_add(u64::from(size));
            // A panic drops the reply, which answers it.
            catch_unwind(AssertUnwindSafe(|| fs.read(Ino(request.ino), range, reply))).ok();
        }
        _ => {
            scratch.clear();
            let done = catch_unwind(AssertUnwindSafe(|| answer_at_once(&**fs, &request, scratch)));
            let body = done.unwrap_or(Err(Errno::IO)).map(|()| scratch.as_slice());
            shared.reply(request.unique, body);
        }
    }
}

fn answer_at_once(
    fs: &dyn Filesystem,
    request: &Request<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Errno> {
    let ino = Ino(request.ino);
    match request.operation {
        Operation::Lookup { name } => lookup(fs, ino, name, out)?,
        Operation::Getattr => answer::attr(out, &fs.getattr(ino)?, Validity::Always),
        Operation::Readlink => out.extend_from_slice(&fs.readlink(ino)?),
        Operation::Readdir { offset, size } => readdir(fs, ino, offset, Listing::Names, out, size)?,
        Operation::Readdirplus { offset, size } => {
            readdir(fs, ino, offset, Listing::Attributes, out, size)?;
        }
        Operation::Opendir if fs.names() == Names::Changing => answer::opened(out),
        // The kernel then stops to ask, and caches as if it had been told to.
        Operation::Open | Operation::Opendir => return Err(Errno::NOSYS),
        Operation::Release | Operation::Releasedir | Operation::Destroy => {}
        Operation::Statfs => answer::statfs(out, &fs.statfs()),
        Operation::Getxattr { .. } if fs.xattrs() == Xattrs::None => return Err(Errno::NOSYS),
        Operation::Getxattr { name, size } => {
            let value = fs.getxattr(ino, name)?;
            xattr(out, size, &value)?;
        }
        Operation::Listxattr { size } => {
            let mut names = Vec::new();
            fs.listxattr(ino, &mut names)?;
            xattr(out, size, &names)?;
        }
        Operation::Modify => return Err(Errno::ROFS),
        Operation::Other { .. } => return Err(Errno::NOSYS),
        Operation::Init(_)
        | Operation::Forget
        | Operation::Interrupt { .. }
        | Operation::Read { .. } => return Err(Errno::IO),
    }
    Ok(())
}

/// How long names of this file system stay true.
fn validity_of_names(fs: &dyn Filesystem) -> Validity {
    match fs.names() {
        Names::Fixed => Validity::Always,
        Names::Changing => Validity::Never,
    }
}

fn lookup(fs: &dyn Filesystem, parent: Ino, name: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
    let names = validity_of_names(fs);
    match fs.lookup(parent, name)? {
        Some(attr) => answer::entry(out, &attr, names, Validity::Always),
        None if names == Validity::Always => answer::no_entry(out),
        None => return Err(Errno::NOENT),
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Listing {
    Names,
    Attributes,
}

fn readdir(
    fs: &dyn Filesystem,
    directory: Ino,
    offset: u64,
    listing: Listing,
    out: &mut Vec<u8>,
    size: u32,
) -> Result<(), Errno> {
    let limit = usize::try_from(size).unwrap_or(usize::MAX);
    let mut sink = DirSink {
        buffer: DirBuffer::new(out, limit),
        plus: listing == Listing::Attributes,
        names: validity_of_names(fs),
        is_full: false,
    };
    if offset == 0 && !sink.push_dot(directory, 1, b".") {
        return Err(Errno::INVAL);
    }
    if offset <= 1 && !sink.push_dot(fs.parent(directory)?, DirSink::DOTS, b"..") {
        return Ok(());
    }
    fs.readdir(directory, offset.saturating_sub(DirSink::DOTS), &mut sink)?;
    // An empty reply would be the end of the directory.
    let nothing_fits = sink.is_full && out.is_empty();
    if nothing_fits { Err(Errno::INVAL) } else { Ok(()) }
}

/// A value of an extended attribute or a list of names: its length alone, or all of it.
fn xattr(out: &mut Vec<u8>, size: u32, bytes: &[u8]) -> Result<(), Errno> {
    let len = u32::try_from(bytes.len()).map_err(|_too_long| Errno::TOOBIG)?;
    if size == 0 {
        answer::xattr_len(out, len);
    } else if len <= size {
        out.extend_from_slice(bytes);
    } else {
        return Err(Errno::RANGE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xattrs_are_given_whole_or_as_a_length() {
        let check = |size, expect: Result<&[u8], Errno>| {
            let mut out = Vec::new();
            let result = xattr(&mut out, size, b"value").map(|()| out.as_slice());
            assert_eq!(result, expect, "{size}");
        };
        let len = [5_u32.to_ne_bytes(), [0; 4]].concat();
        check(0, Ok(&len));
        check(4, Err(Errno::RANGE));
        check(5, Ok(b"value"));
        check(100, Ok(b"value"));
    }
}

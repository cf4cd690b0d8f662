//! What the kernel asks for.

use super::abi::{IN_HEADER_LEN, Reader, opcode};

/// One request of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// Identifies the request in its reply.
    pub unique: u64,
    /// The inode that it is about.
    pub ino: u64,
    /// The thread that waits for it, in the pid namespace of the mounter; 0 if it has no number
    /// there or if nobody in particular waits.
    pub pid: u32,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of linux/fuse.h and named alike")]
pub enum Operation<'a> {
    /// The first request: which protocol is spoken.
    Init(InitRequest),
    /// The child of that name.
    Lookup { name: &'a [u8] },
    /// The kernel dropped inodes; gets no reply.
    Forget,
    /// Attributes.
    Getattr,
    /// Target of a symbolic link.
    Readlink,
    /// A file is opened.
    Open,
    /// A directory is opened.
    Opendir,
    /// An open file is closed for the last time.
    Release,
    /// An open directory is closed for the last time.
    Releasedir,
    /// Bytes of a file.
    Read { offset: u64, size: u32 },
    /// Entries of a directory from a place on, as many as `size` bytes hold.
    Readdir { offset: u64, size: u32 },
    /// The same with attributes.
    Readdirplus { offset: u64, size: u32 },
    /// Figures of the file system.
    Statfs,
    /// One extended attribute; with `size` 0 only its length.
    Getxattr { name: &'a [u8], size: u32 },
    /// The names of the extended attributes; with `size` 0 only their length.
    Listxattr { size: u32 },
    /// Whoever waits for the request `unique` got a signal; gets no reply.
    Interrupt { unique: u64 },
    /// The last request before the end.
    Destroy,
    /// Something that would change the file system.
    Modify,
    /// Anything else.
    Other { opcode: u32 },
}

/// What the kernel offers at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitRequest {
    /// Protocol version of the kernel.
    pub major: u32,
    /// Protocol version of the kernel.
    pub minor: u32,
    /// Bytes that it would read ahead.
    pub max_readahead: u32,
    /// What it knows, see [`init`](super::init).
    pub flags: u64,
}

/// A message is not a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseRequestError {
    /// The header is not whole, or contradicts the length; there is nothing to reply to.
    #[error("a FUSE message of {len} bytes is not a request")]
    Header {
        /// Length of the message in bytes.
        len: usize,
    },
    /// The header is right and the rest is not; the request must be answered all the same.
    #[error("FUSE request {unique} (opcode {opcode}) ends early")]
    Body {
        /// Identifies the request in its reply.
        unique: u64,
        /// What it would have asked.
        opcode: u32,
    },
}

impl<'a> Request<'a> {
    /// Reads one message of the device.
    ///
    /// # Errors
    /// If it is shorter than its header or its operation needs.
    pub fn parse(message: &'a [u8]) -> Result<Self, ParseRequestError> {
        let not_a_request = ParseRequestError::Header { len: message.len() };
        let header = Header::parse(message).ok_or(not_a_request)?;
        let body = message.get(IN_HEADER_LEN..header.body_end).ok_or(not_a_request)?;
        let Header { opcode, unique, ino, pid, .. } = header;
        let operation = Operation::parse(opcode, Reader(body))
            .ok_or(ParseRequestError::Body { unique, opcode })?;
        Ok(Self { unique, ino, pid, operation })
    }
}

/// `fuse_in_header` without the parts that nobody here looks at.
struct Header {
    opcode: u32,
    unique: u64,
    ino: u64,
    pid: u32,
    /// Where the operation's own fields end and extensions begin.
    body_end: usize,
}

impl Header {
    fn parse(message: &[u8]) -> Option<Self> {
        let mut reader = Reader(message);
        let len = usize::try_from(reader.u32()?).ok()?;
        let opcode = reader.u32()?;
        let unique = reader.u64()?;
        let ino = reader.u64()?;
        let _uid = reader.u32()?;
        let _gid = reader.u32()?;
        let pid = reader.u32()?;
        let extensions = usize::from(reader.u16()?) * 8;
        let _padding = reader.u16()?;
        if len != message.len() {
            return None;
        }
        let body_end = len.checked_sub(extensions)?;
        Some(Self { opcode, unique, ino, pid, body_end })
    }
}

impl<'a> Operation<'a> {
    fn parse(opcode: u32, mut body: Reader<'a>) -> Option<Self> {
        Some(match opcode {
            opcode::INIT => Self::Init(InitRequest::parse(body)?),
            opcode::LOOKUP => Self::Lookup { name: body.name()? },
            opcode::FORGET | opcode::BATCH_FORGET => Self::Forget,
            opcode::GETATTR => Self::Getattr,
            opcode::READLINK => Self::Readlink,
            opcode::OPEN => Self::Open,
            opcode::OPENDIR => Self::Opendir,
            opcode::RELEASE => Self::Release,
            opcode::RELEASEDIR => Self::Releasedir,
            opcode::READ => {
                let (offset, size) = read_place(body)?;
                Self::Read { offset, size }
            }
            opcode::READDIR => {
                let (offset, size) = read_place(body)?;
                Self::Readdir { offset, size }
            }
            opcode::READDIRPLUS => {
                let (offset, size) = read_place(body)?;
                Self::Readdirplus { offset, size }
            }
            opcode::STATFS => Self::Statfs,
            opcode::GETXATTR => {
                let size = xattr_size(&mut body)?;
                Self::Getxattr { name: body.name()?, size }
            }
            opcode::LISTXATTR => Self::Listxattr { size: xattr_size(&mut body)? },
            opcode::INTERRUPT => Self::Interrupt { unique: body.u64()? },
            opcode::DESTROY => Self::Destroy,
            opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE
            | opcode::TMPFILE => Self::Modify,
            opcode => Self::Other { opcode },
        })
    }
}

impl InitRequest {
    fn parse(mut body: Reader<'_>) -> Option<Self> {
        let major = body.u32()?;
        let minor = body.u32()?;
        let max_readahead = body.u32()?;
        let mut flags = u64::from(body.u32()?);
        if flags & super::init::INIT_EXT != 0 {
            flags |= u64::from(body.u32()?) << 32;
        }
        Some(Self { major, minor, max_readahead, flags })
    }
}

/// Offset and size of a `fuse_read_in`.
fn read_place(mut body: Reader<'_>) -> Option<(u64, u32)> {
    let _handle = body.u64()?;
    Some((body.u64()?, body.u32()?))
}

/// Size of a `fuse_getxattr_in`, which has four bytes of padding behind it.
fn xattr_size(body: &mut Reader<'_>) -> Option<u32> {
    let size = body.u32()?;
    let _padding = body.u32()?;
    Some(size)
}

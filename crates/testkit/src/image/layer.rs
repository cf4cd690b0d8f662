//! Layers, entry by entry.

use std::io::{self, Write};

use super::content::Content;
use super::encode::{write_entry, write_records};
use super::entry::{SparseContent, TarEntry, TarKind};

/// Makes a layer's tar. Entries are written in the order of the calls, whatever they are.
#[derive(Debug, Clone, Default)]
pub struct LayerBuilder {
    parts: Vec<Part>,
    end: End,
}

#[derive(Debug, Clone)]
enum Part {
    Entry(Box<TarEntry>),
    Global(Vec<(Vec<u8>, Vec<u8>)>),
    Raw(Vec<u8>),
}

/// What comes after the last entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum End {
    /// Two zero blocks.
    #[default]
    TwoBlocks,
    /// Zeros up to a multiple of 10,240 bytes, as GNU tar's.
    Record,
    /// Nothing at all.
    Nothing,
}

impl LayerBuilder {
    /// A layer of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry.
    #[must_use]
    pub fn entry(mut self, entry: TarEntry) -> Self {
        self.parts.push(Part::Entry(Box::new(entry)));
        self
    }

    /// Adds entries.
    #[must_use]
    pub fn entries(self, entries: impl IntoIterator<Item = TarEntry>) -> Self {
        entries.into_iter().fold(self, Self::entry)
    }

    /// Adds a file of root's, mode 0644.
    #[must_use]
    pub fn file(self, name: impl Into<Vec<u8>>, content: impl Into<Content>) -> Self {
        self.entry(TarEntry::file(name, content))
    }

    /// Adds a sparse file.
    #[must_use]
    pub fn sparse(self, name: impl Into<Vec<u8>>, content: SparseContent) -> Self {
        self.entry(TarEntry::new(name, TarKind::Sparse(content)))
    }

    /// Adds a directory of root's, mode 0755.
    #[must_use]
    pub fn dir(self, name: impl Into<Vec<u8>>) -> Self {
        self.entry(TarEntry::directory(name))
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, name: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Self {
        self.entry(TarEntry::symlink(name, target))
    }

    /// Adds a hard link.
    #[must_use]
    pub fn hard_link(self, name: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Self {
        self.entry(TarEntry::hard_link(name, target))
    }

    /// Adds a character device.
    #[must_use]
    pub fn char_device(self, name: impl Into<Vec<u8>>, major: u32, minor: u32) -> Self {
        self.entry(TarEntry::new(name, TarKind::CharDevice(major, minor)))
    }

    /// Adds a block device.
    #[must_use]
    pub fn block_device(self, name: impl Into<Vec<u8>>, major: u32, minor: u32) -> Self {
        self.entry(TarEntry::new(name, TarKind::BlockDevice(major, minor)))
    }

    /// Adds a named pipe.
    #[must_use]
    pub fn fifo(self, name: impl Into<Vec<u8>>) -> Self {
        self.entry(TarEntry::new(name, TarKind::Fifo))
    }

    /// Hides `path` of the layers below.
    #[must_use]
    pub fn whiteout(self, path: impl AsRef<[u8]>) -> Self {
        let path = path.as_ref();
        let base = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        self.file([&path[..base], b".wh.", &path[base..]].concat(), b"")
    }

    /// Hides everything of the layers below in the directory `path`.
    #[must_use]
    pub fn opaque(self, path: impl AsRef<[u8]>) -> Self {
        let path = path.as_ref();
        let slash: &[u8] = if path.is_empty() || path.ends_with(b"/") { b"" } else { b"/" };
        self.file([path, slash, b".wh..wh..opq"].concat(), b"")
    }

    /// Adds a global PAX header.
    #[must_use]
    pub fn global_pax(mut self, records: &[(&str, &str)]) -> Self {
        let bytes = |text: &str| text.as_bytes().to_vec();
        let records = records.iter().map(|(key, value)| (bytes(key), bytes(value))).collect();
        self.parts.push(Part::Global(records));
        self
    }

    /// Adds bytes as they are.
    #[must_use]
    pub fn raw(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.parts.push(Part::Raw(bytes.into()));
        self
    }

    /// Sets what comes after the last entry.
    #[must_use]
    pub fn end(self, end: End) -> Self {
        Self { end, ..self }
    }

    /// The tar.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut tar = Vec::new();
        self.write_to_memory(&mut tar);
        tar
    }

    fn write_to_memory(&self, tar: &mut Vec<u8>) {
        self.write_to(tar).expect("writing to memory cannot fail");
    }

    /// Writes the tar piece by piece, for layers of many gigabytes, and says how long it is.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<u64> {
        let mut out = Counted { out, written: 0 };
        for part in &self.parts {
            match part {
                Part::Entry(entry) => write_entry(&mut out, entry)?,
                Part::Global(records) => {
                    write_records(&mut out, b'g', b"pax_global_header", records)?;
                }
                Part::Raw(bytes) => out.write_all(bytes)?,
            }
        }
        let zeros = match self.end {
            End::Nothing => 0,
            End::TwoBlocks => 1024,
            End::Record => (out.written + 1024).next_multiple_of(10_240) - out.written,
        };
        io::copy(&mut io::Read::take(io::repeat(0), zeros), &mut out)?;
        Ok(out.written)
    }
}

struct Counted<W> {
    out: W,
    written: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += u64::try_from(n).map_err(io::Error::other)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

//! Reading with every offset checked.

use std::ops::Range;

/// An offset that leads out of the buffer, or an impossible length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfBounds {
    /// Where the offset or length stands.
    pub(crate) at: usize,
}

type Result<T> = std::result::Result<T, OutOfBounds>;

/// One table in a buffer.
///
/// Fields are named by their place in the vtable, `4 + 2 * id`. The table's own length is not
/// checked against its fields: Go shares a vtable between tables whose fields lie alike, whatever
/// their lengths are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'a> {
    buffer: &'a [u8],
    at: usize,
    vtable: &'a [u8],
}

impl<'a> Table<'a> {
    /// The table that the buffer as a whole stands for.
    pub(crate) fn root(buffer: &'a [u8]) -> Result<Self> {
        Self::follow(buffer, 0)
    }

    /// The table that the offset at `at` leads to.
    pub(crate) fn follow(buffer: &'a [u8], at: usize) -> Result<Self> {
        let at = target(buffer, at)?;
        let out = OutOfBounds { at };
        let back = i32::from_le_bytes(array(buffer, at)?);
        let back = isize::try_from(back).map_err(|_narrow| out)?;
        let vtable_at = at.checked_add_signed(back.checked_neg().ok_or(out)?).ok_or(out)?;
        let len = usize::from(u16::from_le_bytes(array(buffer, vtable_at)?));
        let end = vtable_at.checked_add(len).ok_or(out)?;
        let vtable = buffer.get(vtable_at..end).ok_or(out)?;
        Ok(Self { buffer, at, vtable })
    }

    /// A field of fixed size.
    pub(crate) fn scalar<const N: usize>(&self, slot: usize) -> Result<Option<[u8; N]>> {
        self.field(slot)?.map(|at| array(self.buffer, at)).transpose()
    }

    /// A 64-bit number, 0 by default.
    pub(crate) fn long(&self, slot: usize) -> Result<i64> {
        Ok(self.scalar(slot)?.map_or(0, i64::from_le_bytes))
    }

    /// A 32-bit number, 0 by default.
    pub(crate) fn uint(&self, slot: usize) -> Result<u32> {
        Ok(self.scalar(slot)?.map_or(0, u32::from_le_bytes))
    }

    /// A string or a vector of bytes, empty by default.
    pub(crate) fn bytes(&self, slot: usize) -> Result<&'a [u8]> {
        Ok(self.buffer.get(self.range(slot)?).unwrap_or_default())
    }

    /// Where in the buffer such a string or vector lies.
    pub(crate) fn range(&self, slot: usize) -> Result<Range<usize>> {
        match self.field(slot)? {
            Some(at) => vector(self.buffer, at, 1),
            None => Ok(0..0),
        }
    }

    /// Another table.
    pub(crate) fn table(&self, slot: usize) -> Result<Option<Self>> {
        self.field(slot)?.map(|at| Self::follow(self.buffer, at)).transpose()
    }

    /// A vector of tables or strings, empty by default.
    pub(crate) fn offsets(&self, slot: usize) -> Result<Offsets<'a>> {
        let items = match self.field(slot)? {
            Some(at) => vector(self.buffer, at, 4)?,
            None => 0..0,
        };
        Ok(Offsets { buffer: self.buffer, items })
    }

    fn field(&self, slot: usize) -> Result<Option<usize>> {
        let out = OutOfBounds { at: self.at };
        let Some(entry) = self.vtable.get(slot..slot.checked_add(2).ok_or(out)?) else {
            return Ok(None);
        };
        match u16::from_le_bytes(array(entry, 0)?) {
            0 => Ok(None),
            offset => Ok(Some(self.at.checked_add(usize::from(offset)).ok_or(out)?)),
        }
    }
}

/// A vector of offsets.
#[derive(Debug, Clone)]
pub(crate) struct Offsets<'a> {
    buffer: &'a [u8],
    items: Range<usize>,
}

impl<'a> Offsets<'a> {
    pub(crate) fn len(&self) -> usize {
        self.items.len() / 4
    }

    pub(crate) fn tables(self) -> impl Iterator<Item = Result<Table<'a>>> {
        let buffer = self.buffer;
        self.places().map(move |at| Table::follow(buffer, at))
    }

    /// Where they stand in the buffer.
    pub(crate) fn places(self) -> impl Iterator<Item = usize> {
        self.items.step_by(4)
    }

    pub(crate) fn strings(self) -> impl Iterator<Item = Result<&'a [u8]>> {
        self.items
            .step_by(4)
            .map(move |at| Ok(self.buffer.get(vector(self.buffer, at, 1)?).unwrap_or_default()))
    }
}

/// Where the body of the vector lies that the offset at `at` leads to; within the buffer.
fn vector(buffer: &[u8], at: usize, item_size: usize) -> Result<Range<usize>> {
    let at = target(buffer, at)?;
    let out = OutOfBounds { at };
    let count = wide(u32::from_le_bytes(array(buffer, at)?), out)?;
    let start = at.checked_add(4).ok_or(out)?;
    let len = count.checked_mul(item_size).ok_or(out)?;
    let range = start..start.checked_add(len).ok_or(out)?;
    if buffer.get(range.clone()).is_some() { Ok(range) } else { Err(out) }
}

/// Follows the offset that stands at `at`; offsets lead forward from where they stand.
fn target(buffer: &[u8], at: usize) -> Result<usize> {
    let out = OutOfBounds { at };
    let offset = wide(u32::from_le_bytes(array(buffer, at)?), out)?;
    at.checked_add(offset).ok_or(out)
}

fn array<const N: usize>(buffer: &[u8], at: usize) -> Result<[u8; N]> {
    buffer.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(OutOfBounds { at })
}

fn wide(number: u32, out: OutOfBounds) -> Result<usize> {
    usize::try_from(number).map_err(|_narrow| out)
}

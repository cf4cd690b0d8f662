//! Writing in the order and with the padding of Go's builder.

use std::collections::HashMap;

/// Where an object was written: its distance from the end of the buffer to its first byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place(usize);

impl Place {
    /// That distance.
    pub(crate) fn distance(self) -> usize {
        self.0
    }
}

/// Writes a buffer from its end to its beginning.
///
/// A buffer ends at 2 GiB: [`Builder::finish`] tells if it would be larger.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    /// The buffer with its last byte first, without the bytes that are put in later.
    reversed: Vec<u8>,
    /// How much of it is behind the bytes that are put in later, and how many those are.
    gap: Option<(usize, usize)>,
    min_align: usize,
    /// The distinct vtables: the fields' offsets, and where the vtable is. Two tables whose fields lie alike
    /// share one even if their lengths differ: Go's builder compares only the fields.
    vtables: HashMap<Vec<usize>, usize>,
}

impl Builder {
    /// Writes a string.
    pub(crate) fn string(&mut self, text: &[u8]) -> Place {
        self.prepare(4, text.len().saturating_add(1));
        self.reversed.push(0);
        self.end_vector(text, text.len())
    }

    /// Writes a vector of `len` bytes that [`finish`](Self::finish) is given, which spares a copy. There is
    /// one in a buffer.
    pub(crate) fn bytes_later(&mut self, len: usize) -> Place {
        self.prepare(4, len);
        self.gap = Some((self.reversed.len(), len));
        self.end_vector(&[], len)
    }

    /// Writes a vector of tables or strings.
    pub(crate) fn offsets(&mut self, places: &[Place]) -> Place {
        self.prepare(4, places.len().saturating_mul(4));
        for &place in places.iter().rev() {
            self.put_offset(place);
        }
        self.end_vector(&[], places.len())
    }

    /// Begins a table; nothing else may be written until it ends.
    pub(crate) fn table(&mut self) -> TableBuilder<'_> {
        let start = self.len();
        TableBuilder { builder: self, start, fields: Vec::new() }
    }

    /// The buffer, unless it is larger than the format allows. `bytes` is what was announced to
    /// [`bytes_later`](Self::bytes_later).
    pub(crate) fn finish(mut self, root: Place, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
        self.prepare(self.min_align, 4);
        self.put_offset(root);
        // Below this every offset was exact: none is larger than the buffer.
        i32::try_from(self.len()).ok()?;
        self.reversed.reverse();
        let behind = self.gap.map_or(0, |(behind, _len)| behind);
        let front = self.reversed.len().saturating_sub(behind);
        bytes.reserve_exact(self.reversed.len());
        bytes.extend(self.reversed.drain(front..));
        bytes.splice(0..0, self.reversed);
        Some(bytes)
    }

    /// How long the buffer is so far.
    fn len(&self) -> usize {
        self.reversed.len().saturating_add(self.gap.map_or(0, |(_behind, len)| len))
    }

    /// Pads so that, `additional` bytes further, a number of `size` bytes would be aligned.
    fn prepare(&mut self, size: usize, additional: usize) {
        self.min_align = self.min_align.max(size);
        let end = self.len().saturating_add(additional);
        // Sizes are powers of two.
        let padding = end.wrapping_neg() & size.saturating_sub(1);
        self.reversed.resize(self.reversed.len().saturating_add(padding), 0);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.reversed.extend(bytes.iter().rev());
    }

    fn put_offset(&mut self, place: Place) {
        self.prepare(4, 0);
        let distance = self.len().saturating_sub(place.0).saturating_add(4);
        self.put(&narrow(distance).to_le_bytes());
    }

    fn end_vector(&mut self, bytes: &[u8], count: usize) -> Place {
        self.put(bytes);
        self.put(&narrow(count).to_le_bytes());
        Place(self.len())
    }
}

/// A table being written. Fields with their default value are to be left out.
#[derive(Debug)]
pub(crate) struct TableBuilder<'a> {
    builder: &'a mut Builder,
    start: usize,
    /// Place of each field; 0 for those left out.
    fields: Vec<usize>,
}

impl TableBuilder<'_> {
    /// Adds a number, little-endian, unless it is the default.
    pub(crate) fn scalar<const N: usize>(&mut self, id: usize, value: [u8; N], default: [u8; N]) {
        if value != default {
            self.builder.prepare(N, 0);
            self.builder.put(&value);
            self.set(id);
        }
    }

    /// Adds a 64-bit number with the default 0.
    pub(crate) fn long(&mut self, id: usize, value: u64) {
        self.scalar(id, value.to_le_bytes(), [0; 8]);
    }

    /// Adds a 32-bit number with the default 0.
    pub(crate) fn uint(&mut self, id: usize, value: u32) {
        self.scalar(id, value.to_le_bytes(), [0; 4]);
    }

    /// Adds what was written before.
    pub(crate) fn reference(&mut self, id: usize, place: Place) {
        self.builder.put_offset(place);
        self.set(id);
    }

    /// Ends the table.
    pub(crate) fn end(self) -> Place {
        let Self { builder, start, fields } = self;
        builder.prepare(4, 0);
        builder.put(&[0; 4]);
        let object = builder.len();
        let written = builder.reversed.len();
        let offsets: Vec<usize> =
            fields.iter().map(|&at| if at == 0 { 0 } else { object.saturating_sub(at) }).collect();
        // From the table to its vtable, against the direction of the buffer: positive if the vtable
        // was written after the table and so stands before it.
        let distance = match builder.vtables.get(&offsets) {
            Some(&vtable) => narrow(object.saturating_sub(vtable)).wrapping_neg(),
            None => {
                for &offset in offsets.iter().rev() {
                    builder.put(&short(offset).to_le_bytes());
                }
                builder.put(&short(object.saturating_sub(start)).to_le_bytes());
                let len = offsets.len().saturating_add(2).saturating_mul(2);
                builder.put(&short(len).to_le_bytes());
                let vtable = builder.len();
                builder.vtables.insert(offsets, vtable);
                narrow(vtable.saturating_sub(object))
            }
        };
        let header = written.saturating_sub(4)..written;
        if let Some(header) = builder.reversed.get_mut(header) {
            header.copy_from_slice(&distance.to_be_bytes());
        }
        Place(object)
    }

    fn set(&mut self, id: usize) {
        let len = self.fields.len().max(id.saturating_add(1));
        self.fields.resize(len, 0);
        if let Some(field) = self.fields.get_mut(id) {
            *field = self.builder.len();
        }
    }
}

/// Offsets of a buffer that is too large saturate; [`Builder::finish`] refuses it.
fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A table of this module has fourteen fields of eight bytes at most.
fn short(number: usize) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

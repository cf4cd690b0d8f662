//! What the dynamic loader will read of an ELF file, from what the file says of itself.
//!
//! A loader works through a library before its first instruction runs: it looks for the libraries that this
//! one needs, walks the symbol tables, and writes an address at every place that a relocation names. In a
//! large library these are a few parts far from each other, each found by the one before. All offsets here
//! are the file's.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endian, Endianness, ReadRef, elf};

/// What a file says that it needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Path of its interpreter, and for a script what the interpreter is told.
    pub interpreter: Vec<Vec<u8>>,
    /// Names of shared libraries.
    pub libraries: Vec<Vec<u8>>,
    /// Folders where these are looked for first.
    pub folders: Vec<Vec<u8>>,
    /// Whether what these need in turn is looked for in `folders`, too: `DT_RPATH`, which is for all that is
    /// loaded because of a file, without `DT_RUNPATH`, which is for the file alone.
    pub passes_folders_on: bool,
}

/// A part of the file, and where it is in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    address: u64,
    file: Range<u64>,
    is_writable: bool,
}

/// A file as the loader finds it by its program headers and its dynamic section (System V ABI, chapters
/// 4 and 5; 64 bits, of either byte order).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Elf {
    segments: Vec<Segment>,
    /// Where the loader's tables are, each up to the next one.
    tables: Vec<Range<u64>>,
    /// The relocations.
    relocations: Vec<Range<u64>>,
    /// Addresses of the pointers to what runs first.
    first: Vec<Range<u64>>,
    /// See [`Self::constants`].
    constants: Range<u64>,
    endian: Endianness,
}

impl Elf {
    /// Reads the headers and the dynamic section, which the loader reads too, so that nothing need be fetched
    /// for this alone. `None` for what is no such file; what it says may be wrong in every other way.
    pub fn parse<'d>(data: impl ReadRef<'d>) -> Option<(Self, Needs)> {
        let header = elf::FileHeader64::<Endianness>::parse(data).ok()?;
        let endian = header.endian().ok()?;
        let headers = header.program_headers(endian, data).ok()?;
        let (mut needs, mut dynamic, mut unwinding) = (Needs::default(), None, None);
        let mut found = Self { endian, ..Self::default() };
        for header in headers {
            if let Ok(Some(path)) = header.interpreter(endian, data) {
                needs.interpreter.push(path.to_vec());
            }
            dynamic = dynamic.or_else(|| header.dynamic(endian, data).ok().flatten());
            if header.p_type(endian) == elf::PT_GNU_EH_FRAME {
                unwinding = Some(header.file_range(endian).0);
            }
            if header.p_type(endian) == elf::PT_LOAD {
                let (start, size) = header.file_range(endian);
                found.segments.push(Segment {
                    address: header.p_vaddr(endian),
                    file: start..start.checked_add(size)?,
                    is_writable: header.p_flags(endian).0 & elf::PF_W.0 != 0,
                });
            }
        }
        found.constants = unwinding.map_or(0..0, |end| found.before(end));
        let dynamic = dynamic.unwrap_or_default();
        let entries: Vec<(elf::DynamicTag, u64)> = dynamic
            .iter()
            .take(MOST_ENTRIES)
            .map(|entry| (entry.tag(endian), entry.val(endian)))
            .take_while(|(tag, _)| *tag != elf::DT_NULL)
            .collect();
        found.learn_tables(&entries);
        found.learn_needs(&entries, data, &mut needs);
        Some((found, needs))
    }

    /// The parts that it reads besides the headers, whatever else is loaded. They may lie outside the file.
    #[must_use]
    pub fn tables(&self) -> Vec<Range<u64>> {
        // Behind the last byte from the file it clears the rest of the page.
        let ends = self.segments.iter().filter(|segment| segment.is_writable);
        let ends = ends.map(|segment| segment.file.end.saturating_sub(1)..segment.file.end);
        self.tables.iter().chain(&self.relocations).cloned().chain(ends).collect()
    }

    /// The constants that code reads from its first line on, strings and tables: what lies before the table that
    /// is for exceptions, where linkers put them (`.rodata`, then `.eh_frame_hdr`). Empty if there is no such
    /// table, and at most [`LONGEST_CONSTANTS`] bytes; it may lie outside the file.
    #[must_use]
    pub fn constants(&self) -> Range<u64> {
        self.constants.clone()
    }

    /// The parts that it writes addresses to, and those that hold what runs first; in whole blocks of
    /// [`BLOCK`] bytes, ascending, perhaps beyond the end of the file.
    ///
    /// It needs memory for the blocks: about 32 bytes each, 4 million of them at most.
    ///
    /// # Errors
    /// Those of `read`, which is to fill a buffer with the file's bytes from an offset on.
    pub fn touched(
        &self,
        mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<Vec<Range<u64>>> {
        let mut blocks = BTreeSet::new();
        let mut last = None;
        let mut touch = |address: u64| {
            let block = self.offset_of(address).map(|offset| offset / BLOCK);
            // They are mostly in ascending order.
            if block.is_some() && block != last {
                blocks.extend(block);
                last = block;
            }
        };
        let mut left = MOST_RELOCATIONS * RELOCATION;
        let mut buffer = vec![0; AT_ONCE];
        for table in &self.relocations {
            let mut at = table.start;
            while left >= RELOCATION && table.end.saturating_sub(at) >= RELOCATION {
                let len = (table.end - at).min(left).min(AT_ONCE as u64) / RELOCATION * RELOCATION;
                let part = buffer.get_mut(..usize::try_from(len).unwrap_or_default());
                let part = part.unwrap_or_default();
                read(part, at)?;
                for relocation in part.chunks_exact(size_of::<elf::Rela64<Endianness>>()) {
                    let (Some(place), Some(value)) =
                        (relocation.first_chunk(), relocation.last_chunk())
                    else {
                        continue;
                    };
                    let place = self.endian.read_u64(*place);
                    touch(place);
                    if self.first.iter().any(|pointers| pointers.contains(&place)) {
                        touch(self.endian.read_u64(*value));
                    }
                }
                at += len;
                left -= len;
            }
        }
        Ok(joined(&blocks))
    }

    /// Where the byte at an address comes from, if from the file.
    fn offset_of(&self, address: u64) -> Option<u64> {
        self.segment_of(address).map(|(segment, at)| segment.file.start + at)
    }

    /// The segment that holds an address, and how far within it.
    fn segment_of(&self, address: u64) -> Option<(&Segment, u64)> {
        self.segments.iter().find_map(|segment| {
            let at = address.checked_sub(segment.address)?;
            (at < segment.file.end - segment.file.start).then_some((segment, at))
        })
    }

    /// What lies before `end` in its segment, as far as constants are looked for.
    fn before(&self, end: u64) -> Range<u64> {
        let segment = self.segments.iter().find(|segment| segment.file.contains(&end));
        let start = segment.map_or(end, |segment| segment.file.start);
        start.max(end.saturating_sub(LONGEST_CONSTANTS))..end
    }

    fn learn_tables(&mut self, entries: &[(elf::DynamicTag, u64)]) {
        let value =
            |wanted| entries.iter().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value);
        let sized = |(start, size)| {
            let (address, size) = (value(start)?, value(size)?);
            let offset = self.offset_of(address)?;
            Some((address..address.checked_add(size)?, offset..offset.checked_add(size)?))
        };
        let relocations = [(elf::DT_RELA, elf::DT_RELASZ), (elf::DT_JMPREL, elf::DT_PLTRELSZ)];
        let relocations: Vec<_> = relocations.into_iter().filter_map(sized).collect();
        let first = [
            (elf::DT_INIT_ARRAY, elf::DT_INIT_ARRAYSZ),
            (elf::DT_PREINIT_ARRAY, elf::DT_PREINIT_ARRAYSZ),
        ];
        let first: Vec<_> = first.into_iter().filter_map(sized).collect();
        let starts = TABLES.iter().filter_map(|tag| self.segment_of(value(*tag)?));
        let starts: Vec<(u64, u64)> =
            starts.map(|(segment, at)| (segment.file.start + at, segment.file.end)).collect();
        let others = relocations.iter().chain(&first).map(|(_, file)| file.start);
        let all: BTreeSet<u64> = starts.iter().map(|(start, _)| *start).chain(others).collect();
        for (start, end) in starts {
            // Not all tables say how long they are.
            let next = all.range(start + 1..).next().copied().unwrap_or(end);
            self.tables.push(start..next.min(end).min(start.saturating_add(LONGEST_TABLE)));
        }
        self.tables.extend(first.iter().map(|(_, file)| file.clone()));
        self.relocations = relocations.into_iter().map(|(_, file)| file).collect();
        self.first = first.into_iter().map(|(addresses, _)| addresses).collect();
    }

    fn learn_needs<'d>(
        &self,
        entries: &[(elf::DynamicTag, u64)],
        data: impl ReadRef<'d>,
        needs: &mut Needs,
    ) {
        let value =
            |wanted| entries.iter().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value);
        let Some(strings) = value(elf::DT_STRTAB).and_then(|at| self.offset_of(at)) else { return };
        let size = value(elf::DT_STRSZ).unwrap_or_default().min(LONGEST_TABLE);
        for (tag, at) in entries {
            let text = || {
                let start = strings.checked_add(*at)?;
                let text = data.read_bytes_at_until(start..strings.checked_add(size)?, 0).ok()?;
                Some(text.to_vec())
            };
            match *tag {
                elf::DT_NEEDED => needs.libraries.extend(text()),
                elf::DT_RPATH | elf::DT_RUNPATH => {
                    needs.passes_folders_on = value(elf::DT_RUNPATH).is_none();
                    let folders = text().unwrap_or_default();
                    needs.folders.extend(folders.split(|byte| *byte == b':').map(<[u8]>::to_vec));
                }
                _ => {}
            }
        }
    }
}

/// Blocks next to each other as one range of bytes.
fn joined(blocks: &BTreeSet<u64>) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for block in blocks {
        let (start, end) = (block * BLOCK, block.saturating_add(1).saturating_mul(BLOCK));
        match ranges.last_mut() {
            Some(range) if range.end == start => range.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// How an ELF file begins.
pub const MAGIC: [u8; 4] = elf::ELFMAG;

/// What is touched is looked at in blocks of this many bytes.
pub const BLOCK: u64 = 64 << 10;

/// Tables of the dynamic section that say where they begin.
const TABLES: [elf::DynamicTag; 8] = [
    elf::DT_STRTAB,
    elf::DT_SYMTAB,
    elf::DT_HASH,
    elf::DT_GNU_HASH,
    elf::DT_VERSYM,
    elf::DT_VERDEF,
    elf::DT_VERNEED,
    elf::DT_RELR,
];

/// Longer tables are fetched no further, in bytes.
const LONGEST_TABLE: u64 = 32 << 20;

/// Constants that lie further from the table behind them are not looked for, in bytes.
pub const LONGEST_CONSTANTS: u64 = 1 << 20;

/// More entries of a dynamic section are not looked at.
const MOST_ENTRIES: usize = 4096;

/// More relocations are left to the loader: ten times those of the largest libraries known.
const MOST_RELOCATIONS: u64 = 4 << 20;

/// Bytes of one: its place, what kind it is, and a value.
const RELOCATION: u64 = size_of::<elf::Rela64<Endianness>>() as u64;

/// How many bytes of relocations are read at a time.
const AT_ONCE: usize = 96 << 10;

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSection};

    use super::*;

    fn ourselves() -> Vec<u8> {
        std::fs::read("/proc/self/exe").unwrap()
    }

    /// Where a section of an ELF file lies, by the section headers, which no loader looks at.
    fn section(bytes: &[u8], name: &str) -> Range<u64> {
        let file = object::File::parse(bytes).unwrap();
        let (start, size) = file.section_by_name(name).unwrap().file_range().unwrap();
        start..start + size
    }

    fn touched_of(elf: &Elf, bytes: &[u8]) -> Vec<Range<u64>> {
        let read = |buffer: &mut [u8], at| {
            let at = usize::try_from(at).unwrap();
            let part = bytes.get(at..).and_then(|rest| rest.get(..buffer.len()));
            buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        elf.touched(read).unwrap_or_default()
    }

    fn covers(parts: &[Range<u64>], wanted: &Range<u64>) -> bool {
        parts.iter().any(|part| part.start <= wanted.start && wanted.end <= part.end)
    }

    #[test]
    fn our_own_program_needs_its_loader_and_libc() {
        let (_, needs) = Elf::parse(ourselves().as_slice()).unwrap();
        let interpreter = needs.interpreter.concat();
        assert!(interpreter.windows(3).any(|part| part == b"ld-"), "{needs:?}");
        assert!(needs.libraries.iter().any(|name| name.starts_with(b"libc.so")), "{needs:?}");
    }

    #[test]
    fn the_tables_are_where_the_section_headers_have_them() {
        let bytes = ourselves();
        let (elf, _) = Elf::parse(bytes.as_slice()).unwrap();
        let tables = elf.tables();
        for name in [".dynsym", ".dynstr", ".gnu.hash", ".gnu.version", ".rela.dyn", ".init_array"]
        {
            let wanted = section(&bytes, name);
            assert!(covers(&tables, &wanted), "{name} {wanted:?} is not in {tables:?}");
        }
        let text = section(&bytes, ".text");
        assert!(!tables.iter().any(|part| part.start < text.end && text.start < part.end));
    }

    #[test]
    fn the_constants_are_found_without_code() {
        let bytes = ourselves();
        let (elf, _) = Elf::parse(bytes.as_slice()).unwrap();
        let (found, wanted) = (elf.constants(), section(&bytes, ".rodata"));
        let last = wanted.end.saturating_sub(LONGEST_CONSTANTS).max(wanted.start)..wanted.end;
        assert!(found.start <= last.start.next_multiple_of(BLOCK) && last.end <= found.end);
        assert!(found.end - found.start <= LONGEST_CONSTANTS, "{found:?} for {wanted:?}");
    }

    #[test]
    fn what_relocations_write_to_and_what_runs_first_is_found_and_little_else() {
        let bytes = ourselves();
        let (elf, _) = Elf::parse(bytes.as_slice()).unwrap();
        let touched = touched_of(&elf, &bytes);
        for name in [".data.rel.ro", ".init_array", ".got"] {
            let wanted = section(&bytes, name);
            assert!(covers(&touched, &wanted), "{name} {wanted:?} is not in {touched:?}");
        }
        let total: u64 = touched.iter().map(|part| part.end - part.start).sum();
        let text = section(&bytes, ".text");
        let in_text = |part: &&Range<u64>| part.start < text.end && text.start < part.end;
        let of_text: u64 = touched.iter().filter(in_text).map(|part| part.end - part.start).sum();
        assert!(of_text > 0, "the first functions are in .text {text:?}, not in {touched:?}");
        assert!(total < bytes.len() as u64 / 2, "{total} of {} bytes", bytes.len());
    }

    #[test]
    fn damaged_programs_panic_nobody() {
        let whole = ourselves();
        for len in [0, 4, 63, 64, 200, 4096] {
            assert!(Elf::parse(&whole[..len]).is_none() || len > 64);
        }
        // Headers and dynamic section, one byte after the other.
        let object = object::File::parse(whole.as_slice()).unwrap();
        let (start, size) = object.section_by_name(".dynamic").unwrap().file_range().unwrap();
        let mut bytes = whole.clone();
        for at in (0..512).chain(start..start + size).step_by(3) {
            let at = usize::try_from(at).unwrap();
            bytes[at] ^= 0xff;
            if let Some((elf, _)) = Elf::parse(bytes.as_slice()) {
                assert!(elf.tables().iter().all(|table| table.start <= table.end), "byte {at}");
                assert!(touched_of(&elf, &bytes).is_sorted_by_key(|part| part.start), "byte {at}");
            }
            bytes[at] = whole[at];
        }
    }
}

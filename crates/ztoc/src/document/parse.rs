//! Reading foreign zTOCs.

use std::ops::Range;

use oci::Digest;

use super::Ztoc;
use super::encode::{GZIP, KINDS, UNCOMPRESSED};
use crate::flatbuffer::{OutOfBounds, Table};
use crate::limits::Limits;
use crate::rfc3339;
use crate::spans::{BadZinfo, Compression, SpanTable, Surroundings};
use crate::sparse::{self, PaxSparse};
use crate::toc::{EntryKind, RECORD_BYTES, TocEntry};

/// Bytes that are not a usable zTOC. None of these goes away by trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseZtocError {
    /// The bytes break the format's rules.
    #[error("not a zTOC: byte {at} leads nowhere")]
    Malformed {
        /// Where.
        at: usize,
    },
    /// The document reads well, but what it says cannot be.
    #[error("the zTOC contradicts itself: {what}")]
    Inconsistent {
        /// What cannot be.
        what: &'static str,
    },
    /// It is of a kind that cannot be used, and was not built wrong.
    #[error("the zTOC cannot be used: {what}")]
    Unsupported {
        /// What it holds.
        what: &'static str,
    },
    /// It is beyond what is taken in.
    #[error("the zTOC exceeds a limit: {what} over {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The limit in force, see [`Limits`].
        limit: u64,
    },
}

impl From<OutOfBounds> for ParseZtocError {
    fn from(OutOfBounds { at }: OutOfBounds) -> Self {
        Self::Malformed { at }
    }
}

impl From<BadZinfo> for ParseZtocError {
    fn from(BadZinfo(what): BadZinfo) -> Self {
        Self::Inconsistent { what }
    }
}

type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// No entry takes less of a document than its slot, a table and its name.
const MIN_ENTRY_LEN: usize = 24;

impl Ztoc {
    /// Reads a zTOC and holds it to what [`SpanTable`] guarantees; entries come sorted by offset and
    /// do not overlap. Entries' names are not looked at: `..`, NUL and the like are for the tree to
    /// judge.
    ///
    /// # Errors
    /// See [`ParseZtocError`].
    pub fn parse(blob: &[u8], limits: &Limits) -> Result<Self, ParseZtocError> {
        let ztoc = Self::parse_without_toc(blob, limits)?;
        let toc = TocEntries::of(blob, limits)?.collect::<Result<_, _>>()?;
        Ok(Self { toc, ..ztoc })
    }

    /// Reads a zTOC as [`parse`](Self::parse) does, but for the table of contents, which stays empty.
    ///
    /// # Errors
    /// See [`ParseZtocError`].
    pub fn parse_without_toc(blob: &[u8], limits: &Limits) -> Result<Self, ParseZtocError> {
        if to_u64(blob.len()) > limits.ztoc {
            return Err(ParseZtocError::TooLarge { what: "its size", limit: limits.ztoc });
        }
        let root = Table::root(blob)?;
        let compressed_size = size(root.long(8)?)?;
        let uncompressed_size = size(root.long(10)?)?;
        let info = root.table(14)?.ok_or_else(|| inconsistent("it has no span data"))?;
        let spans = parse_spans(blob, &info, compressed_size, uncompressed_size)?;
        Ok(Self {
            version: text(root.bytes(4)?)?,
            build_tool: text(root.bytes(6)?)?,
            compressed_size,
            uncompressed_size,
            toc: Vec::new(),
            spans,
        })
    }
}

fn parse_spans(
    blob: &[u8],
    info: &Table<'_>,
    compressed_size: u64,
    uncompressed_size: u64,
) -> Result<SpanTable, ParseZtocError> {
    let compression = match info.scalar(4)?.map_or(GZIP, u8::from_le_bytes) {
        GZIP => Compression::Gzip,
        UNCOMPRESSED => Compression::Uncompressed,
        _ => return Err(ParseZtocError::Unsupported { what: "an unknown compression" }),
    };
    let digests = info.offsets(8)?;
    if i64::from(info.scalar(6)?.map_or(0, i32::from_le_bytes)).checked_add(1)
        != i64::try_from(digests.len()).ok()
    {
        return Err(inconsistent("the number of spans and of their digests differ"));
    }
    let digests = digests.strings().map(|text| digest(text?)).collect::<Result<_, _>>()?;
    let Range { start, end } = info.range(10)?;
    let zinfo = blob.get(start..end).unwrap_or_default();
    let surroundings = Surroundings {
        compressed_size,
        uncompressed_size,
        digests,
        zinfo: to_u64(start)..to_u64(end),
    };
    Ok(SpanTable::parse(compression, zinfo, surroundings)?)
}

/// The table of contents of a document, entry by entry in the order of the archive. Who looks at each but once
/// need not have all of them in memory.
#[derive(Debug)]
pub struct TocEntries<B> {
    blob: B,
    /// Where their offsets stand in it; beside each, where the file's data begins.
    places: std::vec::IntoIter<(u64, usize)>,
    uncompressed_size: u64,
    budget: Budget,
    /// Where the next may begin.
    end: u64,
}

impl<B: AsRef<[u8]>> TocEntries<B> {
    /// Those of the document `blob`.
    ///
    /// # Errors
    /// When it is no zTOC; whether its entries are what they must be shows as they are read.
    pub fn of(blob: B, limits: &Limits) -> Result<Self, ParseZtocError> {
        let bytes = blob.as_ref();
        let root = Table::root(bytes)?;
        let uncompressed_size = size(root.long(10)?)?;
        let mut budget = Budget::new(bytes, limits);
        let mut places = Vec::new();
        if let Some(toc) = root.table(12)? {
            let tables = toc.offsets(4)?;
            budget.entries(tables.len())?;
            let place = |at| Ok((size(Table::follow(bytes, at)?.long(8)?)?, at));
            places = tables.places().map(place).collect::<Result<_, ParseZtocError>>()?;
            places.sort_by_key(|(offset, _)| *offset);
        }
        Ok(Self { blob, places: places.into_iter(), uncompressed_size, budget, end: 0 })
    }

    fn entry(&mut self, at: usize) -> Result<TocEntry, ParseZtocError> {
        let table = Table::follow(self.blob.as_ref(), at)?;
        let entry = parse_entry(&table, &mut self.budget)?;
        if entry.offset < self.end {
            return Err(inconsistent("two files overlap"));
        }
        let data_end = entry.offset.checked_add(entry.size);
        // A file's data may end the archive without padding.
        self.end = data_end
            .filter(|&data_end| data_end <= self.uncompressed_size)
            .and_then(|data_end| data_end.checked_next_multiple_of(512))
            .ok_or_else(|| inconsistent("a file lies outside the layer"))?;
        Ok(entry)
    }
}

impl<B: AsRef<[u8]>> Iterator for TocEntries<B> {
    type Item = Result<TocEntry, ParseZtocError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (_, at) = self.places.next()?;
        Some(self.entry(at))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.places.size_hint()
    }
}

fn parse_entry(table: &Table<'_>, budget: &mut Budget) -> Result<TocEntry, ParseZtocError> {
    let word = table.bytes(6)?;
    let (kind, _) = *KINDS
        .iter()
        .find(|(_, known)| *known == word)
        .ok_or(ParseZtocError::Unsupported { what: "an entry of an unknown type" })?;
    let mut entry = TocEntry {
        name: budget.name(table.bytes(4)?)?,
        kind,
        offset: size(table.long(8)?)?,
        size: size(table.long(10)?)?,
        linkname: budget.name(table.bytes(12)?)?,
        mode: low_bits(table.long(14)?),
        uid: table.uint(16)?,
        gid: table.uint(18)?,
        uname: budget.text(table.bytes(20)?)?,
        gname: budget.text(table.bytes(22)?)?,
        // As AWS's reader: a time that cannot be read is no reason to refuse a file.
        mtime: rfc3339::parse(table.bytes(24)?).unwrap_or_default(),
        device: (low_bits(table.long(26)?), low_bits(table.long(28)?)),
        pax: parse_pax(table, budget)?,
        sparse: None,
    };
    if kind == EntryKind::File {
        derive_sparse(&mut entry)?;
    } else {
        // Old archives state sizes for what has no data.
        entry.size = 0;
    }
    Ok(entry)
}

fn parse_pax(table: &Table<'_>, budget: &mut Budget) -> Result<Records, ParseZtocError> {
    let records = table.offsets(30)?;
    budget.records(records.len())?;
    budget.pay(records.len().saturating_mul(RECORD_BYTES))?;
    let mut pax = records
        .tables()
        .map(|record| {
            let record = record?;
            Ok((budget.text(record.bytes(4)?)?, budget.text(record.bytes(6)?)?))
        })
        .collect::<Result<Vec<_>, ParseZtocError>>()?;
    // Stable, and of equal keys the later counts, as in Go's map.
    pax.sort_by(|(left, _), (right, _)| left.cmp(right));
    pax.reverse();
    pax.dedup_by(|(left, _), (right, _)| left == right);
    pax.reverse();
    Ok(pax)
}

fn derive_sparse(entry: &mut TocEntry) -> Result<(), ParseZtocError> {
    let bad = |_contradiction| inconsistent("a sparse file's map");
    match sparse::from_records(&entry.pax).map_err(bad)? {
        PaxSparse::No => {}
        PaxSparse::InData => {
            return Err(ParseZtocError::Unsupported { what: "a sparse file whose map is missing" });
        }
        PaxSparse::Pieces(pieces) => {
            let stated = sparse::logical_size(&entry.pax).map_err(bad)?;
            let logical = stated.unwrap_or(entry.size);
            let map = sparse::checked_map(pieces, logical, None).map_err(bad)?;
            let archived = sparse::archived_size(&map);
            // AWS's tool writes the size of the file, which is not what the archive holds; where no
            // record states it, both are the same.
            if stated == Some(entry.size) {
                entry.size = archived;
            } else if entry.size < archived {
                return Err(inconsistent("a sparse file's map is larger than its data"));
            }
            entry.sparse = Some(map);
        }
    }
    Ok(())
}

/// What a document may still cost in memory. Flatbuffers may refer to the same bytes from many
/// places, so that what is read can be much larger than what was sent.
#[derive(Debug)]
struct Budget {
    text: u64,
    /// Entries and records.
    objects: usize,
    limits: Limits,
}

impl Budget {
    fn new(blob: &[u8], limits: &Limits) -> Self {
        // Other writers than AWS's may share equal texts, such as `root`, but not much more.
        let text = to_u64(blob.len()).saturating_mul(8).min(limits.text);
        Self { text, objects: blob.len() / MIN_ENTRY_LEN, limits: *limits }
    }

    fn entries(&mut self, count: usize) -> Result<(), ParseZtocError> {
        if count > self.limits.entries {
            let limit = to_u64(self.limits.entries);
            return Err(ParseZtocError::TooLarge { what: "the number of entries", limit });
        }
        self.records(count)
    }

    fn records(&mut self, count: usize) -> Result<(), ParseZtocError> {
        self.objects = self
            .objects
            .checked_sub(count)
            .ok_or_else(|| inconsistent("it has more entries than its size can hold"))?;
        Ok(())
    }

    fn name(&mut self, bytes: &[u8]) -> Result<Vec<u8>, ParseZtocError> {
        if bytes.len() > self.limits.name {
            let limit = to_u64(self.limits.name);
            return Err(ParseZtocError::TooLarge { what: "a name", limit });
        }
        self.text(bytes)
    }

    fn text(&mut self, bytes: &[u8]) -> Result<Vec<u8>, ParseZtocError> {
        self.pay(bytes.len())?;
        Ok(bytes.to_vec())
    }

    fn pay(&mut self, bytes: usize) -> Result<(), ParseZtocError> {
        self.text = self.text.checked_sub(to_u64(bytes)).ok_or(ParseZtocError::TooLarge {
            what: "all names and records",
            limit: self.limits.text,
        })?;
        Ok(())
    }
}

fn inconsistent(what: &'static str) -> ParseZtocError {
    ParseZtocError::Inconsistent { what }
}

fn size(number: i64) -> Result<u64, ParseZtocError> {
    u64::try_from(number).map_err(|_negative| inconsistent("a negative size or offset"))
}

fn text(bytes: &[u8]) -> Result<String, ParseZtocError> {
    let text = std::str::from_utf8(bytes);
    text.map(str::to_owned).map_err(|_not_utf8| inconsistent("a name of a tool that is not text"))
}

fn digest(bytes: &[u8]) -> Result<Digest, ParseZtocError> {
    let digest = std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok());
    digest.ok_or_else(|| inconsistent("a span digest that is not a sha256 digest"))
}

fn low_bits(number: i64) -> u32 {
    u32::try_from(number & 0xffff_ffff).unwrap_or_default()
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

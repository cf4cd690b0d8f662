//! What a table of contents says about the surroundings of a read.

use std::ops::Range;

use plan::FileHint;
use ztoc::TocEntry;

/// Where the files of a layer lie, in the order of the archive: a tenth of what its table of contents takes.
#[derive(Debug)]
pub(crate) struct Files(Box<[Place]>);

#[derive(Debug, Clone, Copy)]
struct Place {
    /// In the uncompressed layer.
    offset: u64,
    size: u64,
    /// Those of one directory that follow one another have the same.
    directory: u32,
}

impl Place {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.size)
    }

    fn overlap(&self, range: &Range<u64>) -> u64 {
        self.end().min(range.end).saturating_sub(self.offset.max(range.start))
    }
}

impl Files {
    pub(crate) fn of(toc: &[TocEntry]) -> Self {
        let (mut directory, mut last) = (0_u32, None);
        let places = toc.iter().map(|entry| {
            let parent = parent(&entry.name);
            if last.replace(parent) != Some(parent) {
                directory = directory.wrapping_add(1);
            }
            Place { offset: entry.offset, size: entry.size, directory }
        });
        Self(places.collect())
    }

    /// The file that most of `range` of the uncompressed layer belongs to, and the files of its directory
    /// around it. Of several that have as much the last one: the kernel reads whole pages, and a file that it
    /// begins to read lies behind the end of another.
    ///
    /// Directories longer than [`FARTHEST`] are not looked at beyond it: nobody wants them whole.
    pub(crate) fn at(&self, range: &Range<u64>) -> Option<FileHint> {
        let places = &self.0;
        let first = places.partition_point(|place| place.offset <= range.start).saturating_sub(1);
        let candidates = places.iter().enumerate().skip(first).take(CANDIDATES);
        let candidates = candidates.take_while(|(_, place)| place.offset < range.end);
        let (number, touched) = candidates.max_by_key(|(_, place)| place.overlap(range))?;
        if touched.overlap(range) == 0 {
            return None;
        }
        let (before, rest) = places.split_at_checked(number)?;
        let (offset, end) = (touched.offset, touched.end());
        let is_sibling = |place: &&Place| place.directory == touched.directory;
        let starts = before.iter().rev().take_while(is_sibling).map(|place| place.offset);
        let first = starts.take_while(|start| offset - start <= FARTHEST).last().unwrap_or(offset);
        let ends = rest.iter().skip(1).take_while(is_sibling).map(Place::end);
        let last = ends.take_while(|end| end - offset <= FARTHEST).last().unwrap_or(end).max(end);
        Some(FileHint { file: offset..end, directory: first..last })
    }
}

/// The name without its last component.
fn parent(name: &[u8]) -> &[u8] {
    let name = name.strip_suffix(b"/").unwrap_or(name);
    let end = name.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    name.get(..end).unwrap_or_default()
}

/// How many files of a read are looked at: a page of the smallest ones, with their headers.
const CANDIDATES: usize = 8;

/// How far around a read its directory is looked at, in uncompressed bytes.
const FARTHEST: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use ztoc::EntryKind;

    use super::*;

    fn files(files: &[(&str, u64, u64)]) -> Files {
        let entry = |&(name, offset, size): &(&str, u64, u64)| TocEntry {
            offset,
            size,
            ..TocEntry::new(name, EntryKind::File)
        };
        Files::of(&files.iter().map(entry).collect::<Vec<_>>())
    }

    #[track_caller]
    fn check(range: Range<u64>, expected: Option<&[Range<u64>; 2]>) {
        let far = FARTHEST * 2;
        let files = files(&[
            ("a/1", 512, 100),
            ("b/1", 1536, 100),
            ("b/2", 2560, 100),
            ("b/3", 3584, 100),
            ("c/1", 4608, 100),
            ("d/1", 5632, far),
            ("d/2", 5632 + far, 1),
        ]);
        let found = files.at(&range).map(|hint| [hint.file, hint.directory]);
        assert_eq!(found.as_ref(), expected, "at {range:?}");
    }

    #[test]
    fn a_read_is_seen_with_its_file_and_the_siblings_around_it() {
        check(2600..2601, Some(&[2560..2660, 1536..3684]));
        check(1536..1537, Some(&[1536..1636, 1536..3684]));
        check(512..513, Some(&[512..612, 512..612]));
    }

    #[test]
    fn a_read_of_whole_pages_is_of_the_file_that_most_of_it_belongs_to() {
        // It begins in the file before, or in the header.
        check(4096..4700, Some(&[4608..4708, 4608..4708]));
        check(4700..8192, Some(&[5632..5632 + FARTHEST * 2, 5632..5632 + FARTHEST * 2]));
        // As much of each: the one that lies behind.
        check(0..1636, Some(&[1536..1636, 1536..3684]));
    }

    #[test]
    fn headers_and_what_lies_outside_belong_to_no_file() {
        check(0..512, None);
        check(1000..1001, None);
        check(u64::MAX - 1..u64::MAX, None);
    }

    #[test]
    fn a_long_directory_is_not_looked_at_to_its_end() {
        check(5632..5633, Some(&[5632..5632 + FARTHEST * 2, 5632..5632 + FARTHEST * 2]));
    }
}

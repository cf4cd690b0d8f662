//! What a table of contents says about the surroundings of a read.

use plan::FileHint;
use ztoc::TocEntry;

/// The file at `offset` of the uncompressed layer, and the files of its directory around it.
///
/// `toc` is in the order of the archive. Directories longer than [`FARTHEST`] are not looked at
/// beyond it: nobody wants them whole.
pub(crate) fn at(toc: &[TocEntry], offset: u64) -> Option<FileHint> {
    let after = toc.partition_point(|entry| entry.offset <= offset);
    let (before, rest) = toc.split_at_checked(after)?;
    let (touched, before) = before.split_last()?;
    let end = touched.offset.saturating_add(touched.size);
    if offset >= end {
        return None;
    }
    let directory = parent(&touched.name);
    let is_sibling = |entry: &&TocEntry| parent(&entry.name) == directory;
    let first = before.iter().rev().take_while(is_sibling).map(|entry| entry.offset);
    let first =
        first.take_while(|start| offset - start <= FARTHEST).last().unwrap_or(touched.offset);
    let last =
        rest.iter().take_while(is_sibling).map(|entry| entry.offset.saturating_add(entry.size));
    let last = last.take_while(|end| end - offset <= FARTHEST).last().unwrap_or(end).max(end);
    Some(FileHint { file: touched.offset..end, directory: first..last })
}

/// The name without its last component.
fn parent(name: &[u8]) -> &[u8] {
    let name = name.strip_suffix(b"/").unwrap_or(name);
    let end = name.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    name.get(..end).unwrap_or_default()
}

/// How far around a read its directory is looked at, in uncompressed bytes.
const FARTHEST: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use ztoc::EntryKind;

    use super::*;

    fn toc(files: &[(&str, u64, u64)]) -> Vec<TocEntry> {
        let entry = |&(name, offset, size): &(&str, u64, u64)| TocEntry {
            offset,
            size,
            ..TocEntry::new(name, EntryKind::File)
        };
        files.iter().map(entry).collect()
    }

    #[track_caller]
    fn check(offset: u64, expected: Option<&[std::ops::Range<u64>; 2]>) {
        let far = FARTHEST * 2;
        let toc = toc(&[
            ("a/1", 512, 100),
            ("b/1", 1536, 100),
            ("b/2", 2560, 100),
            ("b/3", 3584, 100),
            ("c/1", 4608, 100),
            ("d/1", 5632, far),
            ("d/2", 5632 + far, 1),
        ]);
        let found = at(&toc, offset).map(|hint| [hint.file, hint.directory]);
        assert_eq!(found.as_ref(), expected, "at {offset}");
    }

    #[test]
    fn a_read_is_seen_with_its_file_and_the_siblings_around_it() {
        check(2600, Some(&[2560..2660, 1536..3684]));
        check(1536, Some(&[1536..1636, 1536..3684]));
        check(512, Some(&[512..612, 512..612]));
    }

    #[test]
    fn headers_and_what_lies_outside_belong_to_no_file() {
        check(0, None);
        check(1000, None);
        check(u64::MAX, None);
    }

    #[test]
    fn a_long_directory_is_not_looked_at_to_its_end() {
        check(5632, Some(&[5632..5632 + FARTHEST * 2, 5632..5632 + FARTHEST * 2]));
    }
}

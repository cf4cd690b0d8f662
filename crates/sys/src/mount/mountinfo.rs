//! What is mounted, from `/proc/thread-self/mountinfo`.
//!
//! Source of the format: `Documentation/filesystems/proc.rst`, section 3.5.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// The driver; 0 for a file system without a block device.
    pub major: u32,
    /// The device of that driver.
    pub minor: u32,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// One mount of this namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Its number, unique for as long as it exists.
    pub id: u64,
    /// The mount that it lies on.
    pub parent: u64,
    /// The file system's device number, which `stat` shows for files in it.
    pub dev: Device,
    /// The folder of the file system that is shown.
    pub root: PathBuf,
    /// Where it is shown, as seen from this process' root.
    pub point: PathBuf,
    /// The options of this mount, separated by commas.
    pub options: String,
    /// The type of the file system, for example `fuse.hermes`.
    pub fstype: String,
    /// What it was mounted from, in the file system's own words.
    pub source: OsString,
    /// The options of the file system, separated by commas.
    pub super_options: String,
}

/// A line of `mountinfo` is not in the documented form.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of the mount table is not understood")]
pub struct ParseMountinfoError {
    /// Its number, from 1.
    pub line: usize,
}

/// Lists the mounts of the calling thread's namespace, in the order in which they were made.
///
/// # Errors
/// `ENOENT` without `/proc`, or `InvalidData` around a [`ParseMountinfoError`].
pub fn mountinfo() -> io::Result<Vec<MountEntry>> {
    let bytes = std::fs::read("/proc/thread-self/mountinfo")?;
    parse_mountinfo(&bytes).map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}

/// Reads the text of a `mountinfo` file.
///
/// # Errors
/// The first line that is not in the documented form.
pub fn parse_mountinfo(bytes: &[u8]) -> Result<Vec<MountEntry>, ParseMountinfoError> {
    bytes
        .split(|&byte| byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(index, line)| entry(line).ok_or(ParseMountinfoError { line: index + 1 }))
        .collect()
}

fn entry(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let dev = device(fields.next()?)?;
    let root = path(fields.next()?);
    let point = path(fields.next()?);
    let options = text(fields.next()?);
    // Optional fields such as "shared:2" follow, up to a lone hyphen.
    fields.find(|field| *field == b"-")?;
    let fstype = text(fields.next()?);
    let source = OsString::from_vec(unescaped(fields.next()?));
    let super_options = text(fields.next()?);
    Some(MountEntry { id, parent, dev, root, point, options, fstype, source, super_options })
}

fn device(field: &[u8]) -> Option<Device> {
    let colon = field.iter().position(|&byte| byte == b':')?;
    let (major, minor) = (number(&field[..colon])?, number(&field[colon + 1..])?);
    Some(Device { major: u32::try_from(major).ok()?, minor: u32::try_from(minor).ok()? })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescaped(field)))
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescaped(field)).into_owned()
}

/// Undoes `\040` and the like, which the kernel writes for blanks, line ends, `#` and backslashes.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [high @ b'0'..=b'3', middle @ b'0'..=b'7', low @ b'0'..=b'7', ..]) => {
                bytes.push(((high - b'0') << 6) | ((middle - b'0') << 3) | (low - b'0'));
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expected: Option<(&str, &str, &str, &str)>) {
        let parsed = parse_mountinfo(line.as_bytes());
        let found = parsed.as_ref().ok().and_then(|entries| entries.first()).map(|entry| {
            let source = entry.source.to_str().unwrap();
            let (root, point) = (entry.root.to_str().unwrap(), entry.point.to_str().unwrap());
            (root, point, entry.fstype.as_str(), source)
        });
        assert_eq!(found, expected, "{line}");
    }

    #[test]
    fn lines_of_the_kernel() {
        check(
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n",
            Some(("/mnt1", "/mnt2", "ext3", "/dev/root")),
        );
        check(
            "36 35 0:47 / /a\\040b\\134c rw - erofs /x\\011y ro",
            Some(("/", "/a b\\c", "erofs", "/x\ty")),
        );
        check("36 35 0:47 / /x rw shared:1 master:2 - tmpfs  rw", Some(("/", "/x", "tmpfs", "")));
        check("36 35 0:47 / /x\\04 rw - a \\999 ro", Some(("/", "/x\\04", "a", "\\999")));
    }

    #[test]
    fn lines_that_are_not() {
        check("", None);
        check("36", None);
        check("36 35 98 /mnt1 /mnt2 rw - ext3 /dev/root rw", None);
        check("36 35 98:0 /mnt1 /mnt2 rw ext3 /dev/root rw", None);
        check("x 35 98:0 /mnt1 /mnt2 rw - ext3 /dev/root rw", None);
        check("36 35 98:5000000000 /mnt1 /mnt2 rw - ext3 /dev/root rw", None);
    }

    #[test]
    fn numbers_and_options() {
        let entries = parse_mountinfo(
            b"36 35 98:7 / / rw,noatime - ext3 x rw,a=b\n37 36 0:1 / / ro - y z q\n",
        );
        let entries = entries.unwrap();
        assert_eq!((entries[0].id, entries[0].parent), (36, 35));
        assert_eq!(entries[0].dev, Device { major: 98, minor: 7 });
        assert_eq!(entries[0].options, "rw,noatime");
        assert_eq!(entries[0].super_options, "rw,a=b");
        assert_eq!(entries[1].id, 37);
    }

    #[test]
    fn the_table_of_this_machine_is_understood() {
        assert!(
            mountinfo()
                .unwrap()
                .iter()
                .any(|entry| entry.point.as_path() == std::path::Path::new("/proc"))
        );
    }
}

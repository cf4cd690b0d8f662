//! Where the read-ahead of a mount is set.
//!
//! A "backing device info" has a name in `/sys/class/bdi`: the device number for a block device or a
//! FUSE mount, and `<type>-<sequence>` for a file-backed EROFS. Nothing in the kernel leads from such
//! a mount to that sequence number, so it is found by comparing the names before and after.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::Device;

const FOLDER: &str = "/sys/class/bdi";

/// The read-ahead could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the read-ahead of {} to {kib} KiB", bdi.display())]
pub struct ReadAheadError {
    /// Where it was to be set.
    pub bdi: PathBuf,
    /// To what.
    pub kib: u32,
    /// Why not.
    pub source: io::Error,
}

/// The settings of one mount's or block device's page cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bdi {
    name: String,
}

impl Bdi {
    /// That of a block device, or of a FUSE mount. `None` for a file-backed EROFS.
    #[must_use]
    pub fn of_device(device: Device) -> Option<Self> {
        Self::named(&device.to_string())
    }

    /// The one of this [`name`](Self::name), if it exists.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        let exists = plain && Path::new(FOLDER).join(name).is_dir();
        exists.then(|| Self { name: name.to_owned() })
    }

    /// Its name, unique until the next boot.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All names of the form `<fstype>-<sequence>`.
    pub(super) fn all_of(fstype: &str) -> BTreeSet<String> {
        let Ok(folder) = std::fs::read_dir(FOLDER) else {
            return BTreeSet::new();
        };
        let names = folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| is_of(name, fstype)).collect()
    }

    /// The one that is not among `before`. `None` if there are several: someone else has mounted
    /// the same type in the meantime.
    pub(super) fn new_one(fstype: &str, before: &BTreeSet<String>) -> Option<Self> {
        let after = Self::all_of(fstype);
        let mut new = after.difference(before);
        let name = new.next()?.clone();
        new.next().is_none().then_some(Self { name })
    }

    /// Sets up to how many KiB are read at once ahead of a sequential reader. The kernel starts with
    /// 128.
    ///
    /// # Errors
    /// `ENOENT` once the mount is gone, `EROFS` where `/sys` is read-only.
    pub fn set_read_ahead_kb(&self, kib: u32) -> Result<(), ReadAheadError> {
        let bdi = Path::new(FOLDER).join(&self.name);
        let write = std::fs::OpenOptions::new()
            .write(true)
            .open(bdi.join("read_ahead_kb"))
            .and_then(|mut file| io::Write::write_all(&mut file, kib.to_string().as_bytes()));
        write.map_err(|source| ReadAheadError { bdi, kib, source })
    }
}

fn is_of(name: &str, fstype: &str) -> bool {
    let sequence = name.strip_prefix(fstype).and_then(|rest| rest.strip_prefix('-'));
    sequence.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let check = |name, expected| assert_eq!(is_of(name, "erofs"), expected, "{name}");
        check("erofs-1", true);
        check("erofs-4711", true);
        check("erofs2-1", false);
        check("erofs-x", false);
        check("7:0", false);
    }

    #[test]
    fn names_do_not_lead_elsewhere() {
        for name in ["", ".", "..", "../net", "a/b"] {
            assert_eq!(Bdi::named(name), None, "{name}");
        }
    }
}

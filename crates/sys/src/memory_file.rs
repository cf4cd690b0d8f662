//! Files that are nowhere but in memory, for bytes that travel or stay as a descriptor.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags};

/// Makes a file of these bytes, which cannot be changed any more. `name` is for people who look at
/// `/proc/PID/fd`.
///
/// # Errors
/// When there is no memory, or no descriptor.
pub fn make(name: &str, bytes: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create(name, flags)?);
    file.write_all(bytes)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}

/// Reads a file from its start, wherever the position is that all its descriptors share; at most `most`
/// bytes.
///
/// # Errors
/// When it cannot be read.
pub fn read(file: &File, most: usize) -> io::Result<Vec<u8>> {
    let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; len.min(most)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_file_holds_what_it_was_given_and_nothing_else() {
        let mut file = make("secret", b"secret").unwrap();
        assert_eq!(read(&file, 100).unwrap(), b"secret");
        file.write_all(b"more").unwrap_err();
        file.write_all_at(b"other", 0).unwrap_err();
        assert_eq!(read(&file, 3).unwrap(), b"sec");
        assert_eq!(read(&make("empty", b"").unwrap(), 3).unwrap(), b"");
    }
}

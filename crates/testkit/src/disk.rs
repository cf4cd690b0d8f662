//! Small file systems, mounted for one test: disks that are full, or that lack something.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A mounted file system in a folder of its own; gone when dropped, also when the test fails.
///
/// Needs root, and `mkfs.ext4` where it is that.
#[derive(Debug)]
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// A tmpfs: it has holes, and its files raise no pre-content events.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn tmpfs(bytes: u64) -> io::Result<Self> {
        let disk = Self::new()?;
        disk.mount(&["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])?;
        Ok(disk)
    }

    /// A ramfs: it gives no room back where a hole is punched.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn ramfs() -> io::Result<Self> {
        let disk = Self::new()?;
        disk.mount(&["-t", "ramfs", "ramfs"])?;
        Ok(disk)
    }

    /// An ext4 in a file.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn ext4(bytes: u64) -> io::Result<Self> {
        let disk = Self::new()?;
        let image = disk.folder.path().join("image");
        File::create(&image)?.set_len(bytes)?;
        let mut mkfs = Command::new("mkfs.ext4");
        run(mkfs.args(["-q", "-F", "-m", "0", "-O", "^has_journal"]).arg(&image))?;
        disk.mount(&["-o".as_ref(), "loop".as_ref(), image.as_os_str()])?;
        Ok(disk)
    }

    fn new() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("hermes-disk-").tempdir()?;
        fs::create_dir(folder.path().join("disk"))?;
        Ok(Self { folder })
    }

    fn mount<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> io::Result<()> {
        run(Command::new("mount").args(arguments).arg(self.path()))
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// Fills it up to the last block with the file of this name.
    ///
    /// # Errors
    /// When writing fails otherwise than for want of room.
    pub fn fill(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path().join(name);
        let mut file = File::create(&path)?;
        for piece in [1 << 20, 4096, 1] {
            let piece = vec![0xa5; piece];
            loop {
                match file.write_all(&piece) {
                    Ok(()) => {}
                    Err(err) if err.kind() == io::ErrorKind::StorageFull => break,
                    Err(err) => return Err(err),
                }
            }
        }
        Ok(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What is still open keeps it for as long as that.
        Command::new("umount").arg("-l").arg(self.path()).status().ok();
    }
}

fn run(command: &mut Command) -> io::Result<()> {
    let status = command.status()?;
    let name = Path::new(command.get_program()).display().to_string();
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{name}: {status}"))) }
}

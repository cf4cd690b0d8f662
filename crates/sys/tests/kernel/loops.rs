//! Loop devices, alone and below a mounted EROFS.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::Advice;
use rustix::io::Errno;
use sys::fanotify::FileId;
use sys::loop_device::{Access, Caching, LoopDevice, LoopOptions, OnLastClose};
use sys::mount::{Unmount, mount_erofs, unmount};
use tempfile::TempDir;

use crate::rig::{content, erofs_image, own_mounts};

fn attach(file: &File, options: LoopOptions) -> LoopDevice {
    LoopDevice::attach(file.as_fd(), options).expect("loop devices need root and the loop module")
}

#[test]
fn a_file_becomes_a_device_and_is_released() {
    let file = tempfile::tempfile().unwrap();
    let bytes = content(64 << 10);
    file.write_all_at(&bytes, 0).unwrap();
    let device = attach(&file, LoopOptions { size_limit: Some(32 << 10), ..Default::default() });
    let mut read = vec![0; 4096];
    let opened = File::open(device.path()).unwrap();
    opened.read_exact_at(&mut read, 4096).unwrap();
    assert_eq!(read, bytes[4096..8192]);
    assert_eq!(opened.read_at(&mut read, 32 << 10).unwrap(), 0, "the size is limited");
    drop(opened);
    let status = device.status().unwrap();
    assert_eq!(status.file, FileId::of(file.as_fd()).unwrap());
    assert_eq!(status.size_limit, Some(32 << 10));
    assert_eq!((status.access, status.on_last_close), (Access::ReadOnly, OnLastClose::Stay));
    assert_eq!(device.path().to_str().unwrap(), format!("/dev/loop{}", status.number));
    device.set_read_ahead(1024).unwrap();

    let again = LoopDevice::open(device.path()).unwrap();
    assert_eq!(again.status().unwrap(), status);
    drop(again);
    let mine = FileId::of(file.as_fd()).unwrap();
    assert_eq!(device.status().unwrap().file, mine, "what was only opened is not detached");
    let path = device.path().to_owned();
    drop(device);
    let found = LoopDevice::open(&path).unwrap().status();
    // Another test may have taken the device in the meantime.
    assert!(found.is_err() || found.unwrap().file != mine);
}

#[test]
fn a_persistent_device_stays_until_it_is_detached() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let device = attach(&file, LoopOptions::default());
    let path = device.path().to_owned();
    device.into_persistent();
    let again = LoopDevice::open(&path).unwrap();
    assert_eq!(again.status().unwrap().file, FileId::of(file.as_fd()).unwrap());
    again.detach().unwrap();
}

#[test]
fn the_file_below_a_mount_can_be_changed() {
    own_mounts();
    let folder = TempDir::new().unwrap();
    let point = folder.path().join("mnt");
    std::fs::create_dir(&point).unwrap();
    let bytes = content(1 << 20);
    let (image, at) = erofs_image(folder.path(), &bytes);
    let complete = File::open(folder.path().join("image")).unwrap();
    // Stands in for the served file: the same metadata, other content.
    let served = tempfile::tempfile().unwrap();
    served.write_all_at(&image, 0).unwrap();
    served.write_all_at(&vec![b'?'; 1 << 20], at as u64).unwrap();

    let device = attach(&served, LoopOptions::default());
    mount_erofs(device.path(), &[], &point).unwrap();
    let mounted = point.join("file");
    assert_eq!(std::fs::read(&mounted).unwrap(), vec![b'?'; 1 << 20]);
    device.change_fd(complete.as_fd()).unwrap();
    assert_eq!(device.status().unwrap().file, FileId::of(complete.as_fd()).unwrap());
    drop(served);
    rustix::fs::fadvise(File::open(&mounted).unwrap(), 0, None, Advice::DontNeed).unwrap();
    assert!(std::fs::read(&mounted).unwrap() == bytes);

    device.set_caching(Caching::Direct).unwrap();
    assert_eq!(device.status().unwrap().caching, Caching::Direct);
    device.set_caching(Caching::Buffered).unwrap();
    assert_eq!(device.status().unwrap().caching, Caching::Buffered);

    let shorter = tempfile::tempfile().unwrap();
    shorter.set_len(512).unwrap();
    let err = device.change_fd(shorter.as_fd()).expect_err("the sizes differ");
    assert_eq!(err.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
    // Detaching a mounted device waits for the unmount.
    drop(device);
    assert!(std::fs::read(&mounted).unwrap() == bytes);
    unmount(&point, Unmount::Now).unwrap();
}

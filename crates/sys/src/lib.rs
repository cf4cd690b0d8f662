//! The only unsafe code: kernel objects and the inflater, one owning type each.
#![allow(unsafe_code, reason = "this is the one crate for it; every block names its invariant")]
#![cfg(target_os = "linux")]

pub mod descriptors;
pub mod fanotify;
pub mod files;
pub mod fuse_device;
pub mod inflate;
pub mod journal;
pub mod loop_device;
pub mod memory;
pub mod memory_file;
pub mod mount;
pub mod namespace;
pub mod scheduling;
pub mod signals;
pub mod tun;
pub mod usage;

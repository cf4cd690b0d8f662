//! The wrappers against the real kernel. Needs root, Linux 6.15 and `mkfs.erofs`; the folder for
//! temporary files must lie on ext4, xfs or btrfs.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod child;
mod events;
mod loops;
mod mounts;
mod orphans;
mod rig;

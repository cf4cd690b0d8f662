//! The server against the real kernel. Needs root, `/dev/fuse` and loop devices; the Debian packages
//! `util-linux` and `perl-base` (both always installed) and `coreutils`.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod images;
mod interrupted;
mod layers;
mod support;
mod take_over;
mod trees;
mod user_namespace;

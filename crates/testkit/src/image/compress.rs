//! Layers as they are transported.

use std::io::{self, Read, Write};

use flate2::{Compression as Level, GzBuilder};

/// How a layer is transported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// One gzip member.
    Gzip {
        /// 0 (stored blocks) to 9.
        level: u32,
    },
    /// One gzip member whose header has an extra field, a name and a comment.
    GzipNamed {
        /// 0 to 9.
        level: u32,
    },
    /// Gzip members, one after the other.
    GzipMembers {
        /// 0 to 9.
        level: u32,
        /// Uncompressed bytes in each but the last, at least 1.
        member_size: usize,
    },
    /// One zstd frame.
    Zstd {
        /// 1 to 22.
        level: i32,
    },
    /// Zstd frames, one after the other.
    ZstdFrames {
        /// 1 to 22.
        level: i32,
        /// Uncompressed bytes in each but the last, at least 1.
        frame_size: usize,
    },
}

impl Compression {
    /// What an OCI descriptor says of such a layer.
    #[must_use]
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip { .. } | Self::GzipNamed { .. } | Self::GzipMembers { .. } => {
                "application/vnd.oci.image.layer.v1.tar+gzip"
            }
            Self::Zstd { .. } | Self::ZstdFrames { .. } => {
                "application/vnd.oci.image.layer.v1.tar+zstd"
            }
        }
    }

    /// What a Docker manifest says of it; there is no zstd there, so the OCI type is used.
    #[must_use]
    pub const fn docker_media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.docker.image.rootfs.diff.tar",
            Self::Gzip { .. } | Self::GzipNamed { .. } | Self::GzipMembers { .. } => {
                "application/vnd.docker.image.rootfs.diff.tar.gzip"
            }
            Self::Zstd { .. } | Self::ZstdFrames { .. } => self.media_type(),
        }
    }
}

/// Compresses a layer.
#[must_use]
pub fn compress(tar: &[u8], compression: Compression) -> Vec<u8> {
    in_memory(tar, compression)
}

fn in_memory(tar: &[u8], compression: Compression) -> Vec<u8> {
    let mut out = Vec::new();
    compress_to(tar, &mut out, compression).expect("compressing in memory cannot fail");
    out
}

/// Compresses a layer piece by piece.
///
/// # Errors
/// Those of `tar` and of `out`, and levels that do not exist.
pub fn compress_to(
    mut tar: impl Read,
    out: &mut impl Write,
    compression: Compression,
) -> io::Result<()> {
    match compression {
        Compression::None => io::copy(&mut tar, out).map(|_len| ()),
        Compression::Gzip { level } => gzip(&mut tar, out, GzBuilder::new(), level),
        Compression::GzipNamed { level } => {
            let header = GzBuilder::new().extra(&b"XX\x02\0ab"[..]).filename("layer.tar");
            gzip(&mut tar, out, header.comment("a comment").mtime(1_700_000_000), level)
        }
        Compression::GzipMembers { level, member_size } => {
            in_pieces(tar, member_size, |piece| gzip(piece, out, GzBuilder::new(), level))
        }
        Compression::Zstd { level } => zstd::stream::copy_encode(tar, out, level),
        Compression::ZstdFrames { level, frame_size } => {
            in_pieces(tar, frame_size, |piece| zstd::stream::copy_encode(piece, &mut *out, level))
        }
    }
}

fn gzip(
    tar: &mut impl Read,
    out: &mut impl Write,
    header: GzBuilder,
    level: u32,
) -> io::Result<()> {
    let mut encoder = header.write(out, Level::new(level.min(9)));
    io::copy(tar, &mut encoder)?;
    encoder.finish().map(|_out| ())
}

/// Calls `each` with pieces of `size` bytes and a last one of what is left; at least once.
fn in_pieces(
    mut tar: impl Read,
    size: usize,
    mut each: impl FnMut(&mut &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let size = u64::try_from(size.max(1)).map_err(io::Error::other)?;
    let mut first = true;
    loop {
        let mut piece = Vec::new();
        tar.by_ref().take(size).read_to_end(&mut piece)?;
        if piece.is_empty() && !first {
            return Ok(());
        }
        first = false;
        each(&mut piece.as_slice())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_compressed_comes_out_again() {
        let tar: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for tar in [tar.as_slice(), b""] {
            for level in [0, 6] {
                for compression in [
                    Compression::Gzip { level },
                    Compression::GzipNamed { level },
                    Compression::GzipMembers { level, member_size: 70_000 },
                ] {
                    let mut out = Vec::new();
                    let compressed = compress(tar, compression);
                    flate2::read::MultiGzDecoder::new(&compressed[..])
                        .read_to_end(&mut out)
                        .unwrap();
                    assert_eq!(out, tar, "{compression:?}");
                }
            }
            for compression in [
                Compression::Zstd { level: 3 },
                Compression::ZstdFrames { level: 1, frame_size: 70_000 },
            ] {
                let compressed = compress(tar, compression);
                assert_eq!(zstd::stream::decode_all(&compressed[..]).unwrap(), tar);
            }
        }
    }
}

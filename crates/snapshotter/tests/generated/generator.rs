//! From containerd's messages to Rust.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// What `proto/` says, in Rust: a file for each package, with its place in `src/api`.
pub(crate) fn generate() -> Result<Vec<(PathBuf, String)>, Box<dyn Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let service = proto.join("containerd/services/snapshots/v1/snapshots.proto");
    let descriptors = protox::compile([service], [proto])?;
    let out = tempfile::tempdir()?;
    tonic_prost_build::configure()
        .build_client(false)
        .out_dir(out.path())
        .compile_fds(descriptors)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(out.path())? {
        let path = entry?.path();
        let package = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        let place = package.trim_start_matches("containerd.").replace('.', "/");
        let code = fs::read_to_string(&path)?;
        let code = format!("//! The messages of `{package}`, generated from `proto/`.\n\n{code}");
        files.push((PathBuf::from(place).with_extension("rs"), code));
    }
    Ok(files)
}

//! Images on disk: OCI layouts, and archives of them that `docker load` and `ctr images import` take.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use bytes::Bytes;
use oci::Digest;
use serde_json::json;

use super::build::{Image, LayerBlob};
use super::encode::{write_head, write_padding};
use super::entry::TarEntry;

impl Image {
    /// Writes an OCI image layout into the folder `dir`, which is made if it is missing.
    ///
    /// # Errors
    /// Those of the file systems involved.
    pub fn write_layout(&self, dir: impl AsRef<Path>, tag: &str) -> io::Result<()> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir.join("blobs/sha256"))?;
        for (name, blob) in self.layout(tag) {
            match blob {
                LayerBlob::Memory(bytes) => fs::write(dir.join(name), bytes)?,
                LayerBlob::File(path) => fs::copy(path, dir.join(name)).map(|_len| ())?,
            }
        }
        Ok(())
    }

    /// Writes an archive of the layout, with what older Docker wants besides.
    ///
    /// # Errors
    /// Those of the file systems involved.
    pub fn write_archive(&self, file: impl AsRef<Path>, name: &str) -> io::Result<()> {
        let mut out = BufWriter::new(File::create(file)?);
        let layers: Vec<_> = self.layers.iter().map(|layer| blob_name(layer.digest)).collect();
        let docker = json!([{
            "Config": blob_name(Digest::of(&self.config)),
            "RepoTags": [name],
            "Layers": layers,
        }]);
        let docker = ("manifest.json".to_owned(), LayerBlob::Memory(docker.to_string().into()));
        for (name, blob) in self.layout(name).into_iter().chain([docker]) {
            match blob {
                LayerBlob::Memory(bytes) => append(&mut out, &name, &mut &*bytes, len(&bytes))?,
                LayerBlob::File(path) => {
                    let mut file = File::open(path)?;
                    let size = file.metadata()?.len();
                    append(&mut out, &name, &mut file, size)?;
                }
            }
        }
        out.write_all(&[0; 1024])?;
        out.into_inner()?.sync_data()
    }

    /// The files of a layout.
    fn layout(&self, tag: &str) -> Vec<(String, LayerBlob)> {
        let mut descriptor = self.descriptor();
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [descriptor],
        });
        let mut files: Vec<(String, LayerBlob)> = vec![
            ("oci-layout".to_owned(), memory(r#"{"imageLayoutVersion":"1.0.0"}"#.into())),
            ("index.json".to_owned(), memory(index.to_string().into())),
            (blob_name(self.manifest_digest()), memory(self.manifest.clone())),
            (blob_name(Digest::of(&self.config)), memory(self.config.clone())),
        ];
        for layer in &self.layers {
            let name = blob_name(layer.digest);
            if files.iter().all(|(present, _)| *present != name) {
                files.push((name, layer.blob.clone()));
            }
        }
        files
    }
}

const fn memory(bytes: Bytes) -> LayerBlob {
    LayerBlob::Memory(bytes)
}

fn len(bytes: &Bytes) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn append(
    out: &mut impl Write,
    name: &str,
    content: &mut dyn io::Read,
    size: u64,
) -> io::Result<()> {
    write_head(out, &TarEntry::file(name, b""), size)?;
    let copied = io::copy(&mut io::Read::take(content, size), out)?;
    if copied != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    write_padding(out, size)
}

//! Images: layers, a config, a manifest.

use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use oci::Digest;
use serde_json::{Map, Value, json};

use super::compress::{Compression, compress};
use super::pack::PackedLayer;
use crate::registry::Registry;

/// Makes an image.
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    layers: Vec<ImageLayer>,
    process: Map<String, Value>,
    annotations: Map<String, Value>,
    architecture: String,
    os: String,
    flavour: Flavour,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    Oci,
    Docker,
}

/// A layer as it lies in a registry.
#[derive(Debug, Clone)]
pub struct ImageLayer {
    /// Its media type in an OCI manifest.
    pub media_type: String,
    /// Its media type in a Docker manifest.
    pub docker_media_type: String,
    /// The digest of the blob.
    pub digest: Digest,
    /// The size of the blob in bytes.
    pub size: u64,
    /// The digest of the uncompressed tar.
    pub diff_id: Digest,
    /// The blob.
    pub blob: LayerBlob,
}

/// The bytes of a layer's blob.
#[derive(Debug, Clone)]
pub enum LayerBlob {
    /// In memory.
    Memory(Bytes),
    /// In a file that must stay as it is.
    File(PathBuf),
}

/// An image, ready to be pushed or written.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its layers, the lowest first.
    pub layers: Vec<ImageLayer>,
    /// The config document.
    pub config: Bytes,
    /// The manifest document.
    pub manifest: Bytes,
    /// The manifest's media type.
    pub manifest_media_type: String,
    /// Architecture and operating system, as in the config.
    pub platform: (String, String),
}

/// Where an image went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRefs {
    /// What to pull: `127.0.0.1:<port>/<repository>:<tag>`.
    pub reference: String,
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Digest of the config.
    pub config: Digest,
    /// Digests of the layers' blobs, the lowest first.
    pub layers: Vec<Digest>,
    /// Digests of the layers' tars, the lowest first.
    pub diff_ids: Vec<Digest>,
}

impl Default for ImageBuilder {
    fn default() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            layers: Vec::new(),
            process: Map::new(),
            annotations: Map::new(),
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            flavour: Flavour::Oci,
        }
    }
}

impl ImageBuilder {
    /// An image of no layers for Linux on this machine's architecture.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a layer on top.
    #[must_use]
    pub fn layer(self, tar: impl AsRef<[u8]>, compression: Compression) -> Self {
        let tar = tar.as_ref();
        self.compressed_layer(compress(tar, compression), Digest::of(tar), compression)
    }

    /// Adds a layer on top that was compressed elsewhere, in the way of `compression`. Nothing is checked:
    /// this is the way to layers that are not what their config says.
    #[must_use]
    pub fn compressed_layer(
        mut self,
        blob: impl Into<Bytes>,
        diff_id: Digest,
        compression: Compression,
    ) -> Self {
        let blob = blob.into();
        self.layers.push(ImageLayer {
            media_type: compression.media_type().to_owned(),
            docker_media_type: compression.docker_media_type().to_owned(),
            digest: Digest::of(&blob),
            size: u64::try_from(blob.len()).unwrap_or(u64::MAX),
            diff_id,
            blob: LayerBlob::Memory(blob),
        });
        self
    }

    /// Adds a layer on top that was packed from folders. Its file must stay.
    #[must_use]
    pub fn packed_layer(mut self, packed: &PackedLayer) -> Self {
        let compression = Compression::Gzip { level: 6 };
        self.layers.push(ImageLayer {
            media_type: compression.media_type().to_owned(),
            docker_media_type: compression.docker_media_type().to_owned(),
            digest: packed.digest,
            size: packed.size,
            diff_id: packed.diff_id,
            blob: LayerBlob::File(packed.path.clone()),
        });
        self
    }

    /// Sets what is run: the config's `Entrypoint`.
    #[must_use]
    pub fn entrypoint(self, arguments: &[&str]) -> Self {
        self.process("Entrypoint", json!(arguments))
    }

    /// Sets what is run, or its arguments: the config's `Cmd`.
    #[must_use]
    pub fn command(self, arguments: &[&str]) -> Self {
        self.process("Cmd", json!(arguments))
    }

    /// Sets the environment, each as `NAME=value`.
    #[must_use]
    pub fn environment(self, variables: &[&str]) -> Self {
        self.process("Env", json!(variables))
    }

    /// Sets the working directory.
    #[must_use]
    pub fn working_directory(self, path: &str) -> Self {
        self.process("WorkingDir", json!(path))
    }

    /// Sets any field of the config's `config`.
    #[must_use]
    pub fn process(mut self, key: &str, value: Value) -> Self {
        self.process.insert(key.to_owned(), value);
        self
    }

    /// Adds an annotation of the manifest.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), json!(value));
        self
    }

    /// Sets the platform, such as `arm64` and `linux`.
    #[must_use]
    pub fn platform(self, architecture: &str, os: &str) -> Self {
        Self { architecture: architecture.to_owned(), os: os.to_owned(), ..self }
    }

    /// Makes it a Docker image (manifest v2, schema 2) instead of an OCI one.
    #[must_use]
    pub fn docker(self) -> Self {
        Self { flavour: Flavour::Docker, ..self }
    }

    /// The image.
    #[must_use]
    pub fn build(self) -> Image {
        let Self { layers, process, annotations, architecture, os, flavour } = self;
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let history: Vec<Value> =
            layers.iter().map(|_layer| json!({ "created_by": "testkit" })).collect();
        let config = json!({
            "architecture": architecture,
            "os": os,
            "config": process,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": history,
        });
        let config = Bytes::from(config.to_string());
        let (manifest_media_type, config_media_type) = match flavour {
            Flavour::Oci => (
                "application/vnd.oci.image.manifest.v1+json",
                "application/vnd.oci.image.config.v1+json",
            ),
            Flavour::Docker => (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.container.image.v1+json",
            ),
        };
        let descriptors: Vec<Value> = layers
            .iter()
            .map(|layer| {
                let media_type = match flavour {
                    Flavour::Oci => &layer.media_type,
                    Flavour::Docker => &layer.docker_media_type,
                };
                descriptor(media_type, layer.digest, layer.size)
            })
            .collect();
        let config_size = u64::try_from(config.len()).unwrap_or(u64::MAX);
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_media_type,
            "config": descriptor(config_media_type, Digest::of(&config), config_size),
            "layers": descriptors,
        });
        if !annotations.is_empty() {
            manifest["annotations"] = Value::Object(annotations);
        }
        Image {
            layers,
            config,
            manifest: manifest.to_string().into(),
            manifest_media_type: manifest_media_type.to_owned(),
            platform: (architecture, os),
        }
    }
}

pub(super) fn descriptor(media_type: &str, digest: Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size })
}

impl Image {
    /// Puts blobs, config and manifest into a registry.
    ///
    /// # Errors
    /// The file of a layer cannot be read, or is not what it was.
    pub fn push_to(
        &self,
        registry: &Registry,
        repository: &str,
        tag: &str,
    ) -> io::Result<ImageRefs> {
        for layer in &self.layers {
            let digest = match &layer.blob {
                LayerBlob::Memory(bytes) => registry.put_blob(bytes.clone()),
                LayerBlob::File(path) => registry.put_blob_file(path)?,
            };
            if digest != layer.digest {
                return Err(io::Error::other("the file of a layer has changed"));
            }
        }
        registry.put_blob(self.config.clone());
        let media_type = &self.manifest_media_type;
        registry.put_manifest(repository, Some(tag), media_type, self.manifest.clone());
        let prefix = registry.reference_prefix();
        Ok(self.refs(format!("{prefix}/{repository}:{tag}")))
    }

    /// The digest of the manifest.
    #[must_use]
    pub fn manifest_digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// The manifest's descriptor in an index, with its platform.
    #[must_use]
    pub fn descriptor(&self) -> Value {
        let size = u64::try_from(self.manifest.len()).unwrap_or(u64::MAX);
        let mut found = descriptor(&self.manifest_media_type, self.manifest_digest(), size);
        let (architecture, os) = &self.platform;
        found["platform"] = json!({ "architecture": architecture, "os": os });
        found
    }

    fn refs(&self, reference: String) -> ImageRefs {
        ImageRefs {
            reference,
            manifest: self.manifest_digest(),
            config: Digest::of(&self.config),
            layers: self.layers.iter().map(|layer| layer.digest).collect(),
            diff_ids: self.layers.iter().map(|layer| layer.diff_id).collect(),
        }
    }
}

/// Puts several images of a name, one for each platform, and an index of them into a registry. Returns
/// the digest of the index.
///
/// # Errors
/// As [`Image::push_to`].
pub fn push_index(
    images: &[&Image],
    registry: &Registry,
    repository: &str,
    tag: &str,
) -> io::Result<Digest> {
    for image in images {
        // The index takes the tag over.
        image.push_to(registry, repository, tag)?;
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "manifests": images.iter().map(|image| image.descriptor()).collect::<Vec<_>>(),
    });
    Ok(registry.put_manifest(repository, Some(tag), media_type, index.to_string()))
}

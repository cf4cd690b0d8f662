//! One image in the place where it lies: a registry, or an OCI layout on disk.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use oci::{
    Descriptor, Digest, ImageConfig, LayerCompression, Manifest, ManifestOrIndex, Platform,
    parse_manifest,
};
use registry::{Client, FetchError, Repository};

use crate::local::{Local, LocalError, MAX_DOCUMENT};
use crate::name::ImageName;

/// Where an image lies.
#[derive(Debug, Clone)]
pub struct Origin {
    name: ImageName,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Registry(Repository),
    Local(Arc<Local>),
}

/// An image cannot be read from where it lies.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The registry did not give it.
    #[error("asking the registry for {image}")]
    Registry {
        /// The image.
        image: String,
        /// Why not.
        source: FetchError,
    },
    /// The layout does not have it.
    #[error("reading {image}")]
    Local {
        /// The image.
        image: String,
        /// Why not.
        source: LocalError,
    },
    /// Its documents are not those of an image.
    #[error("{image} is no image that can be run: {why}")]
    NotAnImage {
        /// The image.
        image: String,
        /// What is wrong.
        why: String,
    },
    /// It is not made for this platform.
    #[error("{image} is not made for {wanted}; it is for {}", available.join(", "))]
    WrongPlatform {
        /// The image.
        image: String,
        /// The platform that was asked for.
        wanted: String,
        /// The platforms that there are.
        available: Vec<String>,
    },
    /// A document has another digest than it was asked for by.
    #[error("{image}: {asked} came with the content of {found}")]
    WrongDigest {
        /// The image.
        image: String,
        /// What was asked for.
        asked: Digest,
        /// What came.
        found: Digest,
    },
}

impl OriginError {
    /// Whether the registry did not answer at all, so that nothing is known of the image's present
    /// state.
    #[must_use]
    pub const fn is_unreachable(&self) -> bool {
        let Self::Registry { source, .. } = self else { return false };
        matches!(source, FetchError::Unavailable { .. } | FetchError::Stalled { .. })
    }
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Its media type as the manifest has it.
    pub media_type: String,
    /// How the blob is compressed.
    pub compression: LayerCompression,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
}

/// What a name stands for on one platform.
#[derive(Debug, Clone)]
pub struct FoundManifest {
    /// The manifest's.
    pub descriptor: Descriptor,
    /// The manifest, parsed.
    pub manifest: Manifest,
    /// The configuration, where it is known already.
    pub config: Option<ImageConfig>,
}

/// An image for one platform, resolved to digests.
#[derive(Debug, Clone)]
pub struct Image {
    /// What it was asked for by.
    pub name: String,
    /// Its manifest.
    pub descriptor: Descriptor,
    /// The manifest, parsed.
    pub manifest: Manifest,
    /// Its configuration.
    pub config: ImageConfig,
    /// Its layers, the lowest first.
    pub layers: Vec<ImageLayer>,
}

impl Image {
    /// Puts together what was read or stored.
    ///
    /// # Errors
    /// [`OriginError::NotAnImage`] when manifest and configuration do not go together.
    pub fn from_parts(
        name: String,
        descriptor: Descriptor,
        manifest: Manifest,
        config: ImageConfig,
    ) -> Result<Self, OriginError> {
        let not_an_image = |why: String| OriginError::NotAnImage { image: name.clone(), why };
        let (n, diff_ids) = (manifest.layers.len(), &config.rootfs.diff_ids);
        if n != diff_ids.len() {
            let why = format!("its manifest has {n} layers, its configuration {}", diff_ids.len());
            return Err(not_an_image(why));
        }
        let mut layers = Vec::with_capacity(n);
        for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
            let compression = LayerCompression::from_media_type(&layer.media_type);
            layers.push(ImageLayer {
                digest: layer.digest,
                size: layer.size,
                media_type: layer.media_type.clone(),
                compression: compression.map_err(|err| not_an_image(err.to_string()))?,
                diff_id: *diff_id,
            });
        }
        Ok(Self { name, descriptor, manifest, config, layers })
    }

    /// Compressed size of all layers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }
}

/// How a manifest is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundAs<'a> {
    /// By its digest, which another manifest names.
    Part,
    /// By the manifest that it refers to.
    Referrer,
    /// By a tag, which meant something else before, or nothing.
    Tag(&'a str),
}

/// The bytes of a range of a blob, in order.
#[derive(Debug)]
pub enum BlobStream {
    /// From a registry.
    Registry(Box<registry::BlobStream>),
    /// From a file: what is still to come of it.
    File(File, Range<u64>),
}

impl BlobStream {
    /// The server of the registry that sends the bytes, to be told if they are wrong.
    #[must_use]
    pub fn server(&self) -> Option<registry::Source> {
        match self {
            Self::Registry(stream) => stream.source(),
            Self::File(..) => None,
        }
    }

    /// The next bytes, or `None` at the end of the range.
    ///
    /// # Errors
    /// When the registry's answer breaks off, or the file is shorter than it was.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        match self {
            Self::Registry(stream) => stream.next().await,
            Self::File(file, rest) => {
                let want = (rest.end - rest.start).min(FILE_PIECE);
                if want == 0 {
                    return Ok(None);
                }
                let mut piece = vec![0; usize::try_from(want).unwrap_or_default()];
                file.read_exact_at(&mut piece, rest.start).map_err(FetchError::file)?;
                rest.start += want;
                Ok(Some(piece.into()))
            }
        }
    }
}

impl Origin {
    /// The place that `name` names. Nothing is asked of a registry yet.
    ///
    /// # Errors
    /// When an archive cannot be read.
    pub fn open(name: &ImageName, client: &Client) -> Result<Self, OriginError> {
        let place = match name {
            ImageName::Registry(reference) => Place::Registry(client.repository(reference)),
            ImageName::Layout { dir, .. } => Place::Local(Arc::new(Local::folder(dir))),
            ImageName::Archive { file, .. } => {
                let local = Local::archive(file);
                let image = name.to_string();
                Place::Local(Arc::new(
                    local.map_err(|source| OriginError::Local { image, source })?,
                ))
            }
        };
        Ok(Self { name: name.clone(), place })
    }

    /// What the user called the image.
    #[must_use]
    pub fn name(&self) -> &ImageName {
        &self.name
    }

    /// Finds the image for `platform` and reads its manifest and configuration.
    ///
    /// # Errors
    /// [`OriginError`] says which of them could not be had.
    pub async fn resolve(&self, platform: &Platform) -> Result<Image, OriginError> {
        self.configure(self.find(platform).await?, platform).await
    }

    /// The first half of [`resolve`](Self::resolve): what the name stands for on `platform`. With it,
    /// an index can be looked for while the configuration is on its way.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub async fn find(&self, platform: &Platform) -> Result<FoundManifest, OriginError> {
        let (descriptor, bytes) = self.root().await?;
        let parsed = parse_manifest(Some(&descriptor.media_type), &bytes);
        let index = match parsed.map_err(|err| self.not_an_image(&err))? {
            ManifestOrIndex::Manifest(manifest) => {
                return Ok(FoundManifest { descriptor, manifest, config: None });
            }
            ManifestOrIndex::Index(index) => index,
        };
        let descriptor = match index.image_for(platform) {
            Some(chosen) => chosen.clone(),
            None => return Err(self.wrong_platform(platform, platforms(&index))),
        };
        let bytes = self.document(&descriptor).await?;
        match parse_manifest(Some(&descriptor.media_type), &bytes) {
            Ok(ManifestOrIndex::Manifest(manifest)) => {
                Ok(FoundManifest { descriptor, manifest, config: None })
            }
            Ok(ManifestOrIndex::Index(_)) => {
                Err(self.not_an_image(&"its index points at another index"))
            }
            Err(err) => Err(self.not_an_image(&err)),
        }
    }

    /// The second half of [`resolve`](Self::resolve).
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub async fn configure(
        &self,
        found: FoundManifest,
        platform: &Platform,
    ) -> Result<Image, OriginError> {
        let FoundManifest { descriptor, manifest, config } = found;
        let config = match config {
            Some(known) => known,
            None => {
                let bytes = self.blob(&manifest.config.digest, MAX_DOCUMENT).await?;
                ImageConfig::from_bytes(&bytes).map_err(|err| self.not_an_image(&err))?
            }
        };
        if !config.platform().runs_on(platform) {
            return Err(self.wrong_platform(platform, vec![config.platform().to_string()]));
        }
        Image::from_parts(self.name.to_string(), descriptor, manifest, config)
    }

    /// The manifest or index that the name stands for.
    pub(crate) async fn root(&self) -> Result<(Descriptor, Bytes), OriginError> {
        match (&self.place, &self.name) {
            (Place::Registry(repository), ImageName::Registry(reference)) => {
                let answer = repository.manifest(&reference.target()).await;
                answer.map_err(|source| self.registry_error(source))
            }
            (Place::Registry(_), _) => Err(self.not_an_image(&"its name is no reference")),
            (Place::Local(local), name) => {
                let tag = match name {
                    ImageName::Layout { tag, .. } | ImageName::Archive { tag, .. } => {
                        tag.as_deref()
                    }
                    ImageName::Registry(_) => None,
                };
                let descriptor = local.find(tag).map_err(|source| self.local_error(source))?;
                let bytes = self.document(&descriptor).await?;
                Ok((descriptor, bytes))
            }
        }
    }

    /// A manifest or index by its digest.
    ///
    /// # Errors
    /// When it is not there, or is another document.
    pub async fn document(&self, descriptor: &Descriptor) -> Result<Bytes, OriginError> {
        match &self.place {
            Place::Registry(repository) => {
                let answer = repository.manifest(&descriptor.digest.to_string()).await;
                Ok(answer.map_err(|source| self.registry_error(source))?.1)
            }
            Place::Local(_) => self.blob(&descriptor.digest, MAX_DOCUMENT).await,
        }
    }

    /// A whole blob of at most `limit` bytes, checked against its digest.
    ///
    /// # Errors
    /// When it is not there, too large, or has another content.
    pub async fn blob(&self, digest: &Digest, limit: u64) -> Result<Bytes, OriginError> {
        match &self.place {
            Place::Registry(repository) => {
                let answer = repository.blob(digest, limit).await;
                answer.map_err(|source| self.registry_error(source))
            }
            Place::Local(local) => self.local_blob(local, digest, limit),
        }
    }

    /// As [`blob`](Self::blob), for a blob of `size` bytes.
    ///
    /// # Errors
    /// As for [`blob`](Self::blob).
    pub async fn sized_blob(&self, digest: &Digest, size: u64) -> Result<Bytes, OriginError> {
        match &self.place {
            Place::Registry(repository) => {
                let answer = repository.sized_blob(digest, size).await;
                answer.map_err(|source| self.registry_error(source))
            }
            Place::Local(local) => self.local_blob(local, digest, size),
        }
    }

    /// What lies on disk is checked here, what comes from a registry by its client.
    fn local_blob(&self, local: &Local, digest: &Digest, limit: u64) -> Result<Bytes, OriginError> {
        let bytes = local.blob(digest, limit).map_err(|source| self.local_error(source))?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(OriginError::WrongDigest {
                image: self.name.to_string(),
                asked: *digest,
                found,
            });
        }
        Ok(bytes)
    }

    /// Starts reading a range of a blob.
    ///
    /// # Errors
    /// When the blob cannot be read; whether that may pass is for [`FetchError`] to say.
    pub async fn stream(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<BlobStream, FetchError> {
        match &self.place {
            Place::Registry(repository) => {
                Ok(BlobStream::Registry(Box::new(repository.blob_stream(digest, range).await?)))
            }
            Place::Local(local) => {
                let (file, whole) = local
                    .open_blob(digest)
                    .map_err(|err| FetchError::file(std::io::Error::other(err)))?;
                let end = whole.start.saturating_add(range.end).min(whole.end);
                Ok(BlobStream::File(file, whole.start.saturating_add(range.start).min(end)..end))
            }
        }
    }

    /// Whether ranges of a blob, asked for at once, may come sooner than all of it: not of a file, and not of
    /// a registry that is known to ignore them.
    #[must_use]
    pub fn gives_ranges(&self) -> bool {
        match &self.place {
            Place::Registry(repository) => repository.supports_ranges(),
            Place::Local(_) => false,
        }
    }

    /// Opens connections to where the image lies, so that first reads of its layers need not.
    pub async fn warm_up(&self) {
        if let Place::Registry(repository) = &self.place {
            repository.open_connections(WARM_CONNECTIONS).await;
        }
    }

    /// The artifacts of these types that refer to `subject`.
    ///
    /// # Errors
    /// When the place cannot be asked; that there is none is an empty list.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_types: &[&str],
    ) -> Result<Vec<Descriptor>, OriginError> {
        match &self.place {
            Place::Registry(repository) => {
                let answer = repository.referrers(subject, artifact_types).await;
                answer.map_err(|source| self.registry_error(source))
            }
            Place::Local(local) => {
                let all = local.referrers(subject).map_err(|source| self.local_error(source))?;
                let wanted = |entry: &Descriptor| {
                    entry
                        .artifact_type
                        .as_deref()
                        .is_some_and(|found| artifact_types.contains(&found))
                };
                Ok(all.into_iter().filter(wanted).collect())
            }
        }
    }

    /// Stores a blob beside the image.
    ///
    /// # Errors
    /// When the place refuses it.
    pub async fn push_blob(&self, digest: &Digest, bytes: Bytes) -> Result<(), OriginError> {
        match &self.place {
            Place::Registry(repository) => {
                let pushed = repository.push_blob(digest, bytes).await;
                pushed.map_err(|source| self.registry_error(source))
            }
            Place::Local(local) => {
                local.put_blob(digest, &bytes).map_err(|source| self.local_error(source))
            }
        }
    }

    /// Stores a manifest beside the image, to be found as the name says.
    ///
    /// # Errors
    /// When the place refuses it.
    pub async fn push_manifest(
        &self,
        found: FoundAs<'_>,
        descriptor: &Descriptor,
        bytes: Bytes,
    ) -> Result<(), OriginError> {
        match &self.place {
            Place::Registry(repository) => {
                let target = match found {
                    FoundAs::Part | FoundAs::Referrer => descriptor.digest.to_string(),
                    FoundAs::Tag(tag) => tag.to_owned(),
                };
                let pushed = repository.push_manifest(&target, &descriptor.media_type, bytes).await;
                pushed.map(|_descriptor| ()).map_err(|source| self.registry_error(source))
            }
            Place::Local(local) => {
                let put = local.put_blob(&descriptor.digest, &bytes);
                let put = put.and_then(|()| match found {
                    FoundAs::Part => Ok(()),
                    FoundAs::Referrer => local.put_index_entry(descriptor.clone()),
                    FoundAs::Tag(tag) => local.tag(tag, descriptor.clone()),
                });
                put.map_err(|source| self.local_error(source))
            }
        }
    }

    fn registry_error(&self, source: FetchError) -> OriginError {
        OriginError::Registry { image: self.name.to_string(), source }
    }

    fn local_error(&self, source: LocalError) -> OriginError {
        OriginError::Local { image: self.name.to_string(), source }
    }

    fn wrong_platform(&self, wanted: &Platform, available: Vec<String>) -> OriginError {
        OriginError::WrongPlatform {
            image: self.name.to_string(),
            wanted: wanted.to_string(),
            available,
        }
    }

    pub(crate) fn not_an_image(&self, why: &dyn std::fmt::Display) -> OriginError {
        OriginError::NotAnImage { image: self.name.to_string(), why: why.to_string() }
    }
}

fn platforms(index: &oci::Index) -> Vec<String> {
    index.images().filter_map(|image| image.platform.as_ref()).map(Platform::to_string).collect()
}

/// How many connections are open before anything is read.
const WARM_CONNECTIONS: usize = 6;

/// How much of a local blob is read at a time.
const FILE_PIECE: u64 = 256 << 10;

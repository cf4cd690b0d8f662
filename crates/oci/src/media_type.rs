//! Media types of the OCI and Docker (schema 2) documents, and what they say about a layer.

/// An OCI image manifest; also the form of an artifact such as a SOCI index.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// An uncompressed OCI layer.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// A gzip-compressed OCI layer.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// A zstd-compressed OCI layer.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// The blob `{}` that stands where an artifact has no configuration.
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// A Docker schema 2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// A Docker manifest list.
pub const DOCKER_MANIFEST_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// A Docker image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// A gzip-compressed Docker layer.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// Bytes of no stated kind; what SOCI calls its zTOCs.
pub const OCTET_STREAM: &str = "application/octet-stream";

/// What a client that can read every kind of manifest accepts, best first.
pub const MANIFEST_TYPES: [&str; 4] =
    [OCI_INDEX, OCI_MANIFEST, DOCKER_MANIFEST_LIST, DOCKER_MANIFEST];

/// Docker's first manifest format, with and without signature.
pub(crate) const DOCKER_SCHEMA1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

const TAR_LAYERS: [&str; 4] = [
    OCI_LAYER,
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// How the tar of a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerCompression {
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames.
    Zstd,
    /// A plain tar.
    None,
}

/// A layer of a kind that Hermes cannot read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not the media type of a tar layer with gzip, zstd or no compression", .0.escape_debug())]
pub struct UnknownLayerTypeError(pub String);

impl LayerCompression {
    /// The compression that a layer's media type states.
    ///
    /// Docker's types and those of layers that may not be redistributed are included.
    ///
    /// # Errors
    /// The type is that of something else, or of an encrypted layer.
    pub fn from_media_type(media_type: &str) -> Result<Self, UnknownLayerTypeError> {
        TAR_LAYERS
            .iter()
            .find_map(|tar| match media_type.strip_prefix(tar)? {
                "" => Some(Self::None),
                "+gzip" | ".gzip" => Some(Self::Gzip),
                "+zstd" | ".zstd" => Some(Self::Zstd),
                _ => None,
            })
            .ok_or_else(|| UnknownLayerTypeError(media_type.chars().take(200).collect()))
    }
}

/// The type proper: without parameters such as `; charset=utf-8`.
#[must_use]
pub fn essence(media_type: &str) -> &str {
    media_type.split(';').next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(media_type: &str, expected: Option<LayerCompression>) {
        assert_eq!(LayerCompression::from_media_type(media_type).ok(), expected, "{media_type}");
    }

    #[test]
    fn compression_follows_from_the_media_type() {
        use LayerCompression as C;
        check(OCI_LAYER, Some(C::None));
        check(OCI_LAYER_GZIP, Some(C::Gzip));
        check(OCI_LAYER_ZSTD, Some(C::Zstd));
        check("application/vnd.oci.image.layer.nondistributable.v1.tar", Some(C::None));
        check("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Some(C::Gzip));
        check("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", Some(C::Zstd));
        check("application/vnd.docker.image.rootfs.diff.tar", Some(C::None));
        check(DOCKER_LAYER_GZIP, Some(C::Gzip));
        check("application/vnd.docker.image.rootfs.diff.tar.zstd", Some(C::Zstd));
        check("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Some(C::Gzip));
        check("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", None);
        check("application/vnd.oci.image.layer.v1.tarball", None);
        check(OCI_CONFIG, None);
        check("", None);
    }

    #[test]
    fn an_unknown_type_is_named() {
        let error = LayerCompression::from_media_type("application/x-squashfs").unwrap_err();
        assert!(error.to_string().contains("application/x-squashfs"), "{error}");
    }

    #[test]
    fn parameters_are_not_part_of_the_type() {
        assert_eq!(essence("application/json; charset=utf-8"), "application/json");
        assert_eq!(essence(" application/json "), "application/json");
        assert_eq!(essence(""), "");
    }
}

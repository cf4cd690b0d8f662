//! The image configuration: what the runtime starts, and the DiffIDs of the layers.

use serde::{Deserialize, Serialize};

use crate::go_json::{empty_as_none, null_as_default};
use crate::{Digest, Platform};

/// The part of an image configuration that Hermes reads.
///
/// Reading and writing it again loses the rest: configurations are passed on as bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Go's name of the architecture.
    #[serde(default, deserialize_with = "null_as_default")]
    pub architecture: String,
    /// Go's name of the operating system.
    #[serde(default, deserialize_with = "null_as_default")]
    pub os: String,
    /// The architecture's variant.
    #[serde(default, deserialize_with = "empty_as_none", skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// What a container of the image runs.
    #[serde(default, deserialize_with = "null_as_default")]
    pub config: ProcessConfig,
    /// The layers' uncompressed identities.
    pub rootfs: RootFs,
}

/// What a container runs unless told otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ProcessConfig {
    /// User, or user and group after a colon; empty means root.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub user: String,
    /// The environment, as `NAME=value`.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// The program and its first arguments.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// More arguments, or the program where there is no entry point.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Where the program starts; empty means `/`.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub working_dir: String,
}

/// The layers of the root file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type", default, deserialize_with = "null_as_default")]
    pub kind: String,
    /// The digests of the uncompressed layers, lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub diff_ids: Vec<Digest>,
}

impl ImageConfig {
    /// Reads a configuration blob.
    ///
    /// # Errors
    /// The bytes are not JSON of that shape.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The platform that the image is made for.
    #[must_use]
    pub fn platform(&self) -> Platform {
        Platform { variant: self.variant.clone(), ..Platform::new(&self.os, &self.architecture) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_and_unknown_fields_are_tolerated() {
        let config = ImageConfig::from_bytes(
            br#"{"architecture":"amd64","os":"linux","created":"2026-01-01T00:00:00Z",
            "config":{"Env":null,"Cmd":["sh"],"Entrypoint":null,"Labels":{"a":"b"},"WorkingDir":"/x"},
            "rootfs":{"type":"layers","diff_ids":null},"history":[]}"#,
        )
        .unwrap();
        assert_eq!(config.config.cmd, ["sh"]);
        assert_eq!(config.config.working_dir, "/x");
        assert!(config.config.env.is_empty() && config.rootfs.diff_ids.is_empty());
        assert_eq!(config.platform(), Platform::new("linux", "amd64"));
    }

    #[test]
    fn a_configuration_without_layers_field_is_refused() {
        ImageConfig::from_bytes(b"{}").unwrap_err();
        ImageConfig::from_bytes(b"").unwrap_err();
    }
}

//! What a user may call an image.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use oci::{Digest, Reference};

/// An image, as a user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageName {
    /// In a registry: `nginx:1.27`, `registry.example/app@sha256:…`.
    Registry(Reference),
    /// In an OCI layout folder: `oci:DIR[:TAG]`.
    Layout {
        /// The folder that holds `index.json`.
        dir: PathBuf,
        /// The tag (`org.opencontainers.image.ref.name`); without one the layout holds one image.
        tag: Option<String>,
    },
    /// In a tar of an OCI layout: `oci-archive:FILE[:TAG]`.
    Archive {
        /// The tar file.
        file: PathBuf,
        /// As in a layout.
        tag: Option<String>,
    },
}

/// A text that names no image.
#[derive(Debug, thiserror::Error)]
pub enum ParseImageNameError {
    /// `oci:` or `oci-archive:` without a path.
    #[error("`{0}` names no path; write oci:DIR[:TAG] or oci-archive:FILE[:TAG]")]
    NoPath(String),
    /// Not a registry reference either.
    #[error(
        "`{text}` is no image; write a registry reference, oci:DIR[:TAG] or oci-archive:FILE[:TAG]"
    )]
    Reference {
        /// What was written.
        text: String,
        /// What is wrong with it as a reference.
        source: oci::ParseReferenceError,
    },
}

impl ImageName {
    /// The digest, where it is part of the name: then it always means the same image.
    #[must_use]
    pub const fn digest(&self) -> Option<Digest> {
        match self {
            Self::Registry(reference) => reference.digest(),
            Self::Layout { .. } | Self::Archive { .. } => None,
        }
    }
}

impl FromStr for ImageName {
    type Err = ParseImageNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let split = |rest: &str| -> Result<(PathBuf, Option<String>), ParseImageNameError> {
            // A colon before the last slash belongs to the path.
            let (path, tag) = match rest.rsplit_once(':') {
                Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
                _ => (rest, None),
            };
            if path.is_empty() {
                return Err(ParseImageNameError::NoPath(text.to_owned()));
            }
            Ok((PathBuf::from(path), tag.filter(|tag| !tag.is_empty()).map(str::to_owned)))
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = split(rest)?;
            return Ok(Self::Layout { dir, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = split(rest)?;
            return Ok(Self::Archive { file, tag });
        }
        match text.parse() {
            Ok(reference) => Ok(Self::Registry(reference)),
            Err(source) => Err(ParseImageNameError::Reference { text: text.to_owned(), source }),
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, tag) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Layout { dir, tag } => ("oci", dir, tag),
            Self::Archive { file, tag } => ("oci-archive", file, tag),
        };
        write!(f, "{kind}:{}", path.display())?;
        match tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (text, shown) in [
            ("nginx", "docker.io/library/nginx"),
            ("127.0.0.1:5000/a/b:1", "127.0.0.1:5000/a/b:1"),
            ("oci:/images/app:v1", "oci:/images/app:v1"),
            ("oci:images", "oci:images"),
            ("oci:/odd:name/app", "oci:/odd:name/app"),
            ("oci-archive:app.tar:v1", "oci-archive:app.tar:v1"),
        ] {
            let name: ImageName = text.parse().unwrap();
            assert_eq!(name.to_string(), shown, "{text}");
        }
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for text in ["", "oci:", "oci-archive::x", "upper/CASE", "a b"] {
            assert!(text.parse::<ImageName>().is_err(), "{text}");
        }
    }
}

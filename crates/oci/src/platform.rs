//! Platforms, and which image of an index runs on which machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::go_json::{empty_as_none, null_as_default};

/// The machines that an image is made for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// Go's name of the architecture: `amd64`, `arm64`.
    #[serde(default, deserialize_with = "null_as_default")]
    pub architecture: String,
    /// Go's name of the operating system: `linux`.
    #[serde(default, deserialize_with = "null_as_default")]
    pub os: String,
    /// The operating system's version; only Windows uses it.
    #[serde(
        rename = "os.version",
        default,
        deserialize_with = "empty_as_none",
        skip_serializing_if = "Option::is_none"
    )]
    pub os_version: Option<String>,
    /// What the operating system must offer; only Windows uses it.
    #[serde(
        rename = "os.features",
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub os_features: Vec<String>,
    /// The architecture's variant: `v7`, `v8`.
    #[serde(default, deserialize_with = "empty_as_none", skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// What the processor must offer, in Docker manifest lists.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
}

impl Platform {
    /// A platform without a variant.
    #[must_use]
    pub fn new(os: &str, architecture: &str) -> Self {
        Self { os: os.to_owned(), architecture: architecture.to_owned(), ..Self::default() }
    }

    /// The platform that this program was compiled for.
    #[must_use]
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        let variant = variant.map(ToOwned::to_owned);
        Self { variant, ..Self::new(std::env::consts::OS, architecture) }
    }

    /// Whether an image for `self` runs on a `machine`.
    ///
    /// A machine runs images of its own and of lower variants, and an arm64 machine those for arm.
    #[must_use]
    pub fn runs_on(&self, machine: &Self) -> bool {
        self.rank_on(machine).is_some()
    }

    /// How well an image for `self` fits a `machine`: the lower the better, `None` if not at all.
    #[must_use]
    pub(crate) fn rank_on(&self, machine: &Self) -> Option<u32> {
        let (image_arch, image_level) = self.normalised();
        let (machine_arch, machine_level) = machine.normalised();
        if !self.os.eq_ignore_ascii_case(&machine.os) || image_level > machine_level {
            return None;
        }
        let lower_by = machine_level - image_level;
        match (image_arch.as_str(), machine_arch.as_str()) {
            (image, machine) if image == machine => Some(lower_by),
            ("arm", "arm64") => Some(ANOTHER_ARCHITECTURE + lower_by),
            _ => None,
        }
    }

    /// Architecture and level, with the many spellings of the same made one.
    fn normalised(&self) -> (String, u32) {
        let variant = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let level = variant.trim_start_matches('v').split('.').next().unwrap_or_default();
        let level = level.parse().ok().filter(|level| *level < ANOTHER_ARCHITECTURE);
        match self.architecture.to_ascii_lowercase().as_str() {
            "amd64" | "x86_64" | "x86-64" => ("amd64".to_owned(), level.unwrap_or(1)),
            "arm64" | "aarch64" => ("arm64".to_owned(), level.unwrap_or(8)),
            "armhf" => ("arm".to_owned(), 7),
            "armel" => ("arm".to_owned(), 6),
            "arm" => ("arm".to_owned(), level.unwrap_or(7)),
            other => (other.to_owned(), level.unwrap_or(0)),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// A text that is not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no platform; write one as linux/arm64", .0.escape_debug())]
pub struct ParsePlatformError(String);

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None)
                if !os.is_empty() && !architecture.is_empty() =>
            {
                let variant = variant.map(str::to_owned);
                Ok(Self { variant, ..Self::new(os, architecture) })
            }
            _ => Err(ParsePlatformError(text.to_owned())),
        }
    }
}

/// Worse than any lower variant of the right architecture.
const ANOTHER_ARCHITECTURE: u32 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_as_they_are_written() {
        for text in ["linux/amd64", "linux/arm/v7", "windows/amd64"] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), text);
        }
        for text in ["", "linux", "linux/", "/amd64", "linux/arm/v7/x"] {
            let err = text.parse::<Platform>().unwrap_err().to_string();
            assert!(err.contains("no platform"), "{text}: {err}");
        }
    }

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/');
        let (os, arch) = (parts.next().unwrap(), parts.next().unwrap());
        Platform { variant: parts.next().map(ToOwned::to_owned), ..Platform::new(os, arch) }
    }

    #[track_caller]
    fn check(image: &str, machine: &str, runs: bool) {
        assert_eq!(platform(image).runs_on(&platform(machine)), runs, "{image} on {machine}");
    }

    #[test]
    fn images_run_on_their_machine_and_on_better_ones() {
        check("linux/amd64", "linux/amd64", true);
        check("linux/amd64/v1", "linux/amd64", true);
        check("linux/x86_64", "linux/amd64", true);
        check("linux/amd64/v2", "linux/amd64", false);
        check("linux/amd64/v2", "linux/amd64/v3", true);
        check("linux/arm64", "linux/arm64/v8", true);
        check("linux/arm64/8", "linux/arm64", true);
        check("linux/arm64/v9", "linux/arm64/v8", false);
        check("linux/arm/v7", "linux/arm64/v8", true);
        check("linux/arm/v6", "linux/arm/v7", true);
        check("linux/arm/v7", "linux/arm/v6", false);
        check("linux/arm", "linux/arm/v7", true);
        check("linux/riscv64", "linux/riscv64", true);
        check("linux/amd64", "linux/arm64", false);
        check("windows/amd64", "linux/amd64", false);
        check("unknown/unknown", "linux/amd64", false);
        check("linux/amd64/v4294967296", "linux/amd64", true);
    }

    #[test]
    fn the_host_runs_images_made_for_it() {
        let host = Platform::host();
        assert!(host.runs_on(&host));
        assert_eq!(platform(&host.to_string()), host);
        assert_eq!(host.os, "linux");
    }

    #[test]
    fn the_right_architecture_is_better_than_an_older_one() {
        let machine = platform("linux/arm64/v8");
        let rank = |image| platform(image).rank_on(&machine);
        assert!(rank("linux/arm64") < rank("linux/arm/v8"));
        assert!(rank("linux/arm/v7") < rank("linux/arm/v6"));
    }
}

//! Why an image is lazy or not: the closed list.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why an image is lazy or not. Metrics, events and commands use these names; nothing else is ever the reason.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// It is lazy: a policy selects it, and it has an index.
    Indexed,
    /// Hermes has fetched all of it: a policy selects it, and it had no index or is to be eager.
    Streamed,
    /// No policy selects it.
    NoPolicy,
    /// The policies that would select it are paused.
    Paused,
    /// The policies that would select it exclude it.
    Excluded,
    /// The policies that would select it are for other platforms than this node's.
    OtherPlatform,
    /// The policy that selects it wants it downloaded.
    Eager,
    /// The registry has no index for it.
    NoIndex,
    /// The index cannot be used: it is malformed, too large, or was found to lie.
    BadIndex,
    /// The registry cannot be reached, or failed.
    RegistryUnavailable,
    /// The registry did not answer in time.
    RegistrySlow,
    /// The registry wants other credentials than there are.
    Unauthorized,
    /// The image is something that is never lazy.
    Unsupported,
    /// containerd wants a layer at another place than the image has it.
    OtherLayer,
    /// This machine is in the way: its disk is full, or fails.
    Local,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Indexed,
        Self::Streamed,
        Self::NoPolicy,
        Self::Paused,
        Self::Excluded,
        Self::OtherPlatform,
        Self::Eager,
        Self::NoIndex,
        Self::BadIndex,
        Self::RegistryUnavailable,
        Self::RegistrySlow,
        Self::Unauthorized,
        Self::Unsupported,
        Self::OtherLayer,
        Self::Local,
    ];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Indexed => "indexed",
            Self::Streamed => "streamed",
            Self::NoPolicy => "no-policy",
            Self::Paused => "paused",
            Self::Excluded => "excluded",
            Self::OtherPlatform => "other-platform",
            Self::Eager => "eager",
            Self::NoIndex => "no-index",
            Self::BadIndex => "bad-index",
            Self::RegistryUnavailable => "registry-unavailable",
            Self::RegistrySlow => "registry-slow",
            Self::Unauthorized => "unauthorized",
            Self::Unsupported => "unsupported",
            Self::OtherLayer => "other-layer",
            Self::Local => "local",
        }
    }

    /// Whether containerd fetches no layer.
    #[must_use]
    pub const fn is_lazy(self) -> bool {
        matches!(self, Self::Indexed | Self::Streamed)
    }
}

//! Which images are lazy, and how: `HermesPolicy` objects, and what a set of them decides of an image.
//!
//! An object is the same whether it lies as YAML in a folder of the node or is served by Kubernetes. Nothing
//! here reads a file or a clock.
#![forbid(unsafe_code)]

mod document;
mod reason;
mod selector;
mod set;

pub use document::{
    API_VERSION, BackendChoice, CacheClass, Completion, HermesPolicy, KIND, Metadata, Mode,
    ParsePolicyError, PolicySpec, parse,
};
pub use reason::Reason;
pub use selector::{BadSelector, Selector};
pub use set::{BadPolicy, Behaviour, PolicySet, Selected, subject};

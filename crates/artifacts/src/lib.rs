//! Where an image, its layers and its index come from: registry, layout, archive, local store.

mod index_store;
mod indexes;
mod local;
mod name;
mod origin;

pub use index_store::{IndexOrigin, IndexStore, StoreIndexError, StoredIndex};
pub use indexes::{FoundIndexes, PushIndexError, PushedIndexes, find_indexes, push_indexes};
pub use local::LocalError;
pub use name::{ImageName, ParseImageNameError};
pub use origin::{BlobStream, FoundManifest, Image, ImageLayer, Origin, OriginError};

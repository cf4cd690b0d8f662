//! Where an image, its layers and its index come from: registry, layout, archive, local store.

mod index_store;
mod indexes;
mod local;
mod name;
mod origin;
mod push;

pub use index_store::{
    IndexInParts, IndexOrigin, IndexStore, StoreIndexError, StoredIndex, StoredWindows,
};
pub use indexes::{
    FetchWindowsError, FoundIndexes, IndexCame, IndexOutcome, find_indexes, have_windows,
    stored_indexes,
};
pub use local::LocalError;
pub use name::{ImageName, ParseImageNameError};
pub use origin::{BlobStream, FoundAs, FoundManifest, Image, ImageLayer, Origin, OriginError};
pub use push::{
    ConvertedImage, PushIndexError, PushedIndexes, StartRanges, push_converted, push_indexes,
};

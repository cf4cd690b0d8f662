//! Spans that are given up under mounts.

use std::ops::Range;
use std::time::Duration;

use cache::Evicted;
use fill::Layer;

use super::{FrontEnds, MountState};
use crate::error::EvictLayerError;
use crate::precontent::PreContent;
use crate::record::Backend;

impl FrontEnds {
    /// Gives up spans of a layer, which may be mounted: they are fetched again when somebody reads them.
    ///
    /// Those stay that were used within the last `idle`, and all that somebody may be about to read. Of
    /// a sealed layer nothing goes at once: it is opened, and what was on its way before that is given
    /// the grace time of the cache.
    ///
    /// # Errors
    /// [`EvictLayerError`]. Readers get the right bytes all the same.
    pub fn evict(
        &self,
        layer: &Layer,
        spans: &[u32],
        idle: Duration,
    ) -> Result<Evicted, EvictLayerError> {
        if self.has_lost_readers(layer) {
            return Err(EvictLayerError::Lost { layer: *layer.digest() });
        }
        self.precontent.iter().for_each(PreContent::settle);
        let is_read = |range: &Range<u64>| {
            self.precontent.iter().any(|precontent| precontent.may_read(layer, range))
        };
        Ok(layer.evict(spans, idle, &is_read)?)
    }

    /// Whether a mount reads the layer whose reads may not come to us, because it was lost once.
    #[must_use]
    pub fn has_lost_readers(&self, layer: &Layer) -> bool {
        let mounts = self.mounts.lock();
        mounts.values().any(|mount| {
            mount.state == MountState::Lost
                && mount.record.backend != Backend::Fuse
                && mount.record.layers.contains(layer.digest())
        })
    }
}

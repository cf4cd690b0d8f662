//! How much room the store takes up, and what goes when it is too much.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use oci::Digest;

use super::list::allocated;
use super::{HoleSupport, INCOMING, LAYERS, QUARANTINE, Store, TRASH};
use crate::layer::{Layer, SpanState, whole_blocks};

/// The room that a store takes up could not be determined.
#[derive(Debug, thiserror::Error)]
#[error("measuring the layer cache in {}", root.display())]
pub struct UsageError {
    root: PathBuf,
    source: io::Error,
}

/// A piece that can go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    /// Sealed layers in use go last: their reads are not seen, so they only look cold.
    is_sealed: bool,
    last_use: u32,
    layer: usize,
    span: u32,
}

impl Store {
    /// How many bytes the store takes up on the disk: allocated blocks, not lengths of sparse files.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn usage(&self) -> Result<u64, UsageError> {
        let mut sum = 0_u64;
        for folder in [LAYERS, INCOMING, QUARANTINE, TRASH] {
            let bytes = allocated(&self.root.join(folder));
            sum = sum.saturating_add(bytes.map_err(|source| self.unmeasured(source))?);
        }
        Ok(sum)
    }

    /// How many bytes have to go before `coming` more fit the quota; 0 without a quota.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn excess(&self, coming: u64) -> Result<u64, UsageError> {
        let Some(quota) = self.quota else { return Ok(0) };
        Ok(self.usage()?.saturating_add(coming).saturating_sub(quota))
    }

    /// The quota in bytes.
    #[must_use]
    pub const fn quota(&self) -> Option<u64> {
        self.quota
    }

    /// Which spans of which layers to give up so that about `needed` bytes become free; fewer if there
    /// are not enough.
    ///
    /// First go layers that nobody has open, whole, those first that were used longest ago: remove
    /// them. Then spans of open layers, in the order of their last use; those used within the grace
    /// period stay. Spans of sealed open layers come last; the caller has to make sure that the kernel
    /// asks again, and unseal, before it evicts them.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn plan_eviction(&self, needed: u64) -> Result<Vec<(Digest, Vec<u32>)>, UsageError> {
        let mut plan = Vec::new();
        let mut left = needed;
        let mut idle = self.list().map_err(|error| self.unmeasured(io::Error::other(error)))?;
        idle.retain(|layer| !layer.is_open);
        idle.sort_by_key(|layer| layer.last_used);
        for layer in idle {
            if left == 0 {
                return Ok(plan);
            }
            left = left.saturating_sub(layer.allocated);
            plan.push((layer.digest, (0..layer.spans).collect()));
        }
        if left > 0 && self.holes == HoleSupport::Full {
            let mut open: Vec<Arc<Layer>> =
                self.open.lock().values().filter_map(Weak::upgrade).collect();
            open.sort_by_key(|layer| *layer.digest());
            plan.extend(plan_spans(&open, left));
        }
        Ok(plan)
    }

    fn unmeasured(&self, source: io::Error) -> UsageError {
        UsageError { root: self.root.clone(), source }
    }
}

fn plan_spans(layers: &[Arc<Layer>], needed: u64) -> Vec<(Digest, Vec<u32>)> {
    let mut candidates: Vec<Candidate> = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        let is_sealed = layer.is_sealed();
        let goes = |span: &u32| layer.state(*span) != SpanState::Missing && !layer.is_in_use(*span);
        candidates.extend((0..layer.shape().span_count()).filter(goes).map(|span| Candidate {
            is_sealed,
            last_use: layer.last_use(span),
            layer: at,
            span,
        }));
    }
    candidates.sort_unstable();
    let mut chosen: Vec<Vec<u32>> = vec![Vec::new(); layers.len()];
    let mut order = Vec::new();
    let mut left = needed;
    for Candidate { layer: at, span, .. } in candidates {
        if left == 0 {
            break;
        }
        let (Some(layer), Some(spans)) = (layers.get(at), chosen.get_mut(at)) else { continue };
        let blocks = whole_blocks(&layer.shape().range(span), layer.shape().bytes);
        left = left.saturating_sub(blocks.end - blocks.start);
        if spans.is_empty() {
            order.push(at);
        }
        spans.push(span);
    }
    order
        .into_iter()
        .filter_map(|at| Some((*layers.get(at)?.digest(), std::mem::take(chosen.get_mut(at)?))))
        .collect()
}

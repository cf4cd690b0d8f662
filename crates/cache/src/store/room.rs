//! How much room the store takes up, who is told when it is too much, and what can go.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::holes::unnamed;
use super::list::allocated;
use super::{HoleSupport, INCOMING, LAYERS, QUARANTINE, Store, TRASH};
use crate::disk;
use crate::layer::{Layer, SpanState, ticks, whole_blocks};

/// The room that a store takes up could not be determined.
#[derive(Debug, thiserror::Error)]
#[error("measuring the layer cache in {}", root.display())]
pub struct UsageError {
    root: PathBuf,
    source: io::Error,
}

/// How much may still be written, and who is told when it is used up.
pub(crate) struct Allowance {
    quota: Option<u64>,
    left: AtomicU64,
    told: AtomicBool,
    tell: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for Allowance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Allowance").field("quota", &self.quota).finish_non_exhaustive()
    }
}

impl Allowance {
    /// Nothing may be written before the first measurement.
    pub(crate) fn new(quota: Option<u64>) -> Self {
        Self { quota, left: AtomicU64::new(0), told: AtomicBool::new(false), tell: OnceLock::new() }
    }

    /// Notes a write, which takes up at most so many bytes.
    pub(crate) fn spend(&self, bytes: u64) {
        if self.quota.is_none() {
            return;
        }
        let spend = |left: u64| Some(left.saturating_sub(bytes));
        let before = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend);
        let is_used_up = before.is_ok_and(|before| before < bytes);
        if is_used_up
            && !self.told.swap(true, Ordering::Relaxed)
            && let Some(tell) = self.tell.get()
        {
            tell();
        }
    }

    /// Starts again from a measurement, during which so much was spent of `left_before`.
    fn renew(&self, usage: u64, left_before: u64) {
        let Some(quota) = self.quota else { return };
        let spent = left_before.saturating_sub(self.left.load(Ordering::Relaxed));
        let left = match quota.saturating_sub(usage).saturating_sub(spent) {
            // It is known that nothing is left; not each write need say so.
            0 => quota / 16,
            left => left,
        };
        self.left.store(left, Ordering::Relaxed);
        self.told.store(false, Ordering::Relaxed);
    }
}

/// A piece that can go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    /// Sealed layers go last: their reads are not seen, so they only look cold.
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
        let left_before = self.shared.allowance.left.load(Ordering::Relaxed);
        let mut sum = 0_u64;
        for folder in [LAYERS, INCOMING, QUARANTINE, TRASH] {
            let bytes = allocated(&self.root.join(folder));
            sum = sum.saturating_add(bytes.map_err(|source| self.unmeasured(source))?);
        }
        self.shared.allowance.renew(sum, left_before);
        Ok(sum)
    }

    /// The quota in bytes.
    #[must_use]
    pub fn quota(&self) -> Option<u64> {
        self.shared.allowance.quota
    }

    /// Has `tell` called when the quota may be exceeded: by the write that could have done so since the
    /// last [`usage`](Self::usage), and not again before the next. If it was exceeded then, another
    /// sixteenth of the quota may be written before. It must not block. Only the first one is called.
    pub fn on_quota(&self, tell: Box<dyn Fn() + Send + Sync>) {
        // A second one has nothing to do.
        self.shared.allowance.tell.set(tell).ok();
    }

    /// How many bytes the file system of the store has left, by its own figures.
    ///
    /// # Errors
    ///
    /// The disk failed.
    pub fn free_bytes(&self) -> Result<u64, UsageError> {
        let figures = rustix::fs::statvfs(&self.root);
        let figures = figures.map_err(|errno| self.unmeasured(errno.into()))?;
        Ok(figures.f_bavail.saturating_mul(figures.f_frsize))
    }

    /// Whether `bytes` could be written now. They are not kept.
    ///
    /// # Errors
    ///
    /// The disk failed otherwise than by being full.
    pub fn has_room(&self, bytes: u64) -> Result<bool, UsageError> {
        let reserve = || -> io::Result<bool> {
            let file = unnamed(&self.root)?;
            // What the file system does not tell by its figures, a user's quota, is told by doing it.
            match rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes) {
                Ok(()) => Ok(true),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    let figures = rustix::fs::fstatvfs(&file)?;
                    Ok(figures.f_bavail.saturating_mul(figures.f_frsize) >= bytes)
                }
                Err(errno) => Err(errno.into()),
            }
        };
        match reserve() {
            Err(error) if disk::is_full(&error) => Ok(false),
            result => result.map_err(|source| self.unmeasured(source)),
        }
    }

    /// Which spans of `layers`, which are open, to give up so that about `needed` bytes become free;
    /// fewer if there are not enough, none if the file system does not give holes back.
    ///
    /// They come in the order of their last use; those used within the last `idle` stay. Spans of
    /// sealed layers come last, one layer after the other: the caller makes sure that the kernel asks
    /// again, and unseals, before it evicts them.
    #[must_use]
    pub fn plan_eviction(
        &self,
        layers: &[Arc<Layer>],
        needed: u64,
        idle: Duration,
    ) -> Vec<(Arc<Layer>, Vec<u32>)> {
        if self.holes != HoleSupport::Full {
            return Vec::new();
        }
        let mut chosen: Vec<Vec<u32>> = vec![Vec::new(); layers.len()];
        let mut order = Vec::new();
        let mut left = needed;
        for Candidate { layer: at, span, .. } in candidates(layers, ticks(idle)) {
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
        let chosen = order.into_iter().filter_map(|at| {
            Some((Arc::clone(layers.get(at)?), std::mem::take(chosen.get_mut(at)?)))
        });
        chosen.collect()
    }

    fn unmeasured(&self, source: io::Error) -> UsageError {
        UsageError { root: self.root.clone(), source }
    }
}

/// Everything that can go, the coldest first.
fn candidates(layers: &[Arc<Layer>], idle: u32) -> Vec<Candidate> {
    let mut candidates: Vec<Candidate> = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        let is_sealed = layer.is_sealed();
        let spans = 0..layer.shape().span_count();
        let last = spans.clone().map(|span| layer.last_use(span)).max().unwrap_or_default();
        let goes =
            |span: &u32| layer.state(*span) != SpanState::Missing && !layer.is_in_use(*span, idle);
        candidates.extend(spans.filter(goes).map(|span| Candidate {
            is_sealed,
            last_use: if is_sealed { last } else { layer.last_use(span) },
            layer: at,
            span,
        }));
    }
    candidates.sort_unstable();
    candidates
}

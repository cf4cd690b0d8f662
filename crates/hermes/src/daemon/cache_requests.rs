//! What the daemon does with its cache when asked.

use std::sync::Arc;

use anyhow::{Context, Result};
use oci::Digest;
use serde_json::{Value, json};

use super::Daemon;

impl Daemon {
    pub(super) fn cache_list(&self) -> Result<Value> {
        let layers = self.store.list()?.into_iter().map(|layer| {
            let last_used = layer.last_used.elapsed().unwrap_or_default().as_secs();
            json!({
                "digest": layer.digest,
                "bytes": layer.bytes,
                "spans": layer.spans,
                "spans_present": layer.spans_present,
                "allocated": layer.allocated,
                "sealed": layer.sealed.is_some(),
                "last_used_seconds_ago": last_used,
                "in_use": layer.is_open,
            })
        });
        Ok(json!({ "layers": layers.collect::<Vec<Value>>(), "allocated": self.store.usage()? }))
    }

    /// Removes layers that no mount uses: all, or the least recently used until `keep` bytes are left.
    pub(super) fn cache_prune(&self, keep: Option<u64>) -> Result<Value> {
        self.reap();
        let (mut removed, mut freed) = (0_u64, 0);
        let Some(keep) = keep else {
            let needed = self.needed_layers()?;
            let pruned = self.store.prune(&|digest| needed.contains(digest))?;
            self.forget_images();
            self.room_has_changed();
            return Ok(json!({ "layers": pruned.layers, "freed": pruned.bytes }));
        };
        for (_, digest) in self.unused_layers()? {
            if self.store.usage()? <= keep {
                break;
            }
            freed += self.store.remove(&digest)?;
            removed += 1;
        }
        self.forget_images();
        self.room_has_changed();
        Ok(json!({ "layers": removed, "freed": freed }))
    }

    /// Compares every present span with its checksum. Damaged ones are fetched again; layers of which
    /// that cannot be are removed, or named if they are mounted.
    pub(super) fn cache_verify(&self) -> Result<Value> {
        let (mut bytes, mut damaged, mut stay) = (0, Vec::<Digest>::new(), Vec::<Digest>::new());
        let listed = self.store.list()?;
        for layer in &listed {
            let opened = self
                .store
                .stored(&layer.digest)
                .with_context(|| format!("opening {}", layer.digest))?;
            let Some(opened) = opened else { continue };
            let report = opened.verify(&mut |_bytes| {})?;
            bytes += report.bytes;
            if !report.is_sound() {
                damaged.push(layer.digest);
                if !self.mend(opened, &report)? {
                    stay.push(layer.digest);
                }
            }
        }
        Ok(json!({ "layers": listed.len(), "bytes": bytes, "damaged": damaged, "stay": stay }))
    }

    /// Has what is damaged of a layer fetched again. Says whether that is possible.
    fn mend(&self, layer: Arc<cache::Layer>, report: &cache::Report) -> Result<bool> {
        let digest = *layer.digest();
        let is_sealed = layer.is_sealed();
        let spans = if report.is_damaged {
            (0..layer.shape().span_count()).collect()
        } else {
            report.damaged.clone()
        };
        drop(layer);
        let mounted = self.layers.lock().get(&digest).cloned();
        match mounted {
            Some(mounted) => mounted.refetch(&spans)?,
            // Of a mount that could not be taken over.
            None if self.needed_layers()?.contains(&digest) => return Ok(false),
            None if is_sealed => {
                self.store.remove(&digest)?;
            }
            // The damaged spans do not count as present any more.
            None => {}
        }
        tracing::warn!(layer = %digest, spans = spans.len(), "damaged spans are fetched again");
        Ok(true)
    }
}

//! What the daemon does with its cache when asked.

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
            let pruned = self.store.prune()?;
            return Ok(json!({ "layers": pruned.layers, "freed": pruned.bytes }));
        };
        for digest in self.unused_layers()? {
            if self.store.usage()? <= keep {
                break;
            }
            freed += self.store.remove(&digest)?;
            removed += 1;
        }
        Ok(json!({ "layers": removed, "freed": freed }))
    }

    /// Removes layers that no mount uses until the cache fits its quota, with `coming` bytes more.
    pub(super) fn make_room(&self, coming: u64) -> Result<()> {
        let Some(quota) = self.store.quota() else { return Ok(()) };
        let excess = self.store.usage()?.saturating_add(coming).saturating_sub(quota);
        let mut freed = 0;
        for digest in self.unused_layers()? {
            if freed >= excess {
                break;
            }
            freed += self.store.remove(&digest)?;
            tracing::info!(layer = %digest, "unused layer removed to make room");
        }
        if freed < excess {
            let missing = excess - freed;
            tracing::warn!(missing, "the cache exceeds its quota: mounted images need the room");
        }
        Ok(())
    }

    /// The layers that no mount uses, the least recently used first.
    fn unused_layers(&self) -> Result<Vec<Digest>> {
        let mut layers = self.store.list()?;
        layers.retain(|layer| !layer.is_open);
        layers.sort_by_key(|layer| layer.last_used);
        Ok(layers.into_iter().map(|layer| layer.digest).collect())
    }

    /// Compares every present span with its checksum.
    pub(super) fn cache_verify(&self) -> Result<Value> {
        let (mut bytes, mut damaged) = (0, Vec::<Digest>::new());
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
            }
        }
        Ok(json!({ "layers": listed.len(), "bytes": bytes, "damaged": damaged }))
    }
}

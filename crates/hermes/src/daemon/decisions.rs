//! What containerd was told of its images, and why: for people and for metrics.

use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use policy::Reason;
use serde::{Deserialize, Serialize};

/// What containerd was told of an image, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DecisionReport {
    /// The image's reference, as it was pulled.
    pub(crate) image: String,
    /// The manifest's digest.
    pub(crate) manifest: String,
    pub(crate) lazy: bool,
    pub(crate) reason: Reason,
    /// The policy that decided, if one knew the image.
    pub(crate) policy: Option<String>,
    /// More about the reason.
    pub(crate) detail: String,
    /// When, in seconds since 1970.
    pub(crate) at: u64,
}

/// The last decisions, one for each image.
#[derive(Debug, Default)]
pub(super) struct Decisions {
    last: HashMap<String, DecisionReport>,
    counts: BTreeMap<Reason, u64>,
}

impl DecisionReport {
    /// A decision that was just made.
    pub(super) fn new(image: &str, manifest: &str, reason: Reason, detail: String) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (image, manifest) = (image.to_owned(), manifest.to_owned());
        Self { image, manifest, lazy: reason.is_lazy(), reason, policy: None, detail, at }
    }
}

impl DecisionReport {
    /// Whether it is what the `next` one says, on another layer.
    fn is_of_the_pull_of(&self, next: &Self) -> bool {
        (&self.manifest, self.reason, &self.policy) == (&next.manifest, next.reason, &next.policy)
            && next.at.saturating_sub(self.at) < A_PULL
    }

    /// Says it to the operator, if somebody wanted the image lazy.
    fn log(&self) {
        let Self { image, policy, reason, detail, .. } = self;
        let (policy, reason) = (policy.as_deref().unwrap_or_default(), reason.name());
        match (self.lazy, policy) {
            (true, _) => tracing::info!(image, policy, reason, detail, "the image is lazy"),
            (false, "") => tracing::debug!(image, reason, "containerd unpacks the image"),
            (false, _) => {
                tracing::info!(
                    image,
                    policy,
                    reason,
                    detail,
                    "containerd unpacks the image: it is not lazy"
                );
            }
        }
    }
}

impl Decisions {
    /// Remembers a decision in place of the image's last one, and says it. containerd asks for each layer of
    /// a pull; that is one decision.
    pub(super) fn add(&mut self, decision: DecisionReport) {
        if self.last.get(&decision.image).is_some_and(|last| last.is_of_the_pull_of(&decision)) {
            return;
        }
        decision.log();
        *self.counts.entry(decision.reason).or_default() += 1;
        if self.last.len() >= MOST && !self.last.contains_key(&decision.image) {
            let oldest = self.last.values().min_by_key(|decision| decision.at);
            if let Some(image) = oldest.map(|decision| decision.image.clone()) {
                self.last.remove(&image);
            }
        }
        self.last.insert(decision.image.clone(), decision);
    }

    /// The last decision on an image, by its reference or the digest of its manifest.
    pub(super) fn of(&self, what: &str) -> Option<&DecisionReport> {
        let of_manifest = || {
            let (_, digest) = what.rsplit_once('@')?;
            self.last.values().find(|decision| decision.manifest == digest)
        };
        self.last.get(what).or_else(of_manifest)
    }

    /// How often each reason has decided.
    pub(super) fn counts(&self) -> &BTreeMap<Reason, u64> {
        &self.counts
    }
}

/// Images that are remembered; a node has fewer.
const MOST: usize = 2000;

/// Seconds between two layers of a pull, at most, mostly.
const A_PULL: u64 = 60;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_decision_on_each_image_is_remembered() {
        let mut decisions = Decisions::default();
        let new = |image: &str, at| DecisionReport {
            at,
            ..DecisionReport::new(image, &format!("sha256:{image}"), Reason::NoIndex, String::new())
        };
        for number in 0..MOST {
            decisions.add(new(&number.to_string(), 1000 + number as u64));
        }
        // Another layer, and another pull.
        decisions.add(new("0", 1000 + A_PULL - 1));
        decisions.add(new("0", 1000 + A_PULL));
        // The second is the oldest now.
        decisions.add(new("another", 8));
        let is_known = |what: &str| decisions.of(what).is_some();
        assert!(is_known("0") && !is_known("1") && is_known("2") && is_known("another"));
        assert!(is_known("x@sha256:another") && !is_known("x@sha256:1"));
        assert_eq!(decisions.counts()[&Reason::NoIndex], MOST as u64 + 2);
    }
}

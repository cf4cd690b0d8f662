//! Keeps the cache within its quota, finds room when the disk is full, and says what is completed.
//!
//! Unused layers go first, the least recently used before the others; then the coldest spans of mounted
//! layers; sealed layers last. Each class of layers goes before the next, but unused layers of the second
//! before mounted ones of the first: a container may be waiting for those. What is given up comes back when
//! somebody reads it, and is not completed again while the same mounts compete for the room.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fill::{Layer, Room};
use mounts::MountState;
use oci::Digest;
use policy::{CacheClass, Completion};
use serde::{Deserialize, Serialize};
use tokio::select;

use super::Daemon;
use super::images::{ImageRecord, LoadedImage};
use crate::args::Rule;

/// Makes room whenever it is needed, for as long as the daemon runs.
pub(super) async fn look_after(daemon: Arc<Daemon>) {
    loop {
        let round = Arc::clone(&daemon);
        let looked = tokio::task::spawn_blocking(move || round.look_for_room()).await;
        let pause = looked.map_err(anyhow::Error::from).flatten().unwrap_or_else(|err| {
            tracing::error!(error = crate::failure::in_full(&err), "no room could be made");
            daemon.engine.set_room(Room::Scarce);
            Some(PAUSE_AFTER_ERROR)
        });
        match pause {
            None => daemon.pressure.notified().await,
            Some(pause) => select! {
                () = daemon.pressure.notified() => {}
                () = tokio::time::sleep(pause) => {}
            },
        }
    }
}

/// Completes the images that are to be completed when nobody waits, for as long as the daemon runs.
pub(super) async fn complete_when_idle(daemon: Arc<Daemon>) {
    loop {
        tokio::time::sleep(IDLE.saturating_sub(daemon.engine.quiet_for()).max(LOOK_AGAIN)).await;
        if daemon.engine.quiet_for() < IDLE {
            continue;
        }
        let images: Vec<Arc<LoadedImage>> = daemon.images.lock().values().cloned().collect();
        let is_due = |image: &&Arc<LoadedImage>| {
            image.record.tuning.completion == Completion::Idle
                && !image.is_completed.swap(true, Ordering::Relaxed)
        };
        for image in images.iter().filter(is_due) {
            let image_name = &image.record.name;
            tracing::info!(image = image_name, "nobody waits: the rest of the image is fetched");
            daemon.complete(image);
        }
    }
}

/// Why a layer is not completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Shortage {
    /// The quota cannot hold it.
    Quota,
    /// The disk has too little room.
    Disk,
}

/// What the disk has to offer beyond the quota.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Disk {
    /// Enough, as far as is known.
    #[default]
    Fine,
    /// Enough for what readers wait for.
    Little,
    /// Not even that.
    Full,
}

/// How much may be fetched, and when to look again if nobody calls before.
fn verdict(disk: Disk, exceeds_quota: bool) -> (Room, Option<Duration>) {
    match (disk, exceeds_quota) {
        (Disk::Full, _) => (Room::None, Some(Duration::from_secs(1))),
        (Disk::Little, _) => (Room::Scarce, Some(Duration::from_secs(2))),
        (Disk::Fine, true) => (Room::Scarce, Some(SETTLED)),
        (Disk::Fine, false) => (Room::Enough, None),
    }
}

/// How many bytes to give up when `usage` exceeds the quota: a little more than must be, so that this
/// does not happen with each span.
fn excess(quota: Option<u64>, usage: u64) -> u64 {
    match quota {
        Some(quota) if usage > quota => usage - (quota - (quota / 16).min(MOST_HEADROOM)),
        _ => 0,
    }
}

/// Which of the layers, by the bytes that they miss, can be whole within `free` bytes: as many as
/// possible.
fn affordable(missing: &[u64], mut free: u64) -> Vec<bool> {
    let mut order: Vec<(usize, u64)> = missing.iter().copied().enumerate().collect();
    order.sort_by_key(|(_, bytes)| *bytes);
    let mut chosen = vec![false; missing.len()];
    for (at, bytes) in order {
        if bytes > free {
            break;
        }
        free -= bytes;
        if let Some(chosen) = chosen.get_mut(at) {
            *chosen = true;
        }
    }
    chosen
}

/// How far ahead is read in a cache of this size, without some rules: guesses must not displace what is
/// used.
pub(super) fn rules_within(quota: Option<u64>, without: &[Rule]) -> plan::Rules {
    let mut rules = plan::Rules::default();
    for rule in without {
        match rule {
            Rule::SmallLayers => rules.whole_small_layers = None,
            Rule::Sequential => rules.sequential = false,
            Rule::SmallFiles => rules.whole_small_files = None,
            Rule::LargeFiles => rules.large_files = None,
            Rule::Neighbours => rules.neighbours = 0,
            Rule::Directories => rules.directory = false,
            // Not for the engine.
            Rule::Program | Rule::PageCache | Rule::Completion => {}
        }
    }
    let Some(share) = quota.map(|quota| quota / 8) else { return rules };
    plan::Rules {
        whole_small_layers: rules.whole_small_layers.map(|most| most.min(share)),
        max_window: rules.max_window.min(share),
        first_unread: rules.first_unread.min(share),
        max_unread: rules.max_unread.min(share),
        max_directory: rules.max_directory.min(share),
        ..rules
    }
}

impl Daemon {
    /// Looks whether there is room, and makes some if not. Returns when to look again.
    fn look_for_room(&self) -> Result<Option<Duration>> {
        self.remove_unwanted();
        let again = self.look_at_quota_and_disk()?;
        Ok(if self.unwanted.lock().is_empty() { again } else { Some(SETTLED) })
    }

    fn look_at_quota_and_disk(&self) -> Result<Option<Duration>> {
        let quota = self.store.quota();
        let usage = self.store.usage()?;
        let step = self.engine.needs_room().max(STEP);
        let was_full = self.engine.room() == Room::None;
        let (mut needed, mut why) = (excess(quota, usage), Shortage::Quota);
        if was_full && needed < step && !self.store.has_room(step)? {
            (needed, why) = (step, Shortage::Disk);
        }
        if needed > 0 {
            let freed = self.give_up(needed, why)?;
            tracing::debug!(usage, needed, freed, "room was needed");
            // Once it is closed there may be room for what was just given up.
            let some_linger = self.has_lingering_layers()?;
            self.room.lock().has_changed |= some_linger;
        } else {
            self.room.lock().short_since = None;
        }
        let disk = self.disk(was_full, step)?;
        let exceeds =
            quota.is_some_and(|quota| self.store.usage().is_ok_and(|usage| usage > quota));
        let (room, again) = verdict(disk, exceeds);
        self.tell(disk, exceeds, quota);
        self.engine.set_room(room);
        if self.room.lock().has_changed && !self.complete_what_fits()? {
            return Ok(Some(SETTLED));
        }
        if room == Room::Enough && self.left_out_for(Shortage::Disk) {
            self.complete_if_the_disk_has_room();
            return Ok(Some(DISK_PAUSE));
        }
        Ok(again)
    }

    /// Makes room on a full disk for a mount. Says whether there is more than before.
    pub(super) async fn find_room(&self, bytes: u64) -> Result<bool> {
        let until = Instant::now() + CLOSING;
        loop {
            if self.give_up(bytes, Shortage::Disk)? > 0 {
                return Ok(true);
            }
            if !self.has_closing_layers()? || Instant::now() >= until {
                return Ok(false);
            }
            tokio::time::sleep(CLOSING_PAUSE).await;
        }
    }

    /// Whether a layer that no mount uses any more is open, because what is known of it is on its way to the
    /// disk.
    fn has_closing_layers(&self) -> Result<bool> {
        let needed = self.needed_layers()?;
        let mut layers = self.store.list()?.into_iter();
        Ok(layers.any(|layer| layer.is_open && !needed.contains(&layer.digest)))
    }

    /// What the disk has to offer. Only after it was full it is looked at.
    fn disk(&self, was_full: bool, step: u64) -> Result<Disk> {
        if !was_full && self.room.lock().disk == Disk::Fine {
            return Ok(Disk::Fine);
        }
        Ok(if !self.store.has_room(step)? {
            Disk::Full
        } else if self.store.has_room(step.saturating_mul(PLENTY))? {
            Disk::Fine
        } else {
            Disk::Little
        })
    }

    /// Says in the log what has changed.
    fn tell(&self, disk: Disk, exceeds: bool, quota: Option<u64>) {
        let mut state = self.room.lock();
        if disk == Disk::Fine {
            if let Some(since) = state.full_since.take() {
                // The disk may have been too full for the message that it is.
                let seconds = since.elapsed().as_secs();
                tracing::warn!(seconds, "the disk was full, and there is room again");
            }
        } else {
            state.full_since.get_or_insert_with(Instant::now);
        }
        if exceeds && state.excess == Excess::Never {
            let quota = quota.unwrap_or_default();
            tracing::warn!(
                quota,
                "the cache exceeds its quota, and all of it is in use: only what is read is fetched"
            );
        }
        state.disk = disk;
        state.excess = match (exceeds, state.excess) {
            (true, _) => Excess::Now,
            (false, Excess::Never) => Excess::Never,
            (false, _) => Excess::Once,
        };
    }

    /// Gives up about `needed` bytes, or as much as possible. Returns how many it were.
    fn give_up(&self, needed: u64, why: Shortage) -> Result<u64> {
        self.reap();
        let mut freed = self.remove_unused(needed, CacheClass::Standard)?;
        let classes = self.classes();
        let mut layers: Vec<Arc<Layer>> = self.layers.lock().values().cloned().collect();
        layers.retain(|layer| self.can_evict(layer));
        for class in [CacheClass::Disposable, CacheClass::Standard, CacheClass::Retained] {
            let left = needed.saturating_sub(freed);
            if class == CacheClass::Retained {
                if !self.needs_the_retained(left, why) {
                    break;
                }
                freed += self.remove_unused(left, class)?;
            }
            let of_class = |layer: &&Arc<Layer>| classes.of(layer.digest()) == class;
            let layers = layers.iter().filter(of_class).cloned().collect();
            freed += self.give_up_of(layers, needed.saturating_sub(freed), why);
        }
        Ok(freed)
    }

    /// Whether nothing but what is retained can make up for the `left` bytes. What others have just read can
    /// be given up in a moment; a full disk does not wait for that.
    fn needs_the_retained(&self, left: u64, why: Shortage) -> bool {
        let mut state = self.room.lock();
        if left == 0 {
            state.short_since = None;
            return false;
        }
        let since = *state.short_since.get_or_insert_with(Instant::now);
        why == Shortage::Disk || since.elapsed() >= PATIENCE
    }

    /// Gives up about `needed` bytes of mounted layers, or as much as possible. Returns how many it were.
    fn give_up_of(&self, layers: Vec<Arc<Layer>>, needed: u64, why: Shortage) -> u64 {
        let mut freed = 0;
        let (sealed, open): (Vec<_>, Vec<_>) =
            layers.into_iter().partition(|layer| layer.cache().is_sealed());
        let mut evict = |idle: Duration| {
            let left = needed.saturating_sub(freed);
            freed += self.evict_coldest(&open, left, idle, why);
            needed.saturating_sub(freed)
        };
        let left = evict(self.grace);
        let coming = self.open_sealed(&sealed, &open, left, why);
        if evict(self.grace.min(SETTLED)) > coming {
            evict(Duration::ZERO);
        }
        freed
    }

    /// Opens sealed layers until what can be given up of them soon is `needed`. Returns how much that is.
    ///
    /// Whoever was on his way to a layer before it was opened is not known, and is given time.
    fn open_sealed(
        &self,
        sealed: &[Arc<Layer>],
        open: &[Arc<Layer>],
        needed: u64,
        why: Shortage,
    ) -> u64 {
        if needed == 0 {
            return 0;
        }
        let opened = open.iter().filter(|layer| layer.cache().has_unknown_readers());
        let mut coming: u64 = opened.map(|layer| layer.bytes_present()).sum();
        let missing = needed.saturating_sub(coming);
        let worth = sealed.iter().filter(|layer| layer.bytes() >= WORTH_OPENING);
        let worth: Vec<Arc<Layer>> = worth.cloned().collect();
        for (layer, spans) in self.plan(&worth, missing, Duration::ZERO) {
            self.evict(&layer, &spans, Duration::ZERO, why);
            coming += layer.bytes_present();
        }
        coming
    }

    /// A span of a stream costs the whole layer again, and those of a lost mount are read past us.
    fn can_evict(&self, layer: &Layer) -> bool {
        !layer.is_in_order() && !self.front_ends.has_lost_readers(layer)
    }

    /// Gives up the coldest spans of layers that are not sealed.
    fn evict_coldest(
        &self,
        layers: &[Arc<Layer>],
        needed: u64,
        idle: Duration,
        why: Shortage,
    ) -> u64 {
        let mut freed = 0;
        // Some may be in use at the moment: then warmer ones have to go.
        for attempt in 0..ATTEMPTS {
            let left = needed.saturating_sub(freed);
            if left == 0 {
                break;
            }
            for (layer, spans) in self.plan(layers, left << (2 * attempt), idle) {
                if freed < needed {
                    freed += self.evict(&layer, &spans, idle, why);
                }
            }
        }
        freed
    }

    fn plan(
        &self,
        layers: &[Arc<Layer>],
        needed: u64,
        idle: Duration,
    ) -> Vec<(Arc<Layer>, Vec<u32>)> {
        let caches: Vec<_> = layers.iter().map(|layer| Arc::clone(layer.cache())).collect();
        let plan = self.store.plan_eviction(&caches, needed, idle).into_iter();
        let of =
            |cache: &cache::Layer| layers.iter().find(|layer| layer.digest() == cache.digest());
        plan.filter_map(|(cache, spans)| Some((Arc::clone(of(&cache)?), spans))).collect()
    }

    fn evict(&self, layer: &Layer, spans: &[u32], idle: Duration, why: Shortage) -> u64 {
        match self.front_ends.evict(layer, spans, idle) {
            Ok(evicted) => {
                if !evicted.spans.is_empty() {
                    self.leave_out(layer, why);
                }
                evicted.punched
            }
            Err(err) => {
                tracing::warn!(layer = %layer.digest(), error = %err, "nothing is given up of a layer");
                0
            }
        }
    }

    /// Removes layers up to class `most` that no mount uses until `needed` bytes are free.
    pub(super) fn remove_unused(&self, needed: u64, most: CacheClass) -> Result<u64> {
        let mut freed = 0;
        for (class, digest) in if needed > 0 { self.unused_layers()? } else { Vec::new() } {
            if freed >= needed || class > most {
                break;
            }
            match self.store.remove(&digest) {
                Ok(bytes) => freed += bytes,
                // It is just being mounted.
                Err(cache::RemoveError::InUse { .. }) => continue,
                Err(err) => return Err(err.into()),
            }
            tracing::info!(layer = %digest, "unused layer removed to make room");
        }
        if freed > 0 {
            self.forget_images();
        }
        Ok(freed)
    }

    /// Removes what is written down of images that nobody uses and of which the cache has nothing left.
    pub(super) fn forget_images(&self) {
        if let Err(err) = self.try_to_forget_images() {
            let error = crate::failure::in_full(&err);
            tracing::warn!(error, "what is known of removed images stays");
        }
    }

    fn try_to_forget_images(&self) -> Result<()> {
        // Whoever prepares an image writes it down before the cache has its layers.
        let Ok(_nobody_prepares) = self.preparing.try_lock() else { return Ok(()) };
        let records = self.front_ends.records().context("reading the records of mounts")?;
        let mut used: HashSet<Digest> = records.iter().map(|record| record.manifest).collect();
        used.extend(self.being_mounted().iter().map(|image| image.manifest));
        let stored: HashSet<Digest> =
            self.store.list()?.into_iter().map(|layer| layer.digest).collect();
        for record in ImageRecord::all(&self.root)? {
            let has_layers = record.manifest.layers.iter().any(|it| stored.contains(&it.digest));
            if !has_layers && !used.contains(&record.descriptor.digest) {
                record.remove(&self.root)?;
            }
        }
        Ok(())
    }

    /// Removes the layers of removed images, unless something else uses them. Those that are just being
    /// closed are for later.
    fn remove_unwanted(&self) {
        let unwanted = std::mem::take(&mut *self.unwanted.lock());
        if unwanted.is_empty() {
            return;
        }
        self.reap();
        let mounts = self.front_ends.list();
        let staying = mounts.iter().filter(|mount| mount.state != MountState::Detached);
        let mut needed: HashSet<Digest> =
            staying.flat_map(|mount| mount.record.layers.iter().copied()).collect();
        needed.extend(self.being_mounted().iter().flat_map(|image| image.layers.iter().copied()));
        for digest in unwanted.difference(&needed) {
            match self.store.remove(digest) {
                Ok(bytes) => {
                    tracing::info!(layer = %digest, bytes, "layer of a removed image is gone");
                }
                Err(cache::RemoveError::InUse { .. }) => {
                    self.unwanted.lock().insert(*digest);
                }
                Err(err) => {
                    tracing::warn!(layer = %digest, error = %err, "layer of a removed image stays until its room is needed");
                }
            }
        }
        self.forget_images();
    }

    /// The layers that no mount uses, each class before the next, and in it the least recently used first.
    pub(super) fn unused_layers(&self) -> Result<Vec<(CacheClass, Digest)>> {
        let needed = self.needed_layers()?;
        let mut layers = self.store.list()?;
        layers.retain(|layer| !layer.is_open && !needed.contains(&layer.digest));
        let mut classes = Classes::default();
        if !layers.is_empty() {
            let records =
                ImageRecord::all(&self.root).context("reading what is known of images")?;
            records.iter().for_each(|record| classes.count_in(record));
        }
        let mut layers: Vec<_> = layers
            .into_iter()
            .map(|layer| (classes.of(&layer.digest), layer.last_used, layer.digest))
            .collect();
        layers.sort_unstable();
        Ok(layers.into_iter().map(|(class, _, digest)| (class, digest)).collect())
    }

    /// The classes of the layers of images that are mounted.
    fn classes(&self) -> Classes {
        let mut classes = Classes::default();
        self.images.lock().values().for_each(|image| classes.count_in(&image.record));
        classes
    }

    /// Layers of mounts, also of those that could not be taken over, and of images that are being
    /// mounted.
    pub(super) fn needed_layers(&self) -> Result<HashSet<Digest>> {
        let records = self.front_ends.records().context("reading the records of mounts")?;
        let mut needed: HashSet<Digest> =
            records.into_iter().flat_map(|record| record.layers).collect();
        needed.extend(self.being_mounted().iter().flat_map(|image| image.layers.iter().copied()));
        Ok(needed)
    }

    /// Starts what is done without anybody asking: small layers whole, then everything that the quota
    /// can hold.
    pub(super) fn complete(&self, image: &LoadedImage) {
        if !image.is_completed.load(Ordering::Relaxed) {
            return;
        }
        let chosen = self.completed_layers(image);
        for layer in &chosen {
            layer.mounted();
        }
        if self.without.contains(&Rule::Completion) {
            return;
        }
        for layer in &chosen {
            layer.complete();
        }
    }

    /// The layers of an image for which there is room.
    fn completed_layers<'a>(&self, image: &'a LoadedImage) -> Vec<&'a Arc<Layer>> {
        let is_left_out = |layer: &Layer| self.left_out(layer).is_some() && missing(layer) > 0;
        let candidates = image.layers.iter().filter(|layer| !is_left_out(layer));
        let candidates: Vec<&Arc<Layer>> = candidates.collect();
        let reserved: u64 = {
            let others = self.layers.lock();
            let others = others.values().filter(|layer| layer.is_completing());
            let others = others.filter(|layer| candidates.iter().all(|own| own.id() != layer.id()));
            others.map(|layer| missing(layer)).sum()
        };
        let wanted: Vec<u64> = candidates.iter().map(|layer| missing(layer)).collect();
        let in_quota = affordable(&wanted, self.free_in_quota().saturating_sub(reserved));
        let on_disk = affordable(&wanted, self.free_on_disk().saturating_sub(reserved));
        let mut chosen = Vec::new();
        for (layer, fits) in candidates.into_iter().zip(in_quota.into_iter().zip(on_disk)) {
            match fits {
                (true, true) => chosen.push(layer),
                (false, _) => self.leave_out(layer, Shortage::Quota),
                (true, false) => self.leave_out(layer, Shortage::Disk),
            }
        }
        chosen
    }

    fn free_in_quota(&self) -> u64 {
        let Some(quota) = self.store.quota() else { return u64::MAX };
        quota.saturating_sub(self.store.usage().unwrap_or(quota))
    }

    /// What completion may use of the disk: it leaves some for what is read.
    fn free_on_disk(&self) -> u64 {
        self.store.free_bytes().unwrap_or_default().saturating_sub(STEP * PLENTY)
    }

    /// Does not complete a layer, for the time being.
    fn leave_out(&self, layer: &Layer, why: Shortage) {
        if self.room.lock().left_out.insert(*layer.digest(), why).is_none() {
            tracing::info!(layer = %layer.digest(), ?why, "there is too little room to complete a layer: only what is read of it is fetched");
        }
        // Nobody else tells when the disk has room.
        if why == Shortage::Disk {
            self.pressure.notify_one();
        }
    }

    fn left_out_for(&self, why: Shortage) -> bool {
        self.room.lock().left_out.values().any(|reason| *reason == why)
    }

    /// Completes what was left out for want of room on the disk, once there is room for all of it.
    fn complete_if_the_disk_has_room(&self) {
        let left_out = self.room.lock().left_out.clone();
        let is_meant = |layer: &&Arc<Layer>| left_out.get(layer.digest()) == Some(&Shortage::Disk);
        let wanted: u64 =
            self.layers.lock().values().filter(is_meant).map(|layer| missing(layer)).sum();
        if wanted <= self.free_on_disk() {
            self.room.lock().left_out.retain(|_, why| *why != Shortage::Disk);
            self.complete_all();
        }
    }

    /// Mounts have gone, or somebody has made room: what was left out may fit now.
    pub(super) fn room_has_changed(&self) {
        self.room.lock().has_changed = true;
        self.pressure.notify_one();
    }

    /// Completes what fits now. Says whether that is all that can be done: a layer that no mount uses
    /// may still be open, and make room in a moment.
    fn complete_what_fits(&self) -> Result<bool> {
        let mut state = self.room.lock();
        state.has_changed = false;
        state.left_out.clear();
        drop(state);
        // One that is closed only after this look is not removed by what follows.
        let some_linger = self.has_lingering_layers()?;
        self.complete_all();
        let is_done = !self.left_out_for(Shortage::Quota) || !some_linger;
        self.room.lock().has_changed |= !is_done;
        Ok(is_done)
    }

    /// Whether a layer that no mount uses has not been closed yet: it is being proven, for example.
    fn has_lingering_layers(&self) -> Result<bool> {
        let needed = self.needed_layers()?;
        let listed = self.store.list()?;
        Ok(listed.iter().any(|layer| layer.is_open && !needed.contains(&layer.digest)))
    }

    fn complete_all(&self) {
        let images: Vec<Arc<LoadedImage>> = self.images.lock().values().cloned().collect();
        for image in images {
            self.make_room_for(&image);
            self.complete(&image);
        }
    }

    /// Removes unused layers so that an image can be completed.
    pub(super) fn make_room_for(&self, image: &LoadedImage) {
        let Some(quota) = self.store.quota().filter(|_| image.is_completed.load(Ordering::Relaxed))
        else {
            return;
        };
        let coming: u64 = image.layers.iter().map(|layer| missing(layer)).sum();
        let removed = self.store.usage().map_err(anyhow::Error::from).and_then(|usage| {
            let needed = usage.saturating_add(coming).saturating_sub(quota);
            self.remove_unused(needed, image.record.tuning.cache_class.max(CacheClass::Standard))
        });
        if let Err(err) = removed {
            tracing::warn!(error = crate::failure::in_full(&err), "unused layers stay");
        }
    }

    /// Why a layer is not completed, if it is not.
    pub(super) fn left_out(&self, layer: &Layer) -> Option<Shortage> {
        self.room.lock().left_out.get(layer.digest()).copied()
    }

    /// What is wrong with the room, in a sentence.
    pub(super) fn room_trouble(&self) -> Option<String> {
        let exceeds = self.room.lock().excess == Excess::Now;
        match self.engine.room() {
            Room::None => Some("the disk is full: reads of missing bytes wait for room".to_owned()),
            Room::Scarce if exceeds => Some(
                "the cache exceeds its quota: it is all in use, and only what is read is fetched"
                    .to_owned(),
            ),
            Room::Scarce => {
                Some("the disk is almost full: only what is read is fetched".to_owned())
            }
            Room::Enough | Room::InTheMaking => None,
        }
    }
}

/// The classes of layers: of images that share one, the last.
#[derive(Debug, Default)]
struct Classes(HashMap<Digest, CacheClass>);

impl Classes {
    fn count_in(&mut self, image: &ImageRecord) {
        let class = image.tuning.cache_class;
        for layer in &image.manifest.layers {
            let known = self.0.entry(layer.digest).or_insert(class);
            *known = class.max(*known);
        }
    }

    fn of(&self, layer: &Digest) -> CacheClass {
        self.0.get(layer).copied().unwrap_or_default()
    }
}

/// Whether the cache has exceeded its quota. It is said once: a quota that is too small is so again and
/// again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Excess {
    #[default]
    Never,
    /// Once, but not now.
    Once,
    Now,
}

/// What the daemon knows of its room.
#[derive(Debug, Default)]
pub(super) struct RoomState {
    disk: Disk,
    full_since: Option<Instant>,
    excess: Excess,
    /// Since when what is not retained was too little.
    short_since: Option<Instant>,
    /// Mounts have gone, or room was made, since it was decided what is completed.
    has_changed: bool,
    /// Layers that are not completed.
    left_out: HashMap<Digest, Shortage>,
}

fn missing(layer: &Layer) -> u64 {
    layer.bytes().saturating_sub(layer.bytes_present())
}

/// Spans that were used within this time go last: whoever reads a file comes back at once.
///
/// They do not stay for safety; see `docs/design/0002-eviction.md`.
const SETTLED: Duration = Duration::from_secs(1);

/// So long a quota may be exceeded before what is retained has to go.
const PATIENCE: Duration = Duration::from_secs(3);

/// Room is made for at least so many bytes when the disk is full.
const STEP: u64 = 8 << 20;

/// So many times the room that was missing must be there before more than what is read is fetched.
const PLENTY: u64 = 4;

/// A mount on a full disk waits so long for layers to be closed that nobody uses.
const CLOSING: Duration = Duration::from_secs(5);

/// How often it looks whether they are.
const CLOSING_PAUSE: Duration = Duration::from_millis(20);

/// How often the disk is looked at while a layer is left out because of it.
const DISK_PAUSE: Duration = Duration::from_secs(5);

/// At most so many bytes are given up beyond what must be.
const MOST_HEADROOM: u64 = 1 << 30;

/// Smaller layers stay sealed: they need nobody, and hardly any room.
const WORTH_OPENING: u64 = 1 << 20;

/// How often warmer spans are looked for when the coldest are in use.
const ATTEMPTS: u32 = 4;

/// For so long nobody must have waited before what is to be completed then is completed.
const IDLE: Duration = Duration::from_secs(30);

/// How often is looked at images whose time has come.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

const PAUSE_AFTER_ERROR: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_completed_the_smallest_first() {
        let check = |missing: &[u64], free, expected: &[bool]| {
            assert_eq!(affordable(missing, free), expected, "{missing:?} in {free}");
        };
        check(&[], 0, &[]);
        check(&[0, 5], 0, &[true, false]);
        check(&[5, 3, 4], 7, &[false, true, true]);
        check(&[5, 3, 4], 12, &[true, true, true]);
        check(&[5, 3, 4], 11, &[false, true, true]);
    }

    #[test]
    fn more_is_given_up_than_must_be() {
        assert_eq!(excess(None, u64::MAX), 0);
        assert_eq!(excess(Some(1600), 1600), 0);
        assert_eq!(excess(Some(1600), 1601), 101);
        assert_eq!(excess(Some(1 << 40), (1 << 40) + 1), MOST_HEADROOM + 1);
        assert_eq!(excess(Some(0), 7), 7);
    }

    #[test]
    fn little_room_is_for_readers() {
        let check = |disk, exceeds, room, looks_again| {
            let (found, again) = verdict(disk, exceeds);
            assert_eq!((found, again.is_some()), (room, looks_again));
        };
        check(Disk::Fine, false, Room::Enough, false);
        check(Disk::Fine, true, Room::Scarce, true);
        check(Disk::Little, false, Room::Scarce, true);
        check(Disk::Full, true, Room::None, true);
    }

    #[test]
    fn guesses_are_small_in_a_small_cache() {
        assert_eq!(rules_within(None, &[]), plan::Rules::default());
        assert_eq!(rules_within(Some(1 << 40), &[]), plan::Rules::default());
        let small = rules_within(Some(8 << 20), &[]);
        assert_eq!((small.max_window, small.max_unread), (1 << 20, 1 << 20));
        let engine_rules = [
            Rule::SmallLayers,
            Rule::Sequential,
            Rule::SmallFiles,
            Rule::Neighbours,
            Rule::Directories,
        ];
        let found = rules_within(None, &engine_rules);
        assert!(found.whole_small_layers.is_none() && found.whole_small_files.is_none());
        assert!(!found.sequential && !found.directory && found.neighbours == 0);
    }
}

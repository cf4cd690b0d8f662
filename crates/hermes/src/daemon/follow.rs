//! Watches what containers begin to read, so that what loading a library needs is fetched ahead of the
//! loader. What a program loads as it runs, `dlopen` or an import of Python, is known to nobody before.

use std::ops::Range;
use std::sync::{Arc, Weak};

use fill::SlowRead;
use oci::Digest;
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::Daemon;
use super::images::LoadedImage;

/// A read that had to wait: of which layer, and which bytes of its tar.
type Read = (Digest, Range<u64>);

/// Where reads are told.
#[derive(Debug, Clone)]
pub(super) struct Reads(Sender<Read>);

/// Where they arrive.
pub(super) fn channel() -> (Reads, Receiver<Read>) {
    let (tell, told) = mpsc::channel(MOST_UNSEEN);
    (Reads(tell), told)
}

impl Reads {
    /// A reader had to wait, and has its bytes. Never blocks.
    pub(super) fn waited(&self, read: &SlowRead) {
        // Who is too busy to look at all of them loses nothing but a guess.
        self.0.try_send((read.layer, read.range.clone())).unwrap_or_default();
    }
}

/// Looks at all reads until the daemon ends.
pub(super) async fn run(daemon: Weak<Daemon>, mut reads: Receiver<Read>) {
    while let Some((layer, range)) = reads.recv().await {
        let Some(daemon) = daemon.upgrade() else { return };
        for (image, number) in daemon.incomplete_with(&layer) {
            // The kernel reads some pages around the one that was asked for, over the ends of files.
            let ends = [range.start, range.end.saturating_sub(1)];
            tokio::task::spawn_blocking(move || ends.map(|at| image.follow(number, at)));
        }
    }
}

impl Daemon {
    /// Images that are not complete, with this layer and its place in them.
    fn incomplete_with(&self, layer: &Digest) -> Vec<(Arc<LoadedImage>, u32)> {
        let images = self.images.lock();
        let with_layer = images.values().filter_map(|image| {
            let place = image.layers.iter().position(|other| other.digest() == layer)?;
            Some((Arc::clone(image), u32::try_from(place).ok()?))
        });
        with_layer.filter(|(image, _)| !image.is_sealed()).take(MOST_IMAGES).collect()
    }
}

/// So many reads may wait to be looked at.
const MOST_UNSEEN: usize = 256;

/// Images that share a layer: nobody can say through which of them it is read. In so many a library is
/// looked for.
const MOST_IMAGES: usize = 4;

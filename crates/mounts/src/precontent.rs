//! Readers of EROFS, stopped by the kernel until the layer's file has their bytes (fanotify).

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};

use fill::{Gate, Layer, ReadError, Reader};
use parking_lot::{Mutex, RwLock};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use sys::fanotify::{Denial, Event, FileId, Group};
use sys::journal::{Journal, JournalError, Orphan};

use crate::readers::Readers;

/// The layers whose readers come to us.
#[derive(Debug)]
pub struct PreContent {
    inner: Arc<Inner>,
    stop: OwnedFd,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inner {
    group: Group,
    journal: Journal,
    armed: RwLock<HashMap<FileId, Armed>>,
    readers: Arc<Readers>,
}

#[derive(Debug)]
struct Armed {
    layer: Arc<Layer>,
    /// Mounts that read it.
    users: usize,
    /// Whether readers still come to us.
    marked: bool,
}

/// Events cannot be listened for.
#[derive(Debug, thiserror::Error)]
pub enum PreContentError {
    /// The kernel has none, or does not let us.
    #[error("listening for pre-content events (fanotify; Linux 6.14 or later, root)")]
    Group(#[source] io::Error),
    /// The memory in which events are noted.
    #[error("noting events in flight")]
    Journal(#[from] JournalError),
    /// A layer's file.
    #[error("marking the file of layer {layer}")]
    Mark {
        /// The layer's blob.
        layer: oci::Digest,
        /// Why not; `EOPNOTSUPP` if its file system does not take part (ext4, xfs and btrfs do).
        source: io::Error,
    },
    /// A thread.
    #[error("starting a thread")]
    Thread(#[source] io::Error),
}

impl PreContent {
    /// Starts with a new group.
    ///
    /// # Errors
    /// [`PreContentError`], when the kernel does not offer it.
    pub fn new() -> Result<Self, PreContentError> {
        let group = Group::new().map_err(PreContentError::Group)?;
        Self::over(group, Journal::create(EVENTS_IN_FLIGHT)?)
    }

    /// Goes on with what a predecessor left with the keeper.
    ///
    /// # Errors
    /// [`PreContentError`].
    pub fn resume(group: OwnedFd, journal: OwnedFd) -> Result<Self, PreContentError> {
        Self::over(Group::from_fd(group), Journal::open(journal)?)
    }

    fn over(group: Group, journal: Journal) -> Result<Self, PreContentError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            inner: Arc::new(Inner {
                group,
                journal,
                armed: RwLock::default(),
                readers: Arc::default(),
            }),
            stop: stop.map_err(|err| PreContentError::Group(err.into()))?,
            threads: Mutex::default(),
        })
    }

    /// The group's descriptor, for the keeper.
    #[must_use]
    pub fn group_fd(&self) -> BorrowedFd<'_> {
        self.inner.group.as_fd()
    }

    /// The journal's descriptor, for the keeper.
    #[must_use]
    pub fn journal_fd(&self) -> BorrowedFd<'_> {
        self.inner.journal.as_fd()
    }

    /// What a predecessor had read and not answered. To be taken before anything else is opened, so
    /// that the kernel's numbers for these events stay free; see [`Journal::orphans`].
    #[must_use]
    pub fn orphans(&self) -> Vec<Orphan> {
        self.inner.journal.orphans()
    }

    /// From now on, whoever opens the layer's file reads under our eyes. To be called before EROFS
    /// opens it. Each call needs one [`disarm`](Self::disarm).
    ///
    /// # Errors
    /// [`PreContentError::Mark`].
    pub fn arm(&self, layer: &Arc<Layer>) -> Result<(), PreContentError> {
        let failed = |source| PreContentError::Mark { layer: *layer.digest(), source };
        let id = FileId::of(layer.data().as_fd()).map_err(failed)?;
        let mut armed = self.inner.armed.write();
        if let Some(known) = armed.get_mut(&id) {
            if !known.marked {
                self.inner.group.mark(layer.data().as_fd()).map_err(failed)?;
                known.marked = true;
            }
            known.users += 1;
            return Ok(());
        }
        self.inner.group.mark(layer.data().as_fd()).map_err(failed)?;
        armed.insert(id, Armed { layer: Arc::clone(layer), users: 1, marked: true });
        Ok(())
    }

    /// Lets every read of a file that belongs to no layer fail.
    ///
    /// # Errors
    /// When it cannot be marked.
    pub fn condemn(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        // An event on a file that nobody knows is denied.
        self.inner.group.mark(file)
    }

    /// Watches a file no more that belongs to no layer.
    pub fn forget(&self, file: BorrowedFd<'_>) {
        // ENOENT: it was not watched.
        self.inner.group.unmark(file).ok();
    }

    /// After the mount: readers of a sealed layer need not come to us, now or once it is sealed.
    pub fn mounted(&self, layer: &Arc<Layer>) {
        layer.add_gate(Arc::new(Release {
            layer: Arc::downgrade(layer),
            inner: Arc::downgrade(&self.inner),
        }));
    }

    /// Takes note of the reads that are over by now.
    pub fn settle(&self) {
        self.inner.readers.settle();
    }

    /// Whether somebody who was let go may still be about to read some of these bytes of the layer.
    #[must_use]
    pub fn may_read(&self, layer: &Layer, range: &Range<u64>) -> bool {
        let id = FileId::of(layer.data().as_fd());
        id.map_or(true, |id| self.inner.readers.may_read(id, range))
    }

    /// One mount less reads the layer.
    pub fn disarm(&self, layer: &Layer) {
        let Ok(id) = FileId::of(layer.data().as_fd()) else { return };
        let mut armed = self.inner.armed.write();
        if let Some(known) = armed.get_mut(&id) {
            known.users -= 1;
            if known.users == 0 {
                armed.remove(&id);
                drop(armed);
                // ENOENT: the mark went when the layer was sealed.
                self.inner.group.unmark(layer.data().as_fd()).ok();
            }
        }
    }

    /// Answers `orphans` and starts to listen. To be called when all layers of existing mounts are
    /// armed: an event on a file that nobody knows is denied.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn listen(&self, orphans: Vec<Orphan>) -> Result<(), PreContentError> {
        for orphan in orphans {
            self.inner.answer_orphan(orphan);
        }
        for number in 0..LISTENERS {
            let inner = Arc::clone(&self.inner);
            let stop = self.stop.try_clone().map_err(PreContentError::Thread)?;
            let thread = thread::Builder::new().name(format!("fanotify-{number}"));
            let thread = thread
                .spawn(move || inner.listen(stop.as_fd()))
                .map_err(PreContentError::Thread)?;
            self.threads.lock().push(thread);
        }
        Ok(())
    }
}

impl Drop for PreContent {
    fn drop(&mut self) {
        // The counter of an eventfd overflows only after 2^64 - 2 stops.
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).ok();
        for thread in self.threads.lock().drain(..) {
            thread.join().ok();
        }
    }
}

impl Inner {
    fn listen(&self, stop: BorrowedFd<'_>) {
        loop {
            let mut fds = [
                PollFd::new(&stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.group.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(err) => {
                    tracing::error!(error = %err, "pre-content events cannot be waited for");
                    return;
                }
            }
            if fds.first().is_some_and(|fd| !fd.revents().is_empty()) {
                return;
            }
            self.drain();
        }
    }

    fn drain(&self) {
        loop {
            match self.group.read_event(&self.journal) {
                Ok(Some(event)) => self.handle(event),
                Ok(None) => return,
                Err(err) => {
                    tracing::error!(error = %err, "a pre-content event was lost; its reader got EIO");
                    return;
                }
            }
        }
    }

    fn handle(&self, event: Event) {
        let layer = event.file_id().ok().and_then(|id| {
            let armed = self.armed.read();
            armed.get(&id).map(|known| Arc::clone(&known.layer))
        });
        match layer {
            Some(layer) => {
                event.set_tag(tag(&layer));
                self.readers.is_back(event.pid());
                serve(&layer, event, Arc::clone(&self.readers));
            }
            None => {
                tracing::error!(
                    pid = event.pid(),
                    "read of a file that belongs to no mount denied"
                );
                deny(event);
            }
        }
    }

    /// What a dead daemon had read: the journal names the layer, unless the daemon died between the
    /// kernel's copy and its own note. Then the range is made present in every layer.
    fn answer_orphan(&self, orphan: Orphan) {
        let layers: Arc<[Arc<Layer>]> = {
            let armed = self.armed.read();
            let all = armed.values().map(|known| Arc::clone(&known.layer));
            all.filter(|layer| orphan.tag().is_none_or(|noted| noted == tag(layer))).collect()
        };
        tracing::info!(
            pid = orphan.pid(),
            layers = layers.len(),
            "taking over a read of the last daemon"
        );
        let Some(file) =
            layers.first().and_then(|layer| layer.data().as_fd().try_clone_to_owned().ok())
        else {
            let answered =
                self.group.answer_orphan(orphan, sys::fanotify::Answer::Deny(Denial::Io));
            if let Err(err) = answered {
                tracing::error!(error = %err, "an event of the last daemon could not be answered");
            }
            return;
        };
        let (range, is_tagged) = (orphan.range(), orphan.tag().is_some());
        let event = self.group.adopt(orphan, file);
        let pid = event.pid();
        let pending = Arc::new(Mutex::new((layers.len(), Some(event))));
        for layer in layers.iter() {
            let (pending, all) = (Arc::clone(&pending), Arc::clone(&layers));
            let own = Arc::clone(layer);
            let readers = Arc::clone(&self.readers);
            let then = move |result: Result<(), ReadError>| {
                let mut pending = pending.lock();
                pending.0 -= 1;
                if result.is_err() || pending.0 == 0 {
                    let event = pending.1.take();
                    drop(pending);
                    match event {
                        Some(event) if result.is_ok() => {
                            if !is_tagged {
                                // Nobody can say which of them is read.
                                all.iter().for_each(|layer| layer.unknown_reader());
                            }
                            allow(event, &own, &readers);
                        }
                        Some(event) => deny(event),
                        None => {}
                    }
                }
            };
            layer.request(range.clone(), Reader { pid }, Box::new(then));
        }
    }
}

fn serve(layer: &Arc<Layer>, event: Event, readers: Arc<Readers>) {
    let (range, reader) = (event.range(), Reader { pid: event.pid() });
    let own = Arc::clone(layer);
    let then = move |result: Result<(), ReadError>| match result {
        Ok(()) => allow(event, &own, &readers),
        Err(_logged) => deny(event),
    };
    layer.request(range, reader, Box::new(then));
}

fn allow(event: Event, layer: &Layer, readers: &Readers) {
    match event.file_id() {
        Ok(file) if event.pid() > 0 => readers.let_go(event.pid(), file, event.range()),
        _ => layer.unknown_reader(),
    }
    answered(event.allow());
}

fn deny(event: Event) {
    answered(event.deny(Denial::Io));
}

fn answered(answered: io::Result<()>) {
    if let Err(err) = answered {
        tracing::error!(error = %err, "the kernel refused the answer to an event");
    }
}

/// A layer in the journal: the same for every daemon.
fn tag(layer: &Layer) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *layer.digest().as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// Takes the mark off a layer that is whole.
struct Release {
    layer: Weak<Layer>,
    inner: Weak<Inner>,
}

impl Gate for Release {
    fn sealed(&self) {
        let (Some(layer), Some(inner)) = (self.layer.upgrade(), self.inner.upgrade()) else {
            return;
        };
        let Ok(id) = FileId::of(layer.data().as_fd()) else { return };
        let mut armed = inner.armed.write();
        let Some(known) = armed.get_mut(&id).filter(|known| known.marked) else { return };
        known.marked = false;
        if let Err(err) = inner.group.unmark(layer.data().as_fd()) {
            tracing::warn!(layer = %layer.digest(), error = %err, "mark of a sealed layer stays");
        }
    }

    fn reopened(&self) -> io::Result<()> {
        let Some(layer) = self.layer.upgrade() else { return Ok(()) };
        // Without us nobody answers.
        let inner = self.inner.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let id = FileId::of(layer.data().as_fd())?;
        let mut armed = inner.armed.write();
        // A file that is not armed is in no mount any more.
        if let Some(known) = armed.get_mut(&id).filter(|known| !known.marked) {
            inner.group.mark(layer.data().as_fd())?;
            known.marked = true;
        }
        Ok(())
    }
}

/// Events that the daemon may have read and not answered; more wait in the kernel.
const EVENTS_IN_FLIGHT: u32 = 8192;

/// Threads that read events; what takes time happens elsewhere.
const LISTENERS: usize = 2;

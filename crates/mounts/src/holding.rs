//! What must outlive the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use keeper::{Client, ClientError, Held, SystemdStore};
use parking_lot::Mutex;

/// Descriptors that are held here and by a keeper. When the keeper dies another one gets them all.
///
/// A service of systemd has them held there as well, for when this process and the keeper die together.
#[derive(Debug)]
pub struct Holding {
    held: Mutex<BTreeMap<String, (Vec<u8>, OwnedFd)>>,
    keeper: Mutex<Arc<Client>>,
    systemd: Option<Arc<SystemdStore>>,
}

impl Holding {
    /// Starts with what a predecessor left, and has each holder hold what only the other one has.
    ///
    /// # Errors
    /// When the keeper cannot be asked.
    pub fn new(
        keeper: Arc<Client>,
        systemd: Option<Arc<SystemdStore>>,
    ) -> Result<Self, ClientError> {
        let stored = systemd.as_ref().map_or_else(Vec::new, |systemd| systemd.take_all());
        let kept = keeper.take_all()?;
        let holding = Self { held: Mutex::default(), keeper: Mutex::new(keeper), systemd };
        holding.share(stored, kept)?;
        Ok(holding)
    }

    fn share(&self, stored: Vec<Held>, kept: Vec<Held>) -> Result<(), ClientError> {
        let mut n_not_stored = 0_usize;
        let mut held: BTreeMap<_, _> = stored.into_iter().map(entry).collect();
        let mut not_kept: BTreeSet<String> = held.keys().cloned().collect();
        for held_by_keeper in kept {
            let (name, (note, fd)) = entry(held_by_keeper);
            not_kept.remove(&name);
            if !held.contains_key(&name) {
                self.store(&name, &note, fd.as_fd());
                n_not_stored += 1;
            }
            // The keeper said that it has it; what systemd has may be older.
            held.insert(name, (note, fd));
        }
        if self.systemd.is_some() && n_not_stored > 0 {
            tracing::warn!(
                n_not_stored,
                "systemd did not hold all that the keeper holds, and is given it now; if the service was not stopped \
                 before, its FileDescriptorStoreMax= is too small"
            );
        }
        let keeper = self.keeper.lock();
        for name in not_kept {
            let (note, fd) = &held[&name];
            keeper.put(&name, note, fd.as_fd())?;
        }
        *self.held.lock() = held;
        Ok(())
    }

    /// Lets systemd let go of everything, once no mount needs it: a keeper that ends does the same.
    pub fn clear_systemd(&self) {
        for name in self.names() {
            self.unstore(&name);
        }
    }

    /// Gives everything to another keeper.
    ///
    /// # Errors
    /// When it does not take something.
    pub fn move_to(&self, keeper: Arc<Client>) -> Result<(), ClientError> {
        let held = self.held.lock();
        for (name, (note, fd)) in held.iter() {
            keeper.put(name, note, fd.as_fd())?;
        }
        *self.keeper.lock() = keeper;
        Ok(())
    }

    /// Holds `fd` under `name`. A keeper that is just not there gets it with the rest in
    /// [`move_to`](Self::move_to).
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn put(&self, name: &str, note: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
        let copy = fd.try_clone_to_owned()?;
        let keeper = Arc::clone(&self.keeper.lock());
        self.held.lock().insert(name.to_owned(), (note.to_vec(), copy));
        if let Err(err) = keeper.put(name, note, fd) {
            tracing::warn!(name, error = %err, "the keeper does not hold a descriptor yet");
        }
        self.store(name, note, fd);
        Ok(())
    }

    /// Lets go of `name`.
    pub fn remove(&self, name: &str) {
        self.held.lock().remove(name);
        self.unstore(name);
        let keeper = Arc::clone(&self.keeper.lock());
        if let Err(err) = keeper.remove(name) {
            tracing::warn!(name, error = %err, "the keeper holds on to a descriptor");
        }
    }

    /// A duplicate of what is held under `name`, and its note.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(Vec<u8>, OwnedFd)> {
        let held = self.held.lock();
        let (note, fd) = held.get(name)?;
        Some((note.clone(), fd.try_clone().ok()?))
    }

    /// The names of everything held.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.held.lock().keys().cloned().collect()
    }

    fn store(&self, name: &str, note: &[u8], fd: BorrowedFd<'_>) {
        let stored = self.systemd.as_ref().map(|systemd| systemd.put(name, note, fd));
        if let Some(Err(err)) = stored {
            tracing::warn!(name, error = %err, "only the keeper holds a descriptor, not systemd");
        }
    }

    fn unstore(&self, name: &str) {
        if let Some(Err(err)) = self.systemd.as_ref().map(|systemd| systemd.remove(name)) {
            tracing::warn!(name, error = %err, "systemd holds on to a descriptor");
        }
    }
}

fn entry(Held { name, note, fd }: Held) -> (String, (Vec<u8>, OwnedFd)) {
    (name, (note, fd))
}

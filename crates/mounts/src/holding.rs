//! What must outlive the daemon.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use keeper::{Client, ClientError, Held};
use parking_lot::Mutex;

/// Descriptors that are held here and by a keeper. When the keeper dies another one gets them all.
#[derive(Debug)]
pub struct Holding {
    held: Mutex<BTreeMap<String, (Vec<u8>, OwnedFd)>>,
    keeper: Mutex<Arc<Client>>,
}

impl Holding {
    /// Starts with what a predecessor left.
    ///
    /// # Errors
    /// When the keeper cannot be asked.
    pub fn new(keeper: Arc<Client>) -> Result<Self, ClientError> {
        let held = keeper.take_all()?.into_iter();
        let held = held.map(|Held { name, note, fd }| (name, (note, fd))).collect();
        Ok(Self { held: Mutex::new(held), keeper: Mutex::new(keeper) })
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
        Ok(())
    }

    /// Lets go of `name`.
    pub fn remove(&self, name: &str) {
        self.held.lock().remove(name);
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
}

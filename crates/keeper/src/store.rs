//! What the daemon needs of whoever holds its descriptors.

use std::os::fd::BorrowedFd;

use crate::client::{Client, ClientError};
use crate::protocol::Held;
use crate::systemd::{SystemdError, SystemdStore};

/// A descriptor could not be kept, or those that were kept not be had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The keeper did not do it.
    #[error("asking the keeper")]
    Keeper(#[from] ClientError),
    /// systemd did not do it.
    #[error("asking systemd")]
    Systemd(#[from] SystemdError),
}

/// A place where descriptors survive the process.
pub trait Store: Send + Sync {
    /// Keeps a duplicate of `fd`, in place of what was kept under that name.
    ///
    /// # Errors
    /// The descriptor may then die with this process.
    fn put(&self, name: &str, note: &[u8], fd: BorrowedFd<'_>) -> Result<(), StoreError>;

    /// Lets go of what is kept under that name, if anything is.
    ///
    /// # Errors
    /// It may then still be kept.
    fn remove(&self, name: &str) -> Result<(), StoreError>;

    /// Gets what a dead predecessor left. It stays where it is kept. To be called once, at the start.
    ///
    /// # Errors
    /// Nothing is lost then.
    fn take_all(&self) -> Result<Vec<Held>, StoreError>;
}

impl Store for Client {
    fn put(&self, name: &str, note: &[u8], fd: BorrowedFd<'_>) -> Result<(), StoreError> {
        Ok(Self::put(self, name, note, fd)?)
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        Ok(Self::remove(self, name)?)
    }

    fn take_all(&self) -> Result<Vec<Held>, StoreError> {
        Ok(Self::take_all(self)?)
    }
}

impl Store for SystemdStore {
    fn put(&self, name: &str, note: &[u8], fd: BorrowedFd<'_>) -> Result<(), StoreError> {
        Ok(Self::put(self, name, note, fd)?)
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        Ok(Self::remove(self, name)?)
    }

    fn take_all(&self) -> Result<Vec<Held>, StoreError> {
        Ok(Self::take_all(self))
    }
}

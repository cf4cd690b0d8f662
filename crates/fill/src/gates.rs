//! Those who keep reads away from us while a layer is sealed, and let them come when it is not.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

/// Told when a layer stops and starts to need us.
pub trait Gate: Send + Sync {
    /// All bytes are there and proven: reads need not come to us any more.
    fn sealed(&self);

    /// Bytes will be missing: when this has returned, every read that begins comes to us.
    ///
    /// # Errors
    /// When that cannot be had. Nothing is given up then.
    fn reopened(&self) -> io::Result<()>;
}

/// The gates of one layer. Its lock is held from before the layer changes until all are told, so that
/// none hears of a seal after the layer was opened again.
#[derive(Default)]
pub(crate) struct Gates(Mutex<Vec<Arc<dyn Gate>>>);

impl Gates {
    /// Adds a gate and tells it how things are.
    pub(crate) fn add(&self, gate: Arc<dyn Gate>, is_sealed: impl FnOnce() -> bool) {
        let mut gates = self.0.lock();
        if is_sealed() {
            gate.sealed();
        } else if let Err(err) = gate.reopened() {
            tracing::error!(error = %err, "reads of a layer may pass us");
        }
        gates.push(gate);
    }

    /// Seals the layer and tells all.
    pub(crate) fn seal<E>(&self, seal: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let gates = self.0.lock();
        seal()?;
        for gate in gates.iter() {
            gate.sealed();
        }
        Ok(())
    }

    /// Opens all, then the layer; if that fails all are as before.
    pub(crate) fn reopen<E: From<io::Error>>(
        &self,
        is_sealed: impl FnOnce() -> bool,
        unseal: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let gates = self.0.lock();
        if !is_sealed() {
            return Ok(());
        }
        let opened = gates.iter().try_for_each(|gate| gate.reopened());
        opened.map_err(E::from).and_then(|()| unseal()).inspect_err(|_| {
            for gate in gates.iter() {
                gate.sealed();
            }
        })
    }
}

//! Whether there is room for more bytes.

use std::sync::Weak;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::engine::Shared;

/// How much may be fetched, as its owner has told the engine last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// There is enough.
    Enough,
    /// Only what readers wait for is fetched, one span at a time.
    Scarce,
    /// The owner is making room: nothing new is fetched until it has said how much there is.
    InTheMaking,
    /// A write has failed for want of room: nothing is fetched until the owner has made some.
    None,
}

/// The engine's copy.
#[derive(Debug, Default)]
pub(crate) struct RoomCell(AtomicU8);

const ENOUGH: u8 = 0;
const SCARCE: u8 = 1;
const IN_THE_MAKING: u8 = 2;
const NONE: u8 = 3;

impl RoomCell {
    pub(crate) fn get(&self) -> Room {
        of(self.0.load(Ordering::Acquire))
    }

    /// Room is in the making, unless it is known that there is none.
    fn hold(&self) {
        let hold = |before| (before != NONE).then_some(IN_THE_MAKING);
        // It stays as it is where there is none.
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, hold).ok();
    }

    /// Returns what it was before.
    pub(crate) fn set(&self, room: Room) -> Room {
        let number = match room {
            Room::Enough => ENOUGH,
            Room::Scarce => SCARCE,
            Room::InTheMaking => IN_THE_MAKING,
            Room::None => NONE,
        };
        of(self.0.swap(number, Ordering::AcqRel))
    }
}

const fn of(number: u8) -> Room {
    match number {
        ENOUGH => Room::Enough,
        SCARCE => Room::Scarce,
        IN_THE_MAKING => Room::InTheMaking,
        _ => Room::None,
    }
}

impl Room {
    /// The limits within which requests are made, or `None` if none are.
    pub(crate) fn within(self, limits: &plan::Limits) -> Option<plan::Limits> {
        match self {
            Self::Enough => Some(*limits),
            Self::Scarce => Some(plan::Limits {
                max_connections: 1,
                demand_connections: 1,
                background_connections: 0,
                // What nobody waits for is not fetched on the way.
                demand_bytes: 0,
                ..*limits
            }),
            Self::InTheMaking | Self::None => None,
        }
    }
}

/// Stops the engine when its owner sees that room has to be made.
#[derive(Clone)]
pub struct Brake(pub(crate) Weak<Shared>);

impl std::fmt::Debug for Brake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Brake").finish_non_exhaustive()
    }
}

impl Brake {
    /// Lets no new transfer begin before the next [`Engine::set_room`](crate::Engine::set_room).
    pub fn hold(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.room.hold();
        }
    }
}

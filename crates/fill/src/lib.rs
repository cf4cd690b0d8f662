//! The engine: single flight, priorities, verify, inflate, write, wake, complete and seal.
//!
//! Front ends translate what the kernel asks into [`Layer::request`]; everything else is decided
//! here. Sockets are waited for by tasks on the owner's runtime; inflating and writing happen on
//! threads of the engine's own, or for layers that are read in order on the runtime's blocking ones.
#![forbid(unsafe_code)]

mod buffers;
mod decode;
mod durations;
mod engine;
mod error;
mod gates;
mod hint;
mod in_order;
mod lane;
mod layer;
mod memory;
mod pace;
mod room;
mod seal;
mod source;
mod transfer;
mod windows;

pub use durations::Durations;
pub use engine::{Engine, EngineOptions, Event, Figures};
pub use error::{ReadError, ReopenError};
pub use gates::Gate;
pub use layer::{Layer, LayerSpec, Order, Reader, SlowRead, Then};
pub use room::{Brake, Room};
pub use source::{ByteStream, Sender, Source, SourceError, Transfer};

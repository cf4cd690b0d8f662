//! Which spans to fetch, in which order, as which ranges: no clock, no sockets.
//!
//! Decisions, each a function from values to values, so that every corner of them is a line
//! in a table:
//!
//! - [`coalesce()`]: which spans share one ranged request;
//! - [`ReadAhead`]: which spans will probably be read next;
//! - [`elf`]: which parts of a library its loader will read;
//! - [`python`], [`shell`]: what a source file or a script will load and run;
//! - [`Queue`]: what to fetch now, given what is wanted, by whom, and what is under way.
//!
//! The engine that calls them knows what is present, owns the connections and the clock, and acts.
#![forbid(unsafe_code)]

mod coalesce;
pub mod elf;
pub mod python;
mod queue;
mod read_ahead;
pub mod shell;
mod spans;

pub use coalesce::{Fetch, coalesce};
pub use queue::{Class, InFlight, Job, LayerId, Limits, Outcome, Queue, Wanted};
pub use read_ahead::{FileHint, ReadAhead, Rules};
pub use spans::{Spans, covering};

//! Whole layers: made, indexed, decoded span by span, and lied about.
#![expect(clippy::cast_possible_truncation, reason = "layers made here fit into any address space")]

#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod make;
#[cfg(test)]
mod spans;

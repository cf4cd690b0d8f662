//! The client against the test registry, well and with faults.

#[cfg(test)]
mod auth;
#[cfg(test)]
mod mirrors;
#[cfg(test)]
mod pull;
#[cfg(test)]
mod push;
#[cfg(test)]
mod ranges;
#[cfg(test)]
mod referrers;
#[cfg(test)]
mod setup;
#[cfg(test)]
mod tls;

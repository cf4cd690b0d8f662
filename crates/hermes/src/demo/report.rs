//! What the demo found.

use mounts::Backend;
use serde::Serialize;

use crate::output::bytes;

/// The result of `hermes demo`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) image: String,
    /// Compressed bytes of all layers.
    pub(super) image_bytes: u64,
    pub(super) layers: usize,
    /// Nothing with a real registry.
    pub(super) link: Option<LinkFigures>,
    pub(super) lazy: Lazy,
    pub(super) full: Full,
    /// Files that were read in both and compared.
    pub(super) files_compared: usize,
    pub(super) daemon_kills: u32,
    /// Files whose content differed, or that could not be read.
    pub(super) wrong_bytes: usize,
    /// Whether it ran without root, in a user namespace.
    pub(super) unprivileged: bool,
}

/// The way between the registry and us.
#[derive(Debug, Serialize)]
pub(super) struct LinkFigures {
    pub(super) bandwidth_bits_per_s: u64,
    /// The round-trip time.
    pub(super) latency_seconds: f64,
}

/// The lazy start. Seconds count from the request to mount; the daemon runs already, as containerd does.
#[derive(Debug, Serialize)]
pub(super) struct Lazy {
    pub(super) first_answer_seconds: f64,
    pub(super) mount_seconds: f64,
    /// Bytes of blobs that the registry had sent when the program answered, indexes included.
    pub(super) bytes_fetched: u64,
    /// The same when the program had ended.
    pub(super) bytes_fetched_in_all: Option<u64>,
    pub(super) backend: Backend,
    /// Distinct files that the program had loaded or mapped when it answered, by its own count.
    pub(super) files_touched: Option<u64>,
}

/// The full pull. Seconds count from its start.
#[derive(Debug, Serialize)]
pub(super) struct Full {
    pub(super) first_answer_seconds: f64,
    pub(super) bytes_fetched: u64,
}

impl Report {
    /// A table for people.
    pub(super) fn text(&self) -> String {
        let Self { lazy, full, .. } = self;
        let unknown = || "?".to_owned();
        let mut rows = vec![(
            "image".to_owned(),
            format!("{}, {} in {} layers", self.image, bytes(self.image_bytes), self.layers),
        )];
        if let Some(link) = &self.link {
            let (mbit, ms) = (link.bandwidth_bits_per_s / 1_000_000, link.latency_seconds * 1e3);
            rows.push(("link".to_owned(), format!("{mbit} Mbit/s, {ms:.1} ms round trip")));
        }
        let privilege =
            if self.unprivileged { " (without root, so not in the kernel)" } else { "" };
        rows.extend([
            ("back end".to_owned(), format!("{}{privilege}", lazy.backend)),
            (
                "first answer after a full pull".to_owned(),
                format!("{:.2} s", full.first_answer_seconds),
            ),
            (
                "first answer, lazily".to_owned(),
                format!(
                    "{:.2} s, of which {:.2} s to mount",
                    lazy.first_answer_seconds, lazy.mount_seconds
                ),
            ),
            ("fetched by the full pull".to_owned(), bytes(full.bytes_fetched)),
            ("fetched lazily, at the first answer".to_owned(), bytes(lazy.bytes_fetched)),
            (
                "fetched lazily, in all".to_owned(),
                lazy.bytes_fetched_in_all.map_or_else(unknown, bytes),
            ),
            (
                "files touched at the first answer".to_owned(),
                lazy.files_touched.map_or_else(unknown, |files| files.to_string()),
            ),
            ("files read and compared".to_owned(), self.files_compared.to_string()),
            ("times the daemon was killed".to_owned(), self.daemon_kills.to_string()),
            ("files with a wrong byte".to_owned(), self.wrong_bytes.to_string()),
        ]);
        rows.iter().map(|(name, value)| format!("{name:<36}{value}\n")).collect()
    }
}

//! What a command prints: results on standard output, as text or as one JSON object; progress on
//! standard error, on a terminal only.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::OutputFormat;

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    format: OutputFormat,
}

impl Output {
    pub(crate) fn new(format: OutputFormat) -> Self {
        Self { format }
    }

    /// Prints a result: as `text` says, or as JSON.
    pub(crate) fn result<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        let mut line = match self.format {
            OutputFormat::Json => serde_json::to_string_pretty(value)?,
            OutputFormat::Text => text(value),
        };
        if !line.ends_with('\n') && !line.is_empty() {
            line.push('\n');
        }
        self.bytes(line.as_bytes())
    }

    /// Prints bytes as they are.
    pub(crate) fn bytes(self, bytes: &[u8]) -> Result<()> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            // Whoever read our output has seen enough.
            Err(err) if err.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }

    /// Whether results are for a program.
    pub(crate) fn is_json(self) -> bool {
        self.format == OutputFormat::Json
    }

    /// Something that takes time.
    pub(crate) fn progress(self) -> Progress {
        if !io::stderr().is_terminal() {
            return Progress(ProgressBar::hidden());
        }
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(100));
        Progress(bar)
    }

    /// Says on standard error what must not be missed, whoever reads it.
    pub(crate) fn warnings(self, warnings: &[String]) {
        for warning in warnings {
            // Without standard error there is nobody to warn.
            writeln!(io::stderr(), "hermes: warning: {warning}").ok();
        }
    }

    /// Says something to a person who watches; nothing in a pipe.
    pub(crate) fn note(self, text: &str) {
        if io::stderr().is_terminal() && self.format == OutputFormat::Text {
            // Standard error may be closed; then nobody watches.
            writeln!(io::stderr(), "{text}").ok();
        }
    }
}

/// A bar on a terminal, nothing elsewhere; gone when dropped.
#[derive(Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Shows how far `what` has come; `total` is 0 where it is not known.
    pub(crate) fn show(&self, what: &str, done: u64, total: u64) {
        if total > 0 {
            let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.0.set_style(style);
            }
            self.0.set_length(total);
        }
        self.0.set_message(what.to_owned());
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

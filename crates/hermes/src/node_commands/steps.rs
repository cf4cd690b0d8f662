//! What a command does, told step by step.

use anyhow::Result;
use serde::Serialize;

use crate::output::Output;

/// What was done so far. Text is shown at once, JSON at the end.
#[derive(Debug)]
pub(super) struct Steps {
    output: Output,
    done: Vec<String>,
    /// Whether nothing is really done.
    is_trial: bool,
}

/// The whole of it, as JSON.
#[derive(Debug, Serialize)]
struct StepsReport<'a> {
    dry_run: bool,
    steps: &'a [String],
    /// Whether containerd must be restarted for it.
    restart_containerd: bool,
}

impl Steps {
    pub(super) fn new(output: Output, is_trial: bool) -> Self {
        Self { output, done: Vec::new(), is_trial }
    }

    /// Whether nothing is to be changed.
    pub(super) fn is_trial(&self) -> bool {
        self.is_trial
    }

    /// Tells of a step, as an order.
    pub(super) fn tell(&mut self, step: impl AsRef<str>) -> Result<()> {
        let would = if self.is_trial { "would " } else { "" };
        self.note(format!("{would}{}", step.as_ref()))
    }

    /// Says something that is no step.
    pub(super) fn note(&mut self, text: impl Into<String>) -> Result<()> {
        let text = text.into();
        if !self.output.is_json() {
            self.output.bytes(format!("{text}\n").as_bytes())?;
        }
        self.done.push(text);
        Ok(())
    }

    /// Ends the tale.
    pub(super) fn end(&self, restart_containerd: bool) -> Result<()> {
        let report = StepsReport { dry_run: self.is_trial, steps: &self.done, restart_containerd };
        match self.output.is_json() {
            true => self.output.result(&report, |_| String::new()),
            false => Ok(()),
        }
    }
}

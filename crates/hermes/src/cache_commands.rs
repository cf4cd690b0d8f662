//! `cache ls`, `prune` and `verify`: questions to the daemon.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::args::{CacheCommand, DaemonTuning, GlobalArguments};
use crate::failure::{Exit, Failure};
use crate::output::{Output, bytes};
use crate::protocol::Request;

/// Carries out one of them.
pub(crate) fn run(common: &GlobalArguments, output: Output, command: &CacheCommand) -> Result<()> {
    let request = match command {
        CacheCommand::Ls => Request::CacheList,
        CacheCommand::Prune { keep } => Request::CachePrune { keep: *keep },
        CacheCommand::Verify => Request::CacheVerify,
    };
    if !common.root.is_dir() {
        bail!("{} does not exist; nothing is cached", common.root.display());
    }
    let answer: Value =
        crate::client::ask_or_start(common, &output, &DaemonTuning::default(), &request)?;
    output.result(&answer, |answer| match command {
        CacheCommand::Ls => list_text(answer),
        CacheCommand::Prune { .. } => {
            format!(
                "{} layers removed, {} freed",
                number(answer, "layers"),
                bytes(number(answer, "freed"))
            )
        }
        CacheCommand::Verify => {
            format!(
                "{} layers, {} read again",
                number(answer, "layers"),
                bytes(number(answer, "bytes"))
            )
        }
    })?;
    let names = |key: &str| -> Vec<String> {
        let names = answer.get(key).and_then(Value::as_array).into_iter().flatten();
        names.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let (damaged, stay) = (names("damaged"), names("stay"));
    if damaged.is_empty() {
        return Ok(());
    }
    let mut message = format!("damaged, and fetched again: {}", damaged.join(", "));
    if !stay.is_empty() {
        message = format!(
            "damaged: {}; of these {} cannot be fetched again while they are mounted: unmount them, \
             run `hermes cache verify` again, and mount them",
            damaged.join(", "),
            stay.join(", ")
        );
    }
    Err(Failure { exit: Exit::Corrupt, message }.into())
}

fn list_text(answer: &Value) -> String {
    let mut text = String::new();
    for layer in answer.get("layers").and_then(Value::as_array).into_iter().flatten() {
        let digest = layer.get("digest").and_then(Value::as_str).unwrap_or_default();
        let flag = |key: &str| layer.get(key).and_then(Value::as_bool) == Some(true);
        let sealed = if flag("sealed") { ", complete" } else { "" };
        let used = if flag("in_use") { ", in use" } else { "" };
        let (allocated, whole) = (bytes(number(layer, "allocated")), bytes(number(layer, "bytes")));
        text.push_str(&format!("{digest}  {allocated} of {whole}{sealed}{used}\n"));
    }
    text.push_str(&format!("{} in all\n", bytes(number(answer, "allocated"))));
    text
}

fn number(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or_default()
}

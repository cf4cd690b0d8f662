//! `hermes node`: this machine as a node of containerd. `install` sets it up, `check` says what is wrong with
//! it, `uninstall` takes back what `install` did.

mod calls;
mod check;
mod containerd;
mod edit;
mod faults;
mod files;
mod install;
mod record;
mod service;
mod settings;
mod steps;
mod uninstall;

use std::process::ExitCode;

use anyhow::Result;

use crate::args::{GlobalArguments, NodeCommand};
use crate::output::Output;

/// Carries out one of them.
pub(crate) fn run(
    common: &GlobalArguments,
    output: Output,
    command: &NodeCommand,
) -> Result<ExitCode> {
    match command {
        NodeCommand::Install(arguments) => install::run(common, output, arguments)?,
        NodeCommand::Check(arguments) => return check::run(common, output, arguments),
        NodeCommand::Uninstall(arguments) => uninstall::run(common, output, arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

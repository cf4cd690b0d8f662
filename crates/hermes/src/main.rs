//! The `hermes` binary: parse, wire, run.
#![forbid(unsafe_code)]

mod args;
mod at_once;
mod cache_commands;
mod client;
mod config;
mod daemon;
mod demo;
mod failure;
mod index_commands;
mod mount_commands;
mod node_commands;
mod output;
mod policies;

mod program_files;
mod protocol;
mod registries;
mod run;
mod spawn;
mod stream;
mod top;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};

use crate::args::{Arguments, Command, GlobalArguments, KeeperArguments};
use crate::output::Output;

fn main() -> ExitCode {
    let Arguments { common, command } = Arguments::parse();
    sys::memory::return_large_blocks();
    if let Err(err) = log_to_stderr(&common) {
        return fail(&err);
    }
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        // Only the first provider of a process counts, and it is the same one.
        tracing::debug!("a TLS provider was installed before");
    }
    match run_command(&common, command) {
        Ok(code) => code,
        Err(err) => fail(&err),
    }
}

fn run_command(common: &GlobalArguments, command: Command) -> Result<ExitCode> {
    let output = Output::new(common.output);
    match command {
        Command::Demo(arguments) => return demo::run(common, output, &arguments),
        Command::Run(arguments) => return run::run(common, output, &arguments),
        Command::Mount(arguments) => mount_commands::mount(common, output, &arguments)?,
        Command::Umount(arguments) => mount_commands::umount(common, output, &arguments)?,
        Command::Status(arguments) => mount_commands::status(common, output, &arguments)?,
        Command::Explain { what } => mount_commands::explain(common, output, &what)?,
        Command::Top => top::run(common, output)?,
        Command::Metrics => mount_commands::metrics(common, output)?,
        Command::Index(command) => index_commands::run(common, output, &command)?,
        Command::Cache(command) => cache_commands::run(common, output, &command)?,
        Command::Config(command) => config::run(output, &command)?,
        Command::Node(command) => return node_commands::run(common, output, &command),
        Command::Daemon(arguments) => daemon::run(common, &arguments)?,
        Command::Keeper(arguments) => keep(common, &arguments)?,
        Command::ContainerInit { rootfs, program } => return run::init(&rootfs, &program),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "hermes", &mut script);
            output.bytes(&script)?;
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
            clap_mangen::generate_to(Arguments::command(), &dir)
                .with_context(|| format!("writing manual pages to {}", dir.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn keep(common: &GlobalArguments, arguments: &KeeperArguments) -> Result<()> {
    let ready = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)
        .context("taking over the ready pipe")?;
    let null = std::fs::File::open("/dev/null").context("opening /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("closing the ready pipe")?;
    let respawn = (!arguments.respawn.is_empty()).then(|| arguments.respawn.clone());
    keeper::serve(keeper::KeeperOptions {
        socket: common.root.join("keeper.sock"),
        pid_file: common.root.join("keeper.pid"),
        respawn,
        ready: Some(ready),
    })
    .context("keeping descriptors")
}

/// Logs go to standard error: one line an event.
fn log_to_stderr(common: &GlobalArguments) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&common.log);
    let filter = filter.with_context(|| format!("--log {}", common.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // On a full disk each would cost another line.
        .log_internal_errors(false)
        .init();
    Ok(())
}

fn fail(err: &anyhow::Error) -> ExitCode {
    // Without standard error there is only the exit code.
    writeln!(std::io::stderr(), "hermes: {}", failure::in_full(err)).ok();
    ExitCode::from(failure::exit_of(err).code())
}

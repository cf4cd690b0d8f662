//! `hermes run`: an image mounted lazily, a writable layer over it, and a program in both.

mod bundle;
mod container;
mod folder;
mod init;
mod mounted;
mod program;
mod rootfs;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use sys::signals::{Signal, Signals};

use self::folder::RunFolder;
use crate::args::{GlobalArguments, RunArguments};
use crate::output::Output;
use crate::protocol::{MountRequest, MountTuning};

pub(crate) use self::container::{Container, Runtime, Streams};
pub(crate) use self::folder::clear_abandoned;
pub(crate) use self::init::init;
pub(crate) use self::mounted::MountedImage;
pub(crate) use self::program::{Program, config_of};
pub(crate) use self::rootfs::{Rootfs, in_user_namespace};

/// Runs a program of an image; ends as it ends.
pub(crate) fn run(
    common: &GlobalArguments,
    output: Output,
    arguments: &RunArguments,
) -> Result<ExitCode> {
    // From here on a signal no longer ends us at once: what is mounted must be unmounted.
    let signals = Signals::hold().context("holding signals back")?;
    let runtime = Runtime::choose(arguments.runtime)?;
    let dir = RunFolder::create(&std::path::absolute(&common.root)?)?;
    let request = MountRequest {
        image: crate::mount_commands::absolute_image(&arguments.image)?,
        dir: dir.path().join(folder::LOWER),
        backend: crate::daemon::backend(arguments.backend),
        platform: common.registry.platform.clone(),
        access: crate::registries::access(&common.registry)?,
        tuning: MountTuning::default(),
        command: arguments.command.clone(),
    };
    let image = MountedImage::mount(common, output, request)?;
    let rootfs = Rootfs::over(image.dir(), dir.path())?;
    let code = match signals.next()? {
        Some(signal) => 128 + number(signal),
        None => {
            let config = config_of(&common.root, &image.report().digest)?;
            let program = Program::of(&config, &arguments.command, rootfs.path())?;
            if runtime != Runtime::Own {
                // Such a container outlives us, if we are killed.
                dir.share()?;
            }
            start_and_wait(&runtime, dir.path(), &rootfs, &program, &signals)?
        }
    };
    drop(rootfs);
    drop(image);
    dir.close()?;
    Ok(ExitCode::from(code))
}

fn start_and_wait(
    runtime: &Runtime,
    dir: &Path,
    rootfs: &Rootfs,
    program: &Program,
    signals: &Signals,
) -> Result<u8> {
    let mut container = Container::start(runtime, dir, rootfs.path(), program, Streams::Inherited)?;
    container.wait(signals)
}

/// The number that the kernel gives a signal.
fn number(signal: Signal) -> u8 {
    match signal {
        Signal::Hangup => 1,
        Signal::Interrupt => 2,
        Signal::Terminate => 15,
    }
}

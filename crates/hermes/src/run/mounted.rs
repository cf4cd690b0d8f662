//! An image mounted through the daemon, for as long as a value lives.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;
use sys::mount::Unmount;

use crate::args::{DaemonTuning, GlobalArguments};
use crate::client;
use crate::daemon::MountReport;
use crate::output::Output;
use crate::protocol::{MountRequest, Request};

/// A lazily mounted image. Dropping it unmounts it and removes its folder.
#[derive(Debug)]
pub(crate) struct MountedImage {
    common: GlobalArguments,
    output: Output,
    report: MountReport,
}

impl MountedImage {
    /// Mounts; a daemon is started if none runs.
    pub(crate) fn mount(
        common: &GlobalArguments,
        output: Output,
        request: MountRequest,
    ) -> Result<Self> {
        let (tuning, request) = (DaemonTuning::default(), Request::Mount(request));
        let report: MountReport = client::ask_or_start(common, &output, &tuning, &request)?;
        output.warnings(&report.warnings);
        Ok(Self { common: common.clone(), output, report })
    }

    /// Where it is mounted.
    pub(crate) fn dir(&self) -> &Path {
        &self.report.dir
    }

    /// What the daemon said of the mount when it was made.
    pub(crate) fn report(&self) -> &MountReport {
        &self.report
    }

    /// Asks the daemon, which may be about to be started again.
    fn unmount(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        // What still uses it when we end is not ours to wait for.
        let request = Request::Umount { dir: self.report.dir.clone(), lazy: true };
        loop {
            match client::ask::<Value>(&self.common, &self.output, &request) {
                Ok(Some(_)) => return Ok(()),
                Ok(None) if Instant::now() > deadline => bail!("no daemon answers"),
                Err(err) if Instant::now() > deadline => return Err(err),
                Ok(None) | Err(_) => std::thread::park_timeout(PAUSE),
            }
        }
    }
}

impl Drop for MountedImage {
    fn drop(&mut self) {
        let dir = &self.report.dir;
        if let Err(err) = self.unmount() {
            tracing::warn!(dir = %dir.display(), error = crate::failure::in_full(&err), "the daemon did not unmount");
            // EINVAL if it had done so before it failed.
            sys::mount::unmount(dir, Unmount::Detach).ok();
        }
        if let Err(err) = std::fs::remove_dir(dir) {
            tracing::warn!(dir = %dir.display(), error = %err, "folder of a mount stays behind");
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

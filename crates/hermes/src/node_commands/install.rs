//! `hermes node install`: everything that makes this machine a node, each step once.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use toml::{Table, Value};

use super::containerd::Containerd;
use super::edit;
use super::faults::{self, Fault};
use super::files::Files;
use super::record::Record;
use super::service::{self, NAME, SOCKET};
use super::settings::{self, Effective, Wanted, file_version};
use super::steps::Steps;
use crate::args::{GlobalArguments, InstallArguments, RestartArguments};
use crate::config::{self, Config};
use crate::failure::in_full;
use crate::output::Output;

/// What a drop-in of containerd is called.
const DROP_IN: &str = "hermes.toml";

/// Sets this machine up.
pub(super) fn run(
    common: &GlobalArguments,
    output: Output,
    arguments: &InstallArguments,
) -> Result<()> {
    let root = std::path::absolute(&common.root)?;
    let restarts = service::may_restart_containerd(&arguments.restart)?;
    let containerd = Containerd::find(&arguments.node)?;
    let mut steps = Steps::new(output, arguments.dry_run);
    steps.note(format!(
        "for containerd {}, configured by {}",
        containerd.full_version,
        containerd.config.display()
    ))?;
    let record = Record::read(&root)?.unwrap_or_default();
    let path = Path::new(config::USUAL_PLACE);
    let config = if path.exists() { Config::read(path)? } else { Config::default() };
    // First: if there is no way, nothing is written.
    let wanted = wanted(&containerd, &config, &root)?;
    let plan = plan(&containerd, &wanted)?;
    if let Err(why) = &wanted.maps_ids {
        steps.note(format!("containers in user namespaces get copies of images: {why}"))?;
    }
    let mut files = Files { root: &root, record, steps };
    files.make_folder(&root, "for the cache and what is written down here")?;
    write_config(&mut files, &config)?;
    write_service(&mut files, arguments, &config)?;
    // Last: containerd may be restarted at any moment, and asks for Hermes then.
    let changed = carry_out(&mut files, &containerd, &plan)?;
    if changed {
        tell_of_restart(&mut files.steps, &arguments.restart)?;
    }
    files.steps.end(changed && !restarts)
}

/// What containerd must say for this configuration of Hermes.
pub(super) fn wanted(containerd: &Containerd, config: &Config, root: &Path) -> Result<Wanted> {
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.with_context(|| format!("{} is not in UTF-8", path.display()))
    };
    Ok(Wanted {
        version: containerd.version,
        socket: text(&config.containerd.socket)?,
        exports_root: text(&root.join("snapshots"))?,
        maps_ids: maps_ids(containerd, root),
    })
}

/// Whether images can be shown to user namespaces as if they were theirs; else why not.
fn maps_ids(containerd: &Containerd, root: &Path) -> Result<(), String> {
    if !containerd.version.maps_ids() {
        return Err(format!("containerd {} cannot mount them so", containerd.version));
    }
    // The root folder may be about to be made.
    let existing = root.ancestors().find(|folder| folder.is_dir()).unwrap_or(root);
    mounts::try_user_namespaces(existing).map_err(|err| in_full(&err.into()))
}

/// Hermes' own configuration, unless it is there, and the folder of policies.
fn write_config(files: &mut Files<'_>, config: &Config) -> Result<()> {
    let path = Path::new(config::USUAL_PLACE);
    if !path.exists() {
        files.write(path, &config::show_default()?, "the default configuration", &[])?;
    }
    files.make_folder(&config.containerd.policies, "for policies; without one no image is lazy")
}

fn write_service(
    files: &mut Files<'_>,
    arguments: &InstallArguments,
    config: &Config,
) -> Result<()> {
    let units = [
        (SOCKET, service::socket_unit(&config.containerd.socket)?, "where systemd listens for it"),
        (NAME, service::unit(files.root)?, "the service of systemd"),
    ];
    let mut changed = false;
    for (name, unit, what) in units {
        changed |= !service::is_packaged(name, &unit)
            && files.write(&service::place(name), &unit, what, &[])?;
    }
    if !service::is_there() {
        return files.steps.note(format!(
            "systemd does not run here: start `hermes daemon --config {}` by other means, before containerd",
            config::USUAL_PLACE
        ));
    }
    if files.steps.is_trial() {
        return if arguments.no_start {
            Ok(())
        } else {
            files.steps.tell("enable and start hermes.service")
        };
    }
    if changed {
        service::control(&["daemon-reload"])?;
    }
    if arguments.no_start {
        let start = format!("start the service before containerd: `systemctl enable --now {NAME}`");
        return files.steps.note(start);
    }
    if service::control(&["is-enabled", NAME]).is_err() {
        files.record.enabled_service = true;
        files.record.write(files.root)?;
        files.steps.tell("enable hermes.service")?;
        service::control(&["enable", NAME])?;
    }
    if service::control(&["is-active", NAME]).is_err() {
        files.steps.tell("start hermes.service")?;
        service::control(&["start", NAME])?;
    } else if changed {
        files.steps.note("hermes.service runs as before until `systemctl restart hermes`")?;
    }
    Ok(())
}

/// What is done to containerd's configuration.
enum Plan {
    /// It is right.
    Nothing,
    /// A file beside it.
    DropIn { path: PathBuf, text: String, changes: Vec<edit::Change> },
    /// Keys in it, and what else comes into force.
    Edit { text: String, changes: Vec<edit::Change>, side_effects: Vec<String> },
}

/// Finds a way that containerd itself, asked what it would make of it, shows to be right.
fn plan(containerd: &Containerd, wanted: &Wanted) -> Result<Plan> {
    let text = containerd.text()?;
    let shown = containerd.config.display();
    let written: Table =
        toml::from_str(&text).with_context(|| format!("{shown} cannot be used"))?;
    refuse_version_1(&written).with_context(|| format!("{shown} cannot be changed"))?;
    let before = containerd.effective(&text, None)?;
    let faults = |written: &Table, dump: &Table| {
        faults::of_configuration(wanted, written, &Effective::of(dump))
    };
    if faults(&written, &before).is_empty() {
        return Ok(Plan::Nothing);
    }
    if let Some(folder) = containerd.drop_in_folder(&text)? {
        let version = file_version(&written).unwrap_or_else(|| wanted.version.of_files());
        let empty = format!("version = {version}\n");
        let settings = settings::settings(wanted, &toml::from_str(&empty)?, &before);
        let (drop_in, changes) = edit::apply(&empty, &settings)?;
        let after = containerd.effective(&text, Some(&drop_in))?;
        // Some versions let a file that is imported replace whole tables.
        if faults(&written, &after).is_empty() && settings::side_effects(&before, &after).is_empty()
        {
            let text = format!("# Written by `hermes node install`.\n{drop_in}");
            return Ok(Plan::DropIn { path: folder.join(DROP_IN), text, changes });
        }
    }
    let settings = settings::settings(wanted, &written, &before);
    let edited = edit::apply(&text, &settings);
    let (text, changes) = edited.with_context(|| format!("changing {shown}"))?;
    let after = containerd.effective(&text, None)?;
    let left = faults(&toml::from_str(&text)?, &after);
    if let [Fault { what, .. }, ..] = &left[..] {
        let keys = changes.iter().map(edit::Change::shown).collect::<Vec<_>>().join("; ");
        bail!(
            "{shown} was left as it is: with {keys} containerd would still not do as it should: {what}"
        );
    }
    let side_effects = settings::side_effects(&before, &after);
    Ok(Plan::Edit { text, changes, side_effects })
}

/// A file without a version is of the first, which names plugins otherwise.
fn refuse_version_1(written: &Table) -> Result<()> {
    let names = ["plugins", "disabled_plugins", "required_plugins"];
    let is_used = |name: &&str| match written.get(*name) {
        None => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(_) => true,
    };
    match (file_version(written), names.iter().find(|name| is_used(name))) {
        (Some(1), _) | (None, Some(_)) => bail!(
            "it is of version 1, in which containerd has other names for plugins: write it as version 2, for which \
             `containerd config migrate` helps from containerd 2.0 on"
        ),
        _ => Ok(()),
    }
}

/// True if something was changed.
fn carry_out(files: &mut Files<'_>, containerd: &Containerd, plan: &Plan) -> Result<bool> {
    match plan {
        Plan::Nothing => {
            files.steps.note("containerd's configuration is right as it is")?;
            Ok(false)
        }
        Plan::DropIn { path, text, changes } => {
            files.write(path, text, "which containerd's configuration imports", changes)
        }
        Plan::Edit { text, changes, side_effects } => {
            let changed =
                files.write(&containerd.config, text, "containerd's configuration", changes)?;
            for key in side_effects {
                files.steps.note(format!(
                    "    this comes into force too, which the file said and containerd ignored: {key}"
                ))?;
            }
            Ok(changed)
        }
    }
}

/// Containers go on while containerd is restarted, but who else uses it may not expect that.
pub(super) fn tell_of_restart(steps: &mut Steps, restart: &RestartArguments) -> Result<()> {
    match restart.restart_containerd {
        true => {
            steps.tell("restart containerd")?;
            if !steps.is_trial() {
                service::control(&["restart", "containerd.service"])?;
            }
            Ok(())
        }
        false => steps.note(
            "restart containerd for this to be in force (`systemctl restart containerd`; containers go on running)",
        ),
    }
}

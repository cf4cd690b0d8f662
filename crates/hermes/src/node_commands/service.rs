//! The service of systemd, where systemd runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::containerd::output;
use crate::args::RestartArguments;

/// The service of the documentation.
const UNIT: &str = include_str!("../../../../docs/hermes.service");
/// What it starts there.
const DOCUMENTED: &str = "/usr/local/bin/hermes daemon --config /etc/hermes/config.toml";
/// The socket of the documentation.
const SOCKET_UNIT: &str = include_str!("../../../../docs/hermes.socket");
/// Where systemd listens there.
const DOCUMENTED_SOCKET: &str = "/run/hermes/containerd.sock";
/// The name of the service.
pub(super) const NAME: &str = "hermes.service";
/// The name of the socket, which the service enables and starts.
pub(super) const SOCKET: &str = "hermes.socket";
/// Where packages put it.
const PACKAGED: [&str; 2] = ["/usr/lib/systemd/system", "/lib/systemd/system"];

/// Whether systemd runs this machine: `sd_booted(3)`.
pub(super) fn is_there() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Whether containerd is to be restarted.
pub(super) fn may_restart_containerd(arguments: &RestartArguments) -> Result<bool> {
    ensure!(
        !arguments.restart_containerd || is_there(),
        "--restart-containerd needs systemd, which does not run here: restart containerd yourself"
    );
    Ok(arguments.restart_containerd)
}

/// Where the administrator has a unit.
pub(super) fn place(name: &str) -> PathBuf {
    Path::new("/etc/systemd/system").join(name)
}

/// The socket for containerd at this path.
pub(super) fn socket_unit(socket: &Path) -> Result<String> {
    let path = socket.display().to_string();
    ensure!(
        path.chars().all(is_plain),
        "systemd cannot listen at `{path}`: use a path of letters, digits and `/._-` only"
    );
    Ok(SOCKET_UNIT.replace(DOCUMENTED_SOCKET, &path))
}

/// The unit for this program and this root folder.
pub(super) fn unit(root: &Path) -> Result<String> {
    let program = std::env::current_exe().context("finding this program")?;
    let mut command = program.display().to_string();
    if root != Path::new(crate::args::USUAL_ROOT) {
        command = format!("{command} --root {}", root.display());
    }
    let n_spaces = command.matches(' ').count();
    ensure!(
        command.chars().filter(|c| !is_plain(*c)).count() == n_spaces && n_spaces <= 2,
        "a unit of systemd cannot start `{command}`: use paths of letters, digits and `/._-` only"
    );
    Ok(UNIT
        .replace(DOCUMENTED, &format!("{command} daemon --config {}", crate::config::USUAL_PLACE)))
}

/// Whether it means itself in a unit.
fn is_plain(c: char) -> bool {
    !c.is_whitespace() && !"\"'\\%$".contains(c)
}

/// Whether a package has brought this unit.
pub(super) fn is_packaged(name: &str, unit: &str) -> bool {
    let texts = PACKAGED.iter().map(|folder| std::fs::read_to_string(Path::new(folder).join(name)));
    texts.flatten().any(|text| text == unit)
}

/// Has systemd do something, and returns what it says.
pub(super) fn control(arguments: &[&str]) -> Result<String> {
    output(Command::new("systemctl").args(arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_unit_starts_this_program() {
        assert!(UNIT.contains(&format!("ExecStart={DOCUMENTED}\n")));
        let line = |root: &str| {
            let unit = unit(Path::new(root)).unwrap();
            let line = unit.lines().find(|line| line.starts_with("ExecStart=")).unwrap();
            line.replace(std::env::current_exe().unwrap().to_str().unwrap(), "PROGRAM")
        };
        let daemon = "daemon --config /etc/hermes/config.toml";
        assert_eq!(line("/var/lib/hermes"), format!("ExecStart=PROGRAM {daemon}"));
        assert_eq!(line("/srv/h"), format!("ExecStart=PROGRAM --root /srv/h {daemon}"));
        unit(Path::new("/srv/a b")).unwrap_err();
        unit(Path::new("/srv/100%")).unwrap_err();
    }

    #[test]
    fn the_documented_socket_is_where_containerd_looks() {
        let usual = crate::config::Config::default().containerd.socket;
        assert_eq!(socket_unit(&usual).unwrap(), SOCKET_UNIT);
        let lines =
            |unit: &str| unit.lines().filter(|line| line.starts_with("ListenStream=")).count();
        let elsewhere = socket_unit(Path::new("/run/h.sock")).unwrap();
        assert!(elsewhere.contains("\nListenStream=/run/h.sock\n") && lines(&elsewhere) == 1);
        socket_unit(Path::new("/run/a b")).unwrap_err();
        // What is enabled and started is the service.
        assert!(
            UNIT.contains("\nWants=hermes.socket\n") && UNIT.contains("\nAlso=hermes.socket\n")
        );
    }
}

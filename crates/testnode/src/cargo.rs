//! cargo, called by a program that cargo runs.

use std::env;
use std::ffi::OsStr;
use std::process::Command;

/// cargo as a shell would call it. What it sets for a program that it runs is taken away: build scripts ask for
/// some of it, and would run again, with all that depends on them.
#[must_use]
pub fn cargo() -> Command {
    let mut cargo = Command::new("cargo");
    for (name, _) in env::vars_os() {
        if is_of_a_package(&name) {
            cargo.env_remove(name);
        }
    }
    cargo
}

fn is_of_a_package(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    ["CARGO_MANIFEST_", "CARGO_PKG_"].iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cargo_says_of_this_package_stays_here() {
        let seen = cargo();
        let removed: Vec<_> = seen.get_envs().filter(|(_, value)| value.is_none()).collect();
        assert!(removed.contains(&(OsStr::new("CARGO_PKG_NAME"), None)), "{removed:?}");
        assert!(removed.contains(&(OsStr::new("CARGO_MANIFEST_DIR"), None)), "{removed:?}");
    }
}

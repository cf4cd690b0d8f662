//! What the benchmarks share: where results go, and the program under test.

pub mod hermes;
pub mod layers;
pub mod process;
pub mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The root of the clone that this program was built from.
#[must_use]
pub fn project_root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Where results are written unless the caller says otherwise.
#[must_use]
pub fn results_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("results")
}

/// Builds `hermes` as it is released, with the build folder of this program, and returns where it is.
///
/// # Errors
/// When it does not compile.
pub fn hermes_binary() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding our own program")?;
    // TARGET/release/deps/cold-0123456789abcdef
    let profile = own.parent().and_then(Path::parent).context("our own program has no folder")?;
    let target = profile.parent().context("our own program has no build folder")?;
    let mut cargo = testnode::cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "hermes", "--target-dir"]);
    cargo.arg(target).current_dir(project_root());
    let status = cargo.status().context("running cargo")?;
    if !status.success() {
        bail!("`cargo build --release -p hermes` failed: {status}");
    }
    Ok(target.join("release/hermes"))
}

/// The middle of `values`; of an even number the mean of the two in the middle. `None` without values.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        return sorted.get(middle).copied();
    }
    Some(f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, *sorted.get(middle)?))
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[3.0, 1.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
    }
}

//! The rules of the house that no compiler knows. `CONTRIBUTING.md` says what they are for.

mod crates;
mod promises;
mod sources;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::program::{output, project_root};

/// A file of the project: those that git tracks, and new ones that it does not ignore.
#[derive(Debug)]
struct SourceFile {
    /// From the project's root, with `/`.
    path: String,
    text: String,
}

/// Checks all rules, and lists every breach.
pub(crate) fn tidy() -> Result<()> {
    let problems = problems(&project_root())?;
    if problems.is_empty() {
        println!("tidy: every rule is kept");
        return Ok(());
    }
    for problem in &problems {
        println!("{problem}");
    }
    bail!("tidy: {} breaches of the rules in CONTRIBUTING.md", problems.len());
}

/// Every breach, as `path: what is wrong`.
fn problems(root: &Path) -> Result<Vec<String>> {
    let files = source_files(root)?;
    let mut problems = Vec::new();
    for file in &files {
        problems.extend(sources::check(file).into_iter().map(|p| format!("{}: {p}", file.path)));
    }
    problems.extend(promises::check(&files));
    problems.extend(crates::check(&crates::metadata(root)?, root)?);
    Ok(problems)
}

fn source_files(root: &Path) -> Result<Vec<SourceFile>> {
    let mut git = Command::new("git");
    // Root looks at a clone that may be somebody else's.
    git.args([
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ])
    .current_dir(root);
    let list = output(&mut git)?;
    let mut files = Vec::new();
    for path in list.split('\0').filter(|path| !path.is_empty()) {
        let whole: PathBuf = root.join(path);
        // Removed but not yet from git's index, a symbolic link, or a submodule.
        if !fs::symlink_metadata(&whole).is_ok_and(|m| m.is_file()) {
            continue;
        }
        let bytes = fs::read(&whole).with_context(|| format!("reading {path}"))?;
        // Test data may be anything; the rules are about text.
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(SourceFile { path: path.to_owned(), text });
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_project_is_tidy() {
        let found = problems(&project_root()).unwrap();
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}

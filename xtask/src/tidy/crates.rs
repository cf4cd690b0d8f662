//! Rules about crates: who may depend on whom, lints, licences.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::program::output;

/// The crates from the bottom to the top. A crate depends only on crates of rows above its own in this
/// table; `[dev-dependencies]` are free.
const LAYERS: &[&[&str]] = &[
    &["sys", "oci", "causes"],
    &["ztoc"],
    &["plan", "tree"],
    &["erofs", "registry", "index", "cache", "policy", "snapshotter"],
    &["artifacts", "fill", "testkit", "testnode"],
    &["fuse", "keeper"],
    &["mounts"],
    &["hermes", "xtask", "bench"],
];

/// Crates that turn values into values: no clock, no socket, no runtime.
const PURE: &[&str] = &["causes", "oci", "ztoc", "plan", "tree", "erofs", "policy"];

/// What a pure crate must not reach, however far down.
const IMPURE: &[&str] = &["tokio", "reqwest", "hyper", "kube"];

/// A crate of this name may be a direct dependency only of these.
const RESERVED: &[(&str, &[&str])] = &[("libc", &["sys"])];

/// Pairs that must not meet: front ends know nothing of where bytes come from.
const APART: &[(&str, &str)] = &[
    ("fuse", "registry"),
    ("erofs", "registry"),
    ("cache", "registry"),
    ("snapshotter", "registry"),
];

/// Licences that a dependency may be used under.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "OpenSSL",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Where dependencies may come from.
const SOURCE: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What `cargo metadata` says.
#[derive(Debug, Deserialize)]
pub(super) struct Metadata {
    packages: Vec<Package>,
    workspace_members: HashSet<String>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    /// None for a crate of this workspace.
    source: Option<String>,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// None for an ordinary dependency.
    kind: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<ResolvedNode>,
}

#[derive(Debug, Deserialize)]
struct ResolvedNode {
    id: String,
    deps: Vec<ResolvedEdge>,
}

#[derive(Debug, Deserialize)]
struct ResolvedEdge {
    pkg: String,
    dep_kinds: Vec<EdgeKind>,
}

#[derive(Debug, Deserialize)]
struct EdgeKind {
    kind: Option<String>,
}

pub(super) fn metadata(root: &Path) -> Result<Metadata> {
    let mut cargo = Command::new("cargo");
    cargo.args(["metadata", "--format-version=1", "--all-features"]).current_dir(root);
    serde_json::from_str(&output(&mut cargo)?).context("reading the output of cargo metadata")
}

/// Breaches of the rules.
pub(super) fn check(metadata: &Metadata, root: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for package in metadata.packages.iter().filter(|p| metadata.workspace_members.contains(&p.id)) {
        let breaches = arrows(package).into_iter().chain(reach(metadata, package));
        let manifest = std::fs::read_to_string(&package.manifest_path)
            .with_context(|| format!("reading {}", package.manifest_path))?;
        let lints = (!inherits_lints(&manifest))
            .then(|| "the manifest lacks `[lints] workspace = true`".to_owned());
        let place = Path::new(&package.manifest_path);
        let place = place.strip_prefix(root).unwrap_or(place).display();
        problems.extend(breaches.chain(lints).map(|p| format!("{place}: {p}")));
    }
    problems.extend(metadata.packages.iter().filter_map(provenance));
    Ok(problems)
}

/// Dependencies that point upwards or are not for this crate.
fn arrows(package: &Package) -> Vec<String> {
    let Some(own) = layer(&package.name) else {
        return vec!["the crate has no place among LAYERS in xtask/src/tidy/crates.rs".to_owned()];
    };
    let names = package.dependencies.iter().filter(|d| d.kind.as_deref() != Some("dev"));
    let names: HashSet<&str> = names.map(|d| d.name.as_str()).collect();
    let mut problems = Vec::new();
    for name in names {
        if layer(name).is_some_and(|other| other >= own) {
            problems.push(format!("depends on `{name}`, which is not below it"));
        }
        let reserved = RESERVED.iter().find(|(reserved, _)| *reserved == name);
        if reserved.is_some_and(|(_, users)| !users.contains(&package.name.as_str())) {
            problems.push(format!("depends on `{name}`, which is not for this crate"));
        }
        if APART.contains(&(package.name.as_str(), name)) {
            problems.push(format!("must know nothing of `{name}`"));
        }
    }
    problems.sort();
    problems
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&name))
}

/// Impure crates that a pure one reaches.
fn reach(metadata: &Metadata, package: &Package) -> Vec<String> {
    if !PURE.contains(&package.name.as_str()) {
        return Vec::new();
    }
    let nodes: HashMap<&str, &ResolvedNode> =
        metadata.resolve.nodes.iter().map(|n| (n.id.as_str(), n)).collect();
    let names: HashMap<&str, &str> =
        metadata.packages.iter().map(|p| (p.id.as_str(), p.name.as_str())).collect();
    let mut seen = HashSet::new();
    let mut next = vec![package.id.as_str()];
    while let Some(id) = next.pop() {
        if !seen.insert(id) {
            continue;
        }
        let edges = nodes.get(id).into_iter().flat_map(|node| &node.deps);
        let built = edges.filter(|e| e.dep_kinds.iter().any(|k| k.kind.is_none()));
        next.extend(built.map(|edge| edge.pkg.as_str()));
    }
    let mut found: Vec<String> = seen
        .into_iter()
        .filter_map(|id| names.get(id).filter(|name| IMPURE.contains(name)))
        .map(|name| format!("is pure and must not reach `{name}`"))
        .collect();
    found.sort();
    found
}

fn inherits_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().skip_while(|line| line.trim() != "[lints]");
    lines.nth(1).is_some_and(|line| line.replace(' ', "") == "workspace=true")
}

/// What is wrong with where a foreign crate comes from and what it is licensed as.
fn provenance(package: &Package) -> Option<String> {
    let source = package.source.as_deref()?;
    let who = format!("{} {}", package.name, package.version);
    if source != SOURCE {
        return Some(format!("{who}: comes from {source}, not from crates.io"));
    }
    let licence = package.license.as_deref().unwrap_or("none");
    (!is_allowed(licence)).then(|| format!("{who}: licence {licence} is not on the list"))
}

/// Whether an SPDX expression can be met with [`LICENCES`].
///
/// `AND` binds closer than `OR`; the old form `A/B` means `OR`. Of parentheses only the common form is
/// understood, alternatives in them joined by `AND`; anything else is refused.
fn is_allowed(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ");
    if expression.contains('(') {
        return split_outside(&expression, " AND ").iter().all(|part| {
            let inner = part.trim().strip_prefix('(').and_then(|p| p.strip_suffix(')'));
            inner.map_or_else(|| is_listed(part), is_any_listed)
        });
    }
    is_any_listed(&expression)
}

fn is_any_listed(alternatives: &str) -> bool {
    alternatives.split(" OR ").any(|one| one.split(" AND ").all(is_listed))
}

fn is_listed(licence: &str) -> bool {
    LICENCES.contains(&licence.trim())
}

/// Splits where `separator` is not within parentheses.
fn split_outside<'a>(text: &'a str, separator: &str) -> Vec<&'a str> {
    let mut parts = Vec::new();
    let mut begin = 0;
    for (at, _) in text.match_indices(separator) {
        let before = &text[begin..at];
        if before.matches('(').count() == before.matches(')').count() {
            parts.push(before);
            begin = at + separator.len();
        }
    }
    parts.push(&text[begin..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_arrows(name: &str, dependencies: &[(&str, Option<&str>)], expected: &[&str]) {
        let dependencies = dependencies
            .iter()
            .map(|(name, kind)| Dependency { name: (*name).into(), kind: kind.map(str::to_owned) });
        let found = arrows(&Package {
            id: String::new(),
            name: name.into(),
            version: String::new(),
            license: None,
            source: None,
            manifest_path: String::new(),
            dependencies: dependencies.collect(),
        });
        let matches =
            found.len() == expected.len() && found.iter().zip(expected).all(|(f, e)| f.contains(e));
        assert!(matches, "found {found:#?}, expected {expected:#?}");
    }

    #[test]
    fn arrows_point_down() {
        check_arrows("fill", &[("plan", None), ("cache", None), ("tokio", None)], &[]);
        check_arrows("plan", &[("fill", None)], &["`fill`, which is not below"]);
        check_arrows("index", &[("registry", None)], &["`registry`, which is not below"]);
        check_arrows("plan", &[("testkit", Some("dev"))], &[]);
        check_arrows("fill", &[("libc", None)], &["`libc`, which is not for"]);
        check_arrows("fuse", &[("registry", None)], &["must know nothing of `registry`"]);
        check_arrows("newcomer", &[], &["no place"]);
    }

    #[test]
    fn lints_are_inherited() {
        assert!(inherits_lints("[package]\n\n[lints]\nworkspace = true\n"));
        assert!(!inherits_lints("[package]\nworkspace = true\n"));
        assert!(!inherits_lints("[lints]\nworkspace = false\n"));
    }

    #[test]
    fn licences() {
        for allowed in [
            "MIT",
            "MIT OR GPL-3.0",
            "MIT/Apache-2.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
            "ISC AND (Apache-2.0 OR ISC)",
            "ISC AND (Apache-2.0 OR ISC) AND OpenSSL",
        ] {
            assert!(is_allowed(allowed), "{allowed}");
        }
        for refused in ["GPL-3.0", "MIT AND GPL-3.0", "none", "(GPL-2.0 OR GPL-3.0) AND MIT", ""] {
            assert!(!is_allowed(refused), "{refused}");
        }
    }
}

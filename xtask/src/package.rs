//! `cargo xtask package`: the static program and a Debian package of it.
//!
//! CI does not run it: a release build for musl takes minutes.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::program::{output, project_root, run_quietly};
use crate::setup;

/// What it needs on the host beyond what tests need.
const HOST_PACKAGES: &[&str] = &["musl-tools", "binutils", "gzip"];

/// What dpkg asks for. Nothing is restarted: readers wait for a daemon that is replaced, but who replaces a
/// program decides when.
const RELOAD: &str = "#!/bin/sh\nset -e\n\
    if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi\n";

/// Makes `hermes` and `hermes_VERSION_ARCHITECTURE.deb` in `package` of the target folder.
pub(crate) fn package() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "what packages need is installed, and the program tried in an empty root: run it as root"
        );
    }
    setup::install_packages(HOST_PACKAGES)?;
    let root = project_root();
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let program = build(&root, &target)?;
    check_static(&program)?;
    let out = target.join("package");
    fs::create_dir_all(&out).with_context(|| format!("making {}", out.display()))?;
    let stage = tempfile::tempdir_in(&out).context("making a folder for the package")?;
    let stage = Stage { folder: stage.path().join("root") };
    stage.fill(&root, &program)?;
    try_in_an_empty_root(&stage.path("usr/bin/hermes"))?;

    let architecture = output(Command::new("dpkg").arg("--print-architecture"))?;
    let architecture = architecture.trim();
    stage.describe(architecture)?;
    let name = format!("hermes_{VERSION}_{architecture}.deb");
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "--build"]).arg(&stage.folder).arg(out.join(&name));
    run_quietly("packing", &mut build)?;
    let bare = out.join("hermes");
    fs::copy(stage.path("usr/bin/hermes"), &bare).context("copying the program")?;
    for path in [bare, out.join(name)] {
        let size = fs::metadata(&path).context("looking at what was made")?.len();
        println!("{} ({} KiB)", path.display(), size >> 10);
    }
    Ok(())
}

/// Builds the program for musl.
fn build(root: &Path, target: &Path) -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-musl", env::consts::ARCH);
    let mut add = Command::new("rustup");
    run_quietly("adding the Rust target", add.args(["target", "add", &triple]).current_dir(root))?;
    let mut cargo = testnode::cargo();
    cargo.args(["build", "--locked", "--release", "--package", "hermes", "--target", &triple]);
    cargo.env("CARGO_TARGET_DIR", target).current_dir(root);
    run_quietly("building the static program (ten minutes the first time)", &mut cargo)?;
    Ok(target.join(triple).join("release/hermes"))
}

/// Fails if the program asks for a loader or for libraries.
fn check_static(program: &Path) -> Result<()> {
    let mut readelf = Command::new("readelf");
    let found = output(readelf.args(["--program-headers", "--dynamic", "--wide"]).arg(program))?;
    match found.lines().find(|line| line.contains("INTERP") || line.contains("(NEEDED)")) {
        Some(line) => bail!("{} is not static: {}", program.display(), line.trim()),
        None => Ok(()),
    }
}

/// Runs the program where nothing else is.
fn try_in_an_empty_root(program: &Path) -> Result<()> {
    let empty = tempfile::tempdir().context("making an empty root")?;
    fs::copy(program, empty.path().join("hermes")).context("copying the program")?;
    let mut chroot = Command::new("chroot");
    let said = output(chroot.arg(empty.path()).args(["/hermes", "--version"]))?;
    if said.trim() != format!("hermes {VERSION}") {
        bail!("in an empty root the program says `{}`", said.trim());
    }
    println!("{} runs in an empty root", said.trim());
    Ok(())
}

/// The files of the package.
struct Stage {
    folder: PathBuf,
}

impl Stage {
    fn path(&self, inside: &str) -> PathBuf {
        self.folder.join(inside)
    }

    /// Writes a file, with the folders above it.
    fn write(&self, inside: &str, bytes: impl AsRef<[u8]>, mode: u32) -> Result<()> {
        let path = self.path(inside);
        let context = || format!("writing {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&self.folder)).with_context(context)?;
        fs::write(&path, bytes).with_context(context)?;
        fs::set_permissions(&path, Permissions::from_mode(mode)).with_context(context)
    }

    fn fill(&self, root: &Path, program: &Path) -> Result<()> {
        let read = |name: &str| {
            fs::read_to_string(root.join(name)).with_context(|| format!("reading {name}"))
        };
        self.write("usr/bin/hermes", fs::read(program).context("reading the program")?, 0o755)?;
        let hermes = self.path("usr/bin/hermes");
        run_quietly("stripping", Command::new("strip").arg("--strip-debug").arg(&hermes))?;
        let unit =
            read("docs/hermes.service")?.replace("/usr/local/bin/hermes ", "/usr/bin/hermes ");
        self.write("usr/lib/systemd/system/hermes.service", unit, 0o644)?;
        let socket = read("docs/hermes.socket")?;
        self.write("usr/lib/systemd/system/hermes.socket", socket, 0o644)?;
        let says = |arguments: &[&str]| output(Command::new(&hermes).args(arguments));
        self.write(CONFIG, says(&["config", "default"])?, 0o644)?;
        for (shell, place) in [
            ("bash", "usr/share/bash-completion/completions/hermes"),
            ("zsh", "usr/share/zsh/vendor-completions/_hermes"),
            ("fish", "usr/share/fish/vendor_completions.d/hermes.fish"),
        ] {
            self.write(place, says(&["completions", shell])?, 0o644)?;
        }
        let docs = fs::read_dir(root.join("docs")).context("reading docs")?;
        for entry in docs {
            let name = entry.context("reading docs")?.file_name();
            let name = name.to_string_lossy();
            if name.ends_with(".md") {
                let place = format!("usr/share/doc/hermes/{name}");
                self.write(&place, read(&format!("docs/{name}"))?, 0o644)?;
            }
        }
        let licence = read("LICENSE")?;
        self.write("usr/share/doc/hermes/copyright", format!("{COPYRIGHT}{licence}"), 0o644)?;
        self.write("usr/share/doc/hermes/changelog", read("CHANGELOG.md")?, 0o644)?;
        let manual = self.path("usr/share/man/man1");
        output(Command::new(&hermes).arg("man").arg(&manual))?;
        let mut gzip = Command::new("gzip");
        gzip.args(["-9", "--no-name", "--recursive"]).arg(&manual);
        run_quietly(
            "compressing manual pages",
            gzip.arg(self.path("usr/share/doc/hermes/changelog")),
        )
    }

    /// What dpkg wants to know.
    fn describe(&self, architecture: &str) -> Result<()> {
        let mut du = Command::new("du");
        let size = output(du.args(["--summarize", "--block-size=1024"]).arg(&self.folder))?;
        let size = size.split_whitespace().next().unwrap_or_default().to_owned();
        let control = format!(
            "Package: hermes\nVersion: {VERSION}\nArchitecture: {architecture}\n\
             Maintainer: The Hermes project <maintainers@hermes.invalid>\nInstalled-Size: {size}\n\
             Section: admin\nPriority: optional\nRecommends: containerd\n\
             Description: {DESCRIPTION}\n"
        );
        self.write("DEBIAN/control", control, 0o644)?;
        self.write("DEBIAN/conffiles", format!("/{CONFIG}\n"), 0o644)?;
        // There is no prerm: what containers use goes on.
        self.write("DEBIAN/postinst", RELOAD, 0o755)?;
        self.write("DEBIAN/postrm", RELOAD, 0o755)
    }
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where the package has the configuration.
const CONFIG: &str = "etc/hermes/config.toml";

const COPYRIGHT: &str = "Hermes is free software under the Apache License, Version 2.0, which follows.\n\
    The libraries that are linked into it are under licences that allow that.\n\n";

const DESCRIPTION: &str = "lazy container images, for containerd\n \
    Starts containers from unmodified OCI images before the image is downloaded. `hermes node\n \
    install` makes this machine's containerd use it, `hermes node check` says what is wrong, and\n \
    `hermes node uninstall`, to be run before the package is removed, is the way back.";

//! What is run: the image's configuration, the user's wishes and the image's users made one.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use oci::{Digest, ImageConfig, ProcessConfig};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use serde::{Deserialize, Serialize};

/// A program as a runtime starts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Program {
    /// The program and its arguments; never empty.
    pub(crate) arguments: Vec<String>,
    /// `NAME=value`.
    pub(crate) environment: Vec<String>,
    pub(crate) working_dir: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The other groups.
    pub(crate) groups: Vec<u32>,
}

/// The configuration of a mounted image, which the daemon of `root` has written down.
pub(crate) fn config_of(root: &Path, manifest: &Digest) -> Result<ImageConfig> {
    #[derive(Deserialize)]
    struct Recorded {
        config: ImageConfig,
    }
    let path = root.join("images").join(manifest.hex()).join("image.json");
    let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let recorded: Recorded =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    Ok(recorded.config)
}

impl Program {
    /// What `config` says, with `command` instead of the image's own where it is not empty. Users are
    /// looked up in the image's own files below `rootfs`.
    pub(crate) fn of(config: &ImageConfig, command: &[String], rootfs: &Path) -> Result<Self> {
        let ProcessConfig { user, env, entrypoint, cmd, working_dir } = &config.config;
        let arguments = if command.is_empty() {
            [entrypoint.as_slice(), cmd].concat()
        } else {
            command.to_vec()
        };
        if arguments.is_empty() {
            bail!("the image names no program; write one after `--`");
        }
        let user = find_user(user, &read_in(rootfs, "etc/passwd"), &read_in(rootfs, "etc/group"))?;
        let mut environment = env.clone();
        let mut default = |name: &str, value: &str| {
            if !environment.iter().any(|set| set.split('=').next() == Some(name)) {
                environment.push(format!("{name}={value}"));
            }
        };
        default("PATH", DEFAULT_PATH);
        default("HOME", &user.home);
        let working_dir = PathBuf::from("/").join(working_dir);
        let User { uid, gid, groups, home: _ } = user;
        Ok(Self { arguments, environment, working_dir, uid, gid, groups })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

/// `text` is a user's name or number, and after a colon a group's. As in other engines, whoever names a group
/// gets no other ones.
fn find_user(text: &str, passwd: &str, group: &str) -> Result<User> {
    let (name, group_name) = match text.split_once(':') {
        Some((name, group_name)) => (name, Some(group_name)),
        None => (text, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let known = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [login, _, uid, gid, _, home, ..] = fields.as_slice() else { return None };
        let found = *login == name || *uid == name;
        found.then(|| {
            let (groups, home) = (groups_of(login, group), (*home).to_owned());
            Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()?, groups, home })
        })?
    });
    let unknown = |uid, home: &str| User { uid, gid: 0, groups: Vec::new(), home: home.to_owned() };
    let mut user = match (known, name.parse()) {
        (Some(user), _) => user,
        (None, Ok(0)) => unknown(0, "/root"),
        (None, Ok(uid)) => unknown(uid, "/"),
        (None, Err(_)) => bail!(
            "the image's configuration names the user {name}, which its /etc/passwd does not have"
        ),
    };
    if let Some(wanted) = group_name {
        user.groups.clear();
        let known = group.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, gid) = (fields.next()?, fields.nth(1)?);
            if name == wanted { gid.parse().ok() } else { None }
        });
        user.gid = match (known, wanted.parse()) {
            (Some(gid), _) | (None, Ok(gid)) => gid,
            (None, Err(_)) => bail!(
                "the image's configuration names the group {wanted}, which its /etc/group does not have"
            ),
        };
    }
    Ok(user)
}

/// The groups whose members `login` is among.
fn groups_of(login: &str, group: &str) -> Vec<u32> {
    let groups = group.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, gid, members] = fields.as_slice() else { return None };
        if members.split(',').any(|member| member == login) { gid.parse().ok() } else { None }
    });
    groups.take(MOST_GROUPS).collect()
}

/// A small file of the image, or nothing. Links lead to the image's own files, not to the machine's.
fn read_in(rootfs: &Path, path: &str) -> String {
    let open = || -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::CLOEXEC | OFlags::DIRECTORY | OFlags::PATH;
        let root = openat2(CWD, rootfs, flags, Mode::empty(), ResolveFlags::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    };
    let Ok(file) = open() else { return String::new() };
    let mut bytes = Vec::new();
    match File::from(file).take(MOST_BYTES).read_to_end(&mut bytes) {
        Ok(_len) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(err) => {
            tracing::warn!(path, error = %err, "a file of the image cannot be read");
            String::new()
        }
    }
}

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const MOST_BYTES: u64 = 1 << 20;
/// `NGROUPS_MAX`.
const MOST_GROUPS: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbad line\nweb:x:33:34:www:/var/www:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:other,web\nbad:x:51\nwww:x:52:web\nno:x:y:web\n";

    #[track_caller]
    fn check(text: &str, uid: u32, gid: u32, groups: &[u32], home: &str) {
        let found = find_user(text, PASSWD, GROUP).unwrap();
        let (groups, home) = (groups.to_vec(), home.to_owned());
        assert_eq!(found, User { uid, gid, groups, home }, "{text}");
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        check("", 0, 0, &[], "/root");
        check("web", 33, 34, &[50, 52], "/var/www");
        check("33", 33, 34, &[50, 52], "/var/www");
        check("web:staff", 33, 50, &[], "/var/www");
        check("1000", 1000, 0, &[], "/");
        check("1000:1001", 1000, 1001, &[], "/");
        check(":staff", 0, 50, &[], "/root");
        for text in ["nobody", "web:nogroup", "-1"] {
            assert!(find_user(text, PASSWD, GROUP).is_err(), "{text}");
        }
    }

    #[test]
    fn a_command_replaces_the_whole_of_the_images_own() {
        let config = ImageConfig {
            config: ProcessConfig {
                entrypoint: vec!["/bin/entry".into()],
                cmd: vec!["a".into()],
                env: vec!["PATH=/x".into()],
                working_dir: "srv".into(),
                ..ProcessConfig::default()
            },
            ..ImageConfig::default()
        };
        let nowhere = Path::new("/nonexistent");
        let own = Program::of(&config, &[], nowhere).unwrap();
        assert_eq!(own.arguments, ["/bin/entry", "a"]);
        assert_eq!(own.environment, ["PATH=/x", "HOME=/root"]);
        assert_eq!(own.working_dir, Path::new("/srv"));
        let other = Program::of(&config, &["sh".into()], nowhere).unwrap();
        assert_eq!(other.arguments, ["sh"]);
        let nothing = Program::of(&ImageConfig::default(), &[], nowhere).unwrap_err();
        assert!(nothing.to_string().contains("write one after `--`"), "{nothing}");
    }
}

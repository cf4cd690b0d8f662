//! What a JVM reads before the first class of the application: its own libraries, its archive of classes, its
//! settings; and the application's jars where they lie as they mostly do.

use std::collections::BTreeSet;

use tree::{NodeId, Tree};

use super::{Known, ProgramFiles, Reach};

/// Whether a program is `java`.
pub(super) fn is_launcher(tree: &Tree, node: NodeId) -> bool {
    let path = tree.path_of(node);
    path.ends_with(b"/bin/java")
}

/// Asks for what the launchers in `known` will read, and for the jars of what is started. Returns the number of
/// files.
pub(super) fn find(files: &ProgramFiles<'_>, known: &mut Known) -> usize {
    let mut found = Vec::new();
    for launcher in std::mem::take(&mut known.launchers) {
        let home = parent_of(&files.tree.path_of(files.tree.parent(launcher)));
        for name in OF_HOME {
            found.extend(files.want_up_to(&[home.as_slice(), name.as_bytes()].concat(), LONGEST));
        }
        for folder in SETTINGS {
            let folder = [home.as_slice(), folder.as_bytes()].concat();
            found.extend(all_in(files, &folder, b""));
        }
        for folder in folders_of_jars(files, known) {
            found.extend(all_in(files, &folder, b".jar"));
        }
    }
    if found.is_empty() { 0 } else { files.load(found, known, Reach::Scripts) }
}

/// `bin` and `lib` are beside each other where an application has a script to start it; a class path names
/// folders as `lib/*`.
fn folders_of_jars(files: &ProgramFiles<'_>, known: &Known) -> BTreeSet<Vec<u8>> {
    let words = known.commands.iter().flatten();
    let parts = words.flat_map(|word| word.split(|byte| *byte == b':'));
    let mut folders = BTreeSet::new();
    for part in parts.filter(|part| part.contains(&b'/')) {
        if let Some(folder) = part.strip_suffix(b"/*") {
            folders.insert(files.absolute(folder));
        }
        let path = files.absolute(part);
        let Some((node, _)) = files.resolve(&path) else { continue };
        for folder in [parent_of(&path), files.tree.path_of(files.tree.parent(node))] {
            if folder.ends_with(b"/bin") {
                let application = parent_of(&folder);
                folders
                    .extend([b"/lib".as_slice(), b"/libs"].map(|lib| [&application, lib].concat()));
            }
        }
    }
    folders
}

/// Asks for the files in a folder whose names end so.
fn all_in(files: &ProgramFiles<'_>, folder: &[u8], suffix: &[u8]) -> Vec<NodeId> {
    let Some(directory) = files.tree.lookup(folder) else { return Vec::new() };
    let names = files.tree.children(directory).map(|(name, _)| name);
    let names = names.filter(|name| name.ends_with(suffix)).take(MOST_IN_A_FOLDER);
    let paths = names.map(|name| [folder, b"/", name].concat());
    paths.filter_map(|path| files.want_up_to(&path, LONGEST)).collect()
}

fn parent_of(path: &[u8]) -> Vec<u8> {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or_default();
    path.get(..end).unwrap_or_default().to_vec()
}

/// Of a JVM, what HotSpot reads whatever it runs (JDK 11 to 25); `modules` is long, and begins with its index.
const OF_HOME: &[&str] = &[
    "/lib/jvm.cfg",
    "/lib/libjli.so",
    "/lib/server/libjvm.so",
    "/lib/libjimage.so",
    "/lib/libjava.so",
    "/lib/libverify.so",
    "/lib/libzip.so",
    "/lib/server/classes.jsa",
    "/lib/modules",
    "/lib/libnio.so",
    "/lib/libnet.so",
    "/lib/libextnet.so",
    "/lib/libmanagement.so",
    "/lib/libmanagement_ext.so",
    "/lib/libprefs.so",
    "/lib/libinstrument.so",
    "/lib/tzdb.dat",
    "/release",
];

/// Folders with settings, a few KiB each.
const SETTINGS: &[&str] =
    &["/conf", "/conf/security", "/conf/security/policy/unlimited", "/lib/security"];

/// Files up to this many bytes are wanted whole.
const LONGEST: u64 = 64 << 20;

const MOST_IN_A_FOLDER: usize = 512;

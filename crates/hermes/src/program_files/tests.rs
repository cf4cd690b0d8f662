//! What is asked for of images that are here: nothing is fetched.

use testkit::image::LayerBuilder;

use super::*;

/// An image of one layer, which is here.
struct Here {
    tar: Vec<u8>,
    tree: Tree,
    wanted: Mutex<Vec<Range<u64>>>,
}

impl Here {
    fn new(layer: &LayerBuilder) -> Self {
        let tar = layer.build();
        let mut scanner = ztoc::TarScanner::new(ztoc::Limits::default());
        scanner.push(&tar).unwrap();
        let entries = scanner.finish().unwrap().entries;
        let tree = Tree::merge(&[&entries], &tree::Limits::default()).unwrap();
        Self { tar, tree, wanted: Mutex::default() }
    }

    /// The files that a command needs, in the order in which they are asked for.
    fn needed(&self, command: &[&str], environment: &[&str], reach: Reach) -> Vec<String> {
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect();
        let command = Command {
            arguments: words(command),
            environment: words(environment),
            working_dir: "/srv".to_owned(),
        };
        let asked = Asked::default();
        self.wanted.lock().clear();
        let files =
            ProgramFiles { tree: &self.tree, layers: self, command: &command, asked: &asked };
        let count = files.find(reach);
        let mut names = Vec::new();
        for range in &*self.wanted.lock() {
            let node = self.tree.file_at(0, range.start).expect("a part of a file");
            let name = String::from_utf8(self.tree.path_of(node)).unwrap();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        assert_eq!(names.len(), count);
        names
    }
}

impl Layers for Here {
    fn want(&self, layer: u32, range: Range<u64>) {
        assert_eq!(layer, 0);
        self.wanted.lock().push(range);
    }

    fn read_exact_at(&self, _layer: u32, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let at = usize::try_from(at).unwrap();
        let bytes = self.tar.get(at..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A program that needs nothing.
fn program() -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    (header[16], header[18], header[20], header[52], header[54]) = (3, 62, 1, 64, 56);
    header
}

/// A library that says what it needs, by tags of the dynamic section, and has these constants.
fn library(says: &[(u64, &str)], constants: &[u8]) -> Vec<u8> {
    let (strings_at, mut strings, mut dynamic) = (64 + 3 * 56, vec![0], Vec::new());
    for (tag, text) in says {
        dynamic.extend([*tag, strings.len() as u64]);
        strings.extend(text.bytes().chain([0]));
    }
    dynamic.extend([DT_STRTAB, strings_at, DT_STRSZ, strings.len() as u64, 0, 0]);
    let constants_at = strings_at + strings.len() as u64;
    let dynamic_at = (constants_at + constants.len() as u64).next_multiple_of(8);
    let dynamic_len = dynamic.len() as u64 * 8;
    let segments = [
        (PT_LOAD, 0, dynamic_at + dynamic_len),
        (PT_DYNAMIC, dynamic_at, dynamic_len),
        (PT_GNU_EH_FRAME, dynamic_at, 8),
    ];
    let mut file = program();
    (file[32], file[56]) = (64, 3);
    for (kind, at, len) in segments {
        // For reading, here in the file and in memory.
        file.extend([kind | 4 << 32, at, at, at, len, len, 8].iter().flat_map(|n| n.to_le_bytes()));
    }
    file.extend(strings.iter().chain(constants));
    file.resize(usize::try_from(dynamic_at).unwrap(), 0);
    file.extend(dynamic.iter().flat_map(|n| n.to_le_bytes()));
    file
}

const PT_LOAD: u64 = 1;
const PT_DYNAMIC: u64 = 2;
const PT_GNU_EH_FRAME: u64 = 0x6474_e550;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_STRSZ: u64 = 10;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

fn with_programs(names: &[&str]) -> LayerBuilder {
    names.iter().fold(LayerBuilder::new(), |layer, name| layer.file(*name, program()))
}

fn with_sources(layer: LayerBuilder, sources: &[(&str, &str)]) -> LayerBuilder {
    sources.iter().fold(layer, |layer, (name, text)| layer.file(*name, text.as_bytes().to_vec()))
}

#[test]
fn the_image_says_what_is_run() {
    let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
        "config":{"Env":["A=b"],"Cmd":["serve"],"Entrypoint":["/bin/app"],"WorkingDir":"/srv"}}"#;
    let command = Command::of(&ImageConfig::from_bytes(config).unwrap());
    let expected = Command {
        arguments: vec!["/bin/app".to_owned(), "serve".to_owned()],
        environment: vec!["A=b".to_owned()],
        working_dir: "/srv".to_owned(),
    };
    assert_eq!(command, expected);
}

#[test]
fn what_a_script_runs_is_found_where_the_script_looks() {
    let layer = with_programs(&["usr/bin/dash", "usr/bin/id", "opt/bin/server", "usr/bin/unused"]);
    let entry = "#!/usr/bin/dash\nif [ \"$(id -u)\" = 0 ]; then export PATH=/opt/bin:$PATH; fi\n\
        . /etc/settings.sh\nexec \"$@\" --config=$SETTINGS\n";
    let sources = [
        ("entry", entry),
        ("etc/settings.sh", "cat /srv/data"),
        ("etc/app.conf", ""),
        ("srv/data", "data"),
        ("etc/app.conf.other", "x"),
    ];
    let image = Here::new(&with_sources(layer, &sources));
    let environment = ["PATH=/usr/bin", "SETTINGS=/etc/app.conf.other"];
    let command = ["/entry", "server"];
    assert_eq!(
        image.needed(&command, &environment, Reach::Scripts),
        [
            "entry",
            "usr/bin/dash",
            "usr/bin/id",
            "etc/settings.sh",
            "opt/bin/server",
            "etc/app.conf.other",
            "srv/data"
        ]
    );
    assert_eq!(image.needed(&command, &environment, Reach::Program), ["entry", "usr/bin/dash"]);
}

#[test]
fn what_a_shell_is_told_is_run() {
    let image = Here::new(&with_programs(&["bin/sh", "bin/server", "bin/other"]));
    let needed = |command: &[&str]| image.needed(command, &[], Reach::Scripts);
    assert_eq!(needed(&["sh", "-c", "exec server"]), ["bin/sh", "bin/server"]);
    assert_eq!(needed(&["sh", "-c", "exec \"$@\"", "sh", "other"]), ["bin/sh", "bin/other"]);
    assert_eq!(needed(&["sh", "-c"]), ["bin/sh"]);
}

#[test]
fn modules_are_found_as_python_finds_them_in_the_order_of_their_import() {
    let layer = with_programs(&["usr/bin/python3.11", "usr/lib/python3.11/lib-dynload/_native.so"]);
    let layer = layer.symlink("usr/bin/python3", "python3.11");
    let native = "usr/local/lib/python3.11/dist-packages/lib/fast.cpython-311-x86_64-linux-gnu.so";
    let sources = [
        ("srv/app/serve.py", "import lib.deep\nfrom helper import x\nimport missing, _native\n"),
        ("srv/app/helper.py", "def f():\n  import never\n"),
        ("usr/lib/python3.11/site.py", "import os"),
        ("usr/lib/python3.11/os.py", ""),
        ("usr/lib/python3.11/__pycache__/os.cpython-311.pyc", "compiled"),
        ("usr/lib/python3.11/never.py", ""),
        ("usr/local/lib/python3.11/dist-packages/more.pth", "import os\n"),
        ("usr/local/lib/python3.11/dist-packages/lib/__init__.py", "from . import fast, gone"),
        (
            "usr/local/lib/python3.11/dist-packages/lib/__pycache__/__init__.cpython-311.pyc",
            "compiled",
        ),
        ("usr/local/lib/python3.11/dist-packages/lib/deep/__init__.py", "from ..beside import y\n"),
        ("usr/local/lib/python3.11/dist-packages/lib/beside.py", "import lib.deep"),
        (native, "no ELF file"),
    ];
    let image = Here::new(&with_sources(layer, &sources));
    let files = image.needed(&["python3", "app/serve.py"], &[], Reach::Imports);
    let expected = [
        "usr/bin/python3.11",
        "srv/app/serve.py",
        "usr/lib/python3.11/site.py",
        "usr/lib/python3.11/__pycache__/os.cpython-311.pyc",
        "usr/local/lib/python3.11/dist-packages/more.pth",
        "usr/local/lib/python3.11/dist-packages/lib/__pycache__/__init__.cpython-311.pyc",
        native,
        "usr/local/lib/python3.11/dist-packages/lib/deep/__init__.py",
        "usr/local/lib/python3.11/dist-packages/lib/beside.py",
        "srv/app/helper.py",
        "usr/lib/python3.11/lib-dynload/_native.so",
    ];
    // An empty file has no bytes to ask for.
    assert_eq!(files, expected);
    assert_eq!(image.needed(&["python3", "app/serve.py"], &[], Reach::Scripts), expected[..2]);
}

#[test]
fn what_a_library_needs_is_looked_for_where_the_loader_looks() {
    let check = |says: &[(u64, &str)], expected: &[&str]| {
        let layer = LayerBuilder::new()
            .file("app/bin/serve", library(&[says, &[(DT_NEEDED, "liba.so")]].concat(), b""))
            .file("app/lib/liba.so", library(&[(DT_NEEDED, "libb.so")], b""))
            .file("app/lib/libb.so", library(&[(DT_NEEDED, "liba.so")], b""))
            .file("usr/lib/libb.so", program());
        let needed = Here::new(&layer).needed(&["/app/bin/serve"], &[], Reach::Program);
        assert_eq!(needed, expected, "{says:?}");
    };
    let (own, usual) = ("app/lib/libb.so", "usr/lib/libb.so");
    let with = |libb| ["app/bin/serve", "app/lib/liba.so", libb];
    check(&[(DT_RPATH, "$ORIGIN/../lib")], &with(own));
    // That is for what names it alone.
    check(&[(DT_RUNPATH, "$ORIGIN/../lib")], &with(usual));
    check(&[(DT_RPATH, "$ORIGIN/../lib"), (DT_RUNPATH, "$ORIGIN/../lib")], &with(usual));
    check(&[], &["app/bin/serve"]);
}

#[test]
fn a_native_module_names_what_it_imports() {
    let site = "usr/lib/python3.11/site-packages";
    let names = b"\0lib.deep\0 lib.never\0lib.missing\0lib\0asyncio.coroutines\0";
    let layer = with_programs(&["usr/bin/python3.11"])
        .file(format!("{site}/fast.abi3.so"), library(&[], names));
    let module = |name: &str| format!("{site}/{name}");
    let [lib, deep, never] = ["lib/__init__.py", "lib/deep.py", "lib/never.py"].map(module);
    let sources = [
        ("srv/serve.py", "import fast"),
        (lib.as_str(), "#"),
        (deep.as_str(), "#"),
        (never.as_str(), "#"),
        ("usr/lib/python3.11/asyncio/__init__.py", "#"),
        ("usr/lib/python3.11/asyncio/coroutines.py", "#"),
    ];
    let image = Here::new(&with_sources(layer, &sources));
    let needed = image.needed(&["/usr/bin/python3.11", "serve.py"], &[], Reach::Imports);
    let fast = module("fast.abi3.so");
    assert_eq!(needed, ["usr/bin/python3.11", "srv/serve.py", &fast, &lib, &deep]);
}

#[test]
fn a_python_program_is_known_however_it_is_started() {
    let layer = with_programs(&["opt/python/bin/python3.12", "bin/sh"]);
    let layer = layer.symlink("env/bin/python", "/opt/python/bin/python3.12");
    let sources = [
        ("env/bin/serve", "#!/env/bin/python\nfrom web.run import main\n"),
        ("env/lib/python3.12/site-packages/web/run.py", "#"),
        ("opt/python/lib/python3.12/site-packages/web2.py", "#"),
        ("srv/app/main.py", "import web2"),
        ("more/tool.py", "#"),
        ("start.sh", "#!/bin/sh\nexec /env/bin/python -X dev -m app.main\n"),
    ];
    let image = Here::new(&with_sources(layer, &sources));
    let check = |command: &[&str], environment: &[&str], expected: &[&str]| {
        let found = image.needed(command, environment, Reach::Imports);
        let modules = found.iter().filter(|name| name.ends_with(".py"));
        assert_eq!(modules.collect::<Vec<_>>(), expected, "{command:?}");
    };
    let run = "env/lib/python3.12/site-packages/web/run.py";
    let main = ["srv/app/main.py", "opt/python/lib/python3.12/site-packages/web2.py"];
    check(&["/env/bin/serve"], &[], &[run]);
    check(&["serve", "app.main:app"], &["PATH=/env/bin"], &[run, main[0], main[1]]);
    check(&["/env/bin/python", "-m", "app.main"], &[], &main);
    check(&["/start.sh"], &[], &main);
    check(
        &["/bin/sh", "-c", "/env/bin/python -c 'import tool'"],
        &["PYTHONPATH=/more"],
        &["more/tool.py"],
    );
    check(&["/env/bin/python", "-c", "import tool"], &[], &[]);
}

#[test]
fn a_jvm_needs_its_home_and_an_application_its_jars() {
    let layer =
        with_programs(&["jdk/bin/java", "jdk/lib/libjli.so", "jdk/lib/server/libjvm.so", "bin/sh"]);
    let sources = [
        ("jdk/lib/modules", "classes"),
        ("jdk/conf/net.properties", "a=b"),
        (
            "opt/app/bin/start",
            "#!/bin/sh\nexec \"$JAVA_HOME/bin/java\" -cp \"${0%/*}/../extra/*\" Main\n",
        ),
        ("opt/app/lib/app.jar", "classes"),
        ("opt/app/lib/readme", "text"),
        ("opt/app/extra/more.jar", "classes"),
        ("opt/other.jar", "classes"),
    ];
    let image = Here::new(&with_sources(layer, &sources));
    assert_eq!(
        image.needed(&["/opt/app/bin/start"], &["JAVA_HOME=/jdk"], Reach::Scripts),
        [
            "opt/app/bin/start",
            "bin/sh",
            "jdk/bin/java",
            "jdk/lib/libjli.so",
            "jdk/lib/server/libjvm.so",
            "jdk/lib/modules",
            "jdk/conf/net.properties",
            "opt/app/extra/more.jar",
            "opt/app/lib/app.jar",
        ]
    );
}

#[test]
fn scripts_name_their_interpreters() {
    let check = |head: &str, expected: &[&str]| {
        let found = script_interpreter(head.as_bytes());
        let expected: Words = expected.iter().map(|path| path.as_bytes().to_vec()).collect();
        assert_eq!(found, expected);
    };
    check("#!/bin/sh\nexit", &["/bin/sh"]);
    check("#! /usr/bin/env python3\n", &["/usr/bin/env", "python3"]);
    check("#!/bin/sh -e\n", &["/bin/sh"]);
    check("#!", &[]);
    check("import os", &[]);
}

#[test]
fn an_origin_is_the_folder_of_the_file() {
    assert_eq!(at_origin(b"$ORIGIN/../lib", b"opt/a/bin"), b"/opt/a/bin/../lib");
    assert_eq!(at_origin(b"/lib", b"opt"), b"/lib");
}

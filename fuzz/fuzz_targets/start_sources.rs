#![no_main]
//! Whatever a module of Python or a script of a shell says, what is found in it is no longer than it may be.

use libfuzzer_sys::fuzz_target;
use plan::python::{imports, named};
use plan::shell::{Start, read};

fuzz_target!(|bytes: &[u8]| {
    for is_main in [false, true] {
        for import in imports(bytes, is_main) {
            let names = import.module.iter().chain(&import.names).map(Vec::len).sum::<usize>();
            assert!(names + import.level <= bytes.len());
            assert!(!import.module.is_empty() || import.level > 0);
        }
    }
    assert!(named(bytes).iter().all(|import| import.module.len() > 1 && import.level == 0));
    let environment = ["HOME=/root".to_owned(), "PATH=/usr/bin:/bin".to_owned()];
    let arguments = [b"serve".to_vec(), b"a b".to_vec()];
    let start =
        Start { path: b"/opt/app/bin/start", arguments: &arguments, environment: &environment };
    let script = read(bytes, &start);
    assert!(script.commands.iter().all(|command| !command.is_empty()));
    let words = script.commands.iter().flatten();
    assert!(words.map(Vec::len).all(|len| len <= 4096));
});

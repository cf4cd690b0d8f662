//! What developers and CI run: set-up, checks, tests. `cargo xtask` lists the commands.
#![expect(clippy::print_stdout, reason = "this program talks to a person or a CI log")]

mod fuzz;
mod leftovers;
mod package;
mod program;
mod setup;
mod suite;
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
cargo xtask setup                 install and build what tests need; nothing if all is there
cargo xtask test                  set-up, then every check and test
cargo xtask test --quick          without the slow ones
cargo xtask test --only STEP      set-up and one step
cargo xtask package               a static program and a Debian package; minutes, and not part of a test
cargo xtask tidy                  the rules of the house that no compiler knows

Steps, in this order: ";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<()> {
    match args {
        ["setup"] => setup::setup(),
        ["package"] => package::package(),
        ["tidy"] => tidy::tidy(),
        ["test"] => suite::test(&suite::Selection::All),
        ["test", "--quick"] => suite::test(&suite::Selection::Quick),
        ["test", "--only", step] => suite::test(&suite::Selection::only(step)?),
        _ => bail!("what should be done?\n\n{USAGE}{}", suite::step_names().join(", ")),
    }
}

//! Writes `src/api/` from `proto/`. No protoc is needed.

use std::fs;
use std::path::Path;

#[path = "../tests/generated/generator.rs"]
mod generator;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let api = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api");
    for (place, code) in generator::generate()? {
        let path = api.join(place);
        fs::create_dir_all(path.parent().unwrap_or(&api))?;
        fs::write(path, code)?;
    }
    Ok(())
}

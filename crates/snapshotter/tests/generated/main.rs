//! The committed code is what the messages say.

mod generator;

use std::fs;
use std::path::Path;

#[test]
fn the_api_is_generated_from_its_messages() {
    let api = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api");
    let generated = generator::generate().unwrap();
    assert_eq!(generated.len(), 2);
    for (place, code) in generated {
        let committed = fs::read_to_string(api.join(&place)).unwrap();
        let place = place.display();
        assert!(committed == code, "{place}: run `cargo run -p snapshotter --example generate`");
    }
}

//! Layers as files, and loop devices over them.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use fuse::{AddFileError, Ino, LayerFile, LayersFs};
use sys::loop_device::{Caching, LoopDevice, LoopOptions};

use crate::support::{
    LayerBytes, Layers, Mountpoint, When, in_time, mount, pattern, serve, started,
};

fn layer_file(ino: u64, name: &str, layer: u32, len: u64, size: u64) -> LayerFile {
    LayerFile { ino: Ino(ino), name: name.as_bytes().to_vec(), layer, len, size }
}

fn names(at: &Mountpoint) -> Vec<String> {
    let entries = fs::read_dir(at.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn files_come_and_go_while_mounted() {
    let layers = Layers::new(&[10_000, 5000], When::Later);
    let fs = Arc::new(LayersFs::new(Arc::new(LayerBytes(layers))));
    let at = Mountpoint::new();
    let _session = serve(mount(&at), fs.clone());
    assert_eq!(names(&at), Vec::<String>::new());
    assert!(!at.join("one").exists());

    fs.add(layer_file(7, "one", 0, 10_000, 10_240)).unwrap();
    fs.add(layer_file(7, "one", 0, 10_000, 10_240)).unwrap();
    fs.add(layer_file(5, "two", 1, 5000, 5000)).unwrap();
    assert_eq!(names(&at), ["one", "two"]);
    let padded = [pattern(0, 0..10_000), vec![0; 240]].concat();
    assert!(fs::read(at.join("one")).unwrap() == padded);
    assert!(fs::read(at.join("two")).unwrap() == pattern(1, 0..5000));

    let open = File::open(at.join("two")).unwrap();
    assert!(fs.remove(Ino(5)));
    assert!(!fs.remove(Ino(5)));
    assert_eq!(names(&at), ["one"]);
    assert!(!at.join("two").exists());
    let mut byte = [0];
    open.read_exact_at(&mut byte, 4999).unwrap();
    assert_eq!(byte[..], pattern(1, 4999..5000), "the kernel still holds it");
}

#[test]
fn files_that_cannot_be_are_refused() {
    let layers = Layers::new(&[100], When::Now);
    let fs = LayersFs::new(Arc::new(LayerBytes(layers)));
    fs.add(layer_file(2, "there", 0, 100, 100)).unwrap();
    let taken = |file: LayerFile| {
        assert_eq!(fs.add(file.clone()), Err(AddFileError::Taken { file }));
    };
    taken(layer_file(3, "there", 0, 100, 100));
    taken(layer_file(2, "other", 0, 100, 100));
    taken(layer_file(2, "there", 0, 100, 512));
    let invalid = |file: LayerFile| {
        assert_eq!(fs.add(file.clone()), Err(AddFileError::Invalid { file }));
    };
    invalid(layer_file(1, "root", 0, 100, 100));
    invalid(layer_file(u64::MAX, "n", 0, 100, 100));
    invalid(layer_file(9, "", 0, 100, 100));
    invalid(layer_file(9, "..", 0, 100, 100));
    invalid(layer_file(9, "a/b", 0, 100, 100));
    invalid(layer_file(9, "a\0b", 0, 100, 100));
    invalid(layer_file(9, &"n".repeat(256), 0, 100, 100));
    invalid(layer_file(9, "short", 0, 100, 99));
    invalid(layer_file(9, "huge", 0, 100, u64::MAX));
}

#[test]
fn a_loop_device_over_a_layer_shows_its_bytes() {
    let len = 3 * 1024 * 1024 + 512;
    let layers = Layers::new(&[1000, len], When::Later);
    let fs = Arc::new(LayersFs::new(Arc::new(LayerBytes(layers))));
    fs.add(layer_file(2, "layer", 1, len, len)).unwrap();
    let at = Mountpoint::new();
    let _session = serve(mount(&at), fs);
    let file = File::open(at.join("layer")).unwrap();
    let device = LoopDevice::attach(file.as_fd(), LoopOptions::default()).unwrap();
    assert!(fs::read(device.path()).unwrap() == pattern(1, 0..len));
}

#[test]
fn a_missing_block_of_a_loop_device_holds_up_no_other() {
    let len = 64 * 4096;
    let layers = Layers::new(&[len], When::Held);
    let fs = Arc::new(LayersFs::new(Arc::new(LayerBytes(Arc::clone(&layers)))));
    fs.add(layer_file(2, "layer", 0, len, len)).unwrap();
    let at = Mountpoint::new();
    let _session = serve(mount(&at), fs);
    let file = File::open(at.join("layer")).unwrap();
    let options = LoopOptions { caching: Caching::Direct, ..LoopOptions::default() };
    let device = LoopDevice::attach(file.as_fd(), options).unwrap();
    device.set_read_ahead(0).unwrap();
    let readers: Vec<_> = (0..8)
        .map(|number| {
            let device = File::open(device.path()).unwrap();
            let range = number * 8 * 4096..number * 8 * 4096 + 4096;
            started(move || {
                let mut bytes = vec![0; 4096];
                device.read_exact_at(&mut bytes, range.start).unwrap();
                assert!(bytes == pattern(0, range));
            })
        })
        .collect();
    layers.wait_for_held(readers.len());
    layers.set(When::Now);
    layers.release();
    for reader in readers {
        in_time(move || reader.recv()).expect("right bytes");
    }
}

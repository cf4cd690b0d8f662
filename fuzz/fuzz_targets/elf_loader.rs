#![no_main]
//! Whatever an ELF file says of itself, what its loader will read is in order, in blocks, and found without
//! reading outside the file.

use std::io::{Error, ErrorKind};

use libfuzzer_sys::fuzz_target;
use plan::elf::{BLOCK, Elf};

fuzz_target!(|bytes: &[u8]| {
    let Some((elf, needs)) = Elf::parse(bytes) else { return };
    let text = needs.interpreter.iter().chain(&needs.libraries).map(Vec::len);
    assert!(text.max().unwrap_or_default() <= bytes.len());
    assert!(elf.tables().iter().all(|table| table.start <= table.end));
    let mut read = 0;
    let touched = elf.touched(|buffer, at| {
        let at = usize::try_from(at).map_err(Error::other)?;
        let part = bytes.get(at..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(part.ok_or(ErrorKind::UnexpectedEof)?);
        read += buffer.len();
        Ok(())
    });
    assert!(read <= 2 * bytes.len(), "two tables, and each once");
    let touched = touched.unwrap_or_default();
    assert!(touched.iter().all(|part| part.start < part.end && part.start % BLOCK == 0));
    assert!(touched.windows(2).all(|pair| pair[0].end < pair[1].start));
});

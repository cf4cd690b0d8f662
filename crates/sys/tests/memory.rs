//! What the process has of the machine's memory: alone in its process, as other tests would count.
#![cfg(target_env = "gnu")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sys::memory::return_large_blocks;

#[test]
fn memory_of_large_blocks_goes_back() {
    return_large_blocks();
    let block = || vec![1_u8; 1 << 20];
    // Freeing the first would have made glibc keep the second.
    drop(block());
    let before = resident();
    let blocks: Vec<_> = (0..64).map(|_| block()).collect();
    assert!(resident() > before + (60 << 20));
    // One that stays behind the others keeps a heap from shrinking.
    let _behind = vec![1_u8; 1 << 10];
    drop(blocks);
    assert!(resident() < before + (8 << 20));
}

/// In bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

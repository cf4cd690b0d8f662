//! How the allocator treats what is freed.

/// Makes the memory of every block of 256 KiB or more go back to the kernel as soon as the block is
/// freed.
///
/// glibc does so only until the first such block is freed; then it takes that size for a usual one,
/// and cuts up to 32 MiB of every block from heaps of which it has one for each few threads. What
/// streams through in pieces of a MiB leaves holes in all of them: more than twice of what is in use.
/// Other allocators need no telling.
pub fn return_large_blocks() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, LARGE)] {
        // SAFETY: `mallopt` takes two numbers; it may be called at any time, from any thread.
        let set = unsafe { libc::mallopt(parameter, value) };
        debug_assert_eq!(set, 1, "glibc knows the parameter");
    }
}

#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 256 << 10;

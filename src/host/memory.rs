//! How the C library's allocator keeps memory that the daemon has freed.

/// Arenas that threads share. By default there are eight for each core, and each keeps what its
/// threads have freed. Two are enough because threads have a cache of small blocks of their own.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;
/// Larger blocks are mappings of their own, which go back to the system when they are freed.
/// Setting it keeps the C library from raising it to the size of the largest block that was freed
/// (mallopt(3), `M_MMAP_THRESHOLD`).
#[cfg(target_env = "gnu")]
const MAPPED_BYTES_MIN: libc::c_int = 128 * 1024;

/// Limits how much freed memory the allocator keeps. Call it before the first thread starts,
/// because arenas that exist by then are not removed.
pub fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [
        (libc::M_ARENA_MAX, ARENAS_MAX),
        (libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN),
    ] {
        #[allow(unsafe_code)]
        // SAFETY: mallopt takes two numbers and locks the allocator itself.
        let is_set = unsafe { libc::mallopt(option, value) };
        debug_assert_eq!(is_set, 1, "mallopt refuses option {option}");
    }
}

/// Gives freed memory back to the system. It takes milliseconds and the allocator's locks, so call
/// it seldom and without a lock.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    // SAFETY: malloc_trim takes a number and locks the allocator itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

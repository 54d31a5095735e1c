//! Limits how much memory the C library's allocator keeps after the daemon has freed it.

/// The number of arenas that all threads share. By default there are eight for each core, and each
/// keeps the memory that its threads have freed. Two are enough because each thread also has its
/// own cache of small blocks.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;
/// Blocks of at least this size get their own mappings, which return to the system when the blocks
/// are freed. Setting this threshold stops the C library from raising it to the size of the largest
/// freed block (mallopt(3), `M_MMAP_THRESHOLD`).
#[cfg(target_env = "gnu")]
const MAPPED_BYTES_MIN: libc::c_int = 128 * 1024;

/// Limits how much freed memory the allocator keeps. Call this function before the first thread
/// starts, because existing arenas are not removed.
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

/// Returns unused memory to the system. This takes milliseconds and holds the allocator's locks, so
/// call it rarely, and without a lock.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    // SAFETY: malloc_trim takes a number and locks the allocator itself.
    unsafe {
        libc::malloc_trim(0);
    }
    unmap_program_pages();
}

/// Unmaps the pages of the program and its libraries. The kernel keeps them in its page cache while
/// it has room, and maps those that are used again, 16 at a time. The others, which were needed
/// only at the start or under load, then no longer count as the daemon's memory, and the kernel can
/// reclaim them without unmapping them first.
fn unmap_program_pages() {
    crate::locks::may_block("file access");
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else {
        return;
    };
    for range in unmodified_file_ranges(&maps) {
        #[allow(unsafe_code)]
        // SAFETY: the mapping cannot be written and no page of it was ever modified, so at the next
        // access the kernel maps the same bytes of the same file.
        let result = unsafe {
            rustix::mm::madvise(
                std::ptr::with_exposed_provenance_mut(range.start),
                range.len(),
                rustix::mm::Advice::LinuxDontNeed,
            )
        };
        if let Err(e) = result {
            log::debug!("unmap program pages: {e}");
        }
    }
}

/// Returns the private mappings of files that cannot be written and that hold no modified page
/// (proc(5), smaps). Relocated data cannot be written either, but its pages are modified.
fn unmodified_file_ranges(smaps: &str) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut mapping = None;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Anonymous:") {
            let range = mapping.take();
            ranges.extend(range.filter(|_| kib.trim() == "0 kB"));
        } else if let Some(range) = file_range(line) {
            mapping = range;
        }
    }
    ranges
}

/// Parses the first line of a mapping, and returns None for any other line. The inner value is None
/// if the mapping has no file or can be written.
fn file_range(line: &str) -> Option<Option<std::ops::Range<usize>>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let address = |hex| usize::from_str_radix(hex, 16).ok();
    let range = address(start)?..address(end)?;
    let is_fixed = matches!(words.next()?, "r--p" | "r-xp");
    let path = words.nth(3);
    Some((is_fixed && path.is_some_and(|path| path.starts_with('/'))).then_some(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmodified_file_ranges_skip_relocated_writable_and_anonymous_mappings() {
        let smaps = "\
1000-3000 r--p 00000000 fe:00 42                         /usr/bin/fcd
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd mr mw me sd
3000-5000 r-xp 00002000 fe:00 42                         /usr/bin/fcd (deleted)
Anonymous:             0 kB
5000-6000 r--p 00004000 fe:00 42                         /usr/bin/fcd
Anonymous:             4 kB
6000-7000 rw-p 00005000 fe:00 42                         /usr/bin/fcd
Anonymous:             0 kB
7000-8000 r--s 00005000 fe:00 43                         /var/lib/fcd/fcd.db-shm
Anonymous:             0 kB
8000-9000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
9000-a000 r--p 00000000 00:00 0
Anonymous:             0 kB
";
        assert_eq!(
            unmodified_file_ranges(smaps),
            [0x1000..0x3000, 0x3000..0x5000]
        );
    }

    /// The program still runs, and its relocated data is intact.
    #[test]
    fn unmapping_leaves_program_intact() {
        let before = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(before.contains("r-xp"));
        for _ in 0..3 {
            give_back();
        }
        assert_eq!(format!("{:?}", Some([1.5, 2.5])), "Some([1.5, 2.5])");
        assert!(std::fs::read_to_string("/proc/self/status").is_ok());
    }
}

//! What git says, where nothing but its text says it: the exit status is 128 for every fatal error.
//! The texts are those of git 2.39 to 2.47; each comment names the file in git's source. git runs
//! with `LC_ALL=C.UTF-8`, so they are never translated.

use crate::host::strerror;

/// setup.c.
const DUBIOUS_OWNERSHIP: &str = "dubious ownership";
/// dir.c. git leaves the directory out and ends with status 0.
const UNREADABLE_DIR: &str = "warning: could not open directory ";
/// csum-file.c. git has this text of its own for packs and the index.
const OUT_OF_SPACE: &str = "Out of diskspace";
/// apply.c: said of each hunk that does not fit, before the file is named as a whole.
const HUNK_FAILED: &str = "patch failed: ";

/// The repository belongs to another user, so git refuses it.
pub(super) fn is_dubious_ownership(said: &str) -> bool {
    said.contains(DUBIOUS_OWNERSHIP)
}

/// The directory that git could not read, as git names it.
pub(super) fn unreadable_dir(stderr: &str) -> Option<&str> {
    stderr
        .lines()
        .find_map(|line| line.strip_prefix(UNREADABLE_DIR))
}

pub(super) fn is_disk_full(stderr: &str) -> bool {
    strerror::says_disk_full(stderr) || stderr.contains(OUT_OF_SPACE)
}

/// True for a line that the next one repeats with less detail.
pub(super) fn is_hunk(line: &str) -> bool {
    line.starts_with(HUNK_FAILED)
}

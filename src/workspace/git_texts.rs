//! Recognizes conditions that git reports only as text: its exit status is 128 for every fatal
//! error. The texts are those of git 2.39 to 2.47; each comment names the file in git's source. git
//! runs with `LC_ALL=C.UTF-8`, so the texts are never translated.

use crate::host::strerror;

/// setup.c. git prints this if a repository belongs to another user.
const DUBIOUS_OWNERSHIP: &str = "dubious ownership";
/// dir.c. git leaves the directory out and ends with status 0.
const UNREADABLE_DIR: &str = "warning: could not open directory ";
/// csum-file.c. git prints this instead of the `strerror` text when the disk is full while it
/// writes a pack or the index.
const OUT_OF_SPACE: &str = "Out of diskspace";
/// apply.c. git prints this for each hunk that does not fit, before it names the whole file.
const HUNK_FAILED: &str = "patch failed: ";

/// True if git refuses the repository because it belongs to another user.
pub(super) fn is_dubious_ownership(said: &str) -> bool {
    said.contains(DUBIOUS_OWNERSHIP)
}

/// Returns the directory that git could not read, as git prints it.
pub(super) fn unreadable_dir(stderr: &str) -> Option<&str> {
    stderr
        .lines()
        .find_map(|line| line.strip_prefix(UNREADABLE_DIR))
}

pub(super) fn is_disk_full(stderr: &str) -> bool {
    strerror::says_disk_full(stderr) || stderr.contains(OUT_OF_SPACE)
}

/// True if the line reports a hunk that does not fit. The next line then names only the file.
pub(super) fn is_hunk(line: &str) -> bool {
    line.starts_with(HUNK_FAILED)
}

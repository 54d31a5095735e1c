//! The texts with which programs report a failed system call.
//!
//! Programs print the text of `strerror` but not the number, so a decision that depends on the
//! number has to compare this text. Commands run with `LC_ALL=C.UTF-8`, so it is never translated.
//! The texts of two C libraries are recognised: the host's programs use glibc (2.36,
//! sysdeps/gnu/errlist.h), and static builds use musl (1.2.5, src/errno/__strerror.h).

/// The text for ENOSPC, which is the same in both libraries.
const DISK_FULL: &[&str] = &["No space left on device"];
/// The texts for EBUSY, first that of glibc, then that of musl.
const BUSY: &[&str] = &["Device or resource busy", "Resource busy"];
/// The text for ENOENT, which is the same in both libraries.
const NOT_FOUND: &[&str] = &["No such file or directory"];

pub fn says_disk_full(text: &str) -> bool {
    says(text, DISK_FULL)
}

pub fn says_busy(text: &str) -> bool {
    says(text, BUSY)
}

pub fn says_not_found(text: &str) -> bool {
    says(text, NOT_FOUND)
}

fn says(text: &str, any: &[&str]) -> bool {
    any.iter().any(|part| text.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Command, Commands, HostCommands};
    use crate::locks::Cancel;

    /// Compares the texts with those of the host's C library, so that a change is noticed.
    #[test]
    fn texts_match_those_of_host_programs() {
        let complaint = |args: &[&str]| {
            let cancel = Cancel::try_new().unwrap();
            let ran = HostCommands.run(
                &Command::new(args[0]).args(&args[1..]),
                &cancel,
                &mut |_| {},
            );
            ran.unwrap_err().to_string()
        };
        let missing = complaint(&["cat", "/no/such/file"]);
        assert!(
            says_not_found(&missing) && !says_busy(&missing) && !says_disk_full(&missing),
            "{missing}"
        );
        let full = complaint(&["cp", "/etc/passwd", "/dev/full"]);
        assert!(says_disk_full(&full) && !says_not_found(&full), "{full}");
    }
}

//! Recognises failures in the output of mmdebstrap (1.3) and apt (2.6). mmdebstrap exits with the
//! same status after every failure and forwards apt's output, so only the text tells failures
//! apart.

/// The text that apt prints for a package that is in none of its lists.
const UNKNOWN_PACKAGE: &str = "Unable to locate package";
/// The beginnings of mmdebstrap's lines that report a failure without its reason. apt's lines
/// contain the reason.
const OWN_FAILURES: [&str; 2] = ["setup failed", "mmdebstrap failed"];

/// True if apt reports in this line that a package is unknown.
pub(super) fn is_unknown_package(line: &str) -> bool {
    line.contains(UNKNOWN_PACKAGE)
}

/// Returns the reason for a failure in a line of output, or None if the line contains none.
pub(super) fn reason(line: &str) -> Option<&str> {
    line.strip_prefix("E: ")
        .filter(|text| !OWN_FAILURES.iter().any(|own| text.starts_with(own)))
}

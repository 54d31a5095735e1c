//! What mmdebstrap (1.3) and apt (2.6) say, where nothing but their text says it: mmdebstrap ends
//! with the same status whatever went wrong, and passes on what apt prints.

/// Printed by apt for a name that is in none of its lists.
const UNKNOWN_PACKAGE: &str = "Unable to locate package";
/// Lines of mmdebstrap itself, which only say that something failed; apt's own lines say what.
const OWN_FAILURES: [&str; 2] = ["setup failed", "mmdebstrap failed"];

/// True if apt knows no package of the name that is in this line.
pub(super) fn is_unknown_package(line: &str) -> bool {
    line.contains(UNKNOWN_PACKAGE)
}

/// The reason in a line of output, if it has one.
pub(super) fn reason(line: &str) -> Option<&str> {
    line.strip_prefix("E: ")
        .filter(|text| !OWN_FAILURES.iter().any(|own| text.starts_with(own)))
}

//! The helper processes by name. The daemon's program looks here first: a helper is the same
//! program, started again by [`crate::host::confine::spawn`].

use crate::host::confine::Asked;
use std::process::ExitCode;

/// A name that this version does not know, `EX_USAGE` (sysexits.h).
const UNKNOWN: u8 = 64;

/// Runs this process as the helper that its arguments ask for, to its end. None: they ask for none.
pub fn run_if_asked() -> Option<ExitCode> {
    let asked = Asked::from_args()?;
    Some(match asked.name.as_str() {
        crate::net::dns::NAME => crate::net::dns::helper::run(&asked),
        crate::guest::helper::NAME => crate::guest::helper::serve::run(&asked),
        #[cfg(test)]
        crate::guest::helper::tests_hostile::NAME => crate::guest::helper::tests_hostile::run(),
        #[cfg(test)]
        crate::net::dns::tests::hostile::NAME => crate::net::dns::tests::hostile::run(),
        #[cfg(test)]
        crate::host::confine::PROBE => crate::host::confine::run_probe(&asked),
        _ => ExitCode::from(UNKNOWN),
    })
}

/// The test program has a `main` of its own, so its helpers branch off before it.
#[cfg(test)]
mod in_tests {
    #[used]
    #[allow(unsafe_code)]
    // SAFETY: the C library calls it once, after the standard library's own entry has taken the
    // arguments and before `main`.
    #[unsafe(link_section = ".init_array")]
    static BRANCH: extern "C" fn() = branch;

    extern "C" fn branch() {
        if super::run_if_asked().is_some_and(|code| code == std::process::ExitCode::SUCCESS) {
            std::process::exit(0);
        }
        if crate::host::confine::Asked::from_args().is_some() {
            std::process::exit(1);
        }
    }
}

//! Runs helper processes by name. A helper is the daemon's own program, started again by
//! [`crate::host::confine::spawn`]. So `main` first calls [`run_if_asked`].

use crate::host::confine::Asked;
use std::process::ExitCode;

/// The exit status for a helper name that this version does not know: `EX_USAGE` (sysexits.h).
const UNKNOWN: u8 = 64;

/// Runs the helper that this process's arguments name, until the helper ends. Returns `None` if the
/// arguments do not name a helper.
pub fn run_if_asked() -> Option<ExitCode> {
    let asked = Asked::from_args()?;
    Some(match asked.name.as_str() {
        crate::net::dns::NAME => crate::net::dns::helper::run(&asked),
        crate::guest::helper::NAME => crate::guest::helper::serve::run(&asked),
        crate::image::export::helper::NAME => crate::image::export::helper::run(&asked),
        crate::image::pull::helper::NAME => crate::image::pull::helper::run(&asked),
        #[cfg(test)]
        crate::guest::helper::tests_hostile::NAME => crate::guest::helper::tests_hostile::run(),
        #[cfg(test)]
        crate::image::pull::tests::NAME => crate::image::pull::tests::run(),
        #[cfg(test)]
        crate::net::dns::tests::hostile::NAME => crate::net::dns::tests::hostile::run(),
        #[cfg(test)]
        crate::host::confine::PROBE | crate::host::confine::PROBE_WITH_THREADS => {
            crate::host::confine::run_probe(&asked)
        }
        _ => ExitCode::from(UNKNOWN),
    })
}

/// The test program has its own `main`, so its helpers start before `main`.
#[cfg(test)]
mod in_tests {
    #[used]
    #[allow(unsafe_code)]
    // SAFETY: the C library calls the function once, before `main` and after the standard library
    // has stored the arguments.
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

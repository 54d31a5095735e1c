//! A host command that has the user's terminal: an `ssh` that `fcctl` starts for them.

use crate::error::{Error, Kind, Result};
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;

/// Runs a program with our own streams and environment until it ends: its status, 128+n for signal n. It stays in
/// our process group, so that the terminal's signals reach it; the caller catches its own meanwhile. Errors:
/// `command_missing`, `host`.
#[allow(clippy::disallowed_methods)] // Beside `command`, the other place.
pub fn run(program: &str, args: &[OsString]) -> Result<u8> {
    let status = std::process::Command::new(program).args(args).status().map_err(|e| {
        if e.kind() == std::io::ErrorKind::NotFound {
            Error::new(Kind::CommandMissing, format!("{program} is not installed"))
        } else {
            Error::io(format!("run {program}"), e)
        }
    })?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_signal_and_absence() {
        let sh = |script: &str| run("sh", &["-c".into(), script.into()]);
        assert_eq!(sh("exit 3").unwrap(), 3);
        assert_eq!(sh("kill -TERM $$").unwrap(), 128 + 15);
        assert_eq!(run("no-such-program", &[]).unwrap_err().kind(), Kind::CommandMissing);
    }
}

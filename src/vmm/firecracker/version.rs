//! The supported versions of Firecracker and its jailer, and functions that read the version of a
//! program.

use crate::config::Firecracker as Config;
use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, run_any_status};
use crate::host::program;
use crate::host::text::printable;
use crate::locks::Cancel;
use std::path::Path;
use std::time::Duration;

/// The oldest version with `PUT /serial`, and the newest that this driver was tested with.
const VERSION_MIN: (u32, u32) = (1, 14);
pub(super) const VERSION_TESTED: (u32, u32) = (1, 16);
const VERSION_DEADLINE: Duration = Duration::from_secs(10);
/// The length limit of a version in a message.
const VERSION_CHARS_MAX: usize = 20;
/// The names with which the two programs report their versions.
const FIRECRACKER: &str = "Firecracker";
const JAILER: &str = "Jailer";
pub(super) const INSTALL: &str = "install a release of firecracker-microvm/firecracker, and name its programs as binary and jailer under [firecracker]";

/// Rejects a version that is too old. `version` is as reported by the API, such as `1.16.1`.
///
/// # Errors
/// `unsupported`, with a hint that says what to install.
pub(super) fn require(version: &str) -> Result<()> {
    let too_old = |found: &str| {
        let (major, minor) = VERSION_MIN;
        Err(Error::new(
            Kind::Unsupported,
            format!("firecracker is version {found}; {major}.{minor} or newer is needed"),
        )
        .hint(INSTALL))
    };
    match parse_numbers(version) {
        Some(v) if v >= VERSION_MIN => Ok(()),
        _ => too_old(&printable(
            &version.chars().take(VERSION_CHARS_MAX).collect::<String>(),
        )),
    }
}

/// True if a version reported by the API is at least `since`.
pub(super) fn is_since(version: &str, since: (u32, u32)) -> bool {
    parse_numbers(version).is_some_and(|v| v >= since)
}

/// Adds an installation hint to the error of a missing program.
pub(super) fn install_if_missing(e: Error) -> Error {
    if e.kind() == Kind::CommandMissing {
        e.hint(INSTALL)
    } else {
        e
    }
}

/// A release, as a program or the API reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Release {
    /// The whole version, for example `1.16.1` or `1.17.0-dev`.
    pub text: String,
    pub numbers: (u32, u32),
}

impl Release {
    /// Parses the first line of `--version`: `Firecracker v1.16.1` or `Jailer v1.16.1`.
    fn parse(output: &str, name: &str) -> Option<Self> {
        let text = output
            .lines()
            .next()?
            .strip_prefix(name)?
            .strip_prefix(" v")?
            .split_whitespace()
            .next()?;
        Some(Self {
            text: printable(&text.chars().take(VERSION_CHARS_MAX).collect::<String>()),
            numbers: parse_numbers(text)?,
        })
    }
}

fn release(program: &Path, name: &str, cancel: &Cancel) -> Result<Release> {
    let command = Command::new(program)
        .arg("--version")
        .deadline(VERSION_DEADLINE);
    let out = run_any_status(&command, cancel, &mut |_| {})?;
    Release::parse(&String::from_utf8_lossy(&out.stdout), name).ok_or_else(|| {
        let message = format!(
            "{} is not {name}, according to --version",
            program.display()
        );
        Error::new(Kind::Unsupported, message).hint(INSTALL)
    })
}

/// Returns the version of the configured Firecracker. Fails with `unsupported` if that version is
/// too old.
pub(super) fn version(config: &Config, cancel: &Cancel) -> Result<Release> {
    let path = program::locate(&config.binary).map_err(install_if_missing)?;
    let release = release(&path, FIRECRACKER, cancel)?;
    require(&release.text).map(|()| release)
}

/// Checks that the configured jailer is a jailer and from the same release as Firecracker. This
/// runs two processes, so it happens only in `fcctl doctor` and after a start has failed.
///
/// # Errors
/// `unsupported`, with both versions.
pub(super) fn require_same_release(
    jailer: &Path,
    firecracker: &Path,
    cancel: &Cancel,
) -> Result<()> {
    let (its, wanted) = (
        release(jailer, JAILER, cancel)?,
        release(firecracker, FIRECRACKER, cancel)?,
    );
    if its == wanted {
        return Ok(());
    }
    let message = format!(
        "{} is version {}, but {} is version {}",
        jailer.display(),
        its.text,
        firecracker.display(),
        wanted.text
    );
    Err(Error::new(Kind::Unsupported, message)
        .hint("use the firecracker and the jailer of one release"))
}

fn parse_numbers(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_parsed_from_first_line() {
        let parse = |text, name| Release::parse(text, name).map(|r| (r.text, r.numbers));
        let known = "Firecracker v1.16.1\n\nSupported snapshot data format versions: v9.0.0\n";
        assert_eq!(parse(known, FIRECRACKER), Some(("1.16.1".into(), (1, 16))));
        assert_eq!(
            parse("Firecracker v1.17.0-dev\n", FIRECRACKER),
            Some(("1.17.0-dev".into(), (1, 17)))
        );
        assert_eq!(
            parse("Jailer v1.16.1\n\n", JAILER),
            Some(("1.16.1".into(), (1, 16)))
        );
        for bad in [
            "",
            "QEMU emulator version 7.2",
            "Firecracker v",
            "Firecracker v1",
            "true (GNU coreutils) 9.1",
        ] {
            assert_eq!(parse(bad, FIRECRACKER), None, "{bad}");
        }
    }

    #[test]
    fn jailer_must_be_from_same_release() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, says: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .unwrap();
            path
        };
        let cancel = Cancel::try_new().unwrap();
        let firecracker = program("firecracker", "Firecracker v1.16.1");
        let refused =
            |jailer: &Path| require_same_release(jailer, &firecracker, &cancel).unwrap_err();
        require_same_release(&program("good", "Jailer v1.16.1"), &firecracker, &cancel).unwrap();
        let e = refused(Path::new("/bin/true"));
        assert!(
            e.kind() == Kind::Unsupported && e.to_string().starts_with("/bin/true is not Jailer"),
            "{e}"
        );
        let e = refused(&program("old", "Jailer v1.15.0"));
        assert!(
            e.to_string().contains("1.15.0")
                && e.to_string().contains("1.16.1")
                && e.hint_text().is_some(),
            "{e}"
        );
        let e = refused(&firecracker);
        assert!(e.to_string().contains("is not Jailer"), "{e}");
    }

    #[test]
    fn missing_or_wrong_program_is_error_with_install_hint() {
        let cancel = Cancel::try_new().unwrap();
        for (binary, kind) in [
            ("no-such-firecracker", Kind::CommandMissing),
            ("/bin/true", Kind::Unsupported),
        ] {
            let e = version(
                &Config {
                    binary: binary.into(),
                    ..Config::default()
                },
                &cancel,
            )
            .unwrap_err();
            assert_eq!((e.kind(), e.hint_text()), (kind, Some(INSTALL)));
        }
        require("1.14.0").unwrap();
        require("2.0").unwrap();
        for old in ["1.13.1", "0.25.2", "", "x"] {
            assert_eq!(require(old).unwrap_err().kind(), Kind::Unsupported, "{old}");
        }
    }
}

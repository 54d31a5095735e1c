//! The checks of QEMU for `fcctl doctor`: its requirements on this host, and the picked accelerator
//! and board.

use super::accel::Picked;
use super::argv::Board;
use crate::api::daemon::{Check, Severity};
use crate::config::{Accel, Machine, Qemu};
use crate::error::Kind;
use crate::host::command::{Command, run_any_status};
use crate::host::program;
use crate::host::reach;
use crate::locks::Cancel;
use crate::vmm::devices::{self, KVM};
use std::time::Duration;

/// The oldest supported version of QEMU.
const VERSION_MIN: (u32, u32) = (7, 2);
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

pub(super) fn checks(config: &Qemu, picked: Option<&Picked>) -> Vec<Check> {
    vec![
        binary(config),
        accelerator(config, picked),
        board(config, picked),
    ]
}

fn check(id: &str, severity: Severity, found: String, fix: Option<&str>) -> Check {
    Check {
        id: id.to_owned(),
        severity,
        found,
        fix: fix.map(str::to_owned),
    }
}

fn binary(config: &Qemu) -> Check {
    const INSTALL: Option<&str> = Some("apt install qemu-system-x86");
    let path = match program::locate(&config.binary) {
        Ok(path) => path,
        Err(e) => {
            let fix = if e.kind() == Kind::CommandMissing {
                INSTALL
            } else {
                e.hint_text()
            };
            return check("qemu", Severity::Fail, e.to_string(), fix);
        }
    };
    if let Some(closed) =
        reach::closed_to_others(&path).filter(|_| nix::unistd::geteuid().is_root())
    {
        let closed = closed.display();
        let found = format!(
            "VMMs do not run as root and may not enter {closed}, which contains {}",
            path.display()
        );
        return check("qemu", Severity::Fail, found, Some(&binary_fix(&closed)));
    }
    let run = || {
        let command = Command::new(&path)
            .arg("--version")
            .deadline(VERSION_DEADLINE);
        run_any_status(&command, &Cancel::try_new().ok()?, &mut |_| {}).ok()
    };
    let text = run()
        .map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
        .unwrap_or_default();
    match parse_version(&text) {
        Some(v) if v >= VERSION_MIN => check(
            "qemu",
            Severity::Ok,
            format!("{} is version {}.{}", path.display(), v.0, v.1),
            None,
        ),
        Some(v) => {
            let (major, minor) = VERSION_MIN;
            let found = format!(
                "{} is version {}.{}; {major}.{minor} or newer is needed",
                path.display(),
                v.0,
                v.1
            );
            check("qemu", Severity::Warn, found, INSTALL)
        }
        None => check(
            "qemu",
            Severity::Fail,
            format!("{} does not run or is not QEMU", path.display()),
            INSTALL,
        ),
    }
}

/// Returns the hint for a QEMU in a directory that the VMM's uid may not enter.
pub(super) fn binary_fix(closed: &dyn std::fmt::Display) -> String {
    format!("set another binary under [qemu], or chmod o+x {closed}")
}

/// Parses the output of `--version`, for example `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let version = text
        .lines()
        .next()?
        .strip_prefix("QEMU emulator version ")?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn accelerator(config: &Qemu, picked: Option<&Picked>) -> Check {
    let fix = if rustix::process::geteuid().is_root() {
        devices::open_to_group(KVM)
    } else {
        "ls -l /dev/kvm; adduser $USER kvm, and log in again".to_owned()
    };
    let fix = Some(fix.as_str());
    if let Some(picked) = picked {
        let is_slow = config.accel == Accel::Auto
            && picked.platform.accelerator == super::argv::Accelerator::Tcg;
        let found = format!("{} is used: {}", picked.platform, picked.why);
        // Emulation is slow but correct, so it is only a warning, and not even that if the
        // configuration asks for it.
        return check(
            "accelerator",
            if is_slow {
                Severity::Warn
            } else {
                Severity::Ok
            },
            found,
            fix.filter(|_| is_slow),
        );
    }
    match (config.accel, devices::access(KVM)) {
        (Accel::Tcg, _) => check(
            "accelerator",
            Severity::Ok,
            "tcg will be used, as configured".into(),
            None,
        ),
        (Accel::Kvm, Ok(_)) => check(
            "accelerator",
            Severity::Ok,
            "kvm will be used, as configured".into(),
            None,
        ),
        (Accel::Kvm, Err(why)) => check(
            "accelerator",
            Severity::Fail,
            format!("kvm is configured, but {why}"),
            fix,
        ),
        (Accel::Auto, Ok(_)) => {
            let found = "/dev/kvm is accessible; the first start uses it if it boots a stock kernel, and tcg otherwise";
            check("accelerator", Severity::Ok, found.into(), None)
        }
        (Accel::Auto, Err(why)) => check(
            "accelerator",
            Severity::Warn,
            format!("tcg will be used, which is slow: {why}"),
            fix,
        ),
    }
}

fn board(config: &Qemu, picked: Option<&Picked>) -> Check {
    let found = match (picked.map(|p| p.platform.board), config.machine) {
        (Some(Board::Microvm { tsc_khz: Some(khz) }), _) => {
            format!(
                "microvm, with the host's time stamp counter at {}.{:03} MHz",
                khz / 1000,
                khz % 1000
            )
        }
        (Some(Board::Microvm { tsc_khz: None }), _) => "microvm".to_owned(),
        (Some(Board::Q35), Machine::Auto) => {
            "q35, because of kvm or a time stamp counter that is not constant".to_owned()
        }
        (Some(Board::Q35), _) => "q35, as configured".to_owned(),
        (None, machine) => {
            format!("picked at the first start (configured as {machine:?})").to_lowercase()
        }
    };
    check("machine", Severity::Ok, found, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_parsed() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright"),
            Some((7, 2))
        );
        assert_eq!(
            parse_version("QEMU emulator version 10.0.2\n"),
            Some((10, 0))
        );
        assert_eq!(parse_version("QEMU emulator version x"), None);
        assert_eq!(parse_version(""), None);
        assert!((10, 0) > VERSION_MIN && (7, 1) < VERSION_MIN);
    }

    #[test]
    fn missing_qemu_fails_with_install_hint() {
        let checks = checks(
            &Qemu {
                binary: "no-such-qemu".into(),
                ..Qemu::default()
            },
            None,
        );
        assert_eq!(
            (checks[0].id.as_str(), checks[0].severity),
            ("qemu", Severity::Fail)
        );
        assert!(checks[0].fix.as_ref().unwrap().contains("apt install"));
    }
}

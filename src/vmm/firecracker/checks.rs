//! What Firecracker needs here, and what was found.

use crate::api::daemon::Check;
use crate::config::{Firecracker as Config, VmmLimits};
use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, run_any_status};
use crate::host::program;
use crate::locks::Cancel;
use crate::vmm::devices::{self, KVM};
use std::time::Duration;

/// The oldest that has `PUT /serial`, and the newest that this driver was tried with.
const VERSION_MIN: (u32, u32) = (1, 14);
const VERSION_TESTED: (u32, u32) = (1, 16);
const VERSION_DEADLINE: Duration = Duration::from_secs(10);
pub const INSTALL: &str =
    "install a release of firecracker-microvm/firecracker, and name its programs as binary and jailer under [firecracker]";

pub fn checks(config: &Config) -> Vec<Check> {
    let mut all = vec![binary(config), kvm(config)];
    all.extend(jailer(config));
    all
}

fn binary(config: &Config) -> Check {
    const ID: &str = "firecracker";
    let Ok(cancel) = Cancel::try_new() else {
        return Check::warn(ID, "it was not looked at: no descriptor is left".to_owned(), "raise the limit of open files");
    };
    match version(config, &cancel) {
        Ok(v) if v > VERSION_TESTED => {
            let (major, minor) = VERSION_TESTED;
            let found = format!("version {}.{} is newer than {major}.{minor}, the newest that fcd was tried with", v.0, v.1);
            Check::warn(ID, found, "if a VM does not start, use the older one")
        }
        Ok(v) => Check::ok(ID, format!("{} is version {}.{}", config.binary.display(), v.0, v.1)),
        Err(e) => Check::fail(ID, e.to_string(), e.hint_text().unwrap_or(INSTALL)),
    }
}

/// Where VMMs are jailed: the programs, and the limits.
fn jailer(config: &Config) -> Vec<Check> {
    const ID: &str = "jailer";
    if !config.jail {
        return vec![Check::warn(
            ID,
            "VMMs run without a jail, as the configuration says".to_owned(),
            "jail = true under [firecracker]",
        )];
    }
    let programs = match super::jail::programs(config) {
        Ok(programs) => Check::ok(ID, format!("VMMs run under {}", programs.jailer.display())),
        Err(e) => Check::fail(ID, e.to_string(), e.hint_text().unwrap_or(INSTALL)),
    };
    let (missing, has_io) = super::jail::missing_controllers();
    let limits = match (missing.is_empty(), config.limits) {
        (true, _) if has_io => {
            Check::ok("limits", "control groups limit the CPU, memory and threads of VMMs, and their disks' rates".to_owned())
        }
        (true, wanted) => {
            let then = if wanted == VmmLimits::Required { "does not start" } else { "is limited by its VMM alone" };
            let found = format!("the host's control groups have no io, so a VM whose disks have a rate {then}");
            Check::warn("limits", found, "enable the controller io of control groups, version 2")
        }
        (false, VmmLimits::BestEffort) => {
            let found = format!("VMMs are not limited in {}: the host has no such controller", missing.join(", "));
            Check::warn("limits", found, "enable the controllers of control groups, version 2")
        }
        (false, VmmLimits::Required) => {
            let found = format!("the host's control groups have no {}, so no VM starts", missing.join(", "));
            Check::fail("limits", found, "enable them, or set limits = \"best-effort\" under [firecracker]")
        }
    };
    vec![programs, limits]
}

/// The jailer makes a node of its own for each VMM, whatever the mode of the host's.
fn kvm(config: &Config) -> Check {
    const ID: &str = "kvm";
    let is_root = rustix::process::geteuid().is_root();
    if config.jail && is_root {
        return match devices::exists(KVM) {
            Ok(()) => Check::ok(ID, format!("{KVM} is there; each jail has a node of its own")),
            Err(why) => Check::fail(ID, why, "modprobe kvm_intel || modprobe kvm_amd"),
        };
    }
    match devices::access(KVM) {
        Ok(_) => Check::ok(ID, format!("VMMs may open {KVM}")),
        Err(why) if is_root => Check::fail(ID, why, &devices::open_to_group(KVM)),
        Err(why) => Check::fail(ID, why, "adduser $USER kvm, and log in again"),
    }
}

/// Refuses a version that is too old: as the API has it, `1.16.1`.
///
/// # Errors
/// `unsupported`, with what to install.
pub fn require(version: &str) -> Result<()> {
    let too_old = |found: &str| {
        let (major, minor) = VERSION_MIN;
        Err(Error::new(Kind::Unsupported, format!("firecracker is version {found}; {major}.{minor} or newer is needed"))
            .hint(INSTALL))
    };
    match parse_numbers(version) {
        Some(v) if v >= VERSION_MIN => Ok(()),
        _ => too_old(&crate::host::command::printable(&version.chars().take(20).collect::<String>())),
    }
}

/// As the API has it.
pub fn is_since(version: &str, since: (u32, u32)) -> bool {
    parse_numbers(version).is_some_and(|v| v >= since)
}

/// Of a program that is not there, the hint says where to get it.
pub fn install_if_missing(e: Error) -> Error {
    if e.kind() == Kind::CommandMissing { e.hint(INSTALL) } else { e }
}

fn version(config: &Config, cancel: &Cancel) -> Result<(u32, u32)> {
    let path = program::locate(&config.binary).map_err(install_if_missing)?;
    let command = Command::new(&path).arg("--version").deadline(VERSION_DEADLINE);
    let out = run_any_status(&command, cancel, &mut |_| {})?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    match parse_version(&text) {
        Some(v) => require(&format!("{}.{}", v.0, v.1)).map(|()| v),
        None => {
            Err(Error::new(Kind::Unsupported, format!("{} does not run, or is no Firecracker", path.display())).hint(INSTALL))
        }
    }
}

/// `Firecracker v1.16.1`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    parse_numbers(text.lines().next()?.strip_prefix("Firecracker v")?)
}

fn parse_numbers(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(parse_version("Firecracker v1.16.1\n\nSupported snapshot data format versions: v9.0.0\n"), Some((1, 16)));
        assert_eq!(parse_version("Firecracker v1.17.0-dev\n"), Some((1, 17)));
        for bad in ["", "QEMU emulator version 7.2", "Firecracker v", "Firecracker v1"] {
            assert_eq!(parse_version(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_missing_or_something_else_is_refused_with_what_to_install() {
        let cancel = Cancel::try_new().unwrap();
        for (binary, kind) in [("no-such-firecracker", Kind::CommandMissing), ("/bin/true", Kind::Unsupported)] {
            let e = version(&Config { binary: binary.into(), ..Config::default() }, &cancel).unwrap_err();
            assert_eq!((e.kind(), e.hint_text()), (kind, Some(INSTALL)));
        }
        require("1.14.0").unwrap();
        require("2.0").unwrap();
        for old in ["1.13.1", "0.25.2", "", "x"] {
            assert_eq!(require(old).unwrap_err().kind(), Kind::Unsupported, "{old}");
        }
    }
}

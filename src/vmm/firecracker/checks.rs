//! The checks of Firecracker for `fcctl doctor`.

use super::jail;
use super::version::{INSTALL, VERSION_TESTED, require_same_release, version};
use crate::api::daemon::Check;
use crate::config::{Firecracker as Config, VmmLimits};
use crate::error::Error;
use crate::locks::Cancel;
use crate::vmm::devices::{self, KVM};

pub(super) fn checks(config: &Config) -> Vec<Check> {
    let mut all = vec![binary(config), kvm(config)];
    all.extend(jailer(config));
    all
}

fn binary(config: &Config) -> Check {
    const ID: &str = "firecracker";
    let Ok(cancel) = Cancel::try_new() else {
        return Check::warn(
            ID,
            "not checked, because no file descriptor is left".to_owned(),
            "raise the limit of open files",
        );
    };
    match version(config, &cancel) {
        Ok(release) if release.numbers > VERSION_TESTED => {
            let (major, minor) = VERSION_TESTED;
            let found = format!(
                "version {} is newer than {major}.{minor}, the newest that fcd was tested with",
                release.text
            );
            Check::warn(ID, found, "if a VM does not start, use that version")
        }
        Ok(release) => Check::ok(
            ID,
            format!("{} is version {}", config.binary.display(), release.text),
        ),
        Err(e) => Check::fail(ID, e.to_string(), e.hint_text().unwrap_or(INSTALL)),
    }
}

/// Checks the jailer and the limits of jailed VMMs.
fn jailer(config: &Config) -> Vec<Check> {
    const ID: &str = "jailer";
    if !config.jail {
        return vec![Check::warn(
            ID,
            "VMMs run without a jail, as configured".to_owned(),
            "jail = true under [firecracker]",
        )];
    }
    let found = jail::programs(config).and_then(|programs| {
        let cancel = Cancel::try_new().map_err(|e| Error::io("create an eventfd", e))?;
        require_same_release(&programs.jailer, &programs.firecracker, &cancel).map(|()| programs)
    });
    let programs = match found {
        Ok(programs) => Check::ok(ID, format!("VMMs run under {}", programs.jailer.display())),
        Err(e) => Check::fail(ID, e.to_string(), e.hint_text().unwrap_or(INSTALL)),
    };
    let (missing, has_io) = jail::missing_controllers();
    let limits = match (missing.is_empty(), config.limits) {
        (true, _) if has_io => Check::ok(
            "limits",
            "control groups limit the CPU, memory and threads of VMMs, and their disks' rates"
                .to_owned(),
        ),
        (true, wanted) => {
            let then = if wanted == VmmLimits::Required {
                "does not start"
            } else {
                "is limited only by its VMM"
            };
            let found = format!(
                "the host's control groups have no io controller, so a VM with disk rates {then}"
            );
            Check::warn(
                "limits",
                found,
                "enable the io controller of control groups (version 2)",
            )
        }
        (false, VmmLimits::BestEffort) => {
            let found = format!(
                "VMMs have no limit of {}, because the host has no such controller",
                missing.join(", ")
            );
            Check::warn(
                "limits",
                found,
                "enable the controllers of control groups (version 2)",
            )
        }
        (false, VmmLimits::Required) => {
            let found = format!(
                "the host's control groups have no {} controller, so no VM can start",
                missing.join(", ")
            );
            Check::fail(
                "limits",
                found,
                "enable them, or set limits = \"best-effort\" under [firecracker]",
            )
        }
    };
    vec![programs, limits]
}

/// Checks access to KVM. The jailer creates a separate node for each VMM, so with a jail the mode
/// of the host's node does not matter.
fn kvm(config: &Config) -> Check {
    const ID: &str = "kvm";
    let is_root = rustix::process::geteuid().is_root();
    if config.jail && is_root {
        return match devices::exists(KVM) {
            Ok(()) => Check::ok(ID, format!("{KVM} exists, and each jail has its own node")),
            Err(why) => Check::fail(ID, why, "modprobe kvm_intel || modprobe kvm_amd"),
        };
    }
    match devices::access(KVM) {
        Ok(_) => Check::ok(ID, format!("VMMs may open {KVM}")),
        Err(why) if is_root => Check::fail(ID, why, &devices::open_to_group(KVM)),
        Err(why) => Check::fail(ID, why, "adduser $USER kvm, and log in again"),
    }
}

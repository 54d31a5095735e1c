//! Spawns VMMs, with or without a jail.

use super::pipes::{CONSOLE_PIPE, METRICS_PIPE, make_pipe};
use super::{API_SOCKET, api, jail, save, version, vsock};
use crate::config::Firecracker as Config;
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::command::PATH;
use crate::host::fs::open_dir;
use crate::host::process::{self, Process, Spawn};
use crate::host::program;
use crate::vmm::devices::{self, KVM, TUN};
use crate::vmm::run_dir;
use crate::vmm::{SaveTo, VmmSpec};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A VMM that has just been spawned.
pub(super) struct Spawned {
    pub process: Process,
    /// The VMM's working directory, which contains its socket and its pipes.
    pub place: OwnedFd,
    pub files: Files,
}

/// The paths of a VMM's files as the VMM sees them.
pub(super) struct Files {
    pub kernel: String,
    pub initrd: String,
    pub disk: String,
    pub seed: String,
    pub runtime: Option<String>,
    pub work: Option<String>,
    pub saved: Option<SavedFiles>,
}

/// The paths of a saved guest's memory and devices.
pub(super) struct SavedFiles {
    pub memory: String,
    pub devices: String,
}

/// A directory for a VMM, and the process to start in it.
struct Prepared {
    place: OwnedFd,
    files: Files,
    spawn: Spawn,
}

/// True if this VM's VMM runs in a jail.
pub(super) fn is_jailed(config: &Config, spec: &VmmSpec) -> bool {
    config.jail && spec.credentials.is_some()
}

/// Spawns the VMM, which then waits for requests on its API socket. With `needs_kvm`, the devices
/// that a real VMM opens must exist.
pub(super) fn spawn(config: &Config, spec: &VmmSpec, needs_kvm: bool) -> Result<Spawned> {
    let groups = if needs_kvm {
        device_groups(config, spec)?
    } else {
        Vec::new()
    };
    let dir = open_dir(&spec.dir)?;
    let output = run_dir::open_log(&dir, spec)?;
    let jail_owner = spec.credentials.filter(|_| config.jail);
    let Prepared {
        place,
        files,
        spawn,
    } = match jail_owner {
        Some(owner) => jailed(config, spec, owner, output)?,
        None => bare(config, spec, &dir, groups, output)?,
    };
    for name in [CONSOLE_PIPE, METRICS_PIPE] {
        make_pipe(&place, name, spec.credentials)?;
    }
    // With the jailer's --new-pid-ns, the VMM would not be our child, and its exit status could not
    // be read.
    let process = if jail_owner.is_some() {
        process::spawn_in_own_pids(spawn)?
    } else {
        process::spawn(spawn)?
    };
    Ok(Spawned {
        process,
        place,
        files,
    })
}

/// Returns the groups that a VMM without a jail needs to open its devices. A jailed VMM has its own
/// nodes and needs no groups. Fails if a device is missing or the VMM may not open it.
fn device_groups(config: &Config, spec: &VmmSpec) -> Result<Vec<u32>> {
    let mut groups = Vec::new();
    for device in [KVM, TUN] {
        let access = if is_jailed(config, spec) {
            devices::exists(device).map(|()| Vec::new())
        } else {
            devices::access_as(device, spec.credentials.is_some())
        };
        let refused = |why| {
            Error::new(Kind::Unsupported, format!("start the VMM: {why}")).hint("run fcctl doctor")
        };
        groups.extend(access.map_err(refused)?);
    }
    groups.dedup();
    Ok(groups)
}

/// Prepares the jail. The jailer starts as root and changes its uid itself.
fn jailed(config: &Config, spec: &VmmSpec, owner: Credentials, output: File) -> Result<Prepared> {
    let programs = jail::programs(config)?;
    let limits = jail::limits(config, spec)?;
    let place = jail::make(spec, &programs)?;
    let mut args = jail::args(spec, &programs, owner, &limits);
    args.extend(own_args());
    let at = |name: &str| format!("/{name}");
    Ok(Prepared {
        place,
        files: Files {
            kernel: at(jail::KERNEL),
            initrd: at(jail::INITRD),
            disk: at(jail::DISK),
            seed: at(jail::SEED),
            runtime: spec.runtime_disk.as_ref().map(|_| at(jail::RUNTIME)),
            work: spec.work_disk.as_ref().map(|_| at(jail::WORK)),
            saved: spec.saved.as_ref().map(|_| SavedFiles {
                memory: at(jail::MEMORY),
                devices: at(jail::DEVICES),
            }),
        },
        spawn: Spawn {
            program: programs.jailer,
            args,
            env: env(),
            cwd: "/".into(),
            output: Some(output),
            credentials: None,
            groups: Vec::new(),
        },
    })
}

/// Prepares the VM's `run/`, which is the working directory of a VMM without a jail.
fn bare(
    config: &Config,
    spec: &VmmSpec,
    dir: &OwnedFd,
    groups: Vec<u32>,
    output: File,
) -> Result<Prepared> {
    let made_by_vmm = [
        API_SOCKET,
        CONSOLE_PIPE,
        METRICS_PIPE,
        vsock::SOCKET,
        jail::MEMORY,
        jail::DEVICES,
    ];
    let place = run_dir::make(dir, &made_by_vmm, spec.credentials)?;
    if let Some(saved) = &spec.saved {
        let files = SaveTo {
            memory: &saved.memory,
            devices: &saved.devices,
        };
        save::link(&place, files)?;
    }
    let mut args = vec!["--id".into(), spec.tag.as_str().into()];
    args.extend(own_args());
    let program = program::locate(&config.binary).map_err(version::install_if_missing)?;
    let text = |path: &Path| api::text(path).map(str::to_owned);
    Ok(Prepared {
        place,
        files: Files {
            kernel: text(&spec.kernel)?,
            initrd: text(&spec.initrd)?,
            disk: text(&spec.disk)?,
            seed: text(&spec.seed)?,
            runtime: spec.runtime_disk.as_deref().map(text).transpose()?,
            work: spec.work_disk.as_deref().map(text).transpose()?,
            // These files are linked into the VMM's working directory.
            saved: spec.saved.as_ref().map(|_| SavedFiles {
                memory: jail::MEMORY.to_owned(),
                devices: jail::DEVICES.to_owned(),
            }),
        },
        spawn: Spawn {
            program,
            args,
            env: env(),
            cwd: spec.dir.join(run_dir::RUN_DIR),
            output: Some(output),
            credentials: spec.credentials,
            groups,
        },
    })
}

fn own_args() -> [OsString; 5] {
    ["--api-sock", API_SOCKET, "--level", "Error", "--show-level"].map(OsString::from)
}

fn env() -> Vec<(OsString, OsString)> {
    vec![
        ("PATH".into(), PATH.into()),
        ("LC_ALL".into(), "C.UTF-8".into()),
    ]
}

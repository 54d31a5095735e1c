//! Builds a guest runtime: mmdebstrap unpacks the packages, `bundle.sh` relocates their programs to
//! `/.fcd`, and mkfs.ext4 makes the disk without mounting it.

use super::updates::updates;
use super::{FILES, GuestRuntimes, Package, RuntimeInfo, id_of};
use crate::error::{Error, Kind, Result};
use crate::host::time::now_s;
use crate::host::{Commands, hex};
use crate::image::checks::Host;
use crate::image::digest::record;
use crate::image::initrd::write_initrd;
use crate::image::registry::{INITRD, KERNEL};
use crate::image::script::{
    Input, Stage, read_line, run_script, script_command, unpack_kernel, write_inputs,
};
use crate::locks::Cancel;
use sha2::{Digest, Sha256};

/// The packages whose programs are part of the runtime, and those that the build itself uses.
const PACKAGES: [&str; 17] = [
    "ca-certificates",
    "coreutils",
    "dash",
    "diffutils",
    "e2fsprogs",
    "findutils",
    "git",
    "grep",
    "kmod",
    "libc-bin",
    "openssh-server",
    "openssh-sftp-server",
    "patchelf",
    "rsync",
    "sed",
    "tar",
    "util-linux",
];
/// The age at which a runtime is built again.
const FRESH_DAYS: u64 = 7;
/// The age at which a runtime is built again if its packages have updates. This limits how often
/// builds are repeated if the host's apt knows versions that a build does not get.
const UPDATE_DAYS: u64 = 1;
/// The size limit of a build's tree, which is in a tmpfs and therefore uses memory.
const TREE_BYTES_MAX: u64 = 2 << 30;
/// The login shell of guests, a static program that `src/image/guest/build.rs` compiles.
const ENTER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/enter"));

const STAGES: [Stage; 10] = [
    ("check the host", ""),
    ("update package lists", "I: running apt-get update"),
    ("download packages", "I: downloading packages"),
    ("extract packages", "I: extracting archives"),
    ("fetch kernel", "I: running --extract-hook"),
    ("unpack kernel", "fcd-stage kernel"),
    ("assemble the runtime", "fcd-stage assemble"),
    ("make file system", "fcd-stage filesystem"),
    ("make initramfs", ""),
    ("publish", ""),
];
const STAGE_INITRAMFS: usize = 8;
const STAGE_PUBLISH: usize = 9;

/// The files for `build.sh`, apart from the init script and the login shell.
const INPUTS: [(&str, &str); 11] = [
    ("build.sh", include_str!("build.sh")),
    ("bundle.sh", include_str!("bundle.sh")),
    ("fetch.sh", include_str!("../fetch.sh")),
    ("git", include_str!("guest/git")),
    ("image-off", include_str!("guest/image-off")),
    ("modprobe", include_str!("guest/modprobe")),
    ("modprobe.conf", include_str!("../guest/modprobe.conf")),
    ("programs", include_str!("guest/programs")),
    ("shutdown", include_str!("guest/shutdown")),
    ("sshd-root", include_str!("guest/sshd-root")),
    ("sshd_config", include_str!("guest/sshd_config")),
];

/// Builds a runtime from the distribution's current packages and publishes it. `progress` receives
/// the stage, the number of stages done, and their total. A build that fails leaves nothing behind.
///
/// # Errors
/// Those of [`crate::image::build`], without the ones about the image's name and packages.
fn build(
    runtimes: &GuestRuntimes,
    commands: &dyn Commands,
    cancel: &Cancel,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<RuntimeInfo> {
    crate::locks::may_block("file access");
    let mut report = |stage: usize| progress(STAGES[stage].0, stage as u64, STAGES.len() as u64);
    let doing = |e: Error| e.context("build the guest runtime");
    report(0);
    let host = Host::this();
    host.ready(commands, cancel).map_err(doing)?;
    let staging = runtimes.stage()?;
    let init = init();
    let suite = write_inputs(staging.path(), &inputs(&init), commands, cancel).map_err(doing)?;
    let args = [suite, PACKAGES.join(","), TREE_BYTES_MAX.to_string()];
    let command = script_command(host.is_root(), staging.path(), "build.sh", args);
    run_script(commands, &command, &STAGES, cancel, &mut report).map_err(doing)?;

    report(STAGE_INITRAMFS);
    let out = staging.path().join("out");
    let kernel_version = read_line(&out, "kernel-version")?;
    let tree_digest = read_line(&out, "tree-digest")?;
    let packages = packages(&read_line(&out, "packages")?);
    unpack_kernel(commands, &out, cancel).map_err(doing)?;
    write_initrd(&out, &kernel_version).map_err(doing)?;

    report(STAGE_PUBLISH);
    let publish = staging.path().join("publish");
    let io = |e| doing(Error::io("move the files of the runtime", e));
    std::fs::create_dir(&publish).map_err(io)?;
    let mut files = Vec::new();
    for name in FILES {
        std::fs::rename(out.join(name), publish.join(name)).map_err(io)?;
        files.push(record(&publish, name, cancel).map_err(doing)?);
    }
    let digest = |name: &str| {
        let found = files.iter().find(|f| f.name == name);
        found.map_or("", |f| f.sha256.as_str())
    };
    let info = RuntimeInfo {
        id: id_of([&tree_digest, digest(KERNEL), digest(INITRD)]),
        kernel_version,
        packages,
        built_at: now_s(),
        own_digest: own_digest(),
        files,
        bytes: 0,
    };
    runtimes.publish(&publish, &info)
}

/// Returns the newest runtime that this version of fcd has built, or None if [`ensure`] would build
/// one.
pub fn fresh(
    runtimes: &GuestRuntimes,
    commands: &dyn Commands,
    cancel: &Cancel,
) -> Result<Option<RuntimeInfo>> {
    Ok(newest_own(runtimes)?.filter(|info| is_fresh(info, commands, cancel)))
}

/// Returns the newest runtime that this version of fcd has built. Builds one if there is none, if
/// its packages have updates, or if it is so old that there may be updates that the host does not
/// know. If the build fails, for example because the host has no network, returns the old one. A
/// build is heavy, so the caller limits how many run at once.
///
/// # Errors
/// Those of [`build`], if there is no runtime.
pub fn ensure(
    runtimes: &GuestRuntimes,
    commands: &dyn Commands,
    cancel: &Cancel,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<RuntimeInfo> {
    let found = newest_own(runtimes)?;
    let fresh = found.as_ref();
    if let Some(info) = fresh.filter(|info| is_fresh(info, commands, cancel)) {
        return Ok(info.clone());
    }
    match (build(runtimes, commands, cancel, progress), found) {
        (Err(e), Some(info)) if e.kind() != Kind::Cancelled => {
            log::warn!(
                "the guest runtime {} is kept, although it is old: {e}",
                info.id
            );
            Ok(info)
        }
        (built, _) => built,
    }
}

fn newest_own(runtimes: &GuestRuntimes) -> Result<Option<RuntimeInfo>> {
    let own = own_digest();
    Ok(runtimes.list()?.into_iter().find(|r| r.own_digest == own))
}

fn is_fresh(info: &RuntimeInfo, commands: &dyn Commands, cancel: &Cancel) -> bool {
    match info.age_days(now_s()) {
        ..UPDATE_DAYS => true,
        UPDATE_DAYS..FRESH_DAYS => updates(info, commands, cancel).is_empty(),
        FRESH_DAYS.. => false,
    }
}

fn init() -> String {
    crate::image::init_script(include_str!("guest/init"))
}

fn inputs(init: &str) -> Vec<Input<'_>> {
    let texts = INPUTS.into_iter().chain([("init", init)]);
    let mut inputs: Vec<Input<'_>> = texts
        .map(|(name, text)| Input {
            name,
            bytes: text.as_bytes(),
        })
        .collect();
    inputs.push(Input {
        name: "enter",
        bytes: ENTER,
    });
    inputs
}

/// Returns the digest of everything in a runtime that comes from this version of fcd.
pub fn own_digest() -> String {
    let mut hash = Sha256::new();
    let init = init();
    for input in inputs(&init) {
        hash.update((input.bytes.len() as u64).to_le_bytes());
        hash.update(input.bytes);
    }
    hash.update(PACKAGES.join(","));
    hex::encode(&hash.finalize())
}

/// Parses lines that consist of a package's name and version.
fn packages(text: &str) -> Vec<Package> {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .map(|(name, version)| Package {
            name: name.to_owned(),
            version: version.to_owned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::script::stage_of;

    #[test]
    fn script_announces_its_stages() {
        let script = include_str!("build.sh");
        for (name, mark) in STAGES.iter().filter(|(_, m)| m.starts_with("fcd-stage ")) {
            assert!(
                script.contains(&format!("stage {}\n", &mark["fcd-stage ".len()..])),
                "{name}"
            );
        }
        assert_eq!(
            stage_of(&STAGES, "I: running --extract-hook in shell"),
            Some(4)
        );
    }

    #[test]
    fn login_shell_is_a_static_program() {
        assert!(ENTER.starts_with(b"\x7fELF"));
        let interpreter = b"/lib64/ld-linux";
        assert!(!ENTER.windows(interpreter.len()).any(|w| w == interpreter));
    }

    #[test]
    fn packages_are_parsed() {
        let found = packages("git 1:2.39.5-0+deb12u3\ntar 1.34\n");
        assert_eq!(
            (found.len(), found[0].version.as_str()),
            (2, "1:2.39.5-0+deb12u3")
        );
    }
}

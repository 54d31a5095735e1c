//! The jail of a VMM, created by the jailer (docs/jailer.md, v1.16): a separate root directory and
//! uid, and a control group with limits.
//!
//! The jail is `jail/<program>/<tag>/root` in the VM's directory. It is created for each start, and
//! the files that the VMM opens are linked into it. The control group is `fcd-<install>/<tag>`. The
//! jailer never removes either of them, so fcd does.

mod groups;
mod programs;

pub(super) use groups::{CGROUPS, limit_io, limits, missing_controllers, parent_group};
pub(super) use programs::{Programs, programs};

use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::fs::open_dir;
use crate::host::mount;
use crate::ids::Tag;
use crate::vmm::VmmSpec;
use groups::remove_group;
use rustix::fs::{Mode, OFlags};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const JAIL_DIR: &str = "jail";
const ROOT_DIR: &str = "root";
/// The maximum number of files that a VMM may have open: disks, its tap and KVM.
const FILES_MAX: u32 = 256;

/// The names of the files in the jail.
pub(super) const KERNEL: &str = "vmlinux";
pub(super) const INITRD: &str = "initrd";
pub(super) const DISK: &str = "disk";
pub(super) const SEED: &str = "seed";
pub(super) const RUNTIME: &str = "runtime";
pub(super) const WORK: &str = "work";
pub(super) const MEMORY: &str = "memory";
pub(super) const DEVICES: &str = "devices";

/// Returns the jail's root directory, as seen from the host.
pub(super) fn root(dir: &Path, program: &Path, tag: &Tag) -> PathBuf {
    dir.join(JAIL_DIR)
        .join(program.file_name().unwrap_or_default())
        .join(tag.as_str())
        .join(ROOT_DIR)
}

/// Checks that the file system allows device nodes and programs, because the jail contains both.
///
/// # Errors
/// `unsupported`, with the mount that forbids it.
pub fn require_mount(dir: &Path) -> Result<()> {
    let flags = mount::flags(dir)
        .map_err(|e| Error::io(format!("look at the file system of {}", dir.display()), e))?;
    require_flags(dir, flags)
}

fn require_flags(dir: &Path, flags: mount::Flags) -> Result<()> {
    let forbids = flags.names();
    if forbids.is_empty() {
        return Ok(());
    }
    let (at, dir) = (mount::point(dir), dir.display());
    let lifted: Vec<_> = forbids
        .iter()
        .map(|name| name.trim_start_matches("no"))
        .collect();
    let message = format!(
        "create a jail in {dir}: {} is mounted {}, but a jail contains device nodes and a program",
        at.display(),
        forbids.join(" and ")
    );
    let hint = format!(
        "mount -o remount,{} {}, or set another state_dir",
        lifted.join(","),
        at.display()
    );
    Err(Error::new(Kind::Unsupported, message).hint(hint))
}

/// Creates the jail with the files that the VMM opens, and returns its root. An earlier jail with
/// this tag is removed.
pub(super) fn make(spec: &VmmSpec, programs: &Programs) -> Result<OwnedFd> {
    crate::locks::may_block("file access");
    let doing = || format!("create the jail of {}", spec.tag);
    require_mount(&spec.dir)?;
    clear(&spec.dir, &spec.tag)?;
    let root = root(&spec.dir, &programs.firecracker, &spec.tag);
    std::fs::create_dir_all(&root).map_err(|e| Error::io(doing(), e))?;
    let mut files = vec![
        (&spec.kernel, KERNEL),
        (&spec.initrd, INITRD),
        (&spec.disk, DISK),
        (&spec.seed, SEED),
    ];
    files.extend(spec.runtime_disk.as_ref().map(|disk| (disk, RUNTIME)));
    files.extend(spec.work_disk.as_ref().map(|work| (work, WORK)));
    files.extend(
        spec.saved
            .iter()
            .flat_map(|saved| [(&saved.memory, MEMORY), (&saved.devices, DEVICES)]),
    );
    for (from, name) in files {
        std::fs::hard_link(from, root.join(name)).map_err(|e| {
            let e = Error::io(format!("{}: link {}", doing(), from.display()), e);
            e.hint("put images and VMs on one file system")
        })?;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(&root, flags, Mode::empty())
        .map_err(|e| Error::io(doing(), std::io::Error::from(e)))
}

/// Opens the root of the jail with this tag. Returns None if there is no such jail.
pub(super) fn find(dir: &Path, tag: &Tag) -> Result<Option<OwnedFd>> {
    crate::locks::may_block("file access");
    let jail = dir.join(JAIL_DIR);
    let roots = names(&jail)
        .into_iter()
        .map(|program| jail.join(program).join(tag.as_str()).join(ROOT_DIR));
    roots
        .into_iter()
        .find(|root| root.is_dir())
        .map(|root| open_dir(&root))
        .transpose()
}

/// Returns the jailer's arguments. Firecracker's own arguments follow `--`.
pub(super) fn args(
    spec: &VmmSpec,
    programs: &Programs,
    owner: Credentials,
    limits: &[String],
) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--id".into(), spec.tag.as_str().into()];
    let mut option = |name: &str, value: OsString| args.extend([OsString::from(name), value]);
    option("--exec-file", programs.firecracker.clone().into());
    option("--uid", owner.uid.to_string().into());
    option("--gid", owner.gid.to_string().into());
    option("--chroot-base-dir", spec.dir.join(JAIL_DIR).into());
    option("--resource-limit", format!("no-file={FILES_MAX}").into());
    // Without limits the jailer creates no control group, but for version 2 it would still require
    // a mount.
    option(
        "--cgroup-version",
        if limits.is_empty() { "1" } else { "2" }.into(),
    );
    if !limits.is_empty() {
        option("--parent-cgroup", parent_group(spec.tag.install()).into());
    }
    for limit in limits {
        option("--cgroup", limit.into());
    }
    args.push("--".into());
    args
}

/// Removes the jail and the control group with this tag. Succeeds if there are none. The VMM must
/// have exited.
pub(super) fn clear(dir: &Path, tag: &Tag) -> Result<()> {
    crate::locks::may_block("file access");
    remove_group(tag)?;
    let jail = dir.join(JAIL_DIR);
    for program in names(&jail) {
        // Links are not followed, because the VMM's uid may have created them.
        let removed = crate::host::fs::remove_tree(&jail.join(&program).join(tag.as_str()));
        removed.map_err(|e| Error::io(format!("remove the jail of {tag}"), e))?;
        // This fails if the directory contains the jail of another start.
        let _ = std::fs::remove_dir(jail.join(program));
    }
    let _ = std::fs::remove_dir(&jail);
    Ok(())
}

fn names(dir: &Path) -> Vec<String> {
    crate::locks::may_block("file access");
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

/// Returns the tags of this installation for which a control group, or a jail in a VM's directory,
/// exists.
pub(super) fn remains(vms: &Path, install: &str) -> Vec<String> {
    let mut found = names(&Path::new(CGROUPS).join(parent_group(install)));
    for vm in names(vms) {
        let jail = vms.join(vm).join(JAIL_DIR);
        found.extend(
            names(&jail)
                .iter()
                .flat_map(|program| names(&jail.join(program))),
        );
    }
    let prefix = Tag::prefix(install);
    found.retain(|name| name.starts_with(&prefix));
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests;

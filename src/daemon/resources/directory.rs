//! A VM's directory with its keys, seed drive, disks and console log.

use super::{Boot, BootStep, HostView, Resource, Resources, Span};
use crate::api::daemon::Check;
use crate::config::VmmDriver;
use crate::daemon::core::VMS_DIR;
use crate::daemon::vm_dir::{HOST_KEY_FILE, INITRD_FILE, KERNEL_FILE, KEY_FILE};
use crate::disk::KeyPair;
use crate::error::{Error, Result};
use crate::host::fs::create_dir;
use crate::host::reach;
use crate::ids::VmId;
use crate::store::VmRow;
use crate::vmm::VmmSpec;
use rustix::process::Gid;
use std::path::Path;
use std::time::Duration;

const USER_KEY_COMMENT: &str = "fcd";

/// How many times to try to remove a directory that is still being written to.
const REMOVE_TRIES_MAX: u32 = 100;
/// How long to pause between two attempts to remove a directory.
const REMOVE_PERIOD: Duration = Duration::from_millis(20);
/// `doctor` warns if the state directory's file system has less free space than this. An image
/// takes about 400 MB.
const SPACE_BYTES_WARN: u64 = 2 << 30;

pub(super) struct Directory;

impl BootStep for Directory {
    fn stage(&self) -> &'static str {
        "prepare the directory"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        make_directory(&boot.spec)?;
        if let Some((kernel, initrd)) = boot.image.private_kernel() {
            link(kernel, &boot.spec.dir.join(KERNEL_FILE))?;
            link(initrd, &boot.spec.dir.join(INITRD_FILE))?;
        }
        resources.keys(&boot.row, &boot.spec).map(drop)
    }
}

/// Creates the VM's directory. Besides the daemon, only the VM's own VMM can enter it, because it
/// has links to files of images that may be private.
fn make_directory(spec: &VmmSpec) -> Result<()> {
    let dir = create_dir(&spec.dir, 0o710)?;
    let gid = spec.credentials.map(|owner| Gid::from_raw(owner.gid));
    rustix::fs::fchown(&dir, None, gid).map_err(|e| {
        let doing = format!("set the group of {}", spec.dir.display());
        Error::io(doing, e)
    })
}

/// Makes `to` a hard link to a file of an image. A link of an earlier boot is replaced.
fn link(from: &Path, to: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let io = |e| Error::io(format!("link {} to {}", to.display(), from.display()), e);
    match std::fs::remove_file(to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
        _ => {}
    }
    std::fs::hard_link(from, to).map_err(io)
}

impl Resource for Directory {
    fn kind(&self) -> &'static str {
        "directory"
    }
    fn span(&self) -> Span {
        Span::Life
    }
    fn intent(&self, resources: &Resources, row: &VmRow) -> Option<String> {
        Some(resources.core.vm_dir(&row.id).display().to_string())
    }
    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let dir = Path::new(name);
        resources.vmm.consoles().forget(dir);
        let mut tries = 0;
        loop {
            tries += 1;
            match crate::host::fs::remove_tree(dir) {
                Ok(()) => return Ok(()),
                // The last output of the guest may still be on its way to the log in the directory.
                Err(e)
                    if e.kind() == std::io::ErrorKind::DirectoryNotEmpty
                        && tries < REMOVE_TRIES_MAX =>
                {
                    resources.core.sleep(REMOVE_PERIOD);
                }
                Err(e) => return Err(Error::io(format!("remove {}", dir.display()), e)),
            }
        }
    }

    /// Skips directories whose names are not IDs, because they do not belong to fcd.
    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        crate::locks::may_block("file access");
        let vms = resources.core.state_dir.join(VMS_DIR);
        let entries = match std::fs::read_dir(&vms) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(format!("list {}", vms.display()), e)),
        };
        let is_id =
            |name: &std::ffi::OsStr| name.to_str().is_some_and(|n| n.parse::<VmId>().is_ok());
        Ok(entries
            .flatten()
            .filter(|e| is_id(&e.file_name()))
            .map(|e| e.path().display().to_string())
            .collect())
    }

    /// True for a VM that is being created with variables. Its directory, which holds the
    /// variables, exists before its row.
    fn is_in_use(&self, resources: &Resources, name: &str) -> bool {
        let id = Path::new(name).file_name().and_then(|id| id.to_str());
        id.and_then(|id| id.parse().ok())
            .is_some_and(|id| resources.core.beginning.is_used(&id))
    }
}

pub(super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    let mut all = vec![space_check(&host.config.state_dir)];
    all.extend(reach_check(&host.config.state_dir, host.config.vmm.driver));
    all
}

/// Checks that VMMs can reach the state directory. If the daemon is root, QEMU runs under another
/// uid and opens its files by their paths. Firecracker's jailer opens them as root. Returns `None`
/// if nothing is wrong.
pub(super) fn reach_check(state_dir: &Path, driver: VmmDriver) -> Option<Check> {
    if !nix::unistd::geteuid().is_root() || driver == VmmDriver::Firecracker {
        return None;
    }
    // The state directory's own mode is not checked, because the daemon sets it at its start.
    let closed = reach::closed_to_others(state_dir)?;
    let (closed, state_dir) = (closed.display(), state_dir.display());
    let found = format!(
        "no VM can start: VMMs do not run as root and may not enter {closed}, where the state directory {state_dir} is"
    );
    Some(Check::fail(
        "state-dir",
        found,
        &reach::state_dir_fix(&closed),
    ))
}

fn space_check(state_dir: &Path) -> Check {
    match crate::host::fs::space(super::existing(state_dir)) {
        Ok(s) if s.free_bytes >= SPACE_BYTES_WARN => Check::ok(
            "disk-space",
            format!(
                "{} MiB free for {}",
                s.free_bytes >> 20,
                state_dir.display()
            ),
        ),
        Ok(s) => Check::warn(
            "disk-space",
            format!(
                "only {} MiB free for {}",
                s.free_bytes >> 20,
                state_dir.display()
            ),
            "fcctl vm prune, or free some space",
        ),
        Err(e) => Check::fail(
            "disk-space",
            e.to_string(),
            "check the directory's permissions",
        ),
    }
}

impl Resources {
    /// Returns the host key and the user key. They are made at the first start, and the VM keeps
    /// them across restarts.
    pub(super) fn keys(&self, row: &VmRow, spec: &VmmSpec) -> Result<(KeyPair, KeyPair)> {
        self.read_keys(row, spec)?
            .map_or_else(|| self.make_keys(row, spec), Ok)
    }

    /// Reads the VM's keys. Returns `None` if a key is missing or does not match the row. Then the
    /// VM has never been started, or was started by an earlier version, which kept the host's key
    /// only in the seed drive.
    fn read_keys(&self, row: &VmRow, spec: &VmmSpec) -> Result<Option<(KeyPair, KeyPair)>> {
        crate::locks::may_block("file access");
        let read = |name: &str| match std::fs::read_to_string(spec.dir.join(name)) {
            Ok(text) => KeyPair::from_private_openssh(&text).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("read the keys of VM {}", row.name), e)),
        };
        let keys = read(HOST_KEY_FILE)?.zip(read(KEY_FILE)?);
        Ok(keys.filter(|(host, _)| row.host_key.as_deref() == Some(host.public_blob())))
    }

    fn make_keys(&self, row: &VmRow, spec: &VmmSpec) -> Result<(KeyPair, KeyPair)> {
        let (host, user) = (
            KeyPair::generate(row.name.as_str())?,
            KeyPair::generate(USER_KEY_COMMENT)?,
        );
        self.core.effects.before("write the keys")?;
        for (name, key) in [(KEY_FILE, &user), (HOST_KEY_FILE, &host)] {
            crate::host::fs::write_durable(
                &spec.dir.join(name),
                key.private_openssh().as_bytes(),
                0o600,
            )?;
        }
        let blob = host.public_blob().to_vec();
        let ticket = self
            .core
            .change_row(&row.id, false, |r| r.host_key = Some(blob))?;
        self.core.wait_durable(ticket)?;
        Ok((host, user))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::daemon::Severity;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn state_directory_closed_to_vmms_is_reported_with_fix() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED, because VMMs have their own uids only if root runs this test");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let chmod =
            |mode| std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(mode)).unwrap();
        let state_dir = dir.path().join("state");
        let check = |driver| reach_check(&state_dir, driver);
        chmod(0o755);
        assert_eq!(check(VmmDriver::Qemu).map(|c| c.found), None);
        chmod(0o700);
        let found = check(VmmDriver::Qemu).unwrap();
        assert_eq!(found.severity, Severity::Fail);
        let path = dir.path().display().to_string();
        assert!(
            found.found.contains(&format!("may not enter {path},")),
            "{}",
            found.found
        );
        let fix = found.fix.unwrap();
        assert!(
            fix.contains("--state-dir") && fix.ends_with(&format!("chmod o+x {path}")),
            "{fix}"
        );
        assert_eq!(
            check(VmmDriver::Firecracker).map(|c| c.found),
            None,
            "a jailed VMM has another root"
        );
    }
}

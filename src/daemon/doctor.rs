//! What is needed, what was found, what was picked, and how to mend it. Read-only.

use super::{Caller, Daemon, Seams};
use crate::api::daemon::{Check, DoctorReply, LeaksReply};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::host::fs::space;
use crate::locks::Cancel;
use std::path::Path;

/// Less room than this on the state directory's file system is worth a warning: an image takes some 400 MB.
const SPACE_BYTES_WARN: u64 = 2 << 30;
impl Daemon {
    pub fn doctor(&self) -> DoctorReply {
        let mut checks = checks(&self.config, self.vmm.as_ref(), self.commands.as_ref(), &self.closing);
        checks.push(self.image_check());
        checks.push(match self.store.read_only() {
            None => Check::ok("store", format!("the store in {} takes changes", self.config.state_dir.display())),
            Some(e) => {
                Check::fail("store", format!("the store is read-only: {e}"), e.hint_text().unwrap_or("free some disk space"))
            }
        });
        DoctorReply { checks }
    }

    /// What is ours on the host and belongs to nothing; root's and the daemon's own user's business only.
    ///
    /// # Errors
    /// `denied` to others.
    pub fn leaks(&self, caller: &Caller, fix: bool) -> Result<LeaksReply> {
        if caller.uid != 0 && caller.uid != nix::unistd::geteuid().as_raw() {
            return Err(Error::new(Kind::Denied, "look for leaks: only root and the daemon's own user may")
                .hint("run it as the user who runs fcd"));
        }
        Ok(LeaksReply { leaks: self.sweep(fix) })
    }

    fn image_check(&self) -> Check {
        let name = &self.config.vm.image;
        match self.images.get(name) {
            Ok(info) => Check::ok("image", format!("image {name}: {}, kernel {}", info.os, info.kernel_version)),
            Err(_) => Check::warn("image", format!("there is no image {name}"), "fcctl image build"),
        }
    }
}

/// The checks that need no daemon.
pub fn host_checks(config: &Config, seams: &Seams) -> Result<Vec<Check>> {
    let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
    let mut all = checks(config, seams.vmm.as_ref(), seams.commands.as_ref(), &cancel);
    all.push(Check::warn("daemon", format!("no daemon answers on {}", config.socket.display()), "start fcd"));
    Ok(all)
}

fn checks(config: &Config, vmm: &dyn crate::vmm::Driver, commands: &dyn Commands, cancel: &Cancel) -> Vec<Check> {
    let mut all = vmm.checks();
    all.push(disk_check(config));
    all.push(space_check(&config.state_dir));
    all.extend(reach_check(&config.state_dir));
    all.extend(super::network::checks(config, commands, cancel));
    all.extend(crate::image::checks(commands, cancel));
    all
}

/// The nearest directory that is there: the state directory itself may not be made yet.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

fn disk_check(config: &Config) -> Check {
    let dir = config.state_dir.display();
    match super::room::probe(config, existing(&config.state_dir)) {
        Ok(probe) => Check::ok("root-disk", format!("root disks in {dir}: {} ({})", probe.method.name(), probe.reason)),
        Err(e) => Check::fail("root-disk", e.to_string(), e.hint_text().unwrap_or("check the directory's rights")),
    }
}

/// VMMs of a root's daemon have uids of their own, which must get to the disks. None: all is well.
fn reach_check(state_dir: &Path) -> Option<Check> {
    use std::os::unix::fs::PermissionsExt;
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let closed = |dir: &&Path| std::fs::metadata(dir).is_ok_and(|m| m.permissions().mode() & 0o001 == 0);
    // The state directory itself is given its mode when the daemon starts.
    let closed = state_dir.ancestors().skip(1).find(closed)?;
    let found = format!("VMMs, which do not run as root, do not get into {}, where the state directory is", closed.display());
    Some(Check::fail("state-dir", found, &format!("chmod o+x {}, or another state_dir", closed.display())))
}

fn space_check(state_dir: &Path) -> Check {
    match space(existing(state_dir)) {
        Ok(s) if s.free_bytes >= SPACE_BYTES_WARN => {
            Check::ok("disk-space", format!("{} MiB free for {}", s.free_bytes >> 20, state_dir.display()))
        }
        Ok(s) => Check::warn(
            "disk-space",
            format!("only {} MiB free for {}", s.free_bytes >> 20, state_dir.display()),
            "fcctl vm prune, or free some space",
        ),
        Err(e) => Check::fail("disk-space", e.to_string(), "check the directory's rights"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::daemon::Severity;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_place_that_vmms_do_not_reach_is_named() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED, for it is not run by root: a_place_that_vmms_do_not_reach_is_named");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let set = |mode| std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o755);
        assert_eq!(reach_check(&dir.path().join("state")).map(|c| c.found), None);
        set(0o700);
        let check = reach_check(&dir.path().join("state")).unwrap();
        assert_eq!(check.severity, Severity::Fail);
        assert!(check.found.contains(dir.path().to_str().unwrap()), "{}", check.found);
    }
}

//! Finds and removes the control groups of a removed installation if they contain no process.

use super::jail;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Returns the installation's control group if it exists and no process is in it or below it.
/// Otherwise returns None. The kernel does not remove a group that contains a process.
pub fn empty_group(install: &str) -> Option<PathBuf> {
    empty_group_at(Path::new(jail::CGROUPS), install)
}

fn empty_group_at(groups: &Path, install: &str) -> Option<PathBuf> {
    crate::locks::may_block("file access");
    if install.is_empty() || !install.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let group = groups.join(jail::parent_group(install));
    let events = std::fs::read_to_string(group.join("cgroup.events")).ok()?;
    events
        .lines()
        .any(|line| line == "populated 0")
        .then_some(group)
}

/// Removes the installation's control group and the control groups of its VMs.
pub fn remove_group(group: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let io = |path: &Path, e| Error::io(format!("remove control group {}", path.display()), e);
    let entries = std::fs::read_dir(group).map_err(|e| io(group, e))?;
    let of_vms = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    for path in of_vms.map(|entry| entry.path()).chain([group.to_owned()]) {
        match std::fs::remove_dir(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(&path, e)),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::{Spawn, spawn};
    use crate::sched::Instant;
    use std::time::Duration;

    /// Mounts control groups of version 2, visible only to this thread.
    fn mount(at: &Path) {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let script = format!(
            "mount --make-rprivate / && mount -t cgroup2 test '{}'",
            at.display()
        );
        let command = crate::host::Command::new("sh").args(["-ec", &script]);
        let out = crate::host::command::run_any_status(
            &command,
            &crate::locks::Cancel::try_new().unwrap(),
            &mut |_| {},
        )
        .unwrap();
        assert_eq!(out.status, 0, "{}", String::from_utf8_lossy(&out.stderr));
    }

    #[test]
    fn empty_groups_are_removed_and_others_kept() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let at = temp.path().to_owned();
        let checked = crate::host::thread::spawn("groups", move || {
            mount(&at);
            let install = format!("{:08x}", std::process::id());
            let group = at.join(format!("fcd-{install}"));
            let of_vm = group.join(format!("fc-{install}-0123456789ab-1"));
            assert_eq!(
                empty_group_at(&at, &install),
                None,
                "the group does not exist"
            );
            std::fs::create_dir_all(&of_vm).unwrap();
            let args = ["-c", "exec sleep 1000"].map(Into::into).to_vec();
            let program = "sh".into();
            let env = vec![("PATH".into(), "/usr/bin:/bin".into())];
            let vmm = spawn(Spawn {
                program,
                args,
                env,
                cwd: "/".into(),
                output: None,
                credentials: None,
                groups: Vec::new(),
            })
            .unwrap();
            std::fs::write(of_vm.join("cgroup.procs"), vmm.identity().pid.to_string()).unwrap();
            assert_eq!(empty_group_at(&at, &install), None, "a VMM is in the group");
            assert!(
                remove_group(&group).is_err() && of_vm.exists(),
                "the kernel keeps the group"
            );
            vmm.signal(rustix::process::Signal::KILL).unwrap();
            assert!(
                vmm.wait_uncancelled(Instant::now() + Duration::from_secs(20))
                    .unwrap()
            );
            let deadline = Instant::now() + Duration::from_secs(20);
            while empty_group_at(&at, &install).is_none() {
                assert!(Instant::now() < deadline, "the group is not empty");
                std::thread::yield_now();
            }
            assert_eq!(empty_group_at(&at, &install).as_ref(), Some(&group));
            for other in ["", "..", "*", "/"] {
                assert_eq!(empty_group_at(&at, other), None, "{other}");
            }
            remove_group(&group).unwrap();
            assert!(!group.exists());
            assert_eq!(empty_group_at(&at, &install), None);
        });
        checked
            .unwrap()
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}

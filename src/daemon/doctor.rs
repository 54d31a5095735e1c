//! Implements `doctor`, which reports what fcd needs, what it found, what it chose, and how to fix
//! problems. Only `doctor --leaks --fix` changes anything on the host.
//!
//! The checks run programs as the daemon's user, and every local user may call `doctor`. So
//! concurrent callers share one run, and users other than root and the daemon's own user get
//! results that are up to a few seconds old.

use super::access::Caller;
use super::core::Core;
use super::network::Networks;
use super::reconcile::Reconciler;
use super::recovery::Recovery;
use super::resources::Resources;
use super::seams::Seams;
use super::single_flight::Freshness;
use super::single_flight::SingleFlight;
use crate::api::daemon::{Check, DoctorReply, LeaksReply};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::host::Commands;
use crate::host::confine;
use crate::host::time::now_s;
use crate::image::Images;
use crate::locks::Cancel;
use crate::sched::Instant;
use crate::vmm::Driver;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How long a result is reused for users other than root and the daemon's own user.
const KEPT: Duration = Duration::from_secs(3);
/// How long a caller waits for another caller's run.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// The checks of the host, shared between callers.
pub(super) type HostChecks = SingleFlight<Vec<Check>>;

pub(super) fn host_checks_shared() -> HostChecks {
    SingleFlight::new(KEPT)
}

/// Answers `doctor`. It holds the whole configuration because it checks all of it.
pub struct Doctor {
    pub(super) core: Core,
    pub(super) config: Config,
    pub(super) networks: Networks,
    pub(super) recovery: Recovery,
    pub(super) resources: Resources,
    pub(super) reconciler: Arc<Reconciler>,
    pub(super) images: Images,
    pub(super) commands: Arc<dyn Commands>,
    pub(super) vmm: Arc<dyn Driver>,
    pub(super) host_checks: HostChecks,
}

impl Doctor {
    /// Describes the driver that starts VMs.
    pub fn driver(&self) -> String {
        self.vmm.describe()
    }

    /// Returns the driver of the VMs' network.
    pub fn network(&self) -> &'static str {
        match self.networks.net {
            Some(_) => "bridge",
            None => "user",
        }
    }

    /// Runs the checks, or returns the recent result of another caller's run.
    ///
    /// # Errors
    /// `busy` if another caller's run takes too long.
    pub fn doctor(&self, caller: &Caller) -> Result<DoctorReply> {
        let freshness = if caller.is_privileged() {
            Freshness::New
        } else {
            Freshness::Recent
        };
        let run = || {
            let (commands, cancel) = (self.commands.as_ref(), &self.core.closing);
            let mut found = checks(&self.config, self.vmm.as_ref(), commands, cancel);
            let runtimes = &self.resources.specs.guest_runtimes;
            found.push(runtimes.check(now_s(), commands, cancel));
            found
        };
        let found = self
            .host_checks
            .get(freshness, Instant::now() + RUN_DEADLINE, run);
        let mut checks = found.map_err(|e| e.context("check this host"))?;
        // These checks read only files and memory, so there is no need to share them.
        checks.push(self.image_check());
        checks.push(self.recovery.recovery_check(caller));
        checks.extend(self.networks.name_server_check());
        checks.push(match self.core.store.read_only() {
            None => Check::ok(
                "store",
                format!("the store in {} is writable", self.core.state_dir.display()),
            ),
            Some(e) => Check::fail(
                "store",
                format!("the store is read-only: {e}"),
                e.hint_text().unwrap_or("free some disk space"),
            ),
        });
        Ok(DoctorReply { checks })
    }

    /// Lists resources on the host that carry fcd's names but belong to nothing. Removes them if
    /// `fix` is set.
    ///
    /// `busy` if the daemon has just started and is still removing what its predecessor left.
    pub fn leaks(&self, fix: bool) -> Result<LeaksReply> {
        self.reconciler.wait_first_pass()?;
        Ok(LeaksReply {
            leaks: self.resources.sweep(fix),
        })
    }

    fn image_check(&self) -> Check {
        let name = &self.config.vm.image;
        match self.images.get(name) {
            Ok(info) => Check::ok(
                "image",
                format!("image {name}: {}, kernel {}", info.os, info.kernel_version),
            ),
            Err(_) => Check::warn(
                "image",
                format!("there is no image {name}"),
                "fcctl image build",
            ),
        }
    }
}

/// Runs the checks that do not need a daemon, and adds a warning that no daemon answers.
pub fn host_checks(config: &Config, seams: &Seams) -> Result<Vec<Check>> {
    let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
    let mut all = checks(config, seams.vmm.as_ref(), seams.commands.as_ref(), &cancel);
    all.push(Check::warn(
        "daemon",
        format!("no daemon answers on {}", config.socket.display()),
        "start fcd",
    ));
    Ok(all)
}

fn checks(
    config: &Config,
    vmm: &dyn crate::vmm::Driver,
    commands: &dyn Commands,
    cancel: &Cancel,
) -> Vec<Check> {
    let mut all = super::resources::checks(&super::host_view::HostView {
        config,
        vmm,
        commands,
        cancel,
    });
    all.extend(crate::image::checks(commands, cancel));
    all.push(helper_check(confine::landlock_version()));
    all
}

/// Reports whether Landlock confines the helper processes. Without it, they start nevertheless.
fn helper_check(landlock: io::Result<i64>) -> Check {
    const ID: &str = "helper-processes";
    let (why, fix) = match landlock {
        Ok(version) => {
            let found = format!("helper processes are confined with Landlock, version {version}");
            return Check::ok(ID, found);
        }
        Err(e) => match e.raw_os_error() {
            Some(libc::EOPNOTSUPP) => (
                "Landlock is disabled".to_owned(),
                "boot with the kernel argument lsm=landlock,... that adds it to the modules in \
                 /sys/kernel/security/lsm",
            ),
            Some(libc::ENOSYS) => (
                "the kernel has no Landlock".to_owned(),
                "use a kernel of Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK",
            ),
            _ => (
                format!("Landlock cannot be used: {e}"),
                "allow the system calls landlock_* in the container or the unit that runs fcd",
            ),
        },
    };
    let found = format!(
        "{why}, so helper processes are kept from the host's files only by the system call \
         filter, their uid and the modes of files"
    );
    Check::warn(ID, found, fix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::daemon::Severity;

    #[test]
    fn missing_landlock_is_a_warning() {
        let check = |errno| helper_check(Err(io::Error::from_raw_os_error(errno)));
        for (errno, why) in [
            (libc::EOPNOTSUPP, "disabled"),
            (libc::ENOSYS, "no Landlock"),
            (libc::EPERM, "not permitted"),
        ] {
            let check = check(errno);
            assert_eq!(check.severity, Severity::Warn, "{why}");
            assert!(check.found.contains(why), "{}", check.found);
            assert!(check.fix.is_some(), "{why}");
        }
        assert_eq!(helper_check(Ok(4)).severity, Severity::Ok);
    }
}

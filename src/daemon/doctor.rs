//! What is needed, what was found, what was picked, and how to mend it. Read-only.

use super::{Caller, Daemon, Seams};
use crate::api::daemon::{Check, DoctorReply, LeaksReply};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::locks::Cancel;

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
    /// `denied` to others. `busy` when the daemon has just started and what was left is not cleared away in time.
    pub fn leaks(&self, caller: &Caller, fix: bool) -> Result<LeaksReply> {
        if caller.uid != 0 && caller.uid != nix::unistd::geteuid().as_raw() {
            return Err(Error::new(Kind::Denied, "look for leaks: only root and the daemon's own user may")
                .hint("run it as the user who runs fcd"));
        }
        self.await_settled()?;
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
    let mut all = super::resources::checks(&super::resources::HostView { config, vmm, commands, cancel });
    all.extend(crate::image::checks(commands, cancel));
    all
}

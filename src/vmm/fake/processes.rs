//! The processes of fake VMMs.

use super::{Fake, report};
use crate::error::{Error, Kind, Result};
use crate::host::process;
use crate::host::wait::{WaitResult, wait_any, wait_uncancelled};
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use crate::vmm::{Died, End, Identity, Processes, Tagged};
use nix::poll::PollFlags;
use std::path::Path;

impl Processes for Fake {
    fn find(&self, tag: &str) -> Result<Option<Identity>> {
        let mut state = self.state.lock();
        state.finds += 1;
        Ok(state
            .vmms
            .iter()
            .find(|vmm| vmm.end.is_none() && vmm.spec.tag.as_str() == tag)
            .map(|vmm| vmm.identity.clone()))
    }

    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>> {
        let mut state = self.state.lock();
        state.lists += 1;
        let live = state
            .vmms
            .iter()
            .filter(|vmm| vmm.end.is_none() && vmm.spec.tag.as_str().starts_with(tag_prefix));
        Ok(live
            .map(|vmm| Tagged {
                tag: vmm.spec.tag.to_string(),
                identity: vmm.identity.clone(),
            })
            .collect())
    }

    fn is_alive(&self, identity: &Identity) -> bool {
        self.with(identity, |vmm| vmm.end.is_none())
            .unwrap_or(false)
    }

    fn is_ours(&self, identity: &Identity, tag: &str) -> bool {
        self.with(identity, |vmm| {
            vmm.end.is_none() && vmm.spec.tag.as_str() == tag
        })
        .unwrap_or(false)
    }

    fn runs(&self, identity: &Identity) -> bool {
        self.with(identity, |_| ()).is_some()
    }

    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        let Some(gone) = self.with(identity, |vmm| vmm.gone.clone()) else {
            return Ok(true);
        };
        let _blocking = region(Rank::VmmApi);
        let woken = wait_any(&[(gone.fd(), PollFlags::POLLIN)], deadline, cancel);
        Ok(woken.map_err(|e| Error::io("wait for a fake VMM", e))? == WaitResult::Ready)
    }

    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()> {
        if !self.is_alive(identity) {
            return Ok(());
        }
        let is_unkillable = {
            let mut state = self.state.lock();
            state.kills += 1;
            state.is_unkillable
        };
        let _blocking = region(Rank::VmmApi);
        if !is_unkillable {
            self.end(
                |vmm| vmm.identity == *identity,
                &End::Vmm(process::Exit::Signal(9)),
            );
        }
        let Some(gone) = self.with(identity, |vmm| vmm.gone.clone()) else {
            return Ok(());
        };
        let woken = wait_uncancelled(&[(gone.fd(), PollFlags::POLLIN)], deadline)
            .map_err(|e| Error::io("kill a fake VMM", e))?;
        if woken == WaitResult::Ready {
            return Ok(());
        }
        Err(Error::new(
            Kind::Timeout,
            format!("kill the VMM: process {} is still running", identity.pid),
        ))
    }

    fn watch(&self, _dir: &Path, identity: &Identity, died: Died) -> Result<()> {
        let mut died = Some(crate::sched::bound(died));
        let end = self.with(identity, |vmm| {
            if vmm.end.is_none() {
                vmm.watchers.extend(died.take());
            }
            vmm.end.clone()
        });
        if let Some(died) = died {
            report(
                end.flatten().unwrap_or(End::Vmm(process::Exit::Unknown)),
                died,
            );
        }
        Ok(())
    }
}

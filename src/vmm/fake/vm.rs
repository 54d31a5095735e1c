//! Operations on a running guest of the fake.

use super::{End, Fake, GATE_DEADLINE, Keyboard, Stage, Vmm};
use crate::api::port::Port;
use crate::error::{Error, Kind, Result};
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use crate::vmm::{Identity, SaveTo, Vm, VmmSpec};
use nix::poll::PollFlags;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A running VM of the fake.
pub(super) struct FakeVm<'a> {
    pub fake: &'a Fake,
    pub identity: Identity,
}

fn gone(doing: &str) -> Error {
    Error::new(Kind::VmmFailed, format!("{doing}: its VMM has exited"))
}

impl FakeVm<'_> {
    fn with<T>(&self, doing: &str, f: impl FnOnce(&mut Vmm) -> T) -> Result<T> {
        self.fake.with(&self.identity, f).ok_or_else(|| gone(doing))
    }

    fn set_paused(&self, is_paused: bool) -> Result<()> {
        let _blocking = region(Rank::VmmApi);
        self.with("pause the guest", |vmm| vmm.is_paused = is_paused)
    }

    fn change(&self, doing: &str, cancel: &Cancel, change: impl FnOnce(&mut Vmm)) -> Result<()> {
        let fake = self.fake;
        let gate = fake.state.lock().change_gate.clone();
        let _blocking = region(Rank::VmmApi);
        if let Some(gate) = gate {
            fake.state.lock().changes_held += 1;
            fake.changed.notify_all();
            let woken = wait_any(
                &[(gate.fd(), PollFlags::POLLIN)],
                Instant::now() + GATE_DEADLINE,
                cancel,
            );
            fake.state.lock().changes_held -= 1;
            if woken.map_err(|e| Error::io("wait at the gate", e))? != WaitResult::Ready {
                return Err(cancelled(doing, cancel));
            }
        }
        let failure = {
            let failures = &mut fake.state.lock().change_failures;
            (!failures.is_empty()).then(|| failures.remove(0))
        };
        if let Some(message) = failure {
            return Err(Error::new(Kind::VmmFailed, format!("{doing}: {message}"))
                .hint("see the VM's vmm.log"));
        }
        self.with(doing, |vmm| vmm.end.is_none().then(|| change(vmm)))?
            .ok_or_else(|| gone(doing))
    }
}

impl Vm for FakeVm<'_> {
    fn pause(&self, _cancel: &Cancel) -> Result<()> {
        self.set_paused(true)
    }

    fn resume(&self, _cancel: &Cancel) -> Result<()> {
        self.set_paused(false)
    }

    fn save(&self, _spec: &VmmSpec, to: SaveTo<'_>, cancel: &Cancel) -> Result<String> {
        let doing = "save the guest";
        self.fake.pass_gate(Stage::Save, cancel)?;
        let _blocking = region(Rank::VmmApi);
        let saved = self
            .with(doing, |vmm| {
                (vmm.end.is_none() && vmm.is_paused).then(|| vmm.spec.vm.to_string())
            })?
            .ok_or_else(|| Error::new(Kind::VmmFailed, format!("{doing}: it is not paused")))?;
        let write = |path: &Path| {
            std::fs::OpenOptions::new()
                .write(true)
                .open(path)?
                .write_all(saved.as_bytes())
        };
        write(to.memory)
            .and_then(|()| write(to.devices))
            .map_err(|e| Error::io(doing, e))?;
        Ok("1.0".to_owned())
    }

    fn set_rates(&self, spec: &VmmSpec, cancel: &Cancel) -> Result<()> {
        self.change("limit the guest's devices", cancel, |vmm| {
            vmm.rates = spec.rates
        })
    }

    fn set_balloon(&self, keep_mib: u64, cancel: &Cancel) -> Result<()> {
        self.change("set the balloon", cancel, |vmm| vmm.keep_mib = keep_mib)
    }

    fn balloon_mib(&self, _cancel: &Cancel) -> Result<u64> {
        let _blocking = region(Rank::VmmApi);
        self.with("read the size of the balloon", |vmm| vmm.keep_mib)
    }

    fn forward(&self, add: &[Port], remove: &[Port], cancel: &Cancel) -> Result<()> {
        self.change("change the guest's ports", cancel, |vmm| {
            vmm.ports.retain(|port| !remove.contains(port));
            vmm.ports.extend(add);
        })
    }

    fn forwarded(&self, _cancel: &Cancel) -> Result<Vec<Port>> {
        let _blocking = region(Rank::VmmApi);
        self.with("list the guest's ports", |vmm| vmm.ports.clone())
    }

    fn metrics(&self, _cancel: &Cancel) -> Result<Vec<serde_json::Value>> {
        let _blocking = region(Rank::VmmApi);
        self.with("read the VMM's metrics", |vmm| {
            vec![serde_json::json!({ "keep_mib": vmm.keep_mib })]
        })
    }

    fn connect(&self, port: u32, _cancel: &Cancel) -> Result<UnixStream> {
        let doing = "connect to the guest's vsock";
        let _blocking = region(Rank::VmmApi);
        let vm = self
            .with(doing, |vmm| vmm.end.is_none().then(|| vmm.spec.vm.clone()))?
            .ok_or_else(|| gone(doing))?;
        let refused = || {
            Error::new(
                Kind::GuestUnavailable,
                format!("nothing in the guest listens on vsock port {port}"),
            )
        };
        let listening = self
            .fake
            .state
            .lock()
            .vsock
            .get(&(vm, port))
            .cloned()
            .ok_or_else(refused)?;
        let (ours, guests) = UnixStream::pair().map_err(|e| Error::io(doing, e))?;
        listening.send(guests).map_err(|_| refused())?;
        Ok(ours)
    }

    fn press_ctrl_alt_del(&self, _cancel: &Cancel) -> Result<()> {
        let _blocking = region(Rank::VmmApi);
        let keyboard = {
            let mut state = self.fake.state.lock();
            state.presses += 1;
            state.keyboard
        };
        if keyboard == Some(Keyboard::Heard) {
            self.fake
                .end(|vmm| vmm.identity == self.identity, &End::GuestShutDown);
        }
        Ok(())
    }
}

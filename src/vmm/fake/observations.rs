//! Returns to tests what the fake VMMs have done.

use super::Fake;
use crate::api::port::Port;
use crate::api::vm::RateLimits;
use crate::ids::VmId;
use crate::vmm::VmmSpec;

impl Fake {
    /// True if the guest of this VM is paused.
    pub fn is_paused(&self, vm: &VmId) -> bool {
        self.state
            .lock()
            .vmms
            .iter()
            .any(|v| v.spec.vm == *vm && v.end.is_none() && v.is_paused)
    }

    /// Returns the guest's rates and the memory in MiB that it has to keep, or `None` if no VMM is
    /// alive.
    pub fn adjusted(&self, vm: &VmId) -> Option<(RateLimits, u64)> {
        let state = self.state.lock();
        state
            .vmms
            .iter()
            .find(|v| v.spec.vm == *vm && v.end.is_none())
            .map(|v| (v.rates, v.keep_mib))
    }

    /// Returns the ports that the VM's VMM forwards, or `None` if no VMM is alive.
    pub fn ports(&self, vm: &VmId) -> Option<Vec<Port>> {
        let state = self.state.lock();
        let mut live = state.vmms.iter().filter(|v| v.end.is_none());
        live.find(|v| v.spec.vm == *vm).map(|v| v.ports.clone())
    }

    /// Returns the tags of the live VMMs.
    pub fn live(&self) -> Vec<String> {
        self.state
            .lock()
            .vmms
            .iter()
            .filter(|vmm| vmm.end.is_none())
            .map(|vmm| vmm.spec.tag.to_string())
            .collect()
    }

    /// Returns the spec of the VM's last start, or `None` if the VM has never started.
    pub fn last_spec(&self, vm: &VmId) -> Option<VmmSpec> {
        self.state
            .lock()
            .vmms
            .iter()
            .rev()
            .find(|vmm| &vmm.spec.vm == vm)
            .map(|vmm| vmm.spec.clone())
    }

    /// Returns how often Ctrl-Alt-Del was pressed on guests with a keyboard.
    pub fn presses(&self) -> u64 {
        self.state.lock().presses
    }

    /// Returns the number of spawned processes.
    pub fn starts(&self) -> u64 {
        self.state.lock().starts
    }

    /// Returns how often `checks` was called.
    pub fn checks_run(&self) -> u64 {
        self.state.lock().checks
    }

    /// Returns how many live VMMs `kill` was called for.
    pub fn kills(&self) -> u64 {
        self.state.lock().kills
    }

    /// Returns how often all processes of the host were listed or searched.
    pub fn scans(&self) -> u64 {
        let state = self.state.lock();
        state.lists + state.finds
    }

    /// Returns the VMs whose VMMs were adopted, in order of adoption.
    pub fn adoptions(&self) -> Vec<VmId> {
        self.state.lock().adoptions.clone()
    }

    /// Returns how many starts used a disk of another live VMM. Each of them is a bug of the
    /// caller.
    pub fn clashes(&self) -> u64 {
        self.state.lock().clashes
    }
}

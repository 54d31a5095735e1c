//! The controls of the fake for tests: they hold operations at a stage, make operations fail, and
//! set the addresses at which guests are reached.

use super::{Fake, Keyboard, Stage};
use crate::ids::VmId;
use crate::locks::{Cancel, CancelCause};
use crate::sched::Instant;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

impl Fake {
    /// Holds later operations at this stage until [`Fake::release_starts`].
    pub fn hold_starts(&self, stage: Stage) {
        let gate = Cancel::try_new().expect("create an eventfd");
        self.state.lock().gate = Some((stage, gate));
    }

    pub fn release_starts(&self) {
        let gate = self.state.lock().gate.take();
        if let Some((_, gate)) = gate {
            gate.cancel(CancelCause::Finished);
        }
    }

    /// Waits until this many operations are held. Returns false at the deadline.
    pub fn await_held(&self, starts: usize, deadline: Instant) -> bool {
        self.changed
            .wait_while(&mut self.state.lock(), deadline, |s| s.waiting < starts)
    }

    /// Holds later changes of rates, balloons and ports until [`Fake::release_changes`].
    pub fn hold_changes(&self) {
        self.state.lock().change_gate = Some(Cancel::try_new().expect("create an eventfd"));
    }

    pub fn release_changes(&self) {
        let gate = self.state.lock().change_gate.take();
        if let Some(gate) = gate {
            gate.cancel(CancelCause::Finished);
        }
    }

    /// Waits until this many changes are held. Returns false at the deadline.
    pub fn await_held_changes(&self, changes: usize, deadline: Instant) -> bool {
        self.changed
            .wait_while(&mut self.state.lock(), deadline, |s| {
                s.changes_held < changes
            })
    }

    /// Makes the next start fail with this message after the VMM is spawned. Several calls make
    /// several starts fail.
    pub fn fail_next_start(&self, message: &str) {
        self.state.lock().failures.push(message.to_owned());
    }

    /// Makes the next adoption fail with this message, as if the VMM did not respond in time.
    pub fn fail_next_adopt(&self, message: &str) {
        self.state.lock().adopt_failures.push(message.to_owned());
    }

    /// Makes the next change of rates, balloon or ports fail with this message.
    pub fn fail_next_change(&self, message: &str) {
        self.state.lock().change_failures.push(message.to_owned());
    }

    /// Makes `kill` time out, as for a process in uninterruptible sleep, or work again.
    pub fn set_unkillable(&self, is_unkillable: bool) {
        self.state.lock().is_unkillable = is_unkillable;
    }

    /// Sets how all guests react to the keyboard.
    pub fn set_keyboard(&self, keyboard: Keyboard) {
        self.state.lock().keyboard = Some(keyboard);
        self.has_keyboard.store(true, Ordering::SeqCst);
    }

    /// Makes the guest listen on a vsock port. The receiver gets the guest's end of each
    /// connection.
    pub fn listen(&self, vm: &VmId, port: u32) -> Receiver<UnixStream> {
        let (sender, receiver) = channel();
        self.state.lock().vsock.insert((vm.clone(), port), sender);
        receiver
    }

    /// Sets the SSH address of the guests of later starts. The default is 127.0.0.1:9.
    pub fn set_ssh_addr(&self, addr: SocketAddr) {
        self.state.lock().ssh_addr = Some(addr);
    }

    /// Sets the SSH address of one VM's guest.
    pub fn set_ssh_addr_of(&self, vm: &VmId, addr: SocketAddr) {
        self.state.lock().ssh_addrs.insert(vm.clone(), addr);
    }
}

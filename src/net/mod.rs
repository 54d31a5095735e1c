//! The network of VMs when the daemon is root: one bridge, a tap for each VM, rules in nftables tables of our own, and a
//! name server on the bridge's address.
//!
//! ```text
//! guest ── tap (its VMM's uid; isolated port) ── bridge fcbr0, first address of the subnet ── masquerade ── outside
//!          │ table bridge fcd_<install>: only the      │ table inet fcd_<install>: nothing of the host's but names and
//!          │ lease's MAC and address, IPv4 and ARP     │ echo, nothing link-local, no other guest; `none`: no forwarding
//! ```
//!
//! All that is ours on the host is found again by name: the bridge has the alias `fc-<install>`, a tap that waits
//! `fc-<install>-tap`, a VM's tap the VM's own tag, and both tables the installation's id. What carries another name is
//! never touched. Every function is idempotent.

mod checks;
pub mod dns;
mod lease;
mod links;
mod rules;
mod taps;
#[cfg(test)]
mod tests;
mod tun;

pub use checks::checks;
pub use lease::{Access, Guest, Lease, Mac};

use crate::config::Network as Config;
use crate::error::Result;
use crate::host::Commands;
use crate::locks::Cancel;
use std::sync::Arc;

/// A VM's tap, attached to the bridge and owned by its VMM's uid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Of the interface: `fc<install>-<number>`. Not used again by this daemon.
    pub name: String,
}

/// The bridge, its taps and rules.
pub struct Net {}

impl Net {
    /// Makes what is missing of the bridge and the rules, switches IPv4 forwarding on if it is off (and says so in the log),
    /// removes taps that an earlier daemon had made ahead, and begins to make new ones. Taps and rules of VMs that
    /// run are left as they are.
    ///
    /// # Errors
    /// `conflict` when an interface with the bridge's name is not ours; `command_missing`, `command_failed`, `host`.
    pub fn open(config: &Config, install: &str, commands: Arc<dyn Commands>, cancel: &Cancel) -> Result<Self> {
        let _ = (config, install, commands, cancel);
        todo!()
    }

    /// What the VM with this slot has: pure.
    ///
    /// # Errors
    /// `exhausted` when the subnet has no address for it.
    pub fn lease(&self, slot: u32) -> Result<Lease> {
        let _ = slot;
        todo!()
    }

    /// Gives a VM its tap: one made ahead, else a new one. First it gets the VM's tag as alias (from then on [`Net::list`]
    /// and [`Net::release`] know it), then owner and rules, and last it joins the bridge. Some ten milliseconds.
    /// A tap that carries the tag already is replaced. After an error nothing of it is left, or `release` finds it.
    ///
    /// Blocks on host commands: no lock may be held.
    pub fn take(&self, guest: &Guest, uid: u32, cancel: &Cancel) -> Result<Tap> {
        let _ = (guest, uid, cancel);
        todo!()
    }

    /// Removes the tap with this tag and its rules; gone already is ok. The VMM must have exited. Ignores cancellation.
    pub fn release(&self, tag: &str) -> Result<()> {
        let _ = tag;
        todo!()
    }

    /// The tags of all taps on the host that are a VM's (those made ahead are not).
    pub fn list(&self) -> Result<Vec<String>> {
        todo!()
    }

    /// Makes the bridge, and the rules of exactly these guests, what they should be, in one transaction: for the daemon's start
    /// once it has adopted what runs, and for the sweep every minute, as others flush rules. Says what it had to mend.
    /// A guest whose tap is missing is left out. Not while a [`Net::take`] is under way for a guest that is not in the list.
    pub fn restore(&self, guests: &[Guest]) -> Result<Vec<String>> {
        let _ = guests;
        todo!()
    }

    /// Starts the name server on the bridge's address, and tells systemd-resolved, where it runs, to ask it for `.vm`.
    pub fn serve_names(&self, names: Arc<dyn dns::Names>) -> Result<dns::Server> {
        let _ = names;
        todo!()
    }

    /// Removes the taps made ahead and waits for those that are being made. Bridge, rules and taps of VMs stay.
    pub fn close(&self) {
        todo!()
    }

    /// Removes all that is ours, the taps of VMs, too: for an uninstall.
    pub fn remove_all(&self) -> Result<()> {
        todo!()
    }
}

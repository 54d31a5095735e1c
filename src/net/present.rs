//! Reads what the host has of the guests' sets, and turns IPv6 forwarding on.

use super::ipv6::{self, Forwarding};
use super::sets::{self, Element, GUESTS, GUESTS_IPV6, NAT, NAT_IPV6};
use super::{Access, Guest, Net};
use crate::error::Result;
use crate::locks::Cancel;
use std::net::IpAddr;

/// The elements of the sets on the host.
pub(super) struct Present {
    pub nat: Vec<IpAddr>,
    pub elements: Vec<Element>,
    /// False if something has deleted a set.
    pub has_all_sets: bool,
}

impl Present {
    /// True if the guest has all of its elements.
    pub(super) fn has(&self, tap: &str, guest: &Guest) -> bool {
        let mut elements = Element::all_of(tap, guest).into_iter();
        let mut addresses = guest.lease.addresses();
        elements.all(|e| self.elements.contains(&e))
            && (guest.access == Access::None || addresses.all(|a| self.nat.contains(&a)))
    }
}

impl Net {
    /// Reads the addresses that may reach the outside, and after that the elements of taps.
    pub(super) fn present(&self) -> Result<Present> {
        let (mut nat, mut elements, mut has_all_sets) = (Vec::new(), Vec::new(), true);
        let is_wanted = |set: &&str| self.ipv6.is_some() || !matches!(*set, NAT_IPV6 | GUESTS_IPV6);
        for set in [NAT, NAT_IPV6].into_iter().filter(is_wanted) {
            match self.tools.nft_list(&self.sets.list_nat(set))? {
                Some(json) => nat.extend(sets::parse_nat(&json)?),
                None => has_all_sets = false,
            }
        }
        for set in [GUESTS, GUESTS_IPV6].into_iter().filter(is_wanted) {
            match self.tools.nft_list(&self.sets.list_guests(set))? {
                Some(json) => elements.extend(sets::parse_guests(&json)?),
                None => has_all_sets = false,
            }
        }
        Ok(Present {
            nat,
            elements,
            has_all_sets,
        })
    }

    /// Turns IPv6 forwarding on if guests have IPv6 and the host has a route for them. Returns the
    /// state before, or None if guests have no IPv6. A failure is only logged, because guests can
    /// still use IPv4.
    pub(super) fn ensure_ipv6_forwarding(&self, cancel: &Cancel) -> Option<Forwarding> {
        self.ipv6?;
        ipv6::ensure_forwarding(&self.tools, cancel)
            .inspect_err(|e| log::warn!("network: {e}"))
            .ok()
    }
}

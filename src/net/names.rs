//! The names of this installation's bridge, taps and tables. A restarted daemon finds them by name.

use super::Mac;
use crate::error::{Error, Result};
use crate::ids::Tag;

/// The number of hexadecimal digits of an installation's id. `fc`, the id, `-` and a four-digit
/// number must fit into an interface name.
const INSTALL_LEN: usize = 8;

#[derive(Clone, Debug)]
pub(super) struct Names {
    install: String,
}

impl Names {
    pub(super) fn of(install: &str) -> Result<Self> {
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if install.len() != INSTALL_LEN || !install.bytes().all(is_hex) {
            return Err(Error::internal(format!(
                "name the network's parts: {install:?} is not an installation's id"
            )));
        }
        Ok(Self {
            install: install.to_owned(),
        })
    }

    /// Returns the installation's id as a number.
    pub(super) fn number(&self) -> u32 {
        u32::from_str_radix(&self.install, 16).unwrap_or_default()
    }

    /// Returns the bridge's alias.
    pub(super) fn bridge(&self) -> String {
        format!("fc-{}", self.install)
    }

    /// Returns the bridge's MAC address. The bridge is created with this address, while its alias
    /// can only be set afterwards.
    pub(super) fn bridge_mac(&self) -> Mac {
        let [a, b, c, d] = self.number().to_be_bytes();
        Mac([0x06, 0xfc, a, b, c, d])
    }

    /// Returns the alias of a spare tap.
    pub(super) fn spare(&self) -> String {
        format!("{}tap", Tag::prefix(&self.install))
    }

    /// True if an alias is the tag of a VM of this installation.
    pub(super) fn is_tag(&self, alias: &str) -> bool {
        let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let rest = alias.strip_prefix(&Tag::prefix(&self.install));
        rest.is_some_and(|rest| !rest.is_empty() && rest != "tap" && rest.bytes().all(is_plain))
    }

    /// Returns the prefix of the names of this installation's taps.
    pub(super) fn tap_prefix(&self) -> String {
        format!("fc{}-", self.install)
    }

    pub(super) fn tap(&self, number: u32) -> String {
        format!("{}{number}", self.tap_prefix())
    }

    /// Returns the number in the name of one of this installation's taps, or None for any other
    /// name.
    pub(super) fn tap_number(&self, name: &str) -> Option<u32> {
        name.strip_prefix(&self.tap_prefix())?.parse().ok()
    }

    /// Returns the name of this installation's table, which is the same in both families.
    pub(super) fn table(&self) -> String {
        format!("fcd_{}", self.install)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::INTERFACE_NAME_LEN_MAX;

    #[test]
    fn names_contain_installation_id() {
        let names = Names::of("1a2b3c4d").unwrap();
        assert_eq!(
            (names.bridge().as_str(), names.spare().as_str()),
            ("fc-1a2b3c4d", "fc-1a2b3c4d-tap")
        );
        assert_eq!(names.bridge_mac().to_string(), "06:fc:1a:2b:3c:4d");
        assert_eq!(names.tap(9999).len(), INTERFACE_NAME_LEN_MAX);
        assert_eq!(names.tap_number(&names.tap(17)), Some(17));
        assert_eq!(names.tap_number("fc1a2b3c4e-17"), None);
        assert!(names.is_tag("fc-1a2b3c4d-0123456789ab-1"));
        for other in [
            "fc-1a2b3c4d",
            "fc-1a2b3c4d-",
            "fc-1a2b3c4d-tap",
            "fc-1a2b3c4e-x-1",
            "",
            "fc-1a2b3c4d-a b",
            "fc-1a2b3c4d-a\n",
        ] {
            assert!(!names.is_tag(other), "{other}");
        }
    }

    #[test]
    fn malformed_installation_id_is_rejected() {
        for bad in [
            "",
            "1a2b3c4",
            "1a2b3c4d5",
            "1A2B3C4D",
            "../../..",
            "1a2b3c4\"",
        ] {
            assert!(Names::of(bad).is_err(), "{bad}");
        }
    }
}

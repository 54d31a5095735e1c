//! Finds the address and the keys for reaching a guest over SSH.

use super::core::Core;
use super::guest_scripts::Layout;
use super::spec::Specs;
use super::vm_dir::KEY_FILE;
use crate::error::{Error, Kind, Result};
use crate::guest::Target;
use crate::store::VmRow;

/// Makes targets for the guest transport.
#[derive(Clone)]
pub(super) struct Guests {
    pub(super) core: Core,
    pub(super) specs: Specs,
}

impl Guests {
    /// Returns the address of a running guest, and the keys for both sides. Fails if the guest has
    /// no address.
    pub(super) fn target(&self, row: &VmRow) -> Result<Target> {
        match row.ssh_addr {
            Some(addr) => self.target_at(row, addr),
            None => Err(Error::new(
                Kind::GuestUnavailable,
                format!("VM {} has no address", row.name),
            )),
        }
    }

    /// Like [`Self::target`], for the daemon's own scripts. They use programs that fcd has put into
    /// the guest, never those of an image without fcd's init.
    pub(super) fn script_target(&self, row: &VmRow) -> Result<Target> {
        Ok(for_scripts(self.target(row)?, row))
    }

    /// Like [`Self::script_target`], for a guest whose address is not in the row yet.
    pub(super) fn script_target_at(
        &self,
        row: &VmRow,
        addr: std::net::SocketAddr,
    ) -> Result<Target> {
        Ok(for_scripts(self.target_at(row, addr)?, row))
    }

    /// Like [`Self::target`], for a guest whose address is not in the row yet.
    pub(super) fn target_at(&self, row: &VmRow, addr: std::net::SocketAddr) -> Result<Target> {
        let Some(host_key) = row.host_key.clone() else {
            return Err(Error::internal(format!("VM {} has no host key", row.name)));
        };
        let private_key = self.private_key(row)?;
        Ok(Target {
            addr,
            user: "root".to_owned(),
            private_key,
            host_key,
            owner: self.specs.credentials(row),
        })
    }

    fn private_key(&self, row: &VmRow) -> Result<String> {
        crate::locks::may_block("file access");
        let path = self.core.vm_dir(&row.id).join(KEY_FILE);
        std::fs::read_to_string(&path)
            .map_err(|e| Error::io(format!("read the key of VM {}", row.name), e))
    }
}

fn for_scripts(target: Target, row: &VmRow) -> Target {
    Target {
        user: Layout::of(row).script_user().to_owned(),
        ..target
    }
}

//! A stream to what listens on a vsock port in a guest. The daemon opens it and gives it away: its
//! bytes pass by no thread of the daemon's, and it lives as long as the VMM and the caller do.

use super::access::Caller;
use super::runtime::Use;
use super::sessions::Sessions;
use crate::api::vm::{Vm, VmConnectRequest};
use crate::error::{Error, Result};
use crate::locks::Cancel;
use std::os::unix::net::UnixStream;

impl Sessions {
    /// # Errors
    /// `guest_unavailable` when nothing listens there, `timeout` when the guest does not answer,
    /// `unsupported` where it has no vsock.
    pub fn connect(&self, caller: &Caller, request: &VmConnectRequest) -> Result<(Vm, UnixStream)> {
        if request.port == u32::MAX {
            return Err(Error::invalid(format!("vsock port {} is none: it stands for any (vsock(7))", request.port))
                .hint("give the port on which something listens in the guest"));
        }
        let found = self.core.resolve(caller, &request.vm)?;
        // The end of the guest ends the wait for it.
        let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let (row, _user) = self.join_guest(&found, Use::Session, &cancel)?;
        let doing = |e: Error| e.context(format!("connect to vm {}", row.name)).of_vm(&row.name);
        let identity = row.identity.as_ref().ok_or_else(|| doing(Error::internal("it runs without a vmm")))?;
        let stream = self.vmm.connect(identity, request.port, &cancel).map_err(doing)?;
        Ok((self.views.view(&row.id)?, stream))
    }
}

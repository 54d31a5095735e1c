//! Connects a caller to a vsock port in a guest. The daemon opens the stream and passes it to the
//! caller. The bytes do not pass through the daemon, and the stream lasts until the VMM or the
//! caller closes it.

use super::access::Caller;
use super::runtime::Use;
use super::sessions::Sessions;
use crate::api::vm::{Vm, VmConnectRequest};
use crate::error::{Error, Result};
use crate::locks::Cancel;
use std::os::unix::net::UnixStream;

impl Sessions {
    /// Connects to a port, and returns the VM and the connected stream.
    ///
    /// # Errors
    /// `invalid_argument` for the port that means any port, `guest_unavailable` if nothing listens
    /// on the port, `timeout` if the guest does not respond, `unsupported` if the guest has no
    /// vsock.
    pub fn connect(&self, caller: &Caller, request: &VmConnectRequest) -> Result<(Vm, UnixStream)> {
        if request.port == u32::MAX {
            return Err(Error::invalid(format!(
                "vsock port {} means any port and cannot be connected to (vsock(7))",
                request.port
            ))
            .hint("use the port that a program in the guest listens on"));
        }
        let found = self.core.resolve(caller, &request.vm)?;
        // A stop cancels the wait.
        let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let (row, _user) = self.join_guest(&found, Use::Session, &cancel)?;
        let doing = |e: Error| {
            e.context(format!("connect to VM {}", row.name))
                .of_vm(&row.name)
        };
        let identity = row
            .identity
            .as_ref()
            .ok_or_else(|| doing(Error::internal("it is running without a VMM")))?;
        let stream = self
            .vmms
            .vm(&row, identity)
            .and_then(|vm| vm.connect(request.port, &cancel))
            .map_err(doing)?;
        Ok((self.views.view(&row.id)?, stream))
    }
}

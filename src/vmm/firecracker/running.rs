//! Reaches the API of a VMM whose guest has started.

use super::API_SOCKET;
use super::api::Booted;
use crate::error::{Error, Kind, Result};
use crate::host::process::Process;
use crate::vmm::dial::{self, Deadline};
use rustix::fs::{Mode, OFlags};
use std::os::fd::OwnedFd;

/// Returns the error for a VMM that has exited.
pub(super) fn gone(doing: &str) -> Error {
    Error::new(Kind::VmmFailed, format!("{doing}: the VMM has exited"))
}

/// Opens the working directory of a running VMM, which contains its socket and its console, with or
/// without a jail.
pub(super) fn place(process: &Process, doing: &str) -> Result<OwnedFd> {
    crate::locks::may_block("file access");
    let path = format!("/proc/{}/cwd", process.identity().pid);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let place = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|e| Error::io(doing, std::io::Error::from(e)))?;
    // If the process is still alive, its pid was not reused, so the path was its own.
    if process.is_alive() {
        Ok(place)
    } else {
        Err(gone(doing))
    }
}

/// Opens the API of a VMM whose guest has started.
pub(super) fn booted<'a>(
    process: &Process,
    deadline: Deadline<'a>,
    doing: &str,
) -> Result<Booted<'a>> {
    let place = place(process, doing)?;
    let socket =
        dial::connect(&place, API_SOCKET, process, deadline)?.ok_or_else(|| gone(doing))?;
    Booted::open(socket, deadline)
        .map(|(vmm, _)| vmm)
        .map_err(|e| e.context(doing))
}

//! The real transport. Each connection to a guest is a helper process of its own, which speaks SSH and runs one command, so no
//! byte that a guest's SSH server sends is parsed in the daemon.
//!
//! ```text
//! daemon: connect, deadlines, cancel, hang-up      helper (VM's uid, confined)           guest
//!   SshTransport ── session::Session ── channel ── serve ── ssh: libssh2 ── the socket ── sshd
//!      └ sources and sinks: a pipe each, or the caller's own descriptor ──┘
//! ```
//!
//! - [`session`] is the daemon's side: it starts the helper, passes the connected socket and the streams, moves the bytes of
//!   streams that are not plain pipes, and alone decides when a session ends. It believes nothing: a reply that is not what the
//!   protocol allows, and a helper that dies, are `guest_lost` for this session.
//! - [`serve`] is the helper's side. The key that it logs in with is the VM's own, so a guest that takes its helper over gets a
//!   key to itself and the streams of the command that it runs anyway.
//! - [`protocol`] is what passes between the two.

#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod protocol;
mod pumps;
pub mod serve;
mod session;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub mod tests_hostile;

use super::connect;
use super::wait::Wait;
use super::{ExecSpec, Streams, Target, Transport};
use crate::api::exec::Exit;
use crate::error::Result;
use crate::locks::{Cancel, Rank, region};
use session::Session;
use std::time::Instant;

/// What [`crate::host::confine::spawn`] knows this helper by.
pub const NAME: &str = "guest";

#[derive(Clone, Copy, Debug, Default)]
pub struct SshTransport;

impl Transport for SshTransport {
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()> {
        let _blocking = region(Rank::GuestIo);
        let wait = Wait::new(cancel).deadline(Some(deadline));
        connect::wait_ready(target, &wait, &mut |socket| Session::log_in(target, socket, &wait))
    }

    fn exec(&self, target: &Target, spec: &ExecSpec, streams: Streams<'_>, cancel: &Cancel) -> Result<Exit> {
        let _blocking = region(Rank::GuestIo);
        let wait = Wait::new(cancel).deadline(spec.deadline).hangup(streams.hangup);
        wait.check()?;
        Session::start(target, spec, streams, wait)?.run()
    }
}

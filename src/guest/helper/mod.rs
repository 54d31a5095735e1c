//! Implements the real transport. Each connection to a guest has its own helper process, which
//! speaks SSH and runs one command. Therefore the daemon never parses a byte that a guest's SSH
//! server sends.
//!
//! ```text
//! daemon: connect, deadlines, cancel, hang-up      helper (VM's uid, confined)           guest
//!   SshTransport ── session::Session ── channel ── serve ── ssh: libssh2 ── the socket ── sshd
//!      └ sources and sinks: a pipe each, or the caller's own descriptor ──┘
//! ```
//!
//! - [`session`] is the daemon's side. It starts the helper, passes it the connected socket and
//!   the streams, and moves the bytes of streams that are not plain pipes. It alone decides when a
//!   session ends, and it does not trust the helper: if a reply violates the protocol or the helper
//!   dies, this session fails with `guest_lost`.
//! - [`serve`] is the helper's side. It logs in with the VM's own key. A guest that takes over its
//!   helper gets only that key and the streams of the command that it runs anyway.
//! - [`protocol`] defines the messages between the two.

#[cfg(feature = "fuzz")]
pub mod fuzz;
mod orders;
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
use crate::sched::Instant;
use session::Session;

/// The name under which [`crate::host::confine::spawn`] starts this helper.
pub const NAME: &str = "guest";

#[derive(Clone, Copy, Debug, Default)]
pub struct SshTransport;

impl Transport for SshTransport {
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()> {
        let _blocking = region(Rank::GuestIo);
        let wait = Wait::new(cancel).deadline(Some(deadline));
        connect::wait_ready(target, &wait, &mut |socket| {
            Session::log_in(target, socket, &wait)
        })
    }

    fn exec(
        &self,
        target: &Target,
        spec: &ExecSpec,
        streams: Streams<'_>,
        cancel: &Cancel,
    ) -> Result<Exit> {
        let _blocking = region(Rank::GuestIo);
        let wait = Wait::new(cancel)
            .deadline(spec.deadline)
            .hangup(streams.hangup);
        wait.check()?;
        Session::start(target, spec, streams, wait)?.run()
    }
}

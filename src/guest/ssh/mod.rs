//! The real transport: libssh2, one session, one connection and one thread per command, every wait in one poll.

mod channel;
mod dial;
mod flow;
mod pump;
mod signal;
mod wire;

#[cfg(test)]
pub mod test_sshd;
#[cfg(test)]
mod tests;

use super::{ExecSpec, Streams, Target, Transport, wait::Wait};
use crate::api::exec::Exit;
use crate::error::Result;
use crate::locks::{Cancel, Rank, region};
use std::time::Instant;

#[derive(Clone, Copy, Debug, Default)]
pub struct SshTransport;

impl Transport for SshTransport {
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()> {
        let _blocking = region(Rank::GuestIo);
        dial::wait_ready(target, deadline, cancel)
    }

    fn exec(&self, target: &Target, spec: &ExecSpec, streams: Streams<'_>, cancel: &Cancel) -> Result<Exit> {
        let _blocking = region(Rank::GuestIo);
        let wait = Wait::new(cancel).deadline(spec.deadline).hangup(streams.hangup);
        wait.check()?;
        let shared = dial::dial(target, &wait)?;
        let channel = pump::start(&shared, target, spec, &wait)?;
        pump::Pump::new(shared, channel, spec, streams, wait.idle(spec.idle)).run()
    }
}

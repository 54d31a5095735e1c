//! Does the helper's work in the caller's process, so that `scripts/bench helper` can compare it
//! with the real helper. This transport must never talk to a guest.

use super::{Identity, LogInError, Pump, log_in, start};
use crate::api::exec::Exit;
use crate::error::{Error, Kind, Result};
use crate::guest::wait::Wait;
use crate::guest::{ExecSpec, Streams, Target, Transport, connect};
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;

pub struct InProcess;

impl Transport for InProcess {
    fn wait_ready(&self, _: &Target, _: Instant, _: &Cancel) -> Result<()> {
        Err(Error::new(
            Kind::Unsupported,
            "this transport only runs commands",
        ))
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
        let socket = connect::connect(target, &wait)?;
        let who = Identity {
            user: &target.user,
            private_key: &target.private_key,
            host_key: &target.host_key,
        };
        let failed = |e: LogInError| Error::new(Kind::GuestUnavailable, format!("{e:?}"));
        let shared = log_in(socket, &who, &wait).map_err(failed)?;
        let channel =
            start(&shared, spec.pty.as_ref(), spec.command.as_bytes(), &wait).map_err(failed)?;
        Pump::new(shared, channel, spec.pty.is_some(), streams, wait)
            .no_wait_children(spec.no_wait_children)
            .run()
    }
}

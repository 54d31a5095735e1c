//! Small commands of our own in a guest.

use super::io::{BytesSource, VecSink};
use super::{ExecSpec, Streams, Target, Transport};
use crate::api::exec::Exit;
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::time::Instant;

/// What a small command is and may cost.
pub struct Script<'a> {
    /// A command line for the guest's shell.
    pub command: &'a str,
    pub stdin: &'a [u8],
    pub deadline: Instant,
    /// Most bytes of stdout, and of stderr.
    pub output_bytes_max: usize,
}

/// Runs it to its end and gives its exit, its stdout and its stderr. More on stdout than allowed is
/// `guest_command_failed`, since a cut answer would mislead; stderr is cut. Else as [`Transport::exec`].
pub fn run_script(
    transport: &dyn Transport,
    target: &Target,
    script: &Script<'_>,
    cancel: &Cancel,
) -> Result<(Exit, Vec<u8>, Vec<u8>)> {
    let mut stdin = BytesSource::new(script.stdin);
    let mut stdout = VecSink::new(script.output_bytes_max);
    let mut stderr = VecSink::new(script.output_bytes_max);
    let spec = ExecSpec { command: script.command.to_owned(), deadline: Some(script.deadline), ..ExecSpec::default() };
    let streams = Streams { stdin: Some(&mut stdin), stdout: Some(&mut stdout), stderr: Some(&mut stderr), ..Streams::default() };
    let exit = transport.exec(target, &spec, streams, cancel)?;
    if stdout.truncated {
        let message = format!("a command in the guest printed more than {} bytes", script.output_bytes_max);
        return Err(Error::new(Kind::GuestCommandFailed, message));
    }
    Ok((exit, stdout.bytes, stderr.bytes))
}

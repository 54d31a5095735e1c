//! Runs fcd's own small commands in a guest.

use super::io::{BytesSource, VecSink};
use super::{ExecSpec, Sink, Streams, Target, Transport};
use crate::api::exec::Exit;
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use crate::sched::Instant;
use std::io;
use std::os::fd::BorrowedFd;

/// A small command and its limits.
pub struct Script<'a> {
    /// A command line for the guest's shell.
    pub command: &'a str,
    pub stdin: &'a [u8],
    pub deadline: Instant,
    /// Maximum size of stdout, and of stderr.
    pub output_bytes_max: usize,
}

/// The exit of a command, and its output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptOutput {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// A sink that fails at the first byte above its limit, so that a guest cannot keep the daemon
/// reading.
struct StrictSink(VecSink);

impl Sink for StrictSink {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes);
        if self.0.truncated {
            return Err(io::Error::other("the output is too long"));
        }
        written
    }
}

/// Runs the command to its end. Ends it and returns `guest_command_failed` if stdout exceeds its
/// limit, because a truncated answer would mislead. Truncates stderr at its limit. Other errors are
/// those of [`Transport::exec`].
pub fn run_script(
    transport: &dyn Transport,
    target: &Target,
    script: &Script<'_>,
    cancel: &Cancel,
) -> Result<ScriptOutput> {
    let mut stdin = BytesSource::new(script.stdin);
    let mut stdout = StrictSink(VecSink::new(script.output_bytes_max));
    let mut stderr = VecSink::new(script.output_bytes_max);
    let spec = ExecSpec {
        command: script.command.to_owned(),
        deadline: Some(script.deadline),
        ..ExecSpec::default()
    };
    let streams = Streams {
        stdin: Some(&mut stdin),
        stdout: Some(&mut stdout),
        stderr: Some(&mut stderr),
        ..Streams::default()
    };
    let exit = transport.exec(target, &spec, streams, cancel);
    let StrictSink(stdout) = stdout;
    if stdout.truncated {
        let message = format!(
            "a command in the guest printed more than {} bytes",
            script.output_bytes_max
        );
        return Err(Error::new(Kind::GuestCommandFailed, message));
    }
    Ok(ScriptOutput {
        exit: exit?,
        stdout: stdout.bytes,
        stderr: stderr.bytes,
    })
}

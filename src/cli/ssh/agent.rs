//! Forwards the caller's ssh-agent to a guest, on request only: root in the guest can use the
//! agent's keys as long as it is forwarded.
//!
//! libssh2 has no callback for the agent channel, so the system's ssh forwards a socket of the
//! guest to the agent's (`ssh -R`). The socket is below a directory that only root can write and
//! list, under a random name, because every user of the guest may connect to it.

use super::block;
use super::keys::{KeyFiles, write_private};
use crate::api::vm::{SshConfigRequest, VmSshConfig};
use crate::cli::context::Env;
use crate::client::{Client, Failure, Result};
use crate::error::{Error, Kind};
use crate::host::command::{Command, run_any_status};
use crate::host::text::printable;
use crate::host::{hex, random, thread};
use crate::locks::{Cancel, CancelCause};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The variable that names the agent's socket, on the host and in the guest.
pub(in crate::cli) const VARIABLE: &str = "SSH_AUTH_SOCK";
/// The directory of the sockets. `/dev` is writable in every guest, is gone after a shutdown, and
/// is the same for sshd and for the image's programs.
const DIR: &str = "/dev/.fcd-agents";
const NAME_BYTES: usize = 16;
/// How long the guest may take to make the socket.
const READY_DEADLINE: Duration = Duration::from_secs(60);
const READY_POLL: Duration = Duration::from_millis(50);
/// The deadline of the session. It is longer than any command.
const SESSION_DEADLINE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const READY: &str = "ready";
/// The programs of the guest runtime come first, because an image may have none.
const PATH: &str = "PATH=/.fcd/bin:$PATH";

/// A forwarded agent. It ends when this is dropped.
pub(in crate::cli) struct Agent {
    socket: String,
    ended: Cancel,
    relay: Option<JoinHandle<()>>,
    /// The files that ssh reads.
    _dir: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.ended.cancel(CancelCause::Finished);
        if let Some(relay) = self.relay.take() {
            // A panic of the thread has already been reported.
            let _ = relay.join();
        }
    }
}

/// Returns the socket of the caller's agent.
pub(in crate::cli) fn socket(env: &Env) -> Result<PathBuf> {
    env(VARIABLE)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .ok_or_else(|| {
            Error::invalid(format!("no ssh-agent to forward: {VARIABLE} is not set"))
                .hint("start one: eval \"$(ssh-agent)\" && ssh-add")
                .into()
        })
}

impl Agent {
    /// Forwards the agent at `local` to a running VM.
    pub(in crate::cli) fn forward(
        client: &mut Client,
        vm: &str,
        local: &Path,
        cancel: &Cancel,
    ) -> Result<Self> {
        let config = client.call::<VmSshConfig>(&SshConfigRequest {
            vm: vm.to_owned(),
            user: Some("root".to_owned()),
        })?;
        let io = |e| Error::io("create a directory for ssh", e);
        let dir = tempfile::Builder::new()
            .prefix("fcctl-agent-")
            .tempdir()
            .map_err(io)?;
        let files = KeyFiles::in_dir(dir.path());
        files.write(&config)?;
        let mut text = block::render(&config, &files, Some("0"))?;
        text.push_str("  IdentityAgent none\n  ControlPath none\n  LogLevel ERROR\n");
        let file = dir.path().join("config");
        write_private(&file, &text)?;
        let ssh = |options: &[OsString], script: String| {
            Command::new("ssh")
                .args(["-T".into(), "-F".into(), file.clone().into_os_string()])
                .args(options)
                .args([config.name.to_string(), script])
        };
        let made = run_any_status(
            &ssh(&[], format!("{PATH}; mkdir -p {DIR} && chmod 711 {DIR}"))
                .deadline(READY_DEADLINE),
            cancel,
            &mut |_| {},
        )
        .map_err(explain)?;
        if made.status != 0 {
            return Err(refused(&made.stderr).into());
        }
        let socket = format!("{DIR}/{}", hex::encode(&random::bytes::<NAME_BYTES>()));
        let mut remote = OsString::from(format!("{socket}:"));
        remote.push(local);
        let options = [
            "-o".into(),
            "ExitOnForwardFailure=yes".into(),
            "-R".into(),
            remote,
        ];
        let command = ssh(&options, session(&socket)).deadline(SESSION_DEADLINE);
        let ended = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let (sender, lines) = bounded(1);
        let until = ended.clone();
        let relay = thread::spawn("ssh-agent", move || relay(&command, &until, &sender))?;
        let agent = Self {
            socket,
            ended,
            relay: Some(relay),
            _dir: dir,
        };
        await_ready(&lines, cancel)?;
        Ok(agent)
    }

    /// Returns the shell's command that lets programs in the guest find the agent.
    pub(super) fn setting(&self) -> String {
        format!("export {VARIABLE}={};", self.socket)
    }

    /// Returns the variable with which programs in the guest find the agent.
    pub(in crate::cli) fn variable(&self) -> (String, OsString) {
        (VARIABLE.to_owned(), OsString::from(&self.socket))
    }
}

/// Returns the script that lets every user connect to the socket, and removes the socket when the
/// connection is lost. sshd does not end the script in that case. The script therefore writes
/// regularly, and ends when a write fails.
fn session(socket: &str) -> String {
    format!(
        "{PATH}; chmod 666 {socket} && echo {READY} && (while sleep 5 && echo; do :; done); rm -f {socket}"
    )
}

/// Runs ssh until it ends. Sends the first line of its output or, if there is none, the reason why
/// it ended.
fn relay(command: &Command, until: &Cancel, first: &Sender<std::result::Result<String, Error>>) {
    let mut on_line = |line: &str| {
        // Only the first line is received.
        let _ = first.try_send(Ok(line.to_owned()));
    };
    let ended = run_any_status(command, until, &mut on_line);
    let _ = first.try_send(Err(ended.map_or_else(explain, |out| refused(&out.stderr))));
}

fn await_ready(
    lines: &Receiver<std::result::Result<String, Error>>,
    cancel: &Cancel,
) -> Result<()> {
    let deadline = Instant::now() + READY_DEADLINE;
    while !cancel.is_cancelled() {
        match lines.recv_timeout(READY_POLL) {
            Ok(Ok(line)) if line == READY => return Ok(()),
            Ok(Ok(line)) => return Err(refused(line.as_bytes()).into()),
            Ok(Err(e)) => return Err(e.into()),
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            Err(_) => return Err(refused(b"the guest does not answer").into()),
        }
    }
    Err(Failure::from(crate::host::wait::cancelled(
        "forward the ssh-agent",
        cancel,
    )))
}

fn explain(e: Error) -> Error {
    if e.kind() == Kind::CommandMissing {
        e.hint("apt install openssh-client")
    } else {
        e.context("forward the ssh-agent")
    }
}

fn refused(said: &[u8]) -> Error {
    let said = printable(String::from_utf8_lossy(said).trim());
    let text = format!("forward the ssh-agent: {said}");
    Error::new(Kind::GuestCommandFailed, text).hint("leave out --ssh-agent")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::{check, two_vms};
    use expect_test::expect;

    #[test]
    fn agent_needs_a_socket() {
        let of = |value: Option<&'static str>| {
            socket(&move |_: &str| value.map(str::to_owned)).map_err(|f| f.fault.message)
        };
        assert_eq!(of(Some("/a")).unwrap(), Path::new("/a"));
        for none in [None, Some("")] {
            let said = of(none).unwrap_err();
            assert_eq!(said, "no ssh-agent to forward: SSH_AUTH_SOCK is not set");
        }
    }

    #[test]
    fn agent_is_forwarded_only_if_there_is_one() {
        for args in [
            &["ssh", "--ssh-agent", "web"][..],
            &["ssh", "--ssh-agent", "web", "uptime"],
        ] {
            check(
                &two_vms(),
                args,
                expect![[r#"
                    ! fcctl: no ssh-agent to forward: SSH_AUTH_SOCK is not set
                    ! hint: start one: eval "$(ssh-agent)" && ssh-add
                    status 2
                "#]],
            );
        }
    }

    #[test]
    fn agent_is_ready_or_says_why_not() {
        let cancel = Cancel::try_new().unwrap();
        let said = |script: &str| {
            let (sender, lines) = bounded(1);
            let command = Command::new("sh").args(["-c", script]);
            relay(&command, &cancel, &sender);
            await_ready(&lines, &cancel).map_err(|f| f.fault.message)
        };
        assert_eq!(said("echo ready; echo more"), Ok(()));
        for script in ["echo no socket", "echo no socket >&2; exit 255"] {
            let why = "forward the ssh-agent: no socket".to_owned();
            assert_eq!(said(script), Err(why), "{script}");
        }
        cancel.cancel(CancelCause::Requested);
        let (_sender, lines) = bounded(1);
        assert!(await_ready(&lines, &cancel).is_err());
    }
}

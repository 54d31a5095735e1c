//! Exec: runs a command in the guest. The command occupies the thread of the caller's connection.
//! Its input and output go through FIFOs of the caller.

use super::access::Caller;
use super::command_defaults;
use super::core::Core;
use super::guest_scripts::Layout;
use super::guests::Guests;
use super::runtime::{Runtimes, Use, User};
use super::transitions::Verb;
use super::unreconciled::Unreconciled;
use super::views::Views;
use super::vmms::Vmms;
use crate::api::exec::{
    COMMAND_BYTES_MAX, COMMAND_STREAM_BYTES_MAX, CommandWords, ExecReply, ExecResizeRequest,
    ExecSignalRequest, ExecStartRequest, Exit, Stream,
};
use crate::api::vm::{SshConfigReply, SshConfigRequest, WorkspaceState};
use crate::error::{Error, Kind, Result};
use crate::guest::ControlSender;
use crate::guest::Transport;
use crate::guest::io::fifo::{self, Direction};
use crate::guest::io::{BytesSource, FdSink, FdSource, VecSink, read_to_end};
use crate::guest::{
    Control, ExecSpec, GuestUser, Sink, Source, Streams, Target, command_bytes, control_queue,
};
use crate::host::text::printable;
use crate::ids::SessionId;
use crate::image::USER_LOGIN_SINCE;
use crate::locks::Cancel;
use crate::locks::CancelCause;
use crate::sched::Instant;
use crate::session::Registry;
use crate::store::VmRow;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// The caller's descriptors for one exec, checked and reopened.
#[derive(Default)]
pub struct ExecIo {
    stdin: Option<FdSource>,
    stdout: Option<FdSink>,
    stderr: Option<FdSink>,
    command: Option<FdSource>,
}

/// How long a caller may take to send a command through a FIFO.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);
/// How much of the error output is kept when a command cannot be written into the guest.
const STDERR_BYTES_MAX: usize = 1024;

impl ExecIo {
    /// Takes one FIFO for each entry of `streams`, in the same order.
    pub fn accept(streams: &[Stream], fds: Vec<OwnedFd>) -> Result<Self> {
        if streams.len() != fds.len() {
            return Err(Error::invalid(format!(
                "got {} descriptors for {} streams",
                fds.len(),
                streams.len()
            ))
            .hint("pass one FIFO for each entry of streams"));
        }
        let mut io = Self::default();
        for (stream, fd) in streams.iter().zip(fds) {
            let taken = match stream {
                Stream::Stdin => io
                    .stdin
                    .replace(FdSource::new(fifo::accept(fd, Direction::Read)?))
                    .is_some(),
                Stream::Stdout => io
                    .stdout
                    .replace(FdSink::new(fifo::accept(fd, Direction::Write)?))
                    .is_some(),
                Stream::Command => io
                    .command
                    .replace(FdSource::new(fifo::accept(fd, Direction::Read)?))
                    .is_some(),
                Stream::Stderr => io
                    .stderr
                    .replace(FdSink::new(fifo::accept(fd, Direction::Write)?))
                    .is_some(),
            };
            if taken {
                return Err(
                    Error::invalid(format!("{stream:?} is named twice").to_lowercase())
                        .hint("name each stream at most once"),
                );
            }
        }
        Ok(io)
    }

    /// Returns the command, from the request or from its FIFO.
    fn command(
        &mut self,
        request: &ExecStartRequest,
        connection: BorrowedFd<'_>,
        cancel: &Cancel,
    ) -> Result<CommandWords> {
        let Some(mut from) = self.command.take() else {
            return Ok(CommandWords {
                argv: request
                    .argv
                    .iter()
                    .map(|word| word.clone().into())
                    .collect(),
                env: request
                    .env
                    .iter()
                    .map(|(name, value)| (name.clone(), value.clone().into()))
                    .collect(),
                workdir: request.workdir.clone().map(String::into_bytes),
            });
        };
        if !(request.argv.is_empty() && request.env.is_empty() && request.workdir.is_none()) {
            return Err(Error::invalid(
                "a command comes in the request or through a descriptor, not both",
            )
            .hint("leave out argv, env and workdir if streams contains command"));
        }
        let deadline = Instant::now() + COMMAND_DEADLINE;
        let bytes = read_to_end(
            &mut from,
            COMMAND_STREAM_BYTES_MAX,
            deadline,
            connection,
            cancel,
        )
        .map_err(|e| {
            let e = e.context("read the command");
            if e.kind() == Kind::InvalidArgument {
                e.hint("pass long input through stdin (-i) or a file")
            } else {
                e
            }
        })?;
        CommandWords::decode(&bytes).ok_or_else(|| {
            Error::invalid("the command in the descriptor is malformed")
                .hint("fcctl help protocol describes its format")
        })
    }
}

/// Runs commands in guests and serves their consoles, on the callers' threads.
#[derive(Clone)]
pub struct Sessions {
    pub(super) core: Core,
    pub(super) views: Views,
    pub(super) guests: Guests,
    pub(super) unreconciled: Arc<Unreconciled>,
    pub(super) runtimes: Runtimes,
    pub(super) registry: Arc<Registry<ControlSender>>,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) vmms: Vmms,
}

impl Sessions {
    /// Runs a command in the guest until it ends. The command is cancelled if the caller hangs up
    /// or the VM is stopped or deleted.
    pub fn exec(
        &self,
        caller: &Caller,
        request: &ExecStartRequest,
        mut io: ExecIo,
        connection: BorrowedFd<'_>,
        session_made: &mut dyn FnMut(&SessionId),
    ) -> Result<ExecReply> {
        let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let found = self.core.resolve(caller, &request.vm)?;
        let asked_user = request.user.as_deref().map(GuestUser::parse).transpose()?;
        let mut words = io
            .command(request, connection, &cancel)
            .map_err(|e| e.context(format!("exec in VM {}", found.name)))?;
        let _label = crate::locks::operation_scope(format!("exec {}", found.id));
        let (row, _user) = self.join_guest(&found, Use::Session, &cancel)?;
        let doing = |e: Error| {
            self.explain_pause(&row, e)
                .context(format!("exec in VM {}", row.name))
                .of_vm(&row.name)
        };
        let user = match (asked_user, &row.shape.commands.user) {
            (None, Some(user)) => Some(GuestUser::parse(user)?),
            (asked, _) => asked,
        };
        let mut env = command_defaults::passed(&self.core, &row).map_err(doing)?;
        // The last value of a variable wins.
        env.append(&mut words.env);
        let workdir = words
            .workdir
            .or_else(|| self.workdir(&row).map(String::into_bytes));
        // In a guest that boots with a guest runtime, the login shell changes the user.
        let (in_line, user_line) = match Layout::of(&row) {
            Layout::Own => (user.as_ref(), String::new()),
            Layout::Runtime => (None, user.as_ref().map(GuestUser::line).unwrap_or_default()),
        };
        let mut line = command_defaults::make_directory(&row, workdir.as_deref());
        line.extend(command_bytes(&words.argv, &env, workdir.as_deref(), in_line).map_err(doing)?);
        let target = self.guests.target(&row).map_err(doing)?;
        let command = match String::from_utf8(line) {
            Ok(line) if line.len() <= COMMAND_BYTES_MAX => user_line + &line,
            Ok(line) => self
                .upload_command(
                    (&target, &row),
                    &user_line,
                    line.into_bytes(),
                    (connection, &cancel),
                )
                .map_err(doing)?,
            Err(e) => self
                .upload_command(
                    (&target, &row),
                    &user_line,
                    e.into_bytes(),
                    (connection, &cancel),
                )
                .map_err(doing)?,
        };
        let (sender, mut controls) = control_queue()?;
        let session = self.registry.begin(caller.uid, sender);
        session_made(&session.id);
        let spec = ExecSpec {
            command,
            pty: request.pty.clone(),
            no_wait_children: request.no_wait_children,
            ..ExecSpec::default()
        };
        let streams = Streams {
            stdin: io.stdin.as_mut().map(|s| s as &mut dyn Source),
            stdout: io.stdout.as_mut().map(|s| s as &mut dyn Sink),
            stderr: io.stderr.as_mut().map(|s| s as &mut dyn Sink),
            controls: Some(&mut controls),
            hangup: Some(connection),
        };
        let exit = self
            .transport
            .exec(&target, &spec, streams, &cancel)
            .map_err(doing)?;
        Ok(ExecReply { exit })
    }

    /// Writes a command line that is too long for a packet, or not UTF-8, into a file in the guest,
    /// and returns the command line that runs it. The file is removed before the command begins.
    fn upload_command(
        &self,
        (target, row): (&Target, &VmRow),
        user_line: &str,
        line: Vec<u8>,
        (connection, cancel): (BorrowedFd<'_>, &Cancel),
    ) -> Result<String> {
        let dir = Layout::of(row).shared_dir();
        let file = format!("{dir}/.fcd-exec-{}", SessionId::random());
        let mut stdin =
            BytesSource::new([format!("rm -f {file}; ").as_bytes(), &line, b"\n"].concat());
        let mut stderr = VecSink::new(STDERR_BYTES_MAX);
        let spec = ExecSpec {
            // With `set -C`, the command fails if the file exists.
            command: format!("{user_line}umask 077; set -C; cat >{file}"),
            idle: Some(Duration::from_secs(self.core.limits.transfer_idle_s)),
            ..ExecSpec::default()
        };
        let streams = Streams {
            stdin: Some(&mut stdin),
            stderr: Some(&mut stderr),
            hangup: Some(connection),
            ..Streams::default()
        };
        match self.transport.exec(target, &spec, streams, cancel)? {
            Exit::Status(0) => Ok(format!("{user_line}. {file}")),
            _ => {
                let output = printable(String::from_utf8_lossy(&stderr.bytes).trim());
                let e = Error::new(
                    Kind::GuestCommandFailed,
                    format!(
                        "write a command of {} bytes to {file}: {output}",
                        line.len()
                    ),
                );
                Err(e.hint("see whether the guest's disk has room: fcctl exec VM -- df"))
            }
        }
    }

    /// Checks that the VM is running and adds the caller to the VM's cancel set, in one critical
    /// section. Afterwards, refuses a guest that is paused or unresponsive, or whose VMM has died.
    pub(super) fn join_guest(
        &self,
        found: &VmRow,
        kind: Use,
        cancel: &Cancel,
    ) -> Result<(VmRow, User)> {
        self.unreconciled
            .ensure_reconciled(found, Verb::Guest, &self.core.closing)?;
        let guard = self.core.locks.vm.lock(&found.id);
        let row = self.core.row(guard.key())?;
        self.core.allow_locked(&guard, &row, Verb::Guest)?;
        let user = self.runtimes.join(guard.key(), kind, cancel.clone());
        drop(guard);
        if let Some(identity) = row.identity.clone()
            && !self.vmms.vmm.processes().is_alive(&identity)
        {
            return Err(Error::new(
                Kind::GuestUnavailable,
                format!("VM {}: its VMM has died", row.name),
            )
            .hint(format!("fcctl vm show {}", row.name)));
        }
        if row.unresponsive {
            return Err(Error::new(
                Kind::GuestUnavailable,
                format!("VM {}: its VMM does not respond", row.name),
            )
            .hint(format!(
                "wait until it responds (fcctl events), or run fcctl stop --force {}",
                row.name
            )));
        }
        self.refuse_paused(&row)?;
        Ok((row, user))
    }

    fn refuse_paused(&self, row: &VmRow) -> Result<()> {
        if row.paused {
            return Err(
                Error::new(Kind::WrongState, format!("VM {} is paused", row.name))
                    .hint(format!("resume it: fcctl vm resume {}", row.name)),
            );
        }
        if self.runtimes.is_paused(&row.id) {
            let error = Error::new(
                Kind::DiskFull,
                format!("VM {} is paused: {}", row.name, CancelCause::HostDiskFull),
            );
            return Err(error.hint(self.disk_full_hint()));
        }
        Ok(())
    }

    /// Returns the error that explains why a guest could not be reached: its pause, if it has been
    /// paused since `row` was read, and `e` otherwise.
    pub(super) fn explain_pause(&self, row: &VmRow, e: Error) -> Error {
        if !matches!(e.kind(), Kind::Timeout | Kind::GuestUnavailable) {
            return e;
        }
        let paused = self
            .core
            .row(&row.id)
            .and_then(|row| self.refuse_paused(&row));
        match paused {
            Err(why) if matches!(why.kind(), Kind::WrongState | Kind::DiskFull) => why,
            _ => e,
        }
    }

    pub(super) fn disk_full_hint(&self) -> String {
        format!(
            "free some space (df -h {}); the guest then resumes automatically",
            self.core.state_dir.display()
        )
    }

    /// Returns the working directory of commands if the VM has one of its own or a complete
    /// workspace. Otherwise, commands run in the home directory.
    fn workdir(&self, row: &VmRow) -> Option<String> {
        let own = row.shape.commands.workdir.clone();
        own.or_else(|| self.workspace_dir(row))
    }

    fn workspace_dir(&self, row: &VmRow) -> Option<String> {
        self.core.store.read(|s| {
            s.workspace(&row.id)
                .filter(|w| w.info.state == WorkspaceState::Complete)
                .map(|w| w.info.workdir.clone())
        })
    }

    pub fn exec_resize(&self, caller: &Caller, request: &ExecResizeRequest) -> Result<()> {
        self.registry
            .find(&request.session, caller.uid)?
            .send(Control::Resize(request.size))
    }

    pub fn exec_signal(&self, caller: &Caller, request: &ExecSignalRequest) -> Result<()> {
        self.registry
            .find(&request.session, caller.uid)?
            .send(Control::Signal(request.signal.clone()))
    }

    pub fn ssh_config(
        &self,
        caller: &Caller,
        request: &SshConfigRequest,
    ) -> Result<SshConfigReply> {
        let row = self.core.resolve(caller, &request.vm)?;
        self.core.allow(&row, Verb::Guest)?;
        let user = match &request.user {
            Some(user) => {
                GuestUser::parse(user)?;
                Some(user.clone())
            }
            None => login_name(&row)?,
        };
        if let Some(user) = user.as_ref().filter(|user| *user != "root")
            && row.guest_version < USER_LOGIN_SINCE
        {
            let text = format!("VM {}: its image lets only root log in", row.name);
            return Err(Error::new(Kind::Unsupported, text).hint(format!(
                "run fcctl exec -it --user {user} {}, or create the VM from a new image",
                row.name
            )));
        }
        let target = self.guests.target(&row)?;
        let login_user = match Layout::of(&row) {
            Layout::Own => user,
            // The login shell changes to the user that fcctl passes in FCD_USER, or else to the one
            // in the seed.
            Layout::Runtime => None,
        };
        let workdir = self
            .core
            .store
            .read(|s| s.workspace(&row.id).map(|w| w.info.workdir.clone()));
        let workdir = row.shape.commands.workdir.clone().or(workdir);
        let env_file = command_defaults::profile_path(&row);
        let host_key = crate::disk::seed::public_line(&target.host_key)?;
        Ok(SshConfigReply {
            vm: row.id,
            name: row.name,
            addr: target.addr,
            user: login_user.unwrap_or(target.user),
            private_key: target.private_key,
            host_key,
            workdir,
            env_file,
        })
    }
}

/// Returns the user of a VM's commands as a login name for ssh, without the group.
fn login_name(row: &VmRow) -> Result<Option<String>> {
    let Some(user) = &row.shape.commands.user else {
        return Ok(None);
    };
    let name = user.split(':').next().unwrap_or_default();
    if Layout::of(row) == Layout::Own && name.bytes().all(|b| b.is_ascii_digit()) {
        let text = format!("VM {}: ssh needs the name of a user, not {name}", row.name);
        return Err(Error::new(Kind::Unsupported, text).hint(format!(
            "name one: fcctl ssh --user root {0}, or run fcctl exec -it {0}",
            row.name
        )));
    }
    Ok(Some(name.to_owned()))
}

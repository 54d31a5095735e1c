//! What every command needs: the socket, the streams, and the ways to print results and report
//! failures.

use super::output::{Out, harmless_line};
use super::progress::Progress;
use super::signals::SignalSource;
use crate::api::Call;
use crate::api::frame::Note;
use crate::client::{Client, Failure, Result};
use crate::error::Error;
use serde::Serialize;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// The caller's three streams, as duplicates that share their open file descriptions.
pub struct Stdio {
    pub stdin: File,
    pub stdout: File,
    pub stderr: File,
}

impl Stdio {
    /// Duplicates the streams of this process.
    pub fn of_process() -> std::io::Result<Self> {
        use std::os::fd::AsFd;
        Ok(Self {
            stdin: std::io::stdin().as_fd().try_clone_to_owned()?.into(),
            stdout: std::io::stdout().as_fd().try_clone_to_owned()?.into(),
            stderr: std::io::stderr().as_fd().try_clone_to_owned()?.into(),
        })
    }

    pub fn stdin_is_terminal(&self) -> bool {
        self.stdin.is_terminal()
    }

    pub fn stdout_is_terminal(&self) -> bool {
        self.stdout.is_terminal()
    }
}

pub type Env = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

pub struct Context {
    pub socket: PathBuf,
    /// Results as one JSON document on stdout, failures as JSON on stderr.
    pub json: bool,
    pub stdio: Stdio,
    out: Out,
    err: Out,
    pub signals: SignalSource,
    pub env: Env,
    /// Seconds since the epoch.
    pub now_s: u64,
    warned: bool,
}

impl Context {
    pub fn new(stdio: Stdio, signals: SignalSource, env: Env, now_s: u64) -> std::io::Result<Self> {
        let (out, err) = (
            Out::new(stdio.stdout.try_clone()?),
            Out::new(stdio.stderr.try_clone()?),
        );
        Ok(Self {
            socket: PathBuf::new(),
            json: false,
            stdio,
            out,
            err,
            signals,
            env,
            now_s,
            warned: false,
        })
    }

    /// Connects. A version difference between fcctl and fcd is reported only the first time.
    pub fn connect(&mut self) -> Result<Client> {
        let client = Client::connect(&self.socket)?;
        if let Some(warning) = client.warning()
            && !std::mem::replace(&mut self.warned, true)
        {
            self.note(&format!("warning: {warning}"));
        }
        Ok(client)
    }

    /// Runs an operation and shows its progress on stderr. `doing` is the prefix of each line, such
    /// as `start web`.
    pub fn operate<C: Call>(
        &mut self,
        client: &mut Client,
        doing: &str,
        request: &C::Request,
    ) -> Result<C::Reply> {
        let mut progress = self.progress(doing);
        client.call_more::<C>(request, &[], &mut |note| {
            if let Note::Progress(p) = note {
                progress.update(&p);
            }
            Ok(())
        })
    }

    pub fn progress(&self, doing: &str) -> Progress {
        if self.json {
            return Progress::silent();
        }
        Progress::new(doing, &self.stdio.stderr)
    }

    /// Prints one line to stdout.
    pub fn line(&mut self, text: &str) -> Result<()> {
        self.text(&format!("{text}\n"))
    }

    /// Prints `text` to stdout as it is.
    pub fn text(&mut self, text: &str) -> Result<()> {
        self.bytes(text.as_bytes())
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .bytes(bytes)
            .map_err(|e| Error::io("write to stdout", e).into())
    }

    /// Prints the single JSON document of a command.
    pub fn document(&mut self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| Error::internal("write JSON").with_source(e))?;
        self.line(&text)
    }

    /// True once the reader of stdout has exited.
    pub fn is_unread(&self) -> bool {
        self.out.is_broken()
    }

    /// Prints a remark on stderr, except with `--json`.
    pub fn note(&mut self, text: &str) {
        if !self.json {
            // If stderr cannot be written either, there is nowhere left to report it.
            let _ = self.err.line(&format!("fcctl: {}", harmless_line(text)));
        }
    }

    /// Reports a failure on stderr, with `--json` as a JSON object.
    pub fn fail(&mut self, failure: &Failure, status: u8) {
        let fault = &failure.fault;
        if self.json {
            let mut error = serde_json::to_value(fault).unwrap_or_default();
            error["exit_status"] = status.into();
            let _ = self
                .err
                .line(&serde_json::json!({ "error": error }).to_string());
            return;
        }
        let _ = self
            .err
            .line(&format!("fcctl: {}", harmless_line(&fault.message)));
        for line in fault.hint.iter().flat_map(|h| h.lines()) {
            let _ = self.err.line(&format!("hint: {}", harmless_line(line)));
        }
    }

    /// Prints clap's own message about a command line that it rejected.
    pub fn usage(&mut self, text: &str) {
        let _ = self
            .err
            .bytes(text.replacen("error: ", "fcctl: ", 1).as_bytes());
    }

    /// Runs `each` for every target, and continues after failures. The status is that of the first
    /// failure, or 0. With `--json` it prints the results of `each`: one object for one target, an
    /// array for several.
    pub fn for_each<T: Serialize>(
        &mut self,
        targets: &[String],
        mut each: impl FnMut(&mut Self, &mut Client, &str) -> Result<T>,
    ) -> Result<u8> {
        let mut client = self.connect()?;
        let (mut status, mut done) = (0, Vec::new());
        for target in targets {
            match each(self, &mut client, target) {
                Ok(value) => done.push(value),
                Err(failure) => {
                    let this = failure.exit_status();
                    self.fail(&failure, this);
                    status = if status == 0 { this } else { status };
                    if failure.unreachable {
                        // The daemon went away. It may be back for the next target.
                        client = match self.connect() {
                            Ok(client) => client,
                            Err(_) => break,
                        };
                    }
                }
            }
        }
        if self.json {
            match (targets.len(), done.first()) {
                (1, Some(one)) => self.document(one)?,
                (1, None) => {}
                _ => self.document(&done)?,
            }
        }
        Ok(status)
    }

    /// True if results may be coloured.
    pub fn may_colour(&self) -> bool {
        self.stdio.stdout_is_terminal()
            && (self.env)("NO_COLOR").is_none_or(|v| v.is_empty())
            && (self.env)("TERM").is_none_or(|t| t != "dumb")
    }
}

/// Picks the socket if none was named. Root uses the system's. A user's own daemon comes first;
/// without one, the user gets the system's socket if it is accessible.
pub fn default_socket(
    uid: u32,
    env: &dyn Fn(&str) -> Option<String>,
    usable: &dyn Fn(&Path) -> bool,
) -> PathBuf {
    let own = crate::config::Places::for_user(uid, env).socket;
    let system = crate::config::Places::for_user(0, env).socket;
    if uid != 0 && !usable(&own) && usable(&system) {
        system
    } else {
        own
    }
}

/// True if the socket exists and this user may connect to it, which takes write permission
/// (unix(7)).
pub fn is_usable(socket: &Path) -> bool {
    rustix::fs::access(socket, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_socket_without_own_daemon_is_the_systems() {
        let env = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| "/run/user/1000".to_owned());
        let pick = |uid, there: &[&str]| {
            let there: Vec<String> = there.iter().map(|s| (*s).to_owned()).collect();
            default_socket(uid, &env, &|p| there.iter().any(|t| Path::new(t) == p))
                .display()
                .to_string()
        };
        let (own, system) = ("/run/user/1000/fcd/fcd.sock", "/run/fcd/fcd.sock");
        assert_eq!(pick(0, &[own]), system);
        assert_eq!(pick(1000, &[own, system]), own);
        assert_eq!(pick(1000, &[system]), system);
        assert_eq!(pick(1000, &[]), own);
    }
}

//! The context that every command gets, and the choice of the daemon's socket.
//!
//! Only the entry point of a command takes a whole [`Context`]. It passes on the parts that each
//! function uses.

use super::connector::Connector;
use super::printer::Printer;
use super::signals::SignalSource;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// The caller's three streams, as duplicates that share their open file descriptions.
pub(super) struct Stdio {
    pub stdin: File,
    pub stdout: File,
    pub stderr: File,
}

impl Stdio {
    /// Duplicates the streams of this process.
    pub(super) fn of_process() -> std::io::Result<Self> {
        use std::os::fd::AsFd;
        Ok(Self {
            stdin: std::io::stdin().as_fd().try_clone_to_owned()?.into(),
            stdout: std::io::stdout().as_fd().try_clone_to_owned()?.into(),
            stderr: std::io::stderr().as_fd().try_clone_to_owned()?.into(),
        })
    }

    pub(super) fn stdin_is_terminal(&self) -> bool {
        self.stdin.is_terminal()
    }

    pub(super) fn stdout_is_terminal(&self) -> bool {
        self.stdout.is_terminal()
    }
}

/// Reads one variable of the environment.
pub(super) type Env = dyn Fn(&str) -> Option<String> + Send + Sync;

pub(super) struct Context {
    pub connector: Connector,
    pub printer: Printer,
    pub stdio: Stdio,
    pub signals: SignalSource,
    pub env: Box<Env>,
    /// Seconds since the epoch.
    pub now_s: u64,
}

impl Context {
    /// Starts without a socket and without `--json`, which are known only once the command line is
    /// parsed.
    pub(super) fn new(
        stdio: Stdio,
        signals: SignalSource,
        env: Box<Env>,
        now_s: u64,
    ) -> std::io::Result<Self> {
        let mut printer = Printer::new(stdio.stdout.try_clone()?, stdio.stderr.try_clone()?);
        printer.is_dumb = is_dumb(&*env);
        Ok(Self {
            connector: Connector::new(PathBuf::new()),
            printer,
            stdio,
            signals,
            env,
            now_s,
        })
    }
}

/// True if results may be coloured. `NO_COLOR` and `CLICOLOR_FORCE` have the meaning that
/// no-color.org and bixense.com/clicolors give them.
pub(super) fn may_colour(stdio: &Stdio, env: &Env) -> bool {
    let is_set = |name: &str| env(name).is_some_and(|value| !value.is_empty());
    let is_forced = env("CLICOLOR_FORCE").is_some_and(|value| !value.is_empty() && value != "0");
    let is_off = env("CLICOLOR").is_some_and(|value| value == "0");
    !is_set("NO_COLOR") && (is_forced || stdio.stdout_is_terminal() && !is_off && !is_dumb(env))
}

/// True for a terminal that shows text only, without moving its cursor.
fn is_dumb(env: &Env) -> bool {
    env("TERM").is_some_and(|term| term == "dumb")
}

/// Picks the socket if none was named. Root uses the system's socket. Other users use their own
/// daemon's socket, or the system's socket if they have no daemon and may use it.
pub(super) fn default_socket(
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
pub(super) fn is_usable(socket: &Path) -> bool {
    rustix::fs::access(socket, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_need_a_terminal_unless_they_are_forced() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let terminal = File::from(pty.slave);
        let stdio = |stdout: &File| Stdio {
            stdin: terminal.try_clone().unwrap(),
            stdout: stdout.try_clone().unwrap(),
            stderr: terminal.try_clone().unwrap(),
        };
        let file = tempfile::tempfile().unwrap();
        for (variables, on_terminal, in_file) in [
            (&[][..], true, false),
            (&[("NO_COLOR", "1")], false, false),
            (&[("NO_COLOR", "")], true, false),
            (&[("TERM", "dumb")], false, false),
            (&[("TERM", "xterm")], true, false),
            (&[("CLICOLOR", "0")], false, false),
            (&[("CLICOLOR_FORCE", "1")], true, true),
            (&[("CLICOLOR_FORCE", "0")], true, false),
            (&[("CLICOLOR_FORCE", "1"), ("TERM", "dumb")], true, true),
            (&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], false, false),
        ] {
            let env = move |name: &str| {
                let found = variables.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let colours = [&terminal, &file].map(|stdout| may_colour(&stdio(stdout), &env));
            assert_eq!(colours, [on_terminal, in_file], "{variables:?}");
        }
    }

    #[test]
    fn default_socket_without_user_daemon_is_system_socket() {
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
